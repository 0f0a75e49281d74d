"""Find the line of the model's own code that an error message should name."""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType

import sympy
import torch

from .. import errors

_TORCH = f"{inspect.getfile(torch).rpartition('/')[0]}/"
_FXLORA = f"{errors.__file__.rpartition('/')[0]}/"
_SYMPY = f"{inspect.getfile(sympy).rpartition('/')[0]}/"
_STDLIB = f"{sysconfig.get_path('stdlib')}/"
_HANDLERS = ("__torch_function__", "__torch_dispatch__")  # of modes: between a model and its ops
_PACKAGES = tuple(f"{sysconfig.get_path(kind)}/" for kind in ("purelib", "platlib"))


def raised_at(error: BaseException) -> str:
    """Return the `file:line` of the model's code where an error was raised, or ""."""
    return _innermost(_down(error.__traceback__))


def called_at() -> str:
    """Return the `file:line` of the model's code that is running now, or ""."""
    return _innermost(reversed(list(_up(inspect.currentframe()))))


def defined_at(function: Callable[..., object]) -> str:
    """Return the `file:line` of a function's definition, or its repr if it has no code object."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _down(trace: TracebackType | None) -> Iterable[tuple[str, int]]:
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def _up(frame: FrameType | None) -> Iterable[tuple[str, int]]:
    """Yield frames from here up to fxlora's call of torch.export or of the model.

    The frames above that call are fxlora's and its caller's, not the model's.
    """
    inside = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_FXLORA) and inside and frame.f_code.co_name not in _HANDLERS:
            return
        inside = inside or not name.startswith(_FXLORA)
        yield name, frame.f_lineno
        frame = frame.f_back


def _innermost(places: Iterable[tuple[str, int]]) -> str:
    """Return the last place in the model's code or, if there is none, in torch's own modules."""
    users = modules = ""
    for name, line in places:
        if name.startswith((f"{_TORCH}nn/modules/", f"{_TORCH}nn/utils/")):
            modules = f"{name}:{line}" if not name.endswith("/module.py") else modules
        elif not _is_machinery(name):
            users = f"{name}:{line}"
    return users or modules


def _is_machinery(name: str) -> bool:
    if name.startswith(("<", _TORCH, _FXLORA, _SYMPY)):
        return True
    return name.startswith(_STDLIB) and not name.startswith(_PACKAGES)
