"""The options of the command line, parsed with argparse."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__, tables
from ..delivery.formats import FORMATS as EXPORT_FORMATS
from ..errors import ConfigError
from ..matching.budget import limit_of
from .commands import (
    PLAN_WRITERS,
    run_adapt,
    run_export,
    run_fold,
    run_plan,
    run_report,
    run_verify,
)
from .inputs import parsed_input

REPORT_FORMATS = (*tables.FORMATS, "json", "csv")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises usage errors as ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def build_parser() -> _Parser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="fxlora",
        description="LoRA on any weight of any PyTorch model, as a rewrite of its torch.fx graph.",
        epilog="Exit status: 0 success, 2 a usage error or a refusal, 1 anything unexpected.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fxlora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[Namespace], str], help: str, *parents: _Parser) -> _Parser:
        name = run.__name__.removeprefix("run_")
        added = commands.add_parser(
            name, parents=parents, help=help, description=help, allow_abbrev=False
        )
        added.set_defaults(command=run)
        return added

    shaped, weighed, fed = _model_options(meta=True), _model_options(), _model_options(feed=True)

    plan = command(
        run_plan,
        "print the plan: the weights that would be adapted, and how",
        shaped,
        _rule_options(),
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument(
        "-o", "--out", type=_plan_file, metavar="FILE", help="write the plan as .toml or .json"
    )
    plan.add_argument(
        "--html", type=_file, metavar="FILE", help="write a page with the table and the graphs"
    )

    adapt = command(run_adapt, "save an untrained adapter", weighed, _rule_options())
    adapt.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="adapter folder"
    )
    adapt.add_argument("--force", action="store_true", help="overwrite an existing adapter")

    either = _model_options(files=True)
    folding = command(
        run_fold, "write a model's weights, or a checkpoint, with an adapter folded in", either
    )
    folding.add_argument(
        "-o", "--out", type=_file, required=True, metavar="OUT", help="the file or folder to write"
    )
    folding.add_argument(
        "--dry-run", action="store_true", help="only print what would change in a checkpoint"
    )
    folding.add_argument("--json", action="store_true", help="print the result as JSON")

    verifying = command(run_verify, "check the laws on an adapter and its fold", either)
    verifying.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="the checkpoint that fold wrote"
    )
    verifying.add_argument(
        "--folded",
        type=Path,
        metavar="FILE",
        help="weights that fxlora fold wrote for a model, to check instead of a fold made here",
    )
    detail = verifying.add_mutually_exclusive_group()
    detail.add_argument(
        "--reads", action="store_true", help="list every read of the adapted weights, with its line"
    )
    detail.add_argument("--json", action="store_true", help="print the full result as JSON")

    exporting = command(run_export, "write a file that a runtime without fxlora runs", fed)
    exporting.add_argument("--adapter", type=Path, metavar="DIR", help="adapter to fold in first")
    exporting.add_argument(
        "-o", "--out", type=_file, required=True, metavar="FILE", help="its suffix says the format"
    )
    exporting.add_argument("--format", choices=tuple(EXPORT_FORMATS))

    reporting = command(run_report, "count parameters", shaped, _rule_options(adapter=True))
    style = reporting.add_mutually_exclusive_group()
    style.add_argument("--format", choices=REPORT_FORMATS, default="table")
    style.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="format",
        help="the same as --format json",
    )
    return parser


def _model_options(*, meta: bool = False, feed: bool = False, files: bool = False) -> _Parser:
    """Return the options that every command has: the model, its weights and its inputs.

    Args:
        meta: whether the command needs only shapes, and so takes `--meta`.
        feed: whether the command requires inputs.
        files: whether it also takes a checkpoint and an adapter instead of a model.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    named = "module:callable, or torchvision:NAME (torchvision:resnet50)"
    if files:
        _add_files(parser, named)
    else:
        parser.add_argument("model", metavar="MODEL", help=named)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="NAME", help="torchvision's weights, e.g. DEFAULT")
    weights.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="state dict: .safetensors, or torch.save's"
    )
    parser.set_defaults(meta=False)
    if meta:
        weights.add_argument("--meta", action="store_true", help="shapes only, without memory")
    parser.add_argument(
        "--input",
        type=parsed_input,
        action="append",
        default=[],
        required=feed,
        metavar="[NAME=]SHAPE[:DTYPE[:HIGH]]",
        help="example input, e.g. 1x3x224x224 or ids=2x16:int64:1000; repeat it for several. "
        "Integers are random below HIGH, or 0. "
        "Without inputs, torch.fx traces the model, which shows less than torch.export",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    return parser


def _add_files(parser: _Parser, named: str) -> None:
    """Add the options of a command that takes a model or a checkpoint."""
    parser.add_argument(
        "model",
        metavar="MODEL|BASE",
        help=f"{named}; or a .safetensors file, or a folder with such files",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="ADAPTER", help="after BASE: fxlora's or PEFT's"
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="the adapter for MODEL: fxlora's or PEFT's"
    )
    parser.add_argument(
        "--model",
        dest="skeleton",
        metavar="MODEL",
        help="the model of BASE, where names, layouts or ties are ambiguous; it gets no memory",
    )
    parser.add_argument(
        "--key-mapping",
        type=_mapping,
        action="append",
        default=[],
        metavar="EXPRESSION=TEXT",
        help="how names of ADAPTER become those of BASE; repeat it: the first one found counts",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="take an adapter with NaN or infinities"
    )
    parser.add_argument(
        "--strict-base",
        action="store_true",
        help="fail unless the weights are known to be those that the adapter was trained over",
    )


def _rule_options(*, adapter: bool = False) -> _Parser:
    """Return the options for the weights to adapt, whose dests are LoraConfig's fields.

    Args:
        adapter: whether a saved adapter can be given instead of rules.
    """
    parser = _Parser(add_help=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--rules", type=Path, metavar="FILE", help="rules as .toml or .json")
    names: dict[str, Any] = {"type": _names, "action": "extend", "metavar": "NAME,…"}
    which.add_argument(
        "--target", dest="target_modules", help="modules to adapt, or all-linear", **names
    )
    if adapter:
        which.add_argument("--adapter", type=Path, metavar="DIR", help="a saved adapter")
    parser.add_argument("-r", "--rank", type=int, dest="r", metavar="N", help="rank (default 8)")
    parser.add_argument(
        "--alpha",
        type=_number,
        dest="lora_alpha",
        metavar="X",
        help="branches are scaled by X/rank (default 8)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        dest="lora_dropout",
        metavar="P",
        help="dropout probability on the branches' inputs",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="N|N%",
        help="choose ranks for N adapter parameters in all, or this share of the model's",
    )
    parser.add_argument("--exclude", dest="exclude_modules", help="modules not to adapt", **names)
    parser.add_argument("--modules-to-save", help="modules to train in full", **names)
    parser.add_argument(
        "--rslora", action="store_const", const=True, dest="use_rslora", help="scale by X/√rank"
    )
    return parser


def _names(text: str) -> list[str]:
    """Parse a list of names separated by commas."""
    return [name.strip() for name in text.split(",")]


def _mapping(text: str) -> tuple[str, str]:
    """Parse a regular expression and its replacement."""
    expression, equals, replacement = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not EXPRESSION=TEXT")
    return expression, replacement


def _number(text: str) -> float:
    """Parse a number, as an int if it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _budget(text: str) -> int | str:
    """Parse a number of parameters, or a share of the model's ("1%")."""
    budget = int(text) if text.isdecimal() else text
    limit_of(budget, 1)  # a mistake is an error before the model is built
    return budget


def _file(text: str) -> Path:
    """Parse the path of a file to write, and refuse it before the work if its folder is missing."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {path}: no folder {path.parent}")
    return path


def _plan_file(text: str) -> Path:
    """Parse the path of a plan to write, with a known suffix."""
    path = _file(text)
    if path.suffix not in PLAN_WRITERS:
        raise argparse.ArgumentTypeError(f"'{path}' must end in {' or '.join(PLAN_WRITERS)}")
    return path
