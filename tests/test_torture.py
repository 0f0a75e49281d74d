"""Every pattern: fxlora is right in all five measurements, or raises the expected typed error."""

from __future__ import annotations

import pytest
import torch

import fxlora

from .patterns import PATTERNS
from .torture import judge_fxlora, judge_peft

MEASURED = [name for name, pattern in PATTERNS.items() if pattern.measured]


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    """Override the fixture of conftest.py: as for users, fused kernels are on, and bypass PEFT."""


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("name", PATTERNS)
def test_right_or_a_typed_error(name: str) -> None:
    pattern = PATTERNS[name]
    if torch.__version__ < pattern.since:
        pytest.skip("this torch cannot run it, or not save it")
    judgement = judge_fxlora(pattern)
    if pattern.expects:
        assert judgement.verdict == "refused", judgement
        assert isinstance(judgement.error, pattern.expects), judgement.note
        return
    wrong = {check: outcome for check, outcome in judgement.cells.items() if outcome.note}
    if not pattern.exportable:
        assert isinstance(wrong.pop("exports").error, fxlora.ExportError)
    assert not wrong


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_said_of_peft(name: str) -> None:
    """With target_modules. If a newer PEFT fixes a case, our claim about it is out of date."""
    pytest.importorskip("peft", reason="peft is optional")
    judgement = judge_peft(PATTERNS[name])[0]
    assert judgement.verdict == PATTERNS[name].measured, judgement.note
