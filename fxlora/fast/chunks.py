"""Compute a linear head, and what only reads its logits row by row, for some rows at a time.

The logits of all tokens are the widest tensors of a language model, with their softmax and their
gradient. Where only the loss reads them, they need not all be there at once:

    loss = 1/n · sum over parts (sum over the rows of a part of -log softmax(x W^T)[target])

with n targets that count. Each part is a checkpoint: the backward computes its logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .plain import is_plain

_LOGITS = 2**24  # the most that are computed at a time: 64 MiB in float32
MEAN, SUM = 1, 2  # torch's reductions


@dataclass(frozen=True)
class ChunkedLoss:
    """A cross-entropy, and the form in which it runs.

    Attributes:
        head: the weight of the linear layer whose outputs are the logits, or "".
        vocabulary: the number of logits of a row.
        reason: why it is not computed for some rows at a time; "" if it is.
    """

    head: str = ""
    vocabulary: int = 0
    reason: str = ""

    @property
    def rows(self) -> int:
        """The rows at a time."""
        return max(1, _LOGITS // self.vocabulary) if self.vocabulary else 0


NO_LOSS = ChunkedLoss(
    reason="the graph has no cross-entropy, nll_loss or gather of a log_softmax of logits"
)


class Chunks:
    """The loss of all rows, from the logits of some rows at a time."""

    def __init__(
        self,
        module: fx.GraphModule,
        loss: ChunkedLoss,
        reduction: int,
        ignored: int,
        smoothing: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take the head's graph, and the arguments of the loss and of log_softmax."""
        self.module, self.loss, self.mean = module, loss, reduction == MEAN
        self.ignored, self.smoothing, self.dtype = ignored, smoothing, dtype
        self.__name__, self.__module__ = "chunked_loss", __name__  # which torch.fx asks for

    def __call__(self, rows: Tensor, targets: Tensor, *operands: Tensor) -> Tensor:
        # a sum over many rows may overflow in float16
        plain = is_plain([rows, *operands], traced=True) and rows.dtype is not torch.float16
        if not plain or rows.shape[0] <= self.loss.rows:
            return self._loss("mean" if self.mean else "sum", targets, rows, *operands)
        parts = zip(rows.split(self.loss.rows), targets.split(self.loss.rows), strict=True)
        losses = [again(self._loss, "sum", part, some, *operands) for some, part in parts]
        wide = torch.promote_types(losses[0].dtype, torch.float32)
        total = torch.stack(losses).sum(dtype=wide)
        total = total / (targets != self.ignored).sum() if self.mean else total
        return total.to(losses[0].dtype)

    def _loss(self, reduction: str, targets: Tensor, *given: Tensor) -> Tensor:
        logits = self.module(*given)
        logits = logits if self.dtype is None else logits.to(self.dtype)
        return F.cross_entropy(
            logits,
            targets,
            ignore_index=self.ignored,
            label_smoothing=self.smoothing,
            reduction=reduction,
        )


class LogProbabilities:
    """The log-probabilities of some tokens, from the logits of some rows at a time."""

    def __init__(
        self, module: fx.GraphModule, loss: ChunkedLoss, dtype: torch.dtype | None
    ) -> None:
        """Take the head's graph, and the dtype that log_softmax computes in."""
        self.module, self.loss, self.dtype = module, loss, dtype
        self.__name__, self.__module__ = "chunked_log_probabilities", __name__  # for torch.fx

    def __call__(self, x: Tensor, tokens: Tensor, *operands: Tensor) -> Tensor:
        own = x.shape[:-1] == tokens.shape[:-1]  # gather also takes tokens of the first rows only
        few = x.shape[:-1].numel() <= self.loss.rows
        if few or not own or not is_plain([x, *operands], traced=True):
            return self._part(tokens, x, *operands)
        rows, flat = x.reshape(-1, x.shape[-1]), tokens.reshape(-1, tokens.shape[-1])
        parts = zip(rows.split(self.loss.rows), flat.split(self.loss.rows), strict=True)
        found = [again(self._part, part, some, *operands) for some, part in parts]
        return torch.cat(found).view(tokens.shape)

    def _part(self, tokens: Tensor, *given: Tensor) -> Tensor:
        logits = self.module(*given)
        return F.log_softmax(logits, -1, dtype=self.dtype).gather(-1, tokens)


def again(function: Callable[..., Tensor], *given: Any) -> Tensor:
    """Return what a function of some rows does; the backward computes it again."""
    if not torch.is_grad_enabled():
        return function(*given)
    found: Any = checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)
    return found
