"""Keep a forward's dependence on tensor state: memory layout (strides, offset) and requires_grad.

torch.export turns each read of this state into a constant, and drops a `contiguous()` of a tensor
that is contiguous in the example. Here such a call becomes an op of the graph, and every read is
recorded, so that the contract can check that a call's tensors are in the example's state.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..places import called_at
from .asked_modes import Ask, answered, is_torchs
from .patches import patched

_TENSOR = torch.Tensor
_CONTIGUOUS = torch.ops.aten.contiguous.default
_AS_CONTIGUOUS = (_TENSOR.contiguous, torch.ops.aten.contiguous, _CONTIGUOUS)

# Queries of a tensor whose answer, though not a tensor, does not depend on this state.
_METHODS = """
    size dim ndimension numel nelement element_size get_device type is_floating_point is_complex
    is_signed is_nonzero is_same_size is_distributed item tolist equal allclose register_hook
    __len__ __iter__ __hash__ __repr__ __format__ __bool__ __int__ __float__ __index__ __contains__
"""
_FUNCTIONS = """
    numel get_device is_floating_point is_complex is_signed is_nonzero is_same_size is_distributed
    is_tensor result_type equal allclose
"""
_OPS = "sym_size sym_numel"
_ATTRIBUTES = """
    shape ndim dtype device layout itemsize nbytes names name is_cpu is_cuda is_hpu is_ipu is_maia
    is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla
    is_xpu
"""
_TENSORS = "T mT H mH real imag data"  # attributes that are tensors, which ops make


def _functions(scope: Any, names: str) -> set[Any]:
    return {getattr(scope, name, None) for name in names.split()} - {None}


def _attributes(names: str) -> set[Any]:
    """Return the functions that a TorchFunctionMode gets when these attributes are read."""
    return {attribute.__get__ for attribute in _functions(_TENSOR, names)}


def _ops(names: str) -> set[Any]:
    """Return torch's ops of these names, each with its overloads."""
    packets = _functions(torch.ops.aten, names)
    return packets | {getattr(op, overload) for op in packets for overload in op.overloads()}


_INDEPENDENT = {
    *_functions(_TENSOR, _METHODS),
    *_functions(torch, _FUNCTIONS),
    *_attributes(f"{_ATTRIBUTES} {_TENSORS}"),
    *_ops(_OPS),
}
# Queries that the contract on memory layout answers, and those that its offset does.
_OFFSET = _functions(_TENSOR, "storage_offset") | _ops("sym_storage_offset")
_ORDER = {
    *_functions(_TENSOR, "stride is_contiguous is_conj is_neg dim_order"),
    *_functions(torch, "is_conj is_neg"),
    *_ops("sym_stride sym_is_contiguous"),
    *_OFFSET,
}
# Queries that the contract on gradients answers, with the proof in each mode of autograd.
_INFERENCE = {_TENSOR.is_inference, torch.is_inference}
_GRADIENT = _attributes("requires_grad is_leaf grad_fn") | _INFERENCE
# A query in none of these sets is not known to be answered. Of a parameter, only those that change
# from one call to another count: its memory layout stays.
_CHANGING = _attributes("grad _version")


@dataclass
class StateReads:
    """A forward's reads of tensor state.

    Attributes:
        strides: how they lie in memory.
        offset: where they begin in their storage.
        gradient: how often it reads whether they have a gradient.
        inference: whether it reads if one that it computes is of inference mode.
        mode: how often it reads whether gradients are enabled.
        unanswered: the first read that no contract asks of a call, with its place, or "".
        fast: whether a module of torch.nn has a fast path for calls without gradients.
    """

    strides: bool = False
    offset: bool = False
    gradient: int = 0
    inference: bool = False
    mode: int = 0
    unanswered: str = ""
    fast: bool = False


@contextmanager
def kept_state(model: nn.Module, reads: StateReads) -> Generator[None]:
    """Within the context, record the forward's reads of tensor state during an export."""
    noting = _Noting(reads)
    handles = (
        model.register_forward_pre_hook(noting.begin, prepend=True, with_kwargs=True),
        model.register_forward_hook(noting.end, always_call=True),
    )
    try:
        with noting, _noted_modes(reads), _noted_fast_paths(reads):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _noted_modes(found: StateReads) -> Generator[None]:
    """Within the context, note whether code other than torch's asks for autograd's mode."""

    def note(ask: Ask) -> bool:
        found.mode += 1
        return ask()

    with answered({"is_grad_enabled": note, "is_inference_mode_enabled": note}):
        yield


@contextmanager
def _noted_fast_paths(found: StateReads) -> Generator[None]:
    """Within the context, note whether a module of torch.nn asks if it may take its fast path."""
    gate = torch.backends.mha

    def asked() -> bool:
        found.fast = True
        return enabled()

    enabled = gate.get_fastpath_enabled
    with patched(gate, get_fastpath_enabled=asked):
        yield


# Where torch records and describes the graph of an export.
_RECORDING = ("torch.fx.", "torch._subclasses.", "torch._dynamo.")


def _askers(frame: types.FrameType | None) -> Iterator[str]:
    """Yield the modules whose code called a function of a tensor, from the innermost outwards."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # of another mode
        frame = frame.f_back
    if frame and frame.f_globals.get("__name__") == "torch.overrides":  # a method in Python
        frame = frame.f_back and frame.f_back.f_back
    while frame is not None:
        yield str(frame.f_globals.get("__name__", ""))
        frame = frame.f_back


def _is_torchs_own(func: Any, frame: types.FrameType | None) -> bool:
    """Whether a read is torch's own, so that the model's outputs do not depend on it.

    A function of torch may tell the model's code how a tensor lies, but torch's modules and ops ask
    for gradients only to choose among equal ways.
    """
    own = list(itertools.takewhile(is_torchs, _askers(frame)))
    return any(name.startswith(_RECORDING) for name in own) or bool(own and func in _GRADIENT)


class _Noting(TorchFunctionMode):
    def __init__(self, found: StateReads) -> None:
        super().__init__()
        self.found = found
        self._depth = 0
        self._given: list[Any] = []

    def begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._depth:
            self._given = pytree.tree_leaves((args, kwargs))
        self._depth += 1

    def end(self, *_: Any) -> None:
        self._depth -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        parameter = args and isinstance(args[0], nn.Parameter)
        if not self._depth or (parameter and func not in _CHANGING):
            return func(*args, **kwargs)
        if func in _AS_CONTIGUOUS:
            # Of a contiguous tensor, the op returns the same one, whose earlier node would be lost.
            alias = torch.ops.aten.alias.default(args[0])
            return _CONTIGUOUS(alias, *args[1:], **kwargs)
        result = func(*args, **kwargs)
        is_read = _is_attribute(func) or _is_plain(result)
        if is_read and func not in _INDEPENDENT and _has_tensor(args, kwargs):
            inlined = torch.compiler.is_dynamo_compiling()  # a branch of a cond: it sees no frames
            if inlined or not _is_torchs_own(func, sys._getframe(1)):
                self._note(func, args, inlined)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], inlined: bool) -> None:
        if func in _GRADIENT:
            self.found.gradient += 1
            given = not inlined and any(args[0] is leaf for leaf in self._given)
            self.found.inference |= func in _INFERENCE and not given
        elif func in _ORDER:
            self.found.strides = True
            self.found.offset |= func in _OFFSET
        else:
            self.found.unanswered = self.found.unanswered or _told(func, inlined)


def _told(func: Any, inlined: bool) -> str:
    """Describe a read of a tensor, with the line of the model that is running."""
    of = func.__self__ if _is_attribute(func) else func
    place = "" if inlined else called_at()
    return f"'{getattr(of, '__name__', of)}' of a tensor{place and f', at {place}'}"


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _is_plain(result: Any) -> bool:
    tensors = _TENSOR | types.NotImplementedType | None  # `x == None` is not implemented
    return any(not isinstance(leaf, tensors) for leaf in pytree.tree_leaves(result))


def remove_aliases(module: fx.GraphModule) -> None:
    """Take the aliases that `contiguous` is recorded with out of a graph and its nested graphs."""
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            found = inner.graph.find_nodes(op="call_function", target=_CONTIGUOUS)
            for node in found:
                alias = node.args[0]
                if isinstance(alias, fx.Node) and alias.target is torch.ops.aten.alias.default:
                    node.replace_input_with(alias, alias.all_input_nodes[0])
                    if not alias.users:
                        inner.graph.erase_node(alias)
            if found:
                inner.recompile()


def _has_tensor(*values: Any) -> bool:
    return any(isinstance(leaf, _TENSOR) for leaf in pytree.tree_leaves(values))
