"""fxlora::linears, an op: linear layers on one input, with the low-rank branches of all of them.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T

The explicit nodes of k layers read x 2k times and write each output twice. The op has one product
with all A, concatenated, and adds each branch to its output in place. Its backward has one gradient
of x, to which the layers and the branches add in place:

    G_i = s_i g_i B_i,  G = [G_1 … G_k]            (tokens, r_1 + … + r_k)
    dx = sum_i g_i W_i + G A,  dA = G^T x,  dB_i = s_i g_i^T (x A_i^T)

It saves x and x A^T, as the explicit nodes do. If x is the result of a chain, it may save the
inputs of the chain instead (`LinearsOf`), and compute x again (`again.py`). Where tensors are not
plain ones, or somebody needs more than a first gradient (functorch, forward-mode, a gradient's
gradient), it runs the formula as it is written, with torch's own gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..errors import InputError
from .again import Again, Chain, gradients, may_repeat
from .plain import autocast_of, autocast_to, is_plain

_LIBRARY = torch.library.Library("fxlora", "FRAGMENT")
_LIBRARY.define(
    "linears(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] downs, Tensor[] ups, "
    "float[] scalings) -> Tensor[]"
)


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """Return the outputs of adapted linear layers on one input.

    Args:
        x: the input, (…, in).
        weights: W of each layer, (out, in).
        biases: b of each layer, (out,), or None.
        downs: A of each layer, (r, in).
        ups: B of each layer, (out, r).
        scalings: s of each layer.

    Returns:
        The output of each layer, (…, out).
    """
    x, weights, biases, downs, ups = _as_autocast(x, weights, biases, downs, ups)
    with autocast_to(x.device.type, None):
        tensors = [x, *weights, *(b for b in biases if b is not None), *downs, *ups]
        if not is_plain(tensors, traced=True):
            layers = zip(weights, biases, downs, ups, scalings, strict=True)
            return [_formula(x, *layer) for layer in layers]
        if not torch.is_grad_enabled():
            return _forward(x, weights, biases, downs, ups, scalings)[0]
        return _with_gradients(x, weights, biases, downs, ups, scalings)


def _with_gradients(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """Return the outputs of layers, with the backward of this op."""
    outputs = _Linears.apply(tuple(scalings), None, 1, x, *weights, *biases, *downs, *ups)
    return list(cast("tuple[Tensor, ...]", outputs))


def direct_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """Return what `linears` does, without torch's dispatcher where nobody else looks at the call.

    For one token, that takes longer than the products of A and B.
    """
    tensors = [x, *weights, *(b for b in biases if b is not None), *downs, *ups]
    if (
        torch.compiler.is_compiling()
        or not is_plain(tensors)
        or autocast_of(x.device.type) is not None
    ):
        return torch.ops.fxlora.linears(x, weights, biases, downs, ups, scalings)
    if not torch.is_grad_enabled():
        return _outputs(x, weights, biases, downs, ups, scalings)
    return _with_gradients(x, weights, biases, downs, ups, scalings)


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """Return the outputs, of which no gradient is wanted: no x A^T of all layers is kept."""
    outputs: list[Tensor] = []
    for weight, bias, down, up, scaling in zip(weights, biases, downs, ups, scalings, strict=True):
        output, low = F.linear(x, weight, bias).contiguous(), F.linear(x, down)
        rows = output if x.ndim == 2 else output.view(-1, output.shape[-1])
        low = low if x.ndim == 2 else low.reshape(-1, low.shape[-1])
        rows.addmm_(low, up.t(), alpha=scaling)
        outputs.append(output)
    return outputs


class LinearsOf:
    """The op on the result of a chain, which is computed again in the backward, and not saved."""

    def __init__(self, chain: Chain, repeats: bool) -> None:
        """Take a chain, and whether to compute it again if the backward of the op reads no x."""
        self.inner = chain.inner
        self.otherwise = chain if repeats else chain.inner
        self.__name__, self.__module__ = f"linears_of_{chain.__name__}", __name__  # for torch.fx

    def __call__(
        self,
        given: Sequence[Any],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
        scalings: Sequence[float],
    ) -> list[Tensor]:
        """Return the outputs of `linears`, with the chain's inputs (given) in the place of x."""
        tensors = [*weights, *(b for b in biases if b is not None), *downs, *ups]
        # only gradients of W and A read x: with frozen ones (LoRA-FA), it would not be saved
        is_read = any(tensor.requires_grad for tensor in (*weights, *downs))
        if not (is_read and may_repeat(given) and is_plain(tensors)):
            x = self.otherwise(*given)
            return direct_linears(x, weights, biases, downs, ups, scalings)
        weights, biases, downs, ups = _all_as_autocast(weights, biases, downs, ups)
        layers = *weights, *biases, *downs, *ups
        outputs = _Linears.apply(tuple(scalings), self.inner, len(given), *given, *layers)
        return list(cast("tuple[Tensor, ...]", outputs))


_LIBRARY.impl("linears", linears, "CompositeImplicitAutograd")
_LIBRARY.impl("linears", linears, "FuncTorchBatched")  # no composite kernel is tried there


def _formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> Tensor:
    # (…, in) @ (in, r) -> (…, r); (…, r) @ (r, out) -> (…, out)
    return F.linear(x, weight, bias) + F.linear(F.linear(x, down) * scaling, up)


def _as_autocast(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor], Sequence[Tensor]]:
    """Cast all tensors as the caller's autocast casts those of a linear layer."""
    return _cast(x), *_all_as_autocast(weights, biases, downs, ups)


def _all_as_autocast(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor], Sequence[Tensor]]:
    return (
        [_cast(weight) for weight in weights],
        [None if bias is None else _cast(bias) for bias in biases],
        [_cast(down) for down in downs],
        [_cast(up) for up in ups],
    )


def _cast(tensor: Tensor) -> Tensor:
    dtype = autocast_of(tensor.device.type)
    eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor if dtype is None or not eligible else tensor.to(dtype)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs, and x A^T of all layers: (tokens, R)."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    hidden = F.linear(rows, _joined(downs))  # (tokens, in) @ (in, R) -> (tokens, R)
    outputs: list[Tensor] = []
    for weight, bias, up, scaling, low in zip(
        weights, biases, ups, scalings, _split(hidden, ups), strict=True
    ):
        output = F.linear(rows, weight, bias)
        # (tokens, out) += s (tokens, r) @ (r, out)
        output.addmm_(low, up.t(), alpha=scaling)
        if x.ndim != 2:  # not a view, which autograd would not let the model write to
            output = torch.ops.aten._unsafe_view.default(output, [*x.shape[:-1], weight.shape[0]])
        outputs.append(output)
    return outputs, hidden


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scalings: tuple[float, ...],
        inner: fx.GraphModule | None,
        count: int,
        *given: Any,
    ) -> Any:
        """Compute the outputs; the first `count` inputs are x, or those of a chain (`inner`)."""
        first, (weights, biases, downs, ups) = given[:count], _in_fours(given[count:])
        x = first[0] if inner is None else _cast(inner(*first))
        with autocast_to(x.device.type, None):
            outputs, hidden = _forward(x, weights, biases, downs, ups, scalings)
        ctx.scalings, ctx.count = scalings, count
        ctx.has_bias = [bias is not None for bias in biases]
        ctx.set_materialize_grads(False)
        of_first, of_layers = _needed(ctx)
        of_x = weights if any(of_first) else ()  # only a gradient of x reads W
        of_weights, _, of_downs, _ = _in_fours(of_layers)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.again = None if inner is None else Again(inner, first)
        saved = [value for value in first if isinstance(value, Tensor)]
        # only gradients of W and A read x: with frozen ones (LoRA-FA), x A^T is enough
        if inner is None and not any((*of_weights, *of_downs)):
            saved = [None]
        ctx.number = len(saved)
        ctx.save_for_backward(*saved, hidden, *downs, *ups, *of_x)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = ctx.saved_tensors  # which checkpoints give once
        saved, (hidden, *held) = tensors[: ctx.number], tensors[ctx.number :]
        layers = len(ctx.scalings)
        downs, ups, weights = held[:layers], held[layers : 2 * layers], held[2 * layers :]
        of_first, of_layers = _needed(ctx)
        given, output = [], None
        (x, *_) = saved
        if ctx.again:
            given, output = ctx.again.computed(saved, of_first)
            x = output.to(ctx.dtype) if torch.is_grad_enabled() else output.detach().to(ctx.dtype)
        needs = any(of_first), *of_layers
        with autocast_to(hidden.device.type, None):
            # If the gradient itself is to be differentiated, or is a batch of gradients.
            twice = torch.is_grad_enabled()
            plain = not twice and is_plain([g for g in grads if g is not None], True)
            compute = _gradients if plain else _by_formula
            of_x, *others = compute(ctx, needs, x, hidden, weights, downs, ups, grads)
        firsts = [of_x]
        if output is not None:
            of_output = None if of_x is None else of_x.to(output.dtype)
            firsts = gradients(given, of_first, output, [of_output])
        return None, None, None, *firsts, *others


def _needed(ctx: Any) -> tuple[Sequence[bool], Sequence[bool]]:
    """Return whether gradients are needed of x, or a chain's inputs, and of the layers' tensors."""
    needs = ctx.needs_input_grad[3:]
    return needs[: ctx.count], needs[ctx.count :]


def _gradients(
    ctx: Any,
    needs: Sequence[bool],
    x: Tensor | None,
    hidden: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> Iterator[Tensor | None]:
    """Yield the gradients of x, W, b, A and B; x is None if those of W and A are not needed."""
    of_weights, of_biases, of_downs, of_ups = _in_fours(needs[1:])
    rows = hidden if x is None else x.reshape(-1, x.shape[-1])
    flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
    low = _low_gradients(flat, ups, ctx.scalings, hidden)
    yield _input_gradient(flat, weights, low, downs, ctx.shape) if needs[0] else None
    for grad, need in zip(flat, of_weights, strict=True):
        yield grad.t().mm(rows) if grad is not None and need else None
    for grad, need in zip(flat, of_biases, strict=True):
        yield grad.sum(0) if grad is not None and need else None
    reached = [grad is not None and need for grad, need in zip(flat, of_downs, strict=True)]
    yield from _down_gradients(low, rows, ups, reached)
    for grad, part, s, need in zip(flat, _split(hidden, ups), ctx.scalings, of_ups, strict=True):
        yield torch.mm(grad.t(), part).mul_(s) if grad is not None and need else None


def _low_gradients(
    grads: Sequence[Tensor | None],
    ups: Sequence[Tensor],
    scalings: Sequence[float],
    hidden: Tensor,
) -> Tensor:
    """Return G, the gradient of x A^T: (tokens, R)."""
    low = torch.empty_like(hidden)
    for part, grad, up, scaling in zip(_split(low, ups), grads, ups, scalings, strict=True):
        if grad is None:
            part.zero_()
        else:
            # (tokens, out) @ (out, r) -> (tokens, r)
            torch.addmm(part, grad, up, beta=0, alpha=scaling, out=part)
    return low


def _input_gradient(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    low: Tensor,
    downs: Sequence[Tensor],
    shape: torch.Size,
) -> Tensor:
    total: Tensor | None = None
    for grad, weight in zip(grads, weights, strict=True):
        if grad is not None:
            # (tokens, out) @ (out, in) -> (tokens, in)
            total = grad.mm(weight) if total is None else total.addmm_(grad, weight)
    if total is None:
        return low.new_zeros(shape)
    return total.addmm_(low, _joined(downs)).view(shape)


def _down_gradients(
    low: Tensor, rows: Tensor, ups: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    joined = low.t().mm(rows)  # (R, tokens) @ (tokens, in) -> (R, in)
    parts = joined.split([up.shape[1] for up in ups])
    # each in memory of its own, as other gradients are
    return [part.clone() if need else None for part, need in zip(parts, needed, strict=True)]


def _by_formula(
    ctx: Any,
    needs: Sequence[bool],
    x: Tensor | None,
    hidden: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> Iterator[Tensor | None]:
    """Yield the gradients in operations that have gradients themselves."""
    if x is None and torch.is_grad_enabled():
        raise InputError(
            "a gradient of gradients needs x, which an optimized module with a frozen A (LoRA-FA) "
            "does not keep: call the module that was given to fxlora.optimize instead."
        )
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
    pairs = list(zip(flat, downs, ups, ctx.scalings, strict=True))
    if needs[0]:
        of_x = [
            g @ w + (g @ up * s) @ down
            for (g, down, up, s), w in zip(pairs, weights, strict=True)
            if g is not None
        ]
        yield torch.stack(of_x).sum(0).view(ctx.shape) if of_x else None
    else:
        yield None
    yield from (None if g is None or rows is None else g.t() @ rows for g in flat)
    for g, has_bias in zip(flat, ctx.has_bias, strict=True):
        yield g.sum(0) if g is not None and has_bias else None
    yield from (
        None if g is None or rows is None else (g @ up * s).t() @ rows for g, _, up, s in pairs
    )
    for (g, down, _, s), low in zip(pairs, _split(hidden, ups), strict=True):
        yield None if g is None else g.t() @ ((low if rows is None else rows @ down.t()) * s)


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _split(low: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return views of (tokens, R), a part of r columns for each layer."""
    return [low] if len(ups) == 1 else low.split([up.shape[1] for up in ups], dim=1)


def _in_fours(given: Sequence[Any]) -> list[Sequence[Any]]:
    count = len(given) // 4
    return [given[n * count : (n + 1) * count] for n in range(4)]
