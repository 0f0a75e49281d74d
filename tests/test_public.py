"""The public API: its names, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest

import fxlora
from fxlora.lora.ops import OPS
from fxlora.lora.variants import VARIANTS

NAMES = """
AdaptedRead AdapterError CaptureError CapturedModule CheckpointReport ConfigError Entry ExportError
FoldedTensor FxLoraError FxLoraWarning Initialized InjectError InputError Layout LoraConfig
MisfitError NoMatchError NotCapturedError Op Plan QuantisedError Read Reader Rule ShardPlan
ShardedTensor Site SiteCheck SubmoduleError UnsupportedOpError Variant Verification
VerificationError activate adapt capture capture_more combine draw explicit export export_adapter
extract fold fold_checkpoint fold_into hosted initialize_from inject load_adapter load_rules
lora_parameters match merge_aware merged optimize recorded_calls register_op register_variant remove
report route save_adapter scale_adapter shard_plan simplify swap_adapter take_adapter unfold verify
verify_checkpoint
"""
FUNCTIONS = [name for name in fxlora.__all__ if inspect.isfunction(getattr(fxlora, name))]
WITH_EXAMPLES = [*FUNCTIONS, "LoraConfig", "Rule", "Plan"]


def test_the_public_names() -> None:
    assert sorted(fxlora.__all__) == NAMES.split()
    assert all(hasattr(fxlora, name) for name in fxlora.__all__)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name: str) -> None:
    tables: list[dict[Any, Any]] = [OPS, VARIANTS]
    before = [dict(table) for table in tables]
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(fxlora, name), name)
    assert test.examples, f"{name} has no example"
    try:
        assert doctest.DocTestRunner().run(test).failed == 0
    finally:  # an example may register an op or a variant
        for table, rows in zip(tables, before, strict=True):
            table.clear()
            table.update(rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_name_arguments_and_results(name: str) -> None:
    function = getattr(fxlora, name)
    text = inspect.getdoc(function) or ""
    summary, _, rest = text.partition("\n")
    assert summary.endswith("."), name
    assert not rest.partition("\n")[0].strip(), f"the summary of {name} is more than a line"
    signature = inspect.signature(function)
    for parameter in signature.parameters:
        assert f"{parameter}:" in text or f"{parameter}, " in text, f"{name}: {parameter}"
    if signature.return_annotation != "None":
        assert "Returns:" in text or "Yields:" in text, name
