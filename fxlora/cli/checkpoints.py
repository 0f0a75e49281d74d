"""`fxlora fold` and `fxlora verify` on checkpoints: files in place of a model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from torch import nn

from ..disk.checkpoint.fold import fold_checkpoint
from ..disk.checkpoint.verify import verify_checkpoint
from ..errors import ConfigError
from .models import build_model

# Options that only a model takes, and those that only a checkpoint takes, by dest.
_OF_MODELS = {
    "weights": "--weights",
    "checkpoint": "--checkpoint",
    "input": "--input",
    "folded": "--folded",
    "reads": "--reads",
}
_OF_CHECKPOINTS = {"skeleton": "--model", "dry_run": "--dry-run", "key_mapping": "--key-mapping"}


def is_checkpoint(options: Namespace) -> bool:
    """Whether a command is about files: it names an adapter after them, or they are there."""
    source = Path(options.model)
    named = source.suffix == ".safetensors" or (":" not in options.model and _exists(source))
    found = options.folder is not None or named
    wrong = _OF_MODELS if found else _OF_CHECKPOINTS
    if given := [name for dest, name in wrong.items() if getattr(options, dest, None)]:
        what = "a checkpoint (BASE ADAPTER)" if found else f"the model {options.model}"
        raise ConfigError(f"{', '.join(given)} cannot be used with {what}.")
    if not found:
        missing = ("adapter",) if options.command.__name__ == "run_fold" else ("input", "adapter")
        if lacking := [f"--{dest}" for dest in missing if not getattr(options, dest)]:
            raise ConfigError(f"{', '.join(lacking)} required with a model. See --help.")
    elif (options.folder is None) == (options.adapter is None):
        raise ConfigError(f"give one adapter: {options.model} ADAPTER …")
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def fold_files(options: Namespace) -> str:
    """Write a checkpoint with an adapter folded in, without its model."""
    report = fold_checkpoint(
        options.model,
        options.folder or options.adapter,
        options.out,
        model=_skeleton(options),
        allow_nonfinite=options.allow_nonfinite,
        strict_base=options.strict_base,
        key_mapping=dict(options.key_mapping) or None,
        dry_run=options.dry_run,
        progress=True,
    )
    if options.json:
        return report.to_json()
    what = "would hold" if options.dry_run else "holds"
    return f"{report}\n{options.out} {what} the result."


def verify_files(options: Namespace) -> str:
    """Compare a folded checkpoint with its base and its adapter."""
    if options.out is None:
        raise ConfigError("verify needs the folded checkpoint: fxlora verify BASE ADAPTER OUT.")
    report = verify_checkpoint(
        options.model,
        options.folder or options.adapter,
        options.out,
        model=_skeleton(options),
        allow_nonfinite=options.allow_nonfinite,
        strict_base=options.strict_base,
        key_mapping=dict(options.key_mapping) or None,
    )
    if options.json:
        return report.to_json()
    return f"{report}\n{options.out} is {options.model} with the adapter folded in, bit for bit."


def _skeleton(options: Namespace) -> nn.Module | None:
    """Build the model that `--model` names, without memory for its weights."""
    if options.skeleton is None:
        return None
    return build_model(
        Namespace(model=options.skeleton, seed=0, weights=None, checkpoint=None, meta=True)
    )
