"""Keep recurrent layers one op, for any number of time steps and for packed sequences.

A graph has `aten.lstm.input` as one op, but torch.export computes its output's shape by running
the steps, which fixes their number; of packed sequences, whose steps are data, it can run none.
During a capture, a recurrent op over a symbolic number of steps, or over packed sequences, is
therefore an opaque op, whose shape follows from its arguments. In the finished graph it is torch's
own op again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from .patches import patched

_FEW = 3  # steps: the first ones may compute in another dtype, under autocast
# Functions that take sizes as tensors, too: nn.LSTM gives the number of packed sequences so.
_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn)


def _of_steps(op: Callable[..., Any]) -> Callable[..., Any]:
    def fake(inputs: torch.Tensor, hx: Any, params: Any, *options: Any) -> Any:
        """Return the outputs for inputs (T, N, in), or (N, T, in), without running T steps."""
        batch_first: bool = options[-1]
        sizes, time = list(inputs.shape), 1 if batch_first else 0
        steps, sizes[time] = sizes[time], _FEW
        outputs, *states = op(inputs.new_empty(sizes), hx, params, *options)
        # In memory, the time steps come first (T, N, out) in both cases.
        full = outputs.new_empty([steps, outputs.shape[1 - time], outputs.shape[2]])
        return (full.transpose(0, 1) if batch_first else full), *states

    return fake


def _of_packed(op: Callable[..., Any]) -> Callable[..., Any]:
    def fake(data: torch.Tensor, batch_sizes: Any, hx: Any, params: Any, *options: Any) -> Any:
        """Return the outputs for packed inputs (all steps of all sequences, in)."""
        states = list(hx) if isinstance(hx, list | tuple) else [hx]
        n = states[0].shape[1]  # the number of sequences
        few = data.new_empty([_FEW, n, data.shape[1]])
        outputs, *states = op(few, hx, params, *options, False)
        return outputs.new_empty([data.shape[0], outputs.shape[2]]), *states

    return fake


_LIBRARY = torch.library.Library("fxlora", "FRAGMENT")
# The opaque ops, of steps and of packed sequences, for each of torch's functions and ops.
_OPAQUE: dict[Any, tuple[Any, Any]] = {}
_OPS: dict[Any, Any] = {}  # the opaque op: the op that a graph has


def _define(name: str, op: Any, fake: Callable[..., Any]) -> Any:
    """Define an opaque op with the arguments and outputs of one of torch's."""
    arguments = str(op._schema).partition("(")[2]
    _LIBRARY.define(f"{name}({arguments}")
    torch.library.register_fake(f"fxlora::{name}", fake, lib=_LIBRARY)
    opaque = getattr(torch.ops.fxlora, name).default
    _OPS[opaque] = op
    return opaque


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _op = getattr(torch.ops.aten, _name)
    _both = (
        _define(_name, _op.input, _of_steps(_op.input)),
        _define(f"{_name}_packed", _op.data, _of_packed(_op.input)),
    )
    _OPAQUE.update(dict.fromkeys((getattr(torch, _name), _op.input, _op.data), _both))


@contextmanager
def any_number_of_steps() -> Generator[None]:
    """Within the context, a recurrent op whose number of steps is unknown is opaque."""
    original = PackedSequence.__new__

    def new(kind: type[PackedSequence], data: Any, *others: Any, **named: Any) -> Any:
        """Return a packed sequence, or one of dynamic shapes, which torch.export makes of it."""
        if isinstance(data, torch.Tensor) or named:
            return original(kind, data, *others, **named)
        return tuple.__new__(kind, (data, *others))

    with ExitStack() as stack:
        stack.enter_context(patched(PackedSequence, __new__=new))
        for kind in (nn.RNNBase, nn.LSTM):
            check = _check_but_for_data(kind.check_forward_args)
            stack.enter_context(patched(kind, check_forward_args=check))
        stack.enter_context(_Opaque())
        yield


def _check_but_for_data(original: Callable[..., None]) -> Callable[..., None]:
    """Return a layer's check that does not ask how many packed sequences there are: it is data."""

    def check(layer: nn.RNNBase, inputs: torch.Tensor, hx: Any, batch_sizes: Any) -> None:
        if isinstance(batch_sizes, FakeTensor):
            layer.check_input(inputs, batch_sizes)
        else:
            original(layer, inputs, hx, batch_sizes)

    return check


class _Opaque(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPAQUE and not kwargs and len(args) == 9 and isinstance(args[0], FakeTensor):
            of_steps, of_packed = _OPAQUE[func]
            if isinstance(args[3], list | tuple):  # after the inputs, batch sizes and states
                return of_packed(*args)
            if isinstance(args[0].shape[1 if args[8] else 0], torch.SymInt):
                return of_steps(*args)
        if func in _FACTORIES:
            args = tuple(a.item() if _is_size(a) else a for a in args)
        return func(*args, **kwargs)


def _is_size(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.ndim == 0 and not value.dtype.is_floating_point


def restore_recurrent(module: fx.GraphModule) -> None:
    """Put torch's own ops in the place of the opaque ones, in a graph and its nested graphs."""
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            for node in inner.graph.nodes:
                node.target = _OPS.get(node.target, node.target)
            inner.recompile()
