"""Keep what a forward does with the state of tensors: their order in memory, their gradients.

A graph has what Python reads of it as constants, and lacks each `contiguous()` of a tensor that is
contiguous in the example. Here such a call becomes an op of the graph; and what the forward reads
is noted, so that the contract can ask for the state of the example.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .patches import patched

_TENSOR = torch.Tensor
_CONTIGUOUS = torch.ops.aten.contiguous.default
_AS_CONTIGUOUS = (_TENSOR.contiguous, torch.ops.aten.contiguous, _CONTIGUOUS)

# What a tensor is asked whose answer, though no tensor, does not depend on its state.
# Whatever is not among these is taken for a read of strides.
_METHODS = """
    size dim ndimension numel nelement element_size get_device type is_floating_point is_complex
    is_signed is_nonzero is_same_size item tolist equal allclose register_hook
    __len__ __iter__ __hash__ __repr__ __format__ __bool__ __int__ __float__ __index__ __contains__
"""
_FUNCTIONS = """
    numel is_floating_point is_complex is_nonzero is_tensor result_type equal allclose
"""
_ATTRIBUTES = """
    shape ndim dtype device layout itemsize nbytes names name is_cpu is_cuda is_hpu is_ipu is_maia
    is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla
    is_xpu
"""
_INDEPENDENT = {
    *(getattr(_TENSOR, name, None) for name in _METHODS.split()),
    *(getattr(torch, name, None) for name in _FUNCTIONS.split()),
    *(getattr(getattr(_TENSOR, name, None), "__get__", None) for name in _ATTRIBUTES.split()),
}


# What autograd knows of a tensor.
_GRADIENT = {
    *(getattr(_TENSOR, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn", "grad")),
    *(getattr(_TENSOR, name).__get__ for name in ("output_nr", "_version", "retains_grad")),
    *(_TENSOR.is_inference, torch.is_inference),
}


@dataclass
class StateReads:
    """What a forward reads of the state of tensors.

    Attributes:
        strides: how they lie in memory.
        offset: where they begin in their storage.
        gradient: whether they have a gradient.
        mode: whether gradients are enabled.
    """

    strides: bool = False
    offset: bool = False
    gradient: bool = False
    mode: bool = False


@contextmanager
def kept_state(model: nn.Module) -> Generator[StateReads]:
    """Within the context, export a model, and note what its forward reads of tensors' state."""
    noting = _Noting()
    handles = (
        model.register_forward_pre_hook(noting.begin, prepend=True),
        model.register_forward_hook(noting.end, always_call=True),
    )
    try:
        with noting, _noted_modes(model, noting.found):
            yield noting.found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _noted_modes(model: nn.Module, found: StateReads) -> Generator[None]:
    """Within the context, note whether code other than torch's asks for autograd's mode."""

    def noting(original: Callable[[], bool]) -> Callable[[], bool]:
        def ask() -> bool:
            asker = sys._getframe(2)  # 1 is the patch
            found.mode |= not _is_torchs(asker.f_globals.get("__name__", ""))
            return original()

        return ask

    with ExitStack() as stack:
        for original in (torch.is_grad_enabled, torch.is_inference_mode_enabled):
            stack.enter_context(replaced_function(model, original, noting(original)))
        yield


@contextmanager
def replaced_function(
    model: nn.Module, original: Callable[[], bool], new: Callable[[], bool]
) -> Generator[None]:
    """Within the context, replace one of torch's functions for this thread.

    It is replaced in torch, and where a module that defines a class of the model imported it.
    """
    kinds = {kind for part in model.modules() for kind in type(part).__mro__}
    names = sorted({kind.__module__ for kind in kinds if not _is_torchs(kind.__module__)})
    with ExitStack() as stack:
        for scope in (torch, *(sys.modules[name] for name in names if name in sys.modules)):
            for name in [n for n, value in vars(scope).items() if value is original]:
                stack.enter_context(patched(scope, **{name: new}))
        yield


def _asker(frame: types.FrameType | None) -> str:
    """Return the name of the module whose code called a function of a tensor."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # of another mode
        frame = frame.f_back
    if frame and frame.f_globals.get("__name__") == "torch.overrides":  # a method in Python
        frame = frame.f_back and frame.f_back.f_back
    return str(frame.f_globals.get("__name__", "")) if frame else ""


def _is_torchs(module: str) -> bool:
    return module.partition(".")[0] == "torch"


class _Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = StateReads()
        self._depth = 0

    def begin(self, *_: Any) -> None:
        self._depth += 1

    def end(self, *_: Any) -> None:
        self._depth -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._depth or (args and isinstance(args[0], nn.Parameter)):
            return func(*args, **kwargs)  # a parameter lies as it did
        if func in _AS_CONTIGUOUS:
            # Of a contiguous tensor, the op returns the same one, whose earlier node would be lost.
            alias = torch.ops.aten.alias.default(args[0])
            return _CONTIGUOUS(alias, *args[1:], **kwargs)
        result = func(*args, **kwargs)
        inlined = torch.compiler.is_dynamo_compiling()  # a branch of a cond: dynamo sees no frames
        if not inlined and _is_torchs(_asker(sys._getframe(1))):
            return result
        if func in _GRADIENT:
            self.found.gradient = True
        elif func not in _INDEPENDENT and _is_plain(result) and _has_tensor(args, kwargs):
            self.found.strides = True
            self.found.offset |= func not in (_TENSOR.stride, _TENSOR.is_contiguous)
        return result


def _is_plain(result: Any) -> bool:
    return any(not isinstance(leaf, _TENSOR | None) for leaf in pytree.tree_leaves(result))


def remove_aliases(module: fx.GraphModule) -> None:
    """Take the aliases that `contiguous` is recorded with out of a graph and its nested graphs."""
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            for node in inner.graph.find_nodes(op="call_function", target=_CONTIGUOUS):
                alias = node.args[0]
                if isinstance(alias, fx.Node) and alias.target is torch.ops.aten.alias.default:
                    node.replace_input_with(alias, alias.all_input_nodes[0])
                    if not alias.users:
                        inner.graph.erase_node(alias)
            inner.recompile()


def _has_tensor(*values: Any) -> bool:
    return any(isinstance(leaf, _TENSOR) for leaf in pytree.tree_leaves(values))
