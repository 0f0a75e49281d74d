"""verify notices damage: every kind in a few models, and in all of them in the slow run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .mutation import CASES, KINDS, judge_all, sound

QUICK = ("Mlp", "Mlp, bfloat16", "Tied, head alone", "packed QKV")
EXPECTED = 350  # mutants in the quick models that change something


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    """Not here: users run with the fused kernels."""


def caught(case: str, folder: Path) -> int:
    """How many mutants of a model are caught, where all of them are."""
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
