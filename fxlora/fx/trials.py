"""The inputs that a call may return or write to, found by running it on stand-ins.

A schema that says a result may be a view can be trusted; one that says nothing cannot. An op that
torch composes of others (type_as, dropout, broadcast_tensors) may return its input, and a Python
function may write to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from .calls import example_value, frozen, named_argument


@dataclass(frozen=True)
class MemoryUse:
    """The use that a call makes of the memory of its input nodes.

    Attributes:
        returned: the inputs that its result may share memory with.
        written: the inputs that it may write to.
    """

    returned: tuple[fx.Node, ...]
    written: tuple[fx.Node, ...]


def memory_use(node: fx.Node, owner: nn.Module) -> MemoryUse:
    """Return the inputs whose memory a call may return, and those that it may write to.

    A call that does not run on any stand-ins may do both with all inputs.

    Args:
        node: a call of a function or of an op.
        owner: the module whose tensors the graph fetches.
    """
    inputs = node.all_input_nodes
    if not inputs:  # torch's modes (autocast, vmap's levels), which must not be entered here
        return MemoryUse((), ())
    if "_functorch" in str(getattr(node.target, "__module__", "")):  # views at vmap's levels
        return MemoryUse(tuple(inputs), ())
    found: tuple[tuple[int, ...], tuple[int, ...]] | None
    try:
        key = node.target, frozen(node, lambda given: (inputs.index(given), _kind(given, owner)))
        if key not in _KNOWN:
            _KNOWN[key] = _tried(node, owner)
        found = _KNOWN[key]
    except TypeError:  # an argument that cannot be hashed
        found = _tried(node, owner)
    if found is None:
        return MemoryUse(tuple(inputs), tuple(inputs))
    returned, written = (tuple(inputs[index] for index in indices) for indices in found)
    return MemoryUse(returned, written)


_KNOWN: dict[Hashable, tuple[tuple[int, ...], tuple[int, ...]] | None] = {}


def _kind(node: fx.Node, owner: nn.Module) -> Hashable:
    tensor = _known_tensor(node, owner)
    return (
        None
        if tensor is None
        else (concrete_sizes(tensor.shape), concrete_sizes(tensor.stride()), tensor.dtype)
    )


def _known_tensor(node: fx.Node, owner: nn.Module) -> Tensor | None:
    """Return a tensor like the node's value, if one is known."""
    if (value := example_value(node)) is not None:
        return value
    found: Any = owner
    for part in str(node.target).split(".") if node.op == "get_attr" else ():
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def _tried(node: fx.Node, owner: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the indices of the inputs that are returned and written, or None if nothing runs."""
    runs = (
        _run(node, dict(zip(node.all_input_nodes, tensors, strict=True)))
        for tensors in _stand_ins(node, owner)
    )
    results = list(itertools.islice((found for found in runs if found is not None), _ENOUGH))
    if not results:
        return None
    returned, written = (tuple(sorted({i for r in results for i in r[k]})) for k in (0, 1))
    return returned, written


def _stand_ins(node: fx.Node, owner: nn.Module) -> Iterator[list[Any]]:
    """Yield lists of stand-ins for the inputs: like the known ones, with guesses for the others."""
    inputs = node.all_input_nodes
    known = [_known_tensor(given, owner) for given in inputs]
    if any(given.meta.get("val") is not None for given in inputs):
        yield [
            _example(given.meta.get("val")) if tensor is None else _like(tensor, "meta")
            for given, tensor in zip(inputs, known, strict=True)
        ]
        return
    weights = [tensor for tensor in known if tensor is not None]
    small = all(tensor.numel() <= _SMALL for tensor in weights)
    devices = ("meta", "cpu") if small else ("meta",)
    dtypes = dict.fromkeys([*(w.dtype for w in weights), torch.get_default_dtype(), torch.int64])
    unknown = _combined(_guesses(node, weights), sum(t is None for t in known))
    for device, shapes, dtype in itertools.product(devices, unknown, dtypes):
        guessed = iter(shapes)
        yield [
            torch.ones(next(guessed), device=device, dtype=dtype)
            if tensor is None
            else _like(tensor, device)
            for tensor in known
        ]


_SMALL = 1 << 20  # entries of weights for which calls run on the CPU, too
_ENOUGH = 4  # runs
_MOST = 1000  # combinations of shapes


def _combined(shapes: Sequence[tuple[int, ...]], count: int) -> Iterator[tuple[Any, ...]]:
    """Yield shapes for several inputs: first the same shape for all."""
    yield from ((shape,) * count for shape in shapes)
    if count > 1:
        yield from itertools.islice(itertools.product(shapes, repeat=count), _MOST)


def _example(value: Any) -> Any:
    """Return the value of a node in the example: tensors without data, sizes as numbers."""
    value = pytree.tree_map_only(Tensor, lambda tensor: _like(tensor, "meta"), value)
    return pytree.tree_map_only(torch.SymInt, lambda size: concrete_sizes((size,))[0], value)


def _guesses(node: fx.Node, known: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return shapes to try for inputs of unknown shape: those that go with the weights' shapes."""
    shapes: dict[tuple[int, ...], None] = {(3, 4): None}
    groups = named_argument(node, "groups")
    for weight in known:
        size = tuple(weight.shape)
        shapes[size] = None
        for features in dict.fromkeys((size[-1:], size[:1])):
            shapes[(3, *features)] = shapes[(2, 3, *features)] = None
        if len(size) > 2:
            for channels in (size[0], size[1] * (groups if isinstance(groups, int) else 1)):
                shapes[(2, channels, *(s + 5 for s in size[2:]))] = None
    sizes = dict.fromkeys(itertools.chain(*(weight.shape for weight in known)))
    shapes |= dict.fromkeys(itertools.product(sizes, repeat=2))
    return list(shapes)


def _like(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor of the same shape, strides and dtype in memory of its own."""
    made = torch.empty_strided(
        concrete_sizes(tensor.shape),
        concrete_sizes(tensor.stride()),
        dtype=tensor.dtype,
        device=device,
    )
    real = tensor.is_floating_point() or tensor.is_complex()
    return made.fill_(0.5 if real else 0)


def concrete_sizes(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes as integers: for a dynamic one, its value in the example, or 2."""
    return tuple(int(s) if not isinstance(s, torch.SymInt) else _hint(s) for s in sizes)


def _hint(size: torch.SymInt) -> int:
    hint: Any = size.node.hint if size.node.has_hint() else 2
    return int(hint)


def _run(
    node: fx.Node, given: dict[fx.Node, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    tensors = list(given.values())
    versions = [t._version if isinstance(t, Tensor) else 0 for t in tensors]

    def value(leaf: Any) -> Any:
        return given[leaf] if isinstance(leaf, fx.Node) else leaf

    args: Any = map_aggregate(node.args, value)
    kwargs: Any = map_aggregate(dict(node.kwargs), value)
    function: Any = node.target
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            result = function(*args, **kwargs)
    except Exception:  # noqa: BLE001 - on stand-ins, a function may raise anything
        return None
    memory = {_memory(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
    held = [(i, t) for i, t in enumerate(tensors) if isinstance(t, Tensor)]
    returned = tuple(i for i, t in held if _memory(t) in memory)
    return returned, tuple(i for i, t in held if t._version != versions[i])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
