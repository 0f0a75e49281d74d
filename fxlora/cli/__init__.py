"""The command line: `fxlora plan|adapt|fold|verify|export|report`.

Results go to stdout, everything else to stderr. The exit status is 0 for success, 2 for a usage
error or any other FxLoraError, 1 for what nobody expected, 130 for an interrupt; what is not 0
comes with one line on stderr, and with a traceback under `--debug` only.
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
    except Exception as error:  # noqa: BLE001 - a script gets one line and a status, whatever it is
        return _failed(1, f"unexpected {said(error)} (--debug shows the traceback)", words)
    return 0


def _run(words: list[str]) -> str:
    """What a command has to say on stdout."""
    options = build_parser().parse_args(words)
    stderr = sys.stderr
    # A model's own prints must not get between a script and the result.
    with contextlib.redirect_stdout(stderr), warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, stderr)
        warnings.simplefilter("ignore", FutureWarning)  # for those who write torch.export
        return options.command(options)


def _print(result: str) -> None:
    try:
        print(printable(result, "\n\t").removesuffix("\n"), flush=True)
    except OSError as error:
        # Python flushes stdout once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `fxlora plan … | head` has what it wanted
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
