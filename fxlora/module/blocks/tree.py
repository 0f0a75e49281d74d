"""Blocks in the module tree: they are put there, and found inside users' wrappers.

A wrapper around a block leaves it in use, and the modules keep the source's names. A module that
replaces a block runs, but has no graph that fxlora could adapt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ...errors import SubmoduleError
from ...tables import a
from ..program import ProgramModule
from .block import Block
from .calls import Calls

if TYPE_CHECKING:
    from ..captured import CapturedModule


def place(module: CapturedModule, calls: Mapping[str, Calls]) -> None:
    """Put the outlined submodules into the tree, over the containers of their tensors.

    Args:
        module: the captured module.
        calls: the calls of each submodule, by path.
    """
    with module.editing():
        for path in sorted(calls, key=lambda path: path.count(".")):
            if path in module.outlined_modules:  # with its hooks, perhaps in a wrapper
                module.outlined_modules[path].renew(calls[path])
                continue
            held = module.get_submodule(path)
            module.outlined_modules[path] = Block(held, path, calls[path])
            module.set_submodule(path, module.outlined_modules[path])


def module_at(module: CapturedModule, path: str) -> nn.Module | None:
    """Return the module that is at the path of a block: the block, unless somebody changed it.

    A block inside a wrapper's block is found through the wrapper.
    """
    owner, _, name = path.rpartition(".")
    around = module.outlined_modules.get(owner) or module.get_submodule(owner)
    return around._modules.get(name)


def check_not_replaced(module: CapturedModule, verb: str) -> None:
    """Raise SubmoduleError if a block was replaced, and not only wrapped."""
    for path, block in module.outlined_modules.items():
        found = module_at(module, path)
        if found is None or not any(part is block for part in found.modules()):
            raise SubmoduleError(
                f"{verb}: '{path}' was replaced by {a(type(found).__name__)}, which has no "
                "graph. Put the captured one back (a copy of this module still has none): "
                f"module.set_submodule({path!r}, module.outlined_modules[{path!r}])."
            )


def block_around(module: CapturedModule, path: str) -> ProgramModule:
    """Return the innermost called module around a submodule: a block, or the captured module."""
    around = [outer for outer in module.outlined_modules if path.startswith(f"{outer}.")]
    return module.outlined_modules[max(around, key=len)] if around else module


def wrapped(module: CapturedModule) -> dict[int, Block]:
    """Return the blocks by the id of the modules at their paths; empty if none is wrapped."""
    blocks = module.outlined_modules
    found = {id(module_at(module, path)): block for path, block in blocks.items()}
    return {} if all(id(block) in found for block in blocks.values()) else found


def named_modules(
    module: nn.Module,
    prefix: str,
    wrappers: Mapping[int, Block],
    seen: set[nn.Module],
    remove_duplicate: bool,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules as nn.Module does, but by the source's names: a wrapper has its block's name.

    Args:
        module: the module to start at.
        prefix: its path.
        wrappers: the blocks, by the id of the modules at their paths.
        seen: modules to leave out.
        remove_duplicate: whether each module is yielded once.
    """
    if module in seen:
        return
    if remove_duplicate:
        seen.add(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            path = f"{prefix}.{name}" if prefix else name
            inner = wrappers.get(id(child), child)
            yield from ((path, part) for part in _around(child, inner) if part not in seen)
            yield from named_modules(inner, path, wrappers, seen, remove_duplicate)


def _around(wrapper: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """Yield a wrapper, and all that is in it, without the module that it is around."""
    if wrapper is not inner:
        yield wrapper
        for child in wrapper.children():
            yield from _around(child, inner)
