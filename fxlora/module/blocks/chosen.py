"""Choose submodules by glob patterns for their paths, or by class."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from ...errors import NoMatchError, SubmoduleError
from ...tables import some

Modules = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def chosen_modules(model: nn.Module, modules: Modules) -> tuple[str, ...]:
    """Return the paths of the chosen submodules, in the model's order.

    Args:
        model: the model.
        modules: glob patterns for paths ("layers.*"), classes, or a list of both. A `*` does not
            match a dot.

    Raises:
        NoMatchError: a pattern or class matches no submodule.
        SubmoduleError: a chosen submodule has several names.
    """
    choices = [modules] if isinstance(modules, str | type) else list(modules)
    named = [(path, module) for path, module in model.named_modules() if path]
    for choice in choices:
        if not any(_matches(choice, *item) for item in named):
            raise NoMatchError(_no_match(choice, [path for path, _ in named]))
    chosen = [item for item in named if any(_matches(choice, *item) for choice in choices)]
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    for path, module in chosen:
        if len(names := names_of[id(module)]) > 1:
            raise SubmoduleError(
                f"'{path}' cannot be a module of its own: it has several names ({some(names)}). "
                "Outline the modules around it, or those inside."
            )
    return tuple(path for path, _ in chosen)


def _matches(choice: str | type[nn.Module], path: str, module: nn.Module) -> bool:
    if isinstance(choice, type):
        return isinstance(module, choice)
    same_depth = choice.count(".") == path.count(".")
    return same_depth and fnmatchcase(path, choice)


def _no_match(choice: str | type[nn.Module], paths: Sequence[str]) -> str:
    if isinstance(choice, type):
        return f"no submodule is a {choice.__name__}."
    near = get_close_matches(choice, paths)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(paths[:8])}, …"
    return f"no submodule's path matches '{choice}': {hint}"
