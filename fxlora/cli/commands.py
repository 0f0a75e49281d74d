"""The commands: each takes the parsed options and returns its text for stdout."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from ..api import fold, inject
from ..costs import report
from ..delivery import export
from ..disk.files import whole_file
from ..disk.keys import WEIGHTS
from ..disk.load import load_adapter
from ..disk.save import save_adapter
from ..errors import AdapterError, ConfigError, ExportError
from ..matching import match
from ..module import CapturedModule
from ..pictures.page import plan_page
from ..plan import Plan
from ..proof import verify
from .checkpoints import fold_files, is_checkpoint, verify_files
from .inputs import captured_model, example_inputs, given_rules, quiet, refuse_lora_options
from .models import build_model
from .weights import load_checkpoint, read_checkpoint, write_weights

PLAN_WRITERS: dict[str, Callable[[Plan], str]] = {".toml": Plan.to_toml, ".json": Plan.to_json}


def run_plan(options: Namespace) -> str:
    """Return the plan as text or JSON, and write it to `--out` if given."""
    module, plan = _planned(options)
    if options.out is not None:
        _write(options.out, PLAN_WRITERS[options.out.suffix](plan))
    if options.html is not None:
        _write(options.html, plan_page(module, plan, f"fxlora plan {options.model}"))
    return plan.to_json() if options.json else str(plan)


def _write(path: Path, text: str) -> None:
    with whole_file(path, ExportError) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run_adapt(options: Namespace) -> str:
    """Save an untrained adapter of the model in a folder."""
    if (options.out / WEIGHTS).exists() and not options.force:
        raise AdapterError(
            f"{options.out} holds an adapter, which may be trained. Pass --force to overwrite it."
        )
    rules = given_rules(options)
    captured = captured_model(build_model(options), options)
    plan = match(captured, rules, budget=options.budget)
    # Seed again: A must not depend on how many numbers building the model drew.
    torch.manual_seed(options.seed)
    save_adapter(inject(captured, plan), options.out)
    return f"{plan}\nThe untrained adapter is in {options.out}."


def run_fold(options: Namespace) -> str:
    """Write the model's state dict, or a checkpoint, with an adapter folded in."""
    if is_checkpoint(options):
        return fold_files(options)
    if options.json:
        raise ConfigError(f"--json cannot be used with the model {options.model}.")
    model = build_model(options)
    odd = options.allow_nonfinite
    adapted = load_adapter(
        captured_model(model, options),
        options.adapter,
        allow_nonfinite=odd,
        strict_base=options.strict_base,
    )
    folded = fold(adapted, allow_nonfinite=odd)
    write_weights(model, folded, options.out)
    return f"{options.out}: the model's weights, {len(folded.folded[-1])} of them folded."


def run_verify(options: Namespace) -> str:
    """Verify an adapter and its fold (made here, or read from `--folded`), or a checkpoint's."""
    if is_checkpoint(options):
        return verify_files(options)
    if options.allow_nonfinite:
        raise ConfigError(f"--allow-nonfinite cannot be used with the model {options.model}.")
    module, strict = captured_model(build_model(options), options), options.strict_base
    adapted = load_adapter(module, options.adapter, strict_base=strict)
    folded = fold(adapted)
    if options.folded is not None:
        load_checkpoint(folded, read_checkpoint(options.folded), options.folded)
    args, kwargs = example_inputs(options)
    found = verify(adapted, args, kwargs, folded=folded)
    if options.json:
        return found.to_json()
    return f"{found.reads()}\n\n{found}" if options.reads else str(found)


def run_export(options: Namespace) -> str:
    """Write the model, with an adapter folded in if given, as a file."""
    module = captured_model(build_model(options), options)
    if options.adapter is not None:
        module = fold(load_adapter(module, options.adapter))
    args, kwargs = example_inputs(options)
    with quiet(options):
        export(module, options.out, args, kwargs, format=options.format)
    return f"{options.out}: its runtime reads it without fxlora."


def run_report(options: Namespace) -> str:
    """Return the report of a saved adapter, or of the plan that the rules give."""
    if options.adapter is None:
        return report(_planned(options)[1], options.format)
    refuse_lora_options(options, "--adapter", "budget")
    adapted = load_adapter(captured_model(build_model(options), options), options.adapter)
    return report(adapted, options.format)


def _planned(options: Namespace) -> tuple[CapturedModule, Plan]:
    rules = given_rules(options)  # first: a mistake in them is an error before the model is built
    module = captured_model(build_model(options), options)
    return module, match(module, rules, budget=options.budget)
