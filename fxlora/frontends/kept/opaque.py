"""One node for a call on tensor subclasses, which no registered op takes while it is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch._ops import _get_dispatch_mode_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_slot,
    has_proxy_slot,
    track_tensor_tree,
)
from torch.overrides import _pop_mode_temporarily


def opaque_node(
    op: Any,
    number: int,
    tensors: Sequence[torch.Tensor],
    others: Sequence[Any],
    name: str,
    run: Callable[[], Any],
) -> torch.Tensor | None:
    """Add a node (number, tensors, *others) to the graph that torch.export is making.

    Args:
        op: the op that marks the node; it never runs.
        number: which call it is.
        tensors, others: the arguments.
        name: a name for the node.
        run: returns the result of the call on fake tensors, or None if there is none.

    Returns:
        The result; None if nothing is traced, or if it is not one plain tensor.
    """
    mode: Any = _get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)
    if mode is None or not all(has_proxy_slot(tensor, mode.tracer) for tensor in tensors):
        return None
    with disable_proxy_modes_tracing(), ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):  # these watch the source's own calls
            stack.enter_context(_pop_mode_temporarily())
        result = run()
    if not isinstance(result, FakeTensor):
        return None
    proxies = [get_proxy_slot(tensor, mode.tracer).proxy for tensor in tensors]
    given = (number, proxies, *others)
    proxy = mode.tracer.create_proxy("call_function", op, given, {}, name=name)
    track_tensor_tree(result, proxy, constant=None, tracer=mode.tracer)
    return result
