"""`optimize(chunked_loss=True)`: a head and its cross-entropy for some rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora import CapturedModule, LoraConfig
from fxlora.fast import chunks

from .laws import randomise

V, ROWS = 11, 3


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_LOGITS", ROWS * V)


class Model(nn.Module):
    """Embeds tokens, and returns a loss of the next ones."""

    def __init__(self, bias: bool = False, **how: Any) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(V, 6), nn.Linear(6, 8)
        self.head, self.how = nn.Linear(8, V, bias=bias), how

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.loss(self.head(self.up(self.embed(ids)).tanh()), labels)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        """Shift, as transformers' models did."""
        rows = logits[..., :-1, :].contiguous().view(-1, V)
        return F.cross_entropy(rows, labels[..., 1:].contiguous().view(-1), **self.how)


class Wide(Model):
    """Casts the logits, and pads the labels, as transformers' models do."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        targets = F.pad(labels, (0, 1), value=self.how.get("ignore_index", -100))[..., 1:].reshape(
            -1
        )
        return F.cross_entropy(logits.to(torch.float64).view(-1, V), targets, **self.how)


class Last(Model):
    """Of the last token of each text only, and a product with the head's own weight."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        h = self.up(self.embed(ids)).tanh()
        return F.cross_entropy((h @ self.head.weight.T)[:, -1], labels[:, 0], **self.how) * 2


class Likelihood(Model):
    """The cross-entropy as log_softmax and nll_loss."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        rows = F.log_softmax(logits.view(-1, V), dim=-1)
        return F.nll_loss(rows, labels.view(-1), **self.how)


class Preference(Model):
    """Log-probabilities of the next tokens, added up where a token counts."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        logits, tokens = logits[:, :-1], labels[:, 1:].clamp(0)
        found = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return (found * (labels[:, 1:] != -100)).sum(-1).sin().sum()


class OverRows(Model):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        return logits.log_softmax(1).gather(-1, labels.unsqueeze(-1)).sum()


class OtherRows(Model):
    """Tokens for the first rows only."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        return logits.log_softmax(-1).gather(-1, labels[:, :-1].unsqueeze(-1)).sum()


class NoLoss(Model):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (picked - logits.logsumexp(-1)).sum()


class Both(Model):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        return super().loss(logits, labels), logits


class OverTokens(Model):
    """Has the classes in the second dimension."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(logits.transpose(1, 2), labels)


class Soft(Model):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        rows = logits.tanh().view(-1, V)
        return F.cross_entropy(rows, labels.view(-1))


class Alike(Model):
    """Compares the rows with each other, with a bias of their own."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        rows = self.head(self.up(self.embed(ids)).tanh()).view(-1, V)
        bias = rows.sum(-1) if self.how else None
        return F.cross_entropy(F.linear(rows, rows, bias), labels.view(-1))


class Mixed(Model):
    """The same numbers in rows of other sizes: no row of logits is one of the head's outputs."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        rows = logits.transpose(1, 2).reshape(-1, V)
        return F.cross_entropy(rows, labels.view(-1))


class Between(Model):
    """Writes to the weight between the head and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        shift: Any = self.shift
        h = self.up(self.embed(ids)).tanh() + shift
        logits = self.head(h)
        h.mul_(2)
        return F.cross_entropy(logits.view(-1, V), labels.view(-1)) + h.sum()


IDS, LABELS = torch.randint(V, (5, 4)), torch.randint(V, (5, 4))
LABELS[0, 1:3] = -100


def adapted(
    model: nn.Module,
    targets: Any = ("up", "head"),
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> CapturedModule:
    torch.manual_seed(0)
    rules = LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **more)
    lora = fxlora.adapt(model.to(dtype), (IDS, LABELS), rules=rules)
    randomise(lora)
    return lora


def gradients(module: Any) -> list[torch.Tensor]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(module(IDS, LABELS), trained))


def assert_equal(chunked: Any, lora: CapturedModule) -> None:
    expected, base = lora(IDS, LABELS), fxlora.remove(lora)(IDS, LABELS)
    assert abs(float((expected - base).detach())) > 1e-6
    torch.testing.assert_close(chunked(IDS, LABELS), expected, rtol=1e-12, atol=1e-12)
    for found, gradient in zip(gradients(chunked), gradients(lora), strict=True):
        assert gradient.any()
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)


MODELS: dict[str, tuple[Model, Any]] = {
    "mean": (Model(), {}),
    "sum, bias, and a frozen head": (Model(bias=True, reduction="sum"), {"targets": ["up"]}),
    "smoothed": (Wide(label_smoothing=0.1), {}),
    "another ignored target": (Wide(ignore_index=2), {}),
    "last": (Last(), {}),
    "dora": (Model(bias=True), {"use_dora": True}),
    "log_softmax and nll_loss": (Likelihood(bias=True, ignore_index=2), {}),
    "the sum of these": (Likelihood(reduction="sum"), {}),
    "log_softmax and gather": (Preference(bias=True), {}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_explicit_loss(kind: str) -> None:
    model, how = MODELS[kind]
    LABELS[0, 1:3] = 2 if model.how.get("ignore_index") == 2 else -100
    LABELS[0, 0] = 1
    lora = adapted(model, **how)
    chunked = fxlora.optimize(lora, chunked_loss=True)
    assert chunked.schedule is not None
    ((loss, modes),) = chunked.schedule.losses
    assert (loss.head, loss.rows, loss.reason) == ("head.weight", ROWS, "")
    assert modes == ("train", "eval") and f"{ROWS} rows at a time" in str(chunked.schedule)
    for mode in (True, False):
        assert_equal(chunked.train(mode), lora.train(mode))
    widths: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        widths.add(tensor.numel() if tensor.shape[-1:] == (V,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunked(IDS, LABELS)
    assert max(widths) < IDS.numel() * V  # no logits of all tokens, as the explicit one saves
    if kind in ("mean", "log_softmax and gather"):
        compiled: Any = torch.compile(chunked, backend="aot_eager", fullgraph=True)
        assert_equal(compiled, lora)


@pytest.mark.autocast
def test_under_autocast() -> None:
    lora = adapted(Model(), dtype=torch.float32)
    chunked = fxlora.optimize(lora, chunked_loss=True)
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", half):
            found, expected = chunked(IDS, LABELS), lora(IDS, LABELS)
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_precision(half: torch.dtype) -> None:
    lora = adapted(Model(reduction="sum"), dtype=half)
    chunked = fxlora.optimize(lora, chunked_loss=True)
    found, expected = chunked(IDS, LABELS), lora(IDS, LABELS)
    assert found.dtype == expected.dtype == half
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "logits returned": (Both(), "also returned"),
    "classes second": (OverTokens(), "not of one row of logits for each target"),
    "another function": (Soft(), "not of the outputs of a linear layer, but of aten.tanh"),
    "softmax over rows": (OverRows(), "not over the last dimension"),
    "tokens of some rows": (OtherRows(), "rows at a time"),  # which no example shows to be few
    "logsumexp": (NoLoss(), "the graph has no cross-entropy"),
    "weighed": (Model(weight=torch.rand(V).double()), "weighs the classes"),
    "other rows": (Mixed(), "not of the outputs of a linear layer"),
    "rows with rows": (Alike(), "depends on its input"),
    "a bias of the rows": (Alike(ignore_index=-1), "depends on its input"),
    "a write between": (Between(), "may write to a tensor"),
    "dropout": (Model(), "dropout"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_stays_explicit_says_why(kind: str) -> None:
    model, why = REFUSED[kind]
    LABELS.clamp_(0)
    more: dict[str, Any] = {"lora_dropout": 0.5} if kind == "dropout" else {}
    lora = adapted(model, **more)
    chunked = fxlora.optimize(lora.eval(), chunked_loss=True)
    assert why in str(chunked.schedule)
    found, expected = chunked(IDS, LABELS), lora(IDS, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
