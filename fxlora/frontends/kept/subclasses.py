"""Keep each call of an op that takes a tensor subclass, as a quantised weight is, one call.

torch.export goes into the subclass and records the ops on its inner tensors: a layer that reads a
quantised weight is then no layer any more. During a capture such a call is an opaque op, and in the
finished graph it is the function of torch that the source called. An export of that graph goes into
the subclass again, and needs nothing of fxlora.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...fx.dispatched import Dispatched, Position
from ...fx.trials import concrete_sizes
from ...module.quantised import is_quantised
from .functions import own_forwards
from .opaque import opaque_node


class SubclassCalls(TorchFunctionMode):
    """The calls on tensor subclasses during one export; an opaque op refers to one by its index."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Dispatched, tuple[Any, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(map(is_quantised, leaves)) and (found := self._kept(func, args, kwargs, leaves)):
            return found[0]
        return func(*args, **kwargs)

    def _kept(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Sequence[Any]
    ) -> tuple[torch.Tensor] | None:
        """Record a call as one node, and return its result; None if it cannot be one."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len(set(map(id, tensors))) < len(tensors) or any(map(_is_symbol, leaves)):
            return None
        with own_forwards():
            plain = _call_on_plain(func, args, kwargs)
            if plain is None:
                return None
            self.calls.append(plain)
            number, name = len(self.calls) - 1, plain[0].__name__
            result = opaque_node(_OP, number, tensors, (), name, lambda: func(*args, **kwargs))
        return None if result is None else (result,)

    def restore(self, module: fx.GraphModule) -> None:
        """Replace the opaque ops in a graph and its nested graphs by the calls."""
        for inner in module.modules():
            if isinstance(inner, fx.GraphModule) and self.calls:
                for node in inner.graph.find_nodes(op="call_function", target=_OP):
                    number, tensors = cast("tuple[int, list[fx.Node]]", node.args)
                    node.target, args = self.calls[number]
                    node.args = tuple(
                        tensors[a.number] if isinstance(a, Position) else a for a in args
                    )
                inner.recompile()


def _is_symbol(leaf: object) -> bool:
    return isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool)


def _call_on_plain(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Dispatched, tuple[Any, ...]] | None:
    """Return the overload that a function calls on plain tensors, if it does nothing else.

    Returns:
        The target of the call, and the overload's arguments with a `Position` for each tensor: its
        number among the tensors of the function.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    # Below autograd, ops that are made of other ops are still whole.
    with ExitStack() as stack:
        for context in _PLAIN:
            stack.enter_context(context())
        tensors = {i: _like(v) for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)}
        order = {id(tensor): number for number, tensor in enumerate(tensors.values())}
        plain = [tensors.get(i, leaf) for i, leaf in enumerate(leaves)]
        plain_args, plain_kwargs = pytree.tree_unflatten(plain, structure)
        try:
            with _Recorder() as recorded:
                result = func(*plain_args, **plain_kwargs)
        except Exception:  # noqa: BLE001 - a plain tensor may not have the function at all
            return None
    if len(recorded.calls) != 1 or recorded.calls[0][2] is not result:
        return None
    overload, given, _ = recorded.calls[0]
    taken = [id(leaf) for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if sorted(taken) != sorted(order) or overload._schema.is_mutable:
        return None
    places = {id(t): Position(n) for n, t in enumerate(given) if isinstance(t, torch.Tensor)}
    if len(places) < len(order):  # in a list, as an einsum's operands
        return None
    named = [places.get(id(leaf), leaf) for leaf in plain]
    target = Dispatched(overload, func, *pytree.tree_unflatten(named, structure))
    numbered = [Position(order[id(a)]) if isinstance(a, torch.Tensor) else a for a in given]
    return target, tuple(numbered)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(concrete_sizes(tensor.shape), dtype=tensor.dtype, device="meta")


_PLAIN = (
    unset_fake_temporarily,
    disable_proxy_modes_tracing,
    no_python_dispatcher,
    torch._C._AutoDispatchBelowAutograd,
)


class _Recorder(TorchDispatchMode):
    """Records the overloads that run, with positional arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        rest = func._schema.arguments[len(args) :]
        named = [(kwargs or {}).get(argument.name, argument.default_value) for argument in rest]
        self.calls.append((func, (*args, *named), result))
        return result


@contextmanager
def kept_subclass_calls(model: nn.Module) -> Generator[SubclassCalls]:
    """Within the context, a call on a tensor subclass that a model holds is one opaque op."""
    held = (tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    if not any(map(is_quantised, held)):
        yield SubclassCalls()
        return
    with SubclassCalls() as calls:
        yield calls


_LIBRARY = torch.library.Library("fxlora", "FRAGMENT")
_LIBRARY.define("of_subclass(int number, Tensor[] tensors) -> Tensor")
_OP = torch.ops.fxlora.of_subclass.default
