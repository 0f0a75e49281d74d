"""Every pattern: fxlora is right in all five measurements, or raises the expected typed error."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch

import fxlora

from .patterns import PATTERNS
from .torture import CHECKS, judge_fxlora, judge_peft
from .typed import untyped

MEASURED = [name for name, pattern in PATTERNS.items() if pattern.measured]


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    """Override the fixture of conftest.py: as for users, fused kernels are on, and bypass PEFT."""


HEAVY = (  # seconds each; the quick run has smaller patterns of attention
    "F.multi_head_attention_forward",
    "MultiheadAttention with kdim and vdim",
    "Swin: functional attention",
    "TransformerDecoder: attention to memory",
    "ViT: out_proj of nn.MultiheadAttention",
)
ELSEWHERE = (  # the quick run has their laws in other files, or those of a pattern that is alike
    *("MultiheadAttention with bias_k, bias_v", "nn.Linear.forward(self.lin, x)"),
    *("weight_norm of a convolution", "orthogonal parametrization"),
    *("convolution, replicate padding", 'convolution, padding="same"', "deformable convolution"),
    *("transposed convolution 1d", "transposed convolution 3d"),
    *("one Parameter in two Linears, rule on both", "tied, read by functions: a rule on both"),
    *("Embedding, sparse gradient", "EmbeddingBag, sum", "F.embedding_bag, per_sample_weights"),
    *("x @ W", "x @ W.t()", "einsum, a matrix", "einsum ebi,eio->ebo (experts)", "Bilinear"),
    *("stacked experts, bmm", "stacked experts, baddbmm", "experts by torch._grouped_mm"),
    *("RNN", "GPT-2's Conv1D", "ParameterDict", "packed QKV: q and v", "torch.cond"),
    *("DoRA: convolution, reflect padding", "DoRA: grouped convolution", "DoRA: stacked experts"),
    *("PiSSA: embedding", "OLoRA: F.linear(x, self.lin.weight)"),
)
# The quick run has a third of the other patterns, all those that are refused, that have no whole
# graph, or on which a claim about PEFT rests; and it exports every twelfth.
QUICK = {
    name
    for number, (name, pattern) in enumerate(PATTERNS.items())
    if number % 3 == 0 or pattern.expects or pattern.measured or not pattern.exportable
} - {*HEAVY, *ELSEWHERE}
EXPORTED = {*[*PATTERNS][::12], *(p.name for p in PATTERNS.values() if not p.exportable)} & QUICK


def some(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("name", some(PATTERNS))
def test_right_or_a_typed_error(name: str) -> None:
    judge(name, CHECKS if name in EXPORTED else [check for check in CHECKS if check != "exports"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in EXPORTED])
def test_exports(name: str) -> None:
    judge(name, ["exports"])


def judge(name: str, checks: Collection[str]) -> None:
    pattern = PATTERNS[name]
    if torch.__version__ < untyped(pattern.since):
        pytest.skip("this torch cannot run it, or not save it")
    judgement = judge_fxlora(pattern, checks)
    if pattern.expects:
        assert judgement.verdict == "refused", judgement
        assert isinstance(judgement.error, pattern.expects), judgement.note
        return
    wrong = {check: outcome for check, outcome in judgement.cells.items() if outcome.note}
    if not pattern.exportable and "exports" in checks:
        assert isinstance(wrong.pop("exports").error, fxlora.ExportError)
    assert not wrong


@pytest.mark.parametrize("name", some(MEASURED))
def test_what_is_said_of_peft(name: str) -> None:
    """With target_modules. If a newer PEFT fixes a case, our claim about it is out of date."""
    pytest.importorskip("peft", reason="peft is optional")
    judgement = judge_peft(PATTERNS[name])[0]
    assert judgement.verdict == PATTERNS[name].measured, judgement.note
