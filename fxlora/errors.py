"""What can go wrong, as types. Each message says what, where and what to do next."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from .names import printable


class FxLoraError(Exception):
    """Base of every error that fxlora raises on purpose.

    What a message quotes may come from a file: control characters in it are escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), "\n\t")


class ConfigError(FxLoraError, ValueError):
    """A rule, a configuration or a rules file that cannot be meant."""


class CaptureError(FxLoraError):
    """A model whose graph could not be captured."""


class InputError(FxLoraError, ValueError):
    """A call with inputs that the captured graph does not hold for."""


class NoMatchError(FxLoraError, LookupError):
    """A rule or a name that matches nothing."""


class UnsupportedOpError(FxLoraError):
    """A targeted weight that is read in a way no form can adapt."""


class InjectError(FxLoraError):
    """A plan that does not fit the module it is applied to."""


class NotCapturedError(FxLoraError, TypeError):
    """A verb was given something else than a captured module."""


class MisfitError(InjectError):
    """A plan that was made for another module.

    Attributes:
        reason: where the two differ.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} Make the plan with match(module, …) on this module.")
        self.reason = reason


class AdapterError(FxLoraError):
    """An adapter folder that is missing, damaged, foreign or does not fit."""


class VerificationError(FxLoraError):
    """A law of fxlora that does not hold on the given inputs."""


class ExportError(FxLoraError):
    """A module that could not be exported, or a target that could not be written."""


class FxLoraWarning(UserWarning):
    """Something that works and is probably not what was meant."""


def warn(message: str) -> None:
    """Warn where the user's code called fxlora, however deep in it this is."""
    inside = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 2  # pyright: ignore[reportPrivateUsage]
    while frame.f_back and frame.f_code.co_filename.startswith((inside, contextlib.__file__)):
        frame, level = frame.f_back, level + 1
    warnings.warn(printable(message, "\n\t"), FxLoraWarning, stacklevel=level)
