"""The command line: `fxlora plan|adapt|fold|verify|export|report`.

Results go to stdout, everything else to stderr. The exit status is 0 for success, 2 for a usage
error or any other FxLoraError, 1 for an unexpected error, and 130 for an interrupt. A status other
than 0 comes with one line on stderr; a traceback is printed only under `--debug`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TextIO

from ..errors import ExportError, FxLoraError, FxLoraWarning
from ..names import printable
from ..tables import one_line, said
from .options import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        _print(_run(words))
    except FxLoraError as error:
        return _failed(2, str(error), words)
    except KeyboardInterrupt:
        return _failed(130, "interrupted.", words)
    except Exception as error:  # noqa: BLE001 - a script gets one line and a status for any error
        return _failed(1, f"unexpected {said(error)} (--debug shows the traceback)", words)
    return 0


def _run(words: list[str]) -> str:
    """Run a command and return its text for stdout."""
    options = build_parser().parse_args(words)
    stderr = sys.stderr
    # Prints of the model must not mix with the result on stdout.
    with contextlib.redirect_stdout(stderr), warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, stderr)
        warnings.simplefilter("ignore", FutureWarning)  # meant for developers of torch.export
        return options.command(options)


def _print(result: str) -> None:
    try:
        print(printable(result, "\n\t").removesuffix("\n"), flush=True)
    except OSError as error:
        # Python flushes stdout again at exit, and would report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `fxlora plan … | head` may close it
            raise ExportError(f"cannot write to stdout: {error.strerror or error}.") from error


def _failed(status: int, message: str, words: list[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    print(f"fxlora: error: {one_line(message)}", file=sys.stderr)
    return status


def _show_warning(
    stderr: TextIO,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = printable(warnings.formatwarning(message, category, filename, lineno, line), "\n\t")
    if issubclass(category, FxLoraWarning):
        text = f"fxlora: warning: {one_line(str(message))}\n"
    stderr.write(text)
