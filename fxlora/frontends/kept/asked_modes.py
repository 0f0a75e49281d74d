"""Answer code other than torch's that asks for autograd's mode.

Modules bind torch's functions under names of their own (`from torch import is_grad_enabled`). So
each module that Python has loaded is searched for them; torch._C, too, holds them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

from .patches import patched

Ask = Callable[[], bool]

_FUNCTIONS: dict[str, Ask] = {
    "is_grad_enabled": torch.is_grad_enabled,
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
}
# During a capture, by the address of a module: how many names it has, and those of them that are
# functions of these. A search of the thousands of modules that a program loads takes longer than
# some of a capture's exports.
_SEARCHED: dict[int, tuple[int, tuple[str, ...]]] = {}


def forget_searches() -> None:
    """Search the modules anew, as before a capture: a name in them may be another function now."""
    _SEARCHED.clear()


@contextmanager
def answered(answers: Mapping[str, Callable[[Ask], bool]]) -> Generator[None]:
    """Within the context, answer the questions that code other than torch's asks in this thread.

    Args:
        answers: by name of torch's function, the answer, which gets the function.
    """
    _let_dynamo_look_first()
    before: list[tuple[ModuleType, str]] = []
    with ExitStack() as stack:
        for module, attribute, name in list(_places()):
            before.append((module, attribute))
            if name in answers:
                ask = _asking(vars(module)[attribute], answers[name])
                stack.enter_context(patched(module, **{attribute: ask}))
        try:
            yield
        finally:
            for module, attribute, name in list(_places()):
                if (module, attribute) not in before:  # imported in the context, from torch
                    setattr(module, attribute, _FUNCTIONS[name])


def _let_dynamo_look_first() -> None:
    """Have torch.compile note torch's functions, which it does once, before they are replaced."""
    look = getattr(TorchInGraphFunctionVariable, "_get_handlers", None)
    if look:
        look()


def _places() -> Iterator[tuple[ModuleType, str, str]]:
    """Yield each module that holds one of the functions, its name there, and torch's name of it."""
    held = [
        *_FUNCTIONS.values(),
        *(vars(m)[name] for m in (torch, torch._C) for name in _FUNCTIONS),
    ]
    wanted = set(map(id, held))
    for module in {id(m): m for m in list(sys.modules.values())}.values():  # some have two names
        if isinstance(module, ModuleType):
            for attribute in _found(module, wanted):
                function = inspect.unwrap(vars(module).get(attribute, _places))
                for name in (name for name, known in _FUNCTIONS.items() if known is function):
                    yield module, attribute, name


def _found(module: ModuleType, wanted: Collection[int]) -> tuple[str, ...]:
    """Return the names in a module of objects at these addresses, when it had as many names."""
    names: dict[str, Any] = vars(module)
    known = _SEARCHED.get(id(module))
    if known and known[0] == len(names):
        return known[1]
    found = tuple(name for name, value in list(names.items()) if id(value) in wanted)
    _SEARCHED[id(module)] = len(names), found
    return found


def _asking(before: Ask, answer: Callable[[Ask], bool]) -> Ask:
    def ask() -> bool:
        asker = sys._getframe(2)  # 1 is the patch
        return before() if is_torchs(asker.f_globals.get("__name__", "")) else answer(before)

    return ask


def is_torchs(module: str) -> bool:
    """Whether a module, given by name, is torch or in it."""
    return module.partition(".")[0] == "torch"
