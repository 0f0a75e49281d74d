"""verify notices every kind of damage: in a few models, and in the slow run in all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .mutation import CASES, KINDS, judge_all, sound

QUICK = ("Mlp", "Mlp, bfloat16", "Tied, head alone", "packed QKV")
EXPECTED = 350  # mutants in the quick models that change something


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    """Override the fixture of conftest.py: as for users, fused kernels are on."""


def caught(case: str, folder: Path) -> int:
    """Assert that all mutants of a model are caught, and return how many there are."""
    found = judge_all(sound(case, folder), list(KINDS))
    wrong = {
        kind: [outcome for outcome in outcomes if outcome.verdict in ("missed", "crash")]
        for kind, outcomes in found.items()
    }
    assert not {kind: outcomes for kind, outcomes in wrong.items() if outcomes}
    return Counter(o.verdict for outcomes in found.values() for o in outcomes)["caught"]


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_every_mutant_is_caught(tmp_path: Path) -> None:
    counts = [caught(case, tmp_path / str(number)) for number, case in enumerate(QUICK)]
    assert sum(counts) > EXPECTED


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_every_mutant_of_the_other_models_is_caught(case: str, tmp_path: Path) -> None:
    assert caught(case, tmp_path) > 20
