"""The exceptions and the warning. A message names the problem, its place and the next step."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from torch.utils import _contextlib

from .names import printable


class FxLoraError(Exception):
    """Base of every error that fxlora raises on purpose.

    Control characters in a message are escaped, because it may quote a file.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), "\n\t")


class ConfigError(FxLoraError, ValueError):
    """A rule, a configuration or a rules file is invalid."""


class CaptureError(FxLoraError):
    """The graph of a model could not be captured."""


class InputError(FxLoraError, ValueError):
    """A captured graph does not hold for the inputs of a call."""


class NoMatchError(FxLoraError, LookupError):
    """A rule, or a name in one, matches nothing."""


class UnsupportedOpError(FxLoraError):
    """A targeted weight is read in a way that no form can adapt."""


class InjectError(FxLoraError):
    """A plan does not fit the module, or the module is in the wrong state for a function."""


class NotCapturedError(FxLoraError, TypeError):
    """A function needs a captured module, and got something else."""


class SubmoduleError(FxLoraError):
    """A submodule of a captured module was used in a way that would have no effect."""


class QuantisedError(FxLoraError):
    """A quantised weight does not allow what was asked, or would lose it."""


class NoProductError(QuantisedError):
    """A quantised layer computes something else than the product with the values of its weight.

    Attributes:
        reason: which layer, and how that is known.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f'{reason} Fold with quantised="requantise" or quantised="keep", which leave the layer '
            "as it is."
        )
        self.reason = reason


class MisfitError(InjectError):
    """A plan was made for another module.

    Attributes:
        reason: where the two differ.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} Make the plan with match(module, …) on this module.")
        self.reason = reason


class AdapterError(FxLoraError):
    """An adapter folder is missing, damaged, of another kind, or does not fit the module."""


class VerificationError(FxLoraError):
    """A law of fxlora does not hold on the given inputs."""


class ExportError(FxLoraError):
    """A module could not be exported, or a file could not be written."""


class FxLoraWarning(UserWarning):
    """Something works, but probably not as intended."""


def warn(message: str) -> None:
    """Warn with the line of the user's code that called fxlora, however deep this is."""
    inside = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 2
    through = (inside, contextlib.__file__, _contextlib.__file__)  # a verb may have a decorator
    while frame.f_back and frame.f_code.co_filename.startswith(through):
        frame, level = frame.f_back, level + 1
    warnings.warn(printable(message, "\n\t"), FxLoraWarning, stacklevel=level)
