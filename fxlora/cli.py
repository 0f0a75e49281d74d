"""The command line: `fxlora plan|adapt|fold|export|report`.

Results go to stdout, everything else to stderr. The exit status is 0 for success, 2 for a usage
error or any other FxLoraError, 1 for what nobody expected, 130 for an interrupt; what is not 0
comes with one line on stderr, and with a traceback under `--debug` only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import __version__, tables
from .adapters import load_adapter, save_adapter
from .capture import capture
from .config import LoraConfig, Rules, load_rules
from .errors import ConfigError, ExportError, FxLoraError, FxLoraWarning
from .export import FORMATS as EXPORT_FORMATS
from .export import export
from .files import whole_file
from .module import CapturedModule
from .plan import Plan
from .report import report
from .rules import match, nearest
from .verbs import fold, inject

REPORT_FORMATS = (*tables.FORMATS, "json", "csv")
PLAN_WRITERS: dict[str, Callable[[Plan], str]] = {".toml": Plan.to_toml, ".json": Plan.to_json}
INPUT_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "bool"),
)

Options = argparse.Namespace


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
        return _failed(1, f"unexpected {_said(error)} (--debug shows the traceback)", words)
    return 0


def _run(words: list[str]) -> str:
    """What a command has to say on stdout."""
    options = _parser().parse_args(words)
    # A model's own prints must not get between a script and the result.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return options.command(options)


def _print(result: str) -> None:
    try:
        print(result.removesuffix("\n"), flush=True)
    except OSError as error:
        # Python flushes stdout once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `fxlora plan … | head` has what it wanted
            raise ExportError(f"cannot write to stdout: {error.strerror or error}.") from error


def _failed(status: int, message: str, words: list[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    print(f"fxlora: error: {_one_line(message)}", file=sys.stderr)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    if issubclass(category, FxLoraWarning):
        text = f"fxlora: warning: {_one_line(str(message))}\n"
    sys.stderr.write(text)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_one_line(str(error))}".removesuffix(": ")


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


# ---- commands -----------------------------------------------------------------------------------


def _plan(options: Options) -> str:
    plan = _planned(options)
    if options.out is not None:
        with whole_file(options.out, ExportError) as temporary:
            temporary.write_text(PLAN_WRITERS[options.out.suffix](plan), encoding="utf-8")
    return plan.to_json() if options.json else str(plan)


def _adapt(options: Options) -> str:
    rules = _rules(options)
    captured = _captured(_model(options), options)
    plan = match(captured, rules)
    torch.manual_seed(options.seed)  # once more: A shall not depend on how the model was built
    save_adapter(inject(captured, plan), options.out)
    return f"{plan}\nThe untrained adapter is in {options.out}."


def _fold(options: Options) -> str:
    model = _model(options)
    folded = fold(load_adapter(_captured(model, options), options.adapter))
    _write_weights(model, folded, options.out)
    return f"{options.out}: the model's weights, {len(folded.folded[-1])} of them folded."


def _export(options: Options) -> str:
    module = _captured(_model(options), options)
    if options.adapter is not None:
        module = fold(load_adapter(module, options.adapter))
    args, kwargs = _inputs(options)
    export(module, args, options.out, kwargs=kwargs, format=options.format)
    return f"{options.out}: torch.export.load reads it without fxlora."


def _report(options: Options) -> str:
    if options.adapter is None:
        return report(_planned(options), options.format)
    _refuse_lora_options(options, "--adapter")
    adapted = load_adapter(_captured(_model(options), options), options.adapter)
    return report(adapted, options.format)


def _planned(options: Options) -> Plan:
    rules = _rules(options)  # first: a mistake in them should not cost building the model
    return match(_captured(_model(options), options), rules)


# ---- the model ----------------------------------------------------------------------------------


def _model(options: Options) -> nn.Module:
    """The model that MODEL names, with the checkpoint's weights in it."""
    checkpoint: Path | None = options.checkpoint
    state = _read_checkpoint(checkpoint) if checkpoint else {}
    torch.manual_seed(options.seed)
    build = _builder(options)
    try:
        with _device(options):
            model = build()
    except (Exception, SystemExit) as error:  # the model's code may raise anything
        raise ConfigError(
            f"building {options.model} without arguments failed: {_said(error)} (--debug shows "
            "where). MODEL must name a callable that needs none."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{options.model} returned a {type(model).__name__}, not an nn.Module.")
    if checkpoint:
        _load_checkpoint(model, state, checkpoint)
    return model


def _device(options: Options) -> torch.device:
    return torch.device("meta" if options.meta else "cpu")


def _builder(options: Options) -> Callable[[], Any]:
    """What builds the model. Imports happen here, out of reach of the meta device."""
    source, _, name = options.model.partition(":")
    if not source or not name:
        raise ConfigError(
            f"MODEL '{options.model}' is neither module:callable nor torchvision:name."
        )
    if source == "torchvision":
        return _torchvision_builder(name, options.weights)
    if options.weights is not None:
        raise ConfigError(
            f"--weights is for torchvision models; give the weights of {options.model} by "
            "--checkpoint, or load them in the callable."
        )
    found = _named(_imported(source), name)
    if isinstance(found, nn.Module) and options.meta:
        raise ConfigError(
            f"{options.model} is a model that has its weights already: --meta needs a callable "
            "that builds it. Or leave --meta out."
        )
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ConfigError(f"{options.model} is neither a callable nor an nn.Module: {found!r}.")
    return found


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the module's code may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no module '{name}' in {here} or on Python's path. Give MODEL as "
                "module:callable, with dots for folders."
            ) from error
        raise ConfigError(
            f"importing '{name}' failed: {_said(error)} (--debug shows where)."
        ) from error


def _named(module: ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = nearest(part, (n for n in dir(found) if not n.startswith("_")))
            raise ConfigError(
                f"module '{module.__name__}' has no '{name}'."
                + (f" Nearest: {', '.join(near)}." if near else "")
            )
        found = getattr(found, part)
    return found


def _torchvision_builder(name: str, weights: str | None) -> Callable[[], Any]:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ConfigError(
            f"torchvision:{name} needs torchvision, which cannot be imported ({error}): "
            "pip install torchvision."
        ) from error
    if name not in models.list_models():
        near = ", ".join(nearest(name, models.list_models()))
        raise ConfigError(f"torchvision has no model '{name}'. Nearest: {near or 'none'}.")
    known = models.get_model_weights(name).__members__
    if weights is not None and weights not in known:
        raise ConfigError(
            f"torchvision:{name} has no weights '{weights}'. Known: {', '.join(known)}."
        )
    keywords: dict[str, Any] = {"weights": weights}
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if weights is None and "weights_backbone" in parameters:
        keywords["weights_backbone"] = None  # its default is a download
    return partial(models.get_model, name, **keywords)


# ---- checkpoints --------------------------------------------------------------------------------


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror or error}.") from error
    except Exception as error:  # both readers raise whatever the bytes lead them to
        # torch's own words advise to run what is in the file
        raise ConfigError(
            f"checkpoint {path} is damaged or holds more than tensors; nothing in it was run. "
            "Save model.state_dict() again, best with safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = f" with the keys {_some(map(str, state))}" if isinstance(state, dict) else ""
        raise ConfigError(
            f"checkpoint {path} is no state dict but a {type(state).__name__}{keys}. "
            "Save model.state_dict() alone."
        )
    return state


def _load_checkpoint(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """load_state_dict, where one name of a tied weight stands for all of them."""
    refusal = f"checkpoint {path} does not fit {type(model).__name__}:"
    held = model.state_dict(keep_vars=True)
    # how many names of each weight the file has
    given = Counter(id(held[name]) for name in state if name in held)
    try:
        outcome = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{refusal} {error}") from error
    missing = [n for n in outcome.missing_keys if n not in held or id(held[n]) not in given]
    problems = {"missing in the file": missing, "not in the model": outcome.unexpected_keys}
    said = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if said:
        raise ConfigError(f"{refusal} {'; '.join(said)}.")
    tied = {n: t for n, t in state.items() if given[id(held[n])] > 1}
    if lost := _lost(model, tied):
        raise ConfigError(
            f"{refusal} its values for {_some(lost)} are overwritten by those for another name "
            "of the same weight."
        )


def _write_weights(model: nn.Module, folded: CapturedModule, path: Path) -> None:
    """Write a state dict that the source model takes back: tried before it is written."""
    state = folded.state_dict()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"{type(model).__name__} would not load the folded weights: {error} Use fxlora "
            "export, which needs no model class."
        ) from error
    if lost := _lost(model, state):
        raise ExportError(
            f"{type(model).__name__} shares memory between {_some(lost)} and other weights, "
            "which fold to different values. Use fxlora export, which needs no model class."
        )
    with whole_file(path, ExportError) as temporary:
        try:
            save_file(_unshared(state), temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its word for a full disk
            raise ExportError(f"cannot write {path}: {error}.") from error


def _lost(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Names under which a model that loaded a state dict holds something else all the same."""
    held = model.state_dict()
    return [n for n, t in state.items() if n in held and not _equal(t.to(held[n].dtype), held[n])]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in memory of its own: safetensors refuses ties, `load_state_dict` wants all."""
    taken: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in taken else tensor.contiguous()
        taken.add(memory)
    return result


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


# ---- inputs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """One `--input`: a keyword or "" for a positional one, the shape, and the dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def example(self) -> torch.Tensor:
        """Normal floats; integers are zero, which every embedding has."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, dtype=self.dtype)
        return torch.zeros(self.shape, dtype=self.dtype)


def _input(text: str) -> Input:
    found = re.fullmatch(r"(?:([^\W\d]\w*)=)?([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not [NAME=]SHAPE[:DTYPE], as in 1x3x224x224 or ids=2x16:int64"
        )
    name, shape, dtype = found.groups(default="")
    if dtype and dtype not in INPUT_DTYPES:
        raise argparse.ArgumentTypeError(
            f"'{text}' has no known dtype. Known: {', '.join(INPUT_DTYPES)}"
        )
    return Input(name, tuple(map(int, shape.split("x"))), getattr(torch, dtype or "float32"))


def _inputs(options: Options) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    names = [given.name for given in options.input if given.name]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--input gives {', '.join(sorted(twice))} more than once.")
    with _device(options):
        args = tuple(given.example() for given in options.input if not given.name)
        kwargs = {given.name: given.example() for given in options.input if given.name}
    return args, kwargs


def _captured(model: nn.Module, options: Options) -> CapturedModule:
    if not options.input:
        return capture(model)
    return capture(model, *_inputs(options))


# ---- rules --------------------------------------------------------------------------------------


def _rules(options: Options) -> Rules:
    if options.rules is None:
        return LoraConfig(**_lora_options(options))
    _refuse_lora_options(options, "--rules")
    return load_rules(options.rules)


def _lora_options(options: Options) -> dict[str, Any]:
    """What was given of LoraConfig: the options' dests are its fields."""
    fields = [field.name for field in dataclasses.fields(LoraConfig)]
    return {name: value for name in fields if (value := getattr(options, name, None)) is not None}


def _refuse_lora_options(options: Options, source: str) -> None:
    if given := _lora_options(options):
        raise ConfigError(
            f"{source} says all about the adapters: leave out the options for {', '.join(given)}."
        )


# ---- options ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with usage errors as every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="fxlora",
        description="LoRA on any weight of any PyTorch model, as a rewrite of its torch.fx graph.",
        epilog="Exit status: 0 success, 2 a usage error or a refusal, 1 anything unexpected.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fxlora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[Options], str], help: str, *parents: _Parser) -> _Parser:
        added = commands.add_parser(
            run.__name__[1:], parents=parents, help=help, description=help, allow_abbrev=False
        )
        added.set_defaults(command=run)
        return added

    shaped, weighed, fed = _model_options(meta=True), _model_options(), _model_options(feed=True)

    plan = command(_plan, "print what would be adapted, and how", shaped, _rule_options())
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--out", type=_plan_file, metavar="FILE", help="write it as .toml or .json")

    adapt = command(_adapt, "save an untrained adapter", weighed, _rule_options())
    adapt.add_argument("--out", type=Path, required=True, metavar="DIR", help="adapter folder")

    folding = command(_fold, "write the model's weights with an adapter folded in", weighed)
    folding.add_argument(
        "--adapter", type=Path, required=True, metavar="DIR", help="fxlora's or PEFT's"
    )
    folding.add_argument(
        "--out", type=_file, required=True, metavar="FILE", help="a .safetensors state dict"
    )

    exporting = command(_export, "write a program that plain PyTorch runs", fed)
    exporting.add_argument("--adapter", type=Path, metavar="DIR", help="fold it in first")
    exporting.add_argument(
        "--out", type=_file, required=True, metavar="FILE", help="for torch.export.load"
    )
    exporting.add_argument("--format", choices=EXPORT_FORMATS, default=EXPORT_FORMATS[0])

    reporting = command(_report, "count parameters", shaped, _rule_options(adapter=True))
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


def _model_options(*, meta: bool = False, feed: bool = False) -> _Parser:
    """What every command has: the model, its weights and its inputs.

    Args:
        meta: whether shapes are enough for the command.
        feed: whether it cannot do without inputs.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "model", metavar="MODEL", help="module:callable, or torchvision:NAME (torchvision:resnet50)"
    )
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
        type=_input,
        action="append",
        default=None if feed else [],
        required=feed,
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="example input, e.g. 1x3x224x224 or ids=2x16:int64; repeat it for several. "
        "Without any, the model is traced, which sees less",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of whatever is random (default 0)"
    )
    return parser


def _rule_options(*, adapter: bool = False) -> _Parser:
    """What to adapt. The dests of the options are LoraConfig's fields."""
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
        "--dropout", type=float, dest="lora_dropout", metavar="P", help="of the branches' inputs"
    )
    parser.add_argument("--exclude", dest="exclude_modules", help="not these modules", **names)
    parser.add_argument("--modules-to-save", help="modules to train in full", **names)
    parser.add_argument(
        "--rslora", action="store_const", const=True, dest="use_rslora", help="scale by X/√rank"
    )
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _file(text: str) -> Path:
    """A file to write, refused before the work if it has no folder to be in."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {path}: no folder {path.parent}")
    return path


def _plan_file(text: str) -> Path:
    path = _file(text)
    if path.suffix not in PLAN_WRITERS:
        raise argparse.ArgumentTypeError(f"'{path}' must end in {' or '.join(PLAN_WRITERS)}")
    return path
