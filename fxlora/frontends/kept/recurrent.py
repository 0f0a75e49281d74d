"""Keep recurrent layers one op, for any number of time steps and for packed sequences.

A graph has `aten.lstm.input` as one op, but torch.export computes its output's shape by running
the steps, which fixes their number; of packed sequences, whose steps are data, it can run none.
During a capture, a recurrent op over a symbolic number of steps, or over packed sequences, is
therefore an opaque op, whose shape follows from its arguments. In the finished graph it is torch's
own op again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from ...errors import CaptureError
from .patches import patched

_FEW = 3  # steps: the first ones may compute in another dtype, under autocast
# Functions that take sizes as tensors, too: nn.LSTM gives the number of packed sequences so.
_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn)


def _of_steps(inputs: torch.Tensor, hx: Any, params: Any, *options: Any) -> Any:
    """Return outputs and states for inputs (T, N, in), or (N, T, in), without running T steps."""
    batch_first, width, dtypes = options[-3:]
    time = 1 if batch_first else 0
    # In memory, the time steps come first (T, N, out) in both cases.
    sizes = [inputs.shape[time], inputs.shape[1 - time], width]
    outputs = inputs.new_empty(sizes, dtype=getattr(torch, dtypes[0]))
    return (outputs.transpose(0, 1) if batch_first else outputs), *_states(hx, dtypes)


def _of_packed(data: torch.Tensor, batch_sizes: Any, hx: Any, params: Any, *options: Any) -> Any:
    """Return outputs and states for packed inputs (all steps of all sequences, in)."""
    width, dtypes = options[-2:]
    outputs = data.new_empty([data.shape[0], width], dtype=getattr(torch, dtypes[0]))
    return outputs, *_states(hx, dtypes)


def _states(hx: Any, dtypes: Sequence[str]) -> Iterator[torch.Tensor]:
    for state, dtype in zip(_listed(hx), dtypes[1:], strict=True):
        yield state.new_empty(state.shape, dtype=getattr(torch, dtype))


def _listed(hx: Any) -> list[torch.Tensor]:
    return list(hx) if isinstance(hx, list | tuple) else [hx]


def _results_of_few_steps(op: Any, width: int, hx: Any, params: Any, options: Any) -> list[Any]:
    """Return the width of the outputs, and the dtypes of these and of the states.

    An opaque op is below the caller's autocast, which may change the dtypes; this call is not.

    Args:
        op: torch's op over steps.
        width: the number of input features.
        hx, params: the states and the weights of the call.
        options: its other arguments, without `batch_first`.
    """
    with (
        torch._C.DisableTorchFunction(),
        unset_fake_temporarily(),
        disable_proxy_modes_tracing(),
        torch.no_grad(),
        FakeTensorMode(),
    ):
        weights = [torch.empty(tuple(w.shape), dtype=w.dtype, device=w.device) for w in params]
        states = [
            torch.empty((state.shape[0], 2, state.shape[2]), dtype=state.dtype, device=state.device)
            for state in _listed(hx)
        ]
        inputs = torch.empty((_FEW, 2, width), dtype=states[0].dtype, device=states[0].device)
        given = states if isinstance(hx, list | tuple) else states[0]
        results = op(inputs, given, weights, *options, False)
        names = [str(result.dtype).removeprefix("torch.") for result in results]
        return [results[0].shape[2], names]


def _no_gradient(ctx: Any, *gradients: Any) -> Any:
    raise CaptureError(
        "the forward takes a gradient through a recurrent layer, whose number of steps is then "
        "fixed: give examples of one length."
    )


_LIBRARY = torch.library.Library("fxlora", "FRAGMENT")
# The opaque ops, of steps and of packed sequences, for each of torch's functions and ops.
_OPAQUE: dict[Any, tuple[Any, Any]] = {}
_OPS: dict[Any, Any] = {}  # the opaque op: the op that a graph has


def _define(name: str, op: Any, fake: Callable[..., Any]) -> Any:
    """Define an opaque op, with the arguments of torch's and the results of a few steps."""
    arguments, _, results = str(op._schema).partition("(")[2].rpartition(") -> ")
    _LIBRARY.define(f"{name}({arguments}, int width, str[] dtypes) -> {results}")
    torch.library.register_fake(f"fxlora::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fxlora::{name}", _no_gradient, lib=_LIBRARY)
    opaque = getattr(torch.ops.fxlora, name).default
    _OPS[opaque] = op
    return opaque


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _op = getattr(torch.ops.aten, _name)
    _both = (_define(_name, _op.input, _of_steps), _define(f"{_name}_packed", _op.data, _of_packed))
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
            width, torchs = args[0].shape[-1], _OPS[of_steps]
            if isinstance(args[3], list | tuple):  # after the inputs, batch sizes and states
                few = _results_of_few_steps(torchs, width, args[2], args[3], args[4:])
                return of_packed(*args, *few)
            if isinstance(args[0].shape[1 if args[8] else 0], torch.SymInt):
                few = _results_of_few_steps(torchs, width, args[1], args[2], args[3:8])
                return of_steps(*args, *few)
        if func in _FACTORIES:
            args = tuple(a.item() if _is_size(a) else a for a in args)
        return func(*args, **kwargs)


def _is_size(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.ndim == 0 and not value.dtype.is_floating_point


def restore_recurrent(module: fx.GraphModule) -> None:
    """Put torch's own ops in the place of the opaque ones, in a graph and its nested graphs."""
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            found = [node for node in inner.graph.nodes if node.target in _OPS]
            for node in found:
                node.target, node.args = _OPS[node.target], node.args[:-2]
            if found:
                inner.recompile()
