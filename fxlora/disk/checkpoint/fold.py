"""fold_checkpoint: fold an adapter into a checkpoint on disk, one part of a tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...data import as_path
from ...errors import AdapterError, ConfigError, ExportError, warn
from ...module.ambient import no_ambient_modes
from ...tables import some
from .budget import Budget
from .inputs import Inputs, Model
from .pieces import Replaced, Rows, pieces_of, restart
from .report import CheckpointReport, readable
from .stream import Progress, enough_memory, sequential, write_pieces
from .trained_over import fingerprint_of
from .verify import differences
from .weights_file import WeightsFile
from .work import Work, work_for


@no_ambient_modes()
def fold_checkpoint(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    model: Model | None = None,
    allow_nonfinite: bool = False,
    strict_base: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> CheckpointReport:
    """Write a checkpoint with an adapter folded in, without building the model.

    Each adapted weight becomes `W0 + s·BA`, summed in float64 and rounded once; all other tensors
    keep their bytes, and files their headers. In memory are the adapter and some rows of one
    weight. `out` is written next to its place, and is moved there when it is whole; a call that was
    killed is continued by the next one with the same inputs.

    Args:
        base: a .safetensors file, or a folder with one or with an index (…safetensors.index.json).
        adapter: an adapter folder, fxlora's or PEFT's.
        out: the file, or for a folder the folder, to write. A file is overwritten; a folder must
            not exist yet, or be empty. The base's configuration and tokenizer are copied, too.
        model: the model of the checkpoint, or a function that builds it, which is called on the
            meta device. Only needed where names, layouts or ties are ambiguous without it.
        allow_nonfinite: whether the adapter may have NaN or infinities.
        strict_base: whether to raise unless the checkpoint's weights are known to be those that the
            adapter was trained over (fxlora's adapters have their fingerprints).
        key_mapping: regular expressions and their replacements for the adapter's names, where the
            checkpoint has others: the first one that is found in a name counts (as for
            `load_adapter`).
        dry_run: only return the report, from the headers; write nothing.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        The weights that were folded, with the error of the rounding relative to each update.

    Warns:
        FxLoraWarning: files beside the checkpoint were not copied, as they may hold weights; a tie
            may be split; or the adapter was trained over other weights.

    Raises:
        ConfigError: the checkpoint is missing or damaged, the model is not its, or key_mapping is
            no mapping of regular expressions.
        AdapterError: the adapter is missing or damaged, has NaN or infinities, does not fit the
            checkpoint, or does so in several ways; or, with `strict_base`, it was trained over
            another one.
        ExportError: the target cannot be written, or is being written by another process.

    Example:
        >>> import tempfile, torch, fxlora
        >>> from safetensors.torch import save_file
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> folder = tempfile.mkdtemp()
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> fxlora.save_adapter(fxlora.adapt(model, x, rules=config), f"{folder}/adapter")
        >>> save_file(model.state_dict(), f"{folder}/base.safetensors")
        >>> report = fxlora.fold_checkpoint(
        ...     f"{folder}/base.safetensors", f"{folder}/adapter", f"{folder}/out.safetensors"
        ... )
        >>> [tensor.name for tensor in report.folded], report.copied
        (['0.weight'], 1)
    """
    inputs = Inputs.read(base, adapter, model, allow_nonfinite, strict_base, key_mapping)
    target = as_path(out, ExportError)
    if inputs.base.left:
        warn(
            f"{some(map(str, inputs.base.left))} beside {inputs.base.path} may hold other weights, "
            "without the adapter: not copied."
        )
    if dry_run:
        return inputs.report()
    with enough_memory(f"check {adapter}"):
        inputs.check_values()
    _check_target(inputs, target)
    with work_for(target) as work, enough_memory(f"write {target}"):
        if inputs.base.is_folder and _is_full(target):
            return _there_already(inputs, target)
        stamps = inputs.stamps()
        work.begin(inputs.key())
        _check_space(inputs, target, work)
        with _bar(inputs.base.size, progress) as bar:
            for file in inputs.base.files:
                _write_file(inputs, file, work, bar.update)
        for other in inputs.base.others:
            (work.content / other).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inputs.base.path / other, work.content / other)
        _check_names(inputs, target, work)
        if inputs.stamps() != stamps:
            raise ConfigError(f"the checkpoint {inputs.base.path} changed while it was read.")
        inputs.check_base({n: data.get("base") for n, data in work.records.items()})
        whole = work.content if inputs.base.is_folder else next(work.content.iterdir())
        whole.replace(target)
        return inputs.report(work.records, resumed=work.resumed)


def _write_file(inputs: Inputs, file: WeightsFile, work: Work, progress: Progress) -> None:
    """Write one file, from where an earlier call stopped."""
    changes = inputs.changes
    path = work.content / inputs.base.inside(file.path)

    def done(piece: Rows | Replaced, budget: Budget) -> None:
        if isinstance(piece, Rows):
            if budget.overflows and not inputs.allow_nonfinite:
                raise AdapterError(
                    f"'{piece.tensor.name}': W0 + s·BA is not finite in {piece.tensor.code}: A and "
                    "B are too large. Train again with a smaller learning rate."
                )
            measured = {"relative_error": budget.relative_error, "survives": budget.survives}
            mark = fingerprint_of(piece, budget.hashes)
            work.record(piece.tensor.name, {**measured, "base": mark})

    with ExitStack() as stack:
        source = os.open(file.path, os.O_RDONLY)
        stack.callback(os.close, source)
        target = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        stack.callback(os.close, target)
        sequential(source)
        at = restart(file, changes, os.fstat(target).st_size, set(work.records))
        os.truncate(target, at)
        os.lseek(target, at, os.SEEK_SET)
        progress(at)
        write_pieces(source, target, pieces_of(file, changes, at), done, progress)


# ---- the target ---------------------------------------------------------------------------------


def _check_target(inputs: Inputs, target: Path) -> None:
    """Raise if the result cannot take the target's place."""
    try:
        if not target.parent.is_dir():
            raise ExportError(f"cannot write {target}: no folder {target.parent}.")
        if target.name in ("", "..") or target.resolve() == target.parent.resolve():
            raise ExportError(f"cannot write {target}: it is no name of a new file or folder.")
        if inputs.base.is_folder and target.is_symlink():
            raise ExportError(
                f"cannot write {target}: it is a link. Name the folder that it is to point to."
            )
        if inputs.base.is_folder and target.exists() and not target.is_dir():
            raise ExportError(f"cannot write {target}: it is a file, and the base a folder.")
        if not inputs.base.is_folder and target.is_dir():
            raise ExportError(f"cannot write {target}: it is a folder, and the base a file.")
        own = [inputs.base.path, inputs.content.path]
        here = target.resolve()
        for path in (p.resolve() for p in own):
            if _is_within(here, path) or _is_within(path, here):
                raise ExportError(f"cannot write {target}: {path} is read for it.")
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}.") from error


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or a file, or inside of it; also where case does not count."""
    here = [part for part in (path, *path.parents) if part.exists()]
    return folder.exists() and any(part.samefile(folder) for part in here)


def _check_names(inputs: Inputs, target: Path, work: Work) -> None:
    """Raise if files of the base became one, on a disk that does not tell upper from lower case."""
    written = sum(path.is_file() for path in work.content.rglob("*"))
    if written < len(inputs.base.files) + len(inputs.base.others):
        raise ExportError(
            f"cannot write {target}: to its disk, names of files in {inputs.base.path} are the "
            "same. Choose a target on another disk, or rename the files."
        )


def _is_full(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _there_already(inputs: Inputs, target: Path) -> CheckpointReport:
    """Return the report if the target is the result already, as after a kill at the very end."""
    marks: dict[str, str | None] = {}
    try:
        same = not differences(inputs, target, marks)
    except ConfigError:  # no checkpoint
        same = False
    if not same:
        raise ExportError(
            f"cannot write {target}: the folder holds something else already. Choose another "
            "one, or remove it."
        )
    inputs.check_base(marks)
    return inputs.report()


def _check_space(inputs: Inputs, target: Path, work: Work) -> None:
    """Raise if the disk is too small, before anything is written."""
    written = sum(path.stat().st_size for path in work.content.rglob("*") if path.is_file())
    needed = inputs.base.size - written
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ExportError(
            f"cannot write {target}: it needs {readable(needed)}, and the disk has "
            f"{readable(free)} left."
        )


def _bar(size: int, show: bool) -> Any:
    """Return a progress bar, with the throughput, which is silent unless stderr is a terminal."""
    return tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if show else True,
        mininterval=0.2,
    )
