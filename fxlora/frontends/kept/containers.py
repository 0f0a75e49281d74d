"""Containers: register them with pytree, find those that a forward changes, and put them back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.export.dynamic_shapes import _IntWrapper
from torch.utils import _pytree as pytree

from ...errors import CaptureError

_EXPORTER = "transformers.exporters.exporter_dynamo"

# ---- registration -------------------------------------------------------------------------------


def register_containers(model: nn.Module) -> None:
    """Have the packages that define a model's classes register their containers with pytree.

    torch.export accepts and returns only registered containers. Each package's own exporter does
    the registration, which holds for the whole process. No package is imported for a model that
    does not use it.
    """
    kinds = {type(module): module for module in model.modules()}
    for package, register in _REGISTRARS.items():
        if package in sys.modules:
            members = [m for kind, m in kinds.items() if _comes_from(kind, package)]
            for member in {type(m).__module__: m for m in members}.values():
                register(member)


def _comes_from(kind: type, package: str) -> bool:
    return any(base.__module__.partition(".")[0] == package for base in kind.__mro__)


def _register_caches(module: nn.Module) -> None:
    """Register transformers' caches: DynamicCache, EncoderDecoderCache and model-specific ones.

    Releases without this exporter register only DynamicCache, and lose the count of tokens that a
    sliding-window layer keeps. With these releases nothing is registered here, and torch.export
    reports the unregistered cache.
    """
    try:
        exporter: Any = importlib.import_module(_EXPORTER)
        register: Callable[[nn.Module], None] = exporter.register_cache_pytrees_for_model
    except (ImportError, AttributeError):
        return
    register(module)


def count_in_containers(calls: Sequence[Any]) -> None:
    """Make the integers of caches leaves, if they differ in calls that are alike but for them.

    The number of tokens that a sliding-window layer has seen is an integer. In the structure, it
    would be a constant of the graph. This holds for the process, as the registration does.
    """
    flatten = getattr(sys.modules.get(_EXPORTER), "_pytree_flatten", None)
    nodes = {k: n for k, n in pytree.SUPPORTED_NODES.items() if flatten and n.flatten_fn is flatten}
    counting = {kind: _with_integers(node) for kind, node in nodes.items()}
    seen: dict[str, list[int]] = {}
    for item in pytree.tree_leaves(list(calls), is_leaf=lambda value: type(value) in counting):
        if type(item) in counting:
            leaves, context = counting[type(item)].flatten_fn(item)
            counts = [leaf for leaf in leaves if type(leaf) is int]
            if seen.setdefault(f"{type(item)} {context}", counts) != counts:
                pytree.SUPPORTED_NODES.update(counting)
                _COUNTING.update(counting)
                return


def _with_integers(node: pytree.NodeDef) -> pytree.NodeDef:
    """Return how to flatten a cache, with its integers as leaves."""

    def flatten(cache: Any) -> tuple[list[Any], Any]:
        tensors, context = node.flatten_fn(cache)
        leaves: list[Any] = []
        return leaves, _with_number_leaves(context, cache, list(tensors), leaves)

    def flatten_with_keys(cache: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten(cache)
        return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context

    return node._replace(flatten_fn=flatten, flatten_with_keys_fn=flatten_with_keys)


def _with_number_leaves(context: Any, value: Any, known: Sequence[Any], leaves: list[Any]) -> Any:
    """Return transformers' context of a cache, with its integers as leaves.

    Args:
        context: the context, whose leaves are `known`.
        value: the described value.
        known: the leaves of the context.
        leaves: the leaves of the result, which are added to, in the order of the context.
    """

    def inner(context: Any, value: Any) -> Any:
        return _with_number_leaves(context, value, known, leaves)

    def of_each(items: Mapping[str, Any], values: Any) -> dict[str, Any]:
        return {key: inner(item, values[key]) for key, item in items.items()}

    match context:
        case {"_t": "tensor" | "sym" as kind, "i": index}:
            leaves.append(known[index])
            return {"_t": kind, "i": len(leaves) - 1}
        case int() if type(context) is int:
            leaves.append(context)
            return {"_t": "sym", "i": len(leaves) - 1}
        case {"_t": "obj"} if type(value) is _IntWrapper:  # torch.export wraps integers
            leaves.append(value)
            return {"_t": "sym", "i": len(leaves) - 1}
        case {"_t": "obj", "s": state}:
            return {**context, "s": of_each(state, vars(value))}
        case {"_t": "map", "v": items}:
            return {**context, "v": of_each(items, value)}
        case {"_t": "items", "v": pairs}:
            return {**context, "v": [[key, inner(item, value[key])] for key, item in pairs]}
        case {"_t": "seq", "v": items}:
            return {**context, "v": inner(items, list(value))}
        case list():
            return [inner(*pair) for pair in zip(context, value, strict=True)]
        case dict() if "_t" not in context:
            return of_each(context, value)
        case _:  # a constant
            return context


_COUNTING: set[type] = set()  # the kinds of containers whose integers are leaves


def counts(values: Any) -> bool:
    """Whether there is a container among values whose integers are leaves."""
    return any(integers_of_containers(values))


def integers_of_containers(values: Any) -> list[bool]:
    """Return, for each leaf, whether it is an integer of a container such as a cache."""
    found: list[bool] = []
    for item in pytree.tree_leaves(values, is_leaf=lambda value: type(value) in _COUNTING):
        counting = type(item) in _COUNTING
        found += [counting and type(leaf) is int for leaf in pytree.tree_leaves(item)]
    return found


_REGISTRARS: dict[str, Callable[[nn.Module], None]] = {"transformers": _register_caches}


@contextmanager
def recorded_outputs(model: nn.Module) -> Generator[list[Any]]:
    """Fill a list with a forward's outputs, for errors that name an output no graph can return."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


# ---- arguments that the forward changes ---------------------------------------------------------


@contextmanager
def watch_updates(model: nn.Module) -> Generator[dict[int | str, Any]]:
    """Find the container arguments that a forward changes in place.

    A graph takes the tensors out of a container and returns new ones: where the source updates a
    key-value cache, the graph would leave the caller's cache unchanged. If the source also returns
    the container, the caller's can be updated from the output; if not, the change would be lost.

    Yields:
        A dict that the forward fills: for each changed argument, by position or name, its path in
        the output.

    Raises:
        CaptureError: during the forward, if a changed container is not among its outputs.
    """
    before: list[Any] = []
    updates: dict[int | str, Any] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[:] = map(pytree.tree_flatten, [*args, *kwargs.values()])

    def compare(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        places = [*range(len(args)), *kwargs]
        for place, value, old in zip(places, [*args, *kwargs.values()], before, strict=True):
            if _changed(value, old):
                updates[place] = _path_to(value, output, place, model)

    handles = (
        model.register_forward_pre_hook(remember, with_kwargs=True),
        model.register_forward_hook(compare, with_kwargs=True),
    )
    try:
        yield updates
    finally:
        for handle in handles:
            handle.remove()


def _changed(value: Any, before: tuple[list[Any], Any]) -> bool:
    """Whether a container has another structure, or other objects as leaves, than before."""
    leaves, structure = pytree.tree_flatten(value)
    if structure.is_leaf():
        return False
    return structure != before[1] or any(
        new is not old for new, old in zip(leaves, before[0], strict=True)
    )


def _path_to(value: Any, output: Any, place: int | str, model: nn.Module) -> Any:
    """Return the path of a changed argument in the output, or raise if it is not returned."""
    found, _ = pytree.tree_flatten_with_path(output, is_leaf=lambda item: item is value)
    for path, item in found:
        if item is value:
            return path
    raise CaptureError(
        f"{type(model).__name__} changes its argument {place!r} ({type(value).__name__}) in place "
        "and does not return it; a graph would lose the change. Have the forward return it "
        "(transformers: use_cache=True), or do not pass this argument."
    )


# ---- containers that are put back ---------------------------------------------------------------


def put_back(container: Any, before: Any) -> None:
    """Restore the items of a list, dict or set in place from an earlier copy of it."""
    if unchanged(container, before):
        return
    container.clear()
    (container.extend if hasattr(container, "extend") else container.update)(before)


def unchanged(container: Any, before: Any) -> bool:
    """Whether a list, dict or set holds the same objects as an earlier copy of it."""
    if isinstance(container, set):  # a copy of a set may have another order
        return set(map(id, container)) == set(map(id, before))
    return len(container) == len(before) and all(
        a is b for a, b in zip(items(container), items(before), strict=True)
    )


def items(container: Any) -> list[Any]:
    """Return a container's items; of a dict, its keys and values."""
    if isinstance(container, dict):
        return [item for pair in container.items() for item in pair]
    return list(tuple.__iter__(container) if isinstance(container, tuple) else container)
