"""Measure what a joint op of adapted layers costs, beside their explicit nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..fx.calls import example_value
from ..fx.marks import INPUT
from ..fx.trials import concrete_sizes
from .linears import linears


@dataclass(frozen=True)
class Shapes:
    """The sizes of a joint op in the example.

    Attributes:
        rows: the rows of x.
        inputs: the features of x.
        layers: the output features, the rank, and whether there is a bias, of each layer.
        dtype, device: of x.
    """

    rows: int
    inputs: int
    layers: tuple[tuple[int, int, bool], ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, joint: fx.Node, sizes: Sequence[tuple[int, int]]) -> Shapes | None:
        """Return the sizes of a joint op, given each layer's outputs and rank; None if unknown."""
        x = joint.meta[INPUT] if INPUT in joint.meta else example_value(joint.args[0])
        if x is None:
            return None
        biases: Any = joint.args[2]
        layers = tuple((*size, b is not None) for size, b in zip(sizes, biases, strict=True))
        *rows, inputs = concrete_sizes(x.shape)
        return cls(math.prod(rows), inputs, layers, x.dtype, x.device)


def seconds(shapes: Shapes) -> tuple[float, float]:
    """Return the medians for a forward and backward: of the explicit nodes, and of the op."""
    how: dict[str, Any] = {"dtype": shapes.dtype, "device": shapes.device}
    x = torch.randn(shapes.rows, shapes.inputs, requires_grad=True, **how)
    weights = [torch.randn(out, shapes.inputs, **how) for out, _, _ in shapes.layers]
    biases = [torch.randn(out, **how) if bias else None for out, _, bias in shapes.layers]
    downs = [torch.randn(r, shapes.inputs, requires_grad=True, **how) for _, r, _ in shapes.layers]
    ups = [torch.randn(out, r, requires_grad=True, **how) for out, r, _ in shapes.layers]

    def explicit() -> list[Tensor]:
        return [
            F.linear(x, weight, bias) + F.linear(F.linear(x, down) * 0.5, up)
            for weight, bias, down, up in zip(weights, biases, downs, ups, strict=True)
        ]

    def joint() -> list[Tensor]:
        return linears(x, weights, biases, downs, ups, [0.5] * len(ups))

    grads = [torch.ones_like(output) for output in joint()]

    def step(forward: Callable[[], list[Tensor]]) -> None:
        torch.autograd.grad(forward(), [x, *downs, *ups], grads)

    return _median(lambda: step(explicit)), _median(lambda: step(joint))


def _median(run: Callable[[], None]) -> float:
    from torch.utils.benchmark import Timer  # looks for compilers, and says so

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.1).median)
