"""verify_checkpoint: compare a folded checkpoint with its base and adapter, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from ...data import as_path
from ...errors import ConfigError, VerificationError
from ...lora.dtypes import correctly_rounded
from ...module.ambient import no_ambient_modes
from ...module.folded_weight import Box, folded_weight
from ...tables import count
from .base import Checkpoint
from .budget import Budget
from .inputs import Inputs, Model
from .pieces import ROWS, Copied, Replaced, Rows, pieces_of
from .report import CheckpointReport
from .stream import enough_memory, read_and_fold, read_into, sequential
from .trained_over import fingerprint_of
from .weights_file import REPLACED, WeightsFile

_STEP = 2**21  # bytes that are compared at a time
# Sums in float64 may differ in their last bits, by the order of their terms, which depends on the
# number of threads. Close to halfway between two numbers of the checkpoint, both are right.
_LAST_BITS = 2.0**-44
_FEW = 1024  # entries of a piece that can be so close


@no_ambient_modes()
def verify_checkpoint(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    model: Model | None = None,
    allow_nonfinite: bool = False,
    strict_base: bool = False,
    key_mapping: Mapping[str, str] | None = None,
) -> CheckpointReport:
    """Check that a checkpoint is another one with an adapter folded in, bit for bit.

    Every adapted weight is computed again; all other tensors must have the base's bytes. As in
    `fold_checkpoint`, no model is built, and no tensor need fit into memory.

    Args:
        base, adapter, model, allow_nonfinite, strict_base, key_mapping: as for `fold_checkpoint`.
        out: the checkpoint to check.

    Returns:
        The weights that are folded.

    Raises:
        VerificationError: tensors differ; says which, and in how many entries.
        ConfigError, AdapterError: as for `fold_checkpoint`.

    Example:
        >>> import tempfile, torch, fxlora
        >>> from safetensors.torch import save_file
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> folder = tempfile.mkdtemp()
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> fxlora.save_adapter(fxlora.adapt(model, x, rules=config), f"{folder}/adapter")
        >>> save_file(model.state_dict(), f"{folder}/base.safetensors")
        >>> files = f"{folder}/base.safetensors", f"{folder}/adapter", f"{folder}/out.safetensors"
        >>> fxlora.fold_checkpoint(*files) and len(fxlora.verify_checkpoint(*files).folded)
        1
    """
    inputs = Inputs.read(base, adapter, model, allow_nonfinite, strict_base, key_mapping)
    with enough_memory(f"check {adapter}"):
        inputs.check_values()
    target = as_path(out, ConfigError)
    marks: dict[str, str | None] = {}
    with enough_memory(f"compare {target}"):
        differ = differences(inputs, target, marks)
    if differ:
        listed = "; ".join(f"'{name}': {what}" for name, what in list(differ.items())[:8])
        more = f"; and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise VerificationError(
            f"{target} is not {inputs.base.path} with {inputs.content.path} folded in; "
            f"{count(len(differ), 'other tensor')}: {listed}{more}."
        )
    inputs.check_base(marks)
    return inputs.report()


def differences(inputs: Inputs, target: Path, marks: dict[str, str | None]) -> dict[str, str]:
    """Return the tensors of a checkpoint that are not what they should be, and why.

    Fingerprints of the base's adapted weights are added to `marks`.
    """
    found = Checkpoint.read(target)
    base = inputs.base
    differ = {name: "missing" for name in base.tensors if name not in found.tensors}
    differ |= {name: "not in the base" for name in found.tensors if name not in base.tensors}
    for name in base.tensors.keys() & found.tensors.keys():
        ours, theirs = base.tensors[name], found.tensors[name]
        if (ours.code, ours.shape) != (theirs.code, theirs.shape):
            differ[name] = f"{theirs.code} {theirs.shape}, not {ours.code} {ours.shape}"
    places = {tensor.name: file.path for file in found.files for tensor in file.tensors}
    for file in base.files:
        differ |= _differences_of_file(inputs, file, found, places, differ, marks)
    return {name: differ[name] for name in sorted(differ)}


def _differences_of_file(
    inputs: Inputs,
    file: WeightsFile,
    found: Checkpoint,
    places: dict[str, Path],
    known: dict[str, str],
    marks: dict[str, str | None],
) -> dict[str, str]:
    wrong: dict[str, int] = {}
    hashes: list[torch.Tensor] = []
    with ExitStack() as stack:
        source = _opened(file.path, stack)
        others: dict[Path, int] = {}
        starts = {
            tensor.start: tensor.name for tensor in file.tensors if tensor.stop > tensor.start
        }
        for piece in pieces_of(file, inputs.changes, file.start, by_tensor=True):
            name = starts[piece.start] if isinstance(piece, Copied) else piece.tensor.name
            if name in known:
                continue
            path = places[name]
            if path not in others:
                others[path] = _opened(path, stack)
            theirs = others[path]
            shift = found.tensors[name].start - inputs.base.tensors[name].start
            if isinstance(piece, Copied):
                number = _differing_bytes(source, theirs, piece, shift)
            else:
                budget = Budget()
                number = _differing_entries(source, theirs, piece, shift, budget)
                hashes += budget.hashes
            if isinstance(piece, Rows) and piece.stop == piece.tensor.stop:
                marks[name] = fingerprint_of(piece, hashes)
                hashes.clear()
            if number:
                wrong[name] = wrong.get(name, 0) + number
    changed = {*inputs.changes.folded, *inputs.changes.replaced}
    return {
        name: count(n, "wrong number" if name in changed else "other byte")
        for name, n in wrong.items()
    }


def _opened(path: Path, stack: ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    sequential(descriptor)
    return descriptor


def _differing_bytes(source: int, other: int, piece: Copied, shift: int) -> int:
    buffers = [torch.empty(_STEP, dtype=torch.uint8) for _ in range(2)]
    number = 0
    for start in range(piece.start, piece.stop, _STEP):
        size = min(_STEP, piece.stop - start)
        ours = read_into(source, start, buffers[0][:size])
        theirs = read_into(other, start + shift, buffers[1][:size])
        if not torch.equal(ours, theirs):
            number += int((ours != theirs).sum())
    return number


def _differing_entries(
    source: int, other: int, piece: Rows | Replaced, shift: int, budget: Budget
) -> int:
    buffer = torch.empty(piece.stop - piece.start, dtype=torch.uint8)
    if isinstance(piece, Rows):
        ours = read_and_fold(source, piece, buffer, budget)
    else:
        ours = piece.write(buffer)
    dtype = REPLACED[piece.tensor.code]
    number = 0
    for start in range(0, len(ours), ROWS):
        mine = ours[start : start + ROWS]
        theirs = read_into(other, piece.start + shift + start, torch.empty_like(mine))
        if not torch.equal(mine, theirs):
            number += int(_differ(mine, theirs, dtype).sum())
    if not number or isinstance(piece, Replaced) or number > _FEW:
        return number
    return number - _halfway(source, other, piece, shift, buffer)


def _differ(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return which entries of a dtype have other bytes, as (entries,)."""
    return (ours.view(-1, dtype.itemsize) != theirs.view(-1, dtype.itemsize)).any(-1)


def _halfway(source: int, other: int, piece: Rows, shift: int, buffer: torch.Tensor) -> int:
    """Count the entries that differ only because the sum in float64 has last bits of its own."""
    dtype = piece.tensor.dtype
    assert dtype is not None
    theirs = read_into(other, piece.start + shift, torch.empty_like(buffer))
    held = theirs.view(dtype).view(piece.shape)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    number = 0

    def compare(_: torch.Tensor, exact: torch.Tensor, box: Box) -> None:
        nonlocal number
        found, slack = box.of(held), exact.abs() * _LAST_BITS
        low, high = (correctly_rounded(exact + sign * slack, dtype) for sign in (-1, 1))
        differs = found.view(bits) != correctly_rounded(exact, dtype).view(bits)
        number += int((differs & ((found == low) | (found == high))).sum())

    rows = read_into(source, piece.start, buffer).view(dtype).view(piece.shape)
    fold = piece.fold
    with torch.no_grad():
        folded_weight(fold.entries, rows, fold.values, rows, piece.first, compare)
    return number
