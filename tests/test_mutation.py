"""verify notices every kind of damage: once in the quick run, and in the slow run in all models."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest

from .mutation import CASES, KINDS, judge, judge_all, sound

# For each kind of damage, these models are tried in turn until one of them has a place for it.
FIRST = ("Mlp", "packed QKV", "Tied, head alone")
THEN = ("Mlp, bfloat16", "casts", "Mlp, DoRA", "nested graphs", "regions", "Readers", "Normed")


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    """Override the fixture of conftest.py: as for users, fused kernels are on."""


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_every_kind_of_mutant_is_caught(tmp_path: Path) -> None:
    built = functools.cache(lambda case: sound(case, tmp_path / str(CASES.index(case))))
    for number, kind in enumerate(KINDS):
        start = number % len(FIRST)
        for case in (*FIRST[start:], *FIRST[:start], *THEN):
            outcome = judge(built(case), kind, 0)
            if outcome and outcome.verdict != "equivalent":
                assert outcome.verdict == "caught", (kind, case, outcome)
                break
        else:
            pytest.fail(f"no model has a place for this damage: {kind}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("case", CASES)
def test_every_mutant_is_caught(case: str, tmp_path: Path) -> None:
    found = judge_all(sound(case, tmp_path), list(KINDS))
    wrong = {
        kind: [outcome for outcome in outcomes if outcome.verdict in ("missed", "crash")]
        for kind, outcomes in found.items()
    }
    assert not {kind: outcomes for kind, outcomes in wrong.items() if outcomes}
    assert Counter(o.verdict for outcomes in found.values() for o in outcomes)["caught"] > 20
