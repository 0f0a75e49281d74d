"""Keep what a forward does with the order of tensors in memory.

A graph has the strides that Python reads as constants, and lacks each `contiguous()` of a tensor
that is contiguous in the example. Here such a call becomes an op of the graph; and whether the
forward reads strides is noted, so that the contract can ask for those of the example.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_TENSOR = torch.Tensor

# What a tensor is asked whose answer, though no tensor, does not depend on its order in memory.
# Whatever is not among these is taken for a read of strides.
_METHODS = """
    size dim ndimension numel nelement element_size get_device type is_floating_point is_complex
    is_signed is_inference is_nonzero is_same_size item tolist equal allclose register_hook
    __len__ __iter__ __hash__ __repr__ __format__ __bool__ __int__ __float__ __index__ __contains__
"""
_FUNCTIONS = """
    numel is_floating_point is_complex is_nonzero is_tensor result_type equal allclose
"""
_ATTRIBUTES = """
    shape ndim dtype device layout itemsize nbytes names name grad grad_fn requires_grad output_nr
    is_leaf is_cpu is_cuda is_hpu is_ipu is_maia is_meta is_mkldnn is_mps is_mtia is_nested
    is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu _version
"""
_INDEPENDENT = {
    *(getattr(_TENSOR, name, None) for name in _METHODS.split()),
    *(getattr(torch, name, None) for name in _FUNCTIONS.split()),
    *(getattr(getattr(_TENSOR, name, None), "__get__", None) for name in _ATTRIBUTES.split()),
}


@dataclass
class Strides:
    """Whether a forward reads how its tensors lie in memory, and where in their storage."""

    read: bool = False
    offset_read: bool = False


@contextmanager
def kept_strides(model: nn.Module) -> Generator[Strides]:
    """Within the context, export a model, and note whether its forward reads strides."""
    noting = _Noting()
    handles = (
        model.register_forward_pre_hook(noting.begin),
        model.register_forward_hook(noting.end, always_call=True),
    )
    try:
        with noting:
            yield noting.found
    finally:
        for handle in handles:
            handle.remove()


class _Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Strides()
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
        if func is _TENSOR.contiguous:
            return torch.ops.aten.contiguous.default(*args, **kwargs)
        result = func(*args, **kwargs)
        plain = [
            leaf for leaf in pytree.tree_leaves(result) if not isinstance(leaf, _TENSOR | None)
        ]
        if plain and func not in _INDEPENDENT and _has_tensor(args, kwargs):
            self.found.read = True
            self.found.offset_read |= func not in (_TENSOR.stride, _TENSOR.is_contiguous)
        return result


def _has_tensor(*values: Any) -> bool:
    return any(isinstance(leaf, _TENSOR) for leaf in pytree.tree_leaves(values))
