"""The inputs of a fold or its check: a checkpoint, an adapter, and what one does to the other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ...data import as_path
from ...errors import AdapterError, ConfigError
from ...module.fingerprints import fingerprint
from ...names import shown
from ...tables import some
from ..folder import Folder, read_folder
from ..keys import CONFIG
from ..renaming import checked_mapping
from ..values import not_finite
from .adapter import changes_of
from .base import Checkpoint
from .changes import Changes
from .model import Skeleton
from .report import CheckpointReport, FoldedTensor
from .stream import one_thread, read_into
from .trained_over import check_trained_over, comparable_marks
from .weights_file import REPLACED

_PART = 2**19  # entries that are checked at a time

Model = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Inputs:
    """A checkpoint, an adapter, and the changes of the one by the other."""

    base: Checkpoint
    content: Folder
    changes: Changes
    allow_nonfinite: bool
    strict_base: bool

    @classmethod
    def read(
        cls,
        base: str | Path,
        adapter: str | Path,
        model: Model | None,
        allow_nonfinite: bool,
        strict_base: bool,
        key_mapping: Mapping[str, str] | None,
    ) -> Inputs:
        """Read headers and the adapter.

        Raises:
            ConfigError: the checkpoint is missing or damaged, the model is not its, or key_mapping
                is no mapping of regular expressions.
            AdapterError: the adapter is missing or damaged, has NaN or infinities, does not fit
                the checkpoint, or does so in several ways; or, with `strict_base`, it does not say
                which weights it was trained over.
        """
        checkpoint = Checkpoint.read(base)
        content = read_folder(as_path(adapter, AdapterError))
        if key_mapping is not None:
            content = content.named(checked_mapping(key_mapping))
        if not content.tensors:
            raise AdapterError(f"{content.path} has no tensors.")
        changes = changes_of(checkpoint, content, None if model is None else skeleton(model))
        inputs = cls(checkpoint, content, changes, allow_nonfinite, strict_base)
        if strict_base:
            known = comparable_marks(changes.folded, checkpoint.tensors)
            inputs.check_base(known)  # as if they were the base's: those that are missing count
        return inputs

    @one_thread()
    def check_values(self) -> None:
        """Raise unless the adapter's values are finite, and those of frozen tensors the base's.

        Raises:
            AdapterError: they are not.
        """
        changes = self.changes
        pairs = {n: t for fold in changes.folded.values() for n, t in fold.values.items()}
        odd = [name for name, tensor in pairs.items() if any(map(not_finite, _parts(tensor)))]
        odd += [name for name in changes.replaced if self._is_odd(name)]
        if odd and not self.allow_nonfinite:
            raise AdapterError(
                f"{self.content.path}: {some(odd)} has NaN or infinities, as after a training that "
                "diverged. Use an earlier checkpoint of the adapter, or allow_nonfinite=True "
                "(--allow-nonfinite) to fold it nevertheless."
            )
        for name in changes.same:
            if not self._is_same(name):
                raise AdapterError(
                    f"{self.content.path} has '{name}' with other values than {self.base.path}, "
                    f"but {CONFIG} does not say that it trains (modules_to_save, bias). Is the "
                    "adapter for another checkpoint?"
                )

    def _is_odd(self, name: str) -> bool:
        """Whether a tensor that is replaced is not finite where the checkpoint's is."""
        given = self.changes.replaced[name]
        if not any(map(not_finite, _parts(given))):
            return False
        return any(not_finite(now, before) for now, before in self._beside(name, given))

    def _is_same(self, name: str) -> bool:
        """Whether a tensor that the adapter's file repeats is the checkpoint's."""
        if self.base.tensors[name].code not in REPLACED:
            return False
        pairs = self._beside(name, self.changes.same[name])
        return all(torch.equal(before, now.to(before.dtype)) for now, before in pairs)

    def _beside(
        self, name: str, given: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parts of a tensor, flattened, and the same parts of the checkpoint's."""
        tensor = self.base.tensors[name]
        file = next(file for file in self.base.files if tensor in file.tensors)
        dtype = REPLACED[tensor.code]
        with _opened(file.path) as source:
            at = tensor.start
            for part in _parts(given.contiguous()):
                buffer = torch.empty(len(part) * dtype.itemsize, dtype=torch.uint8)
                yield part, read_into(source, at, buffer).view(dtype)
                at += len(buffer)

    def check_base(self, marks: Mapping[str, str | None]) -> None:
        """Warn, or raise, if fingerprints of weights are not those in the adapter's file.

        Raises:
            AdapterError: `strict_base`, and they are others or unknown.
        """
        check_trained_over(self.content.path, self.changes.folded, marks, self.strict_base)

    def key(self) -> Any:
        """Return all that the result depends on, as data.

        The adapter counts by its content, as it is in memory.
        """
        entries = {n: [e.to_data() for e in f.entries] for n, f in self.changes.folded.items()}
        held = {n: fingerprint(tensor) for n, tensor in self.content.tensors.items()}
        return [self.stamps(), entries, held, sorted(self.changes.replaced), self.allow_nonfinite]

    def stamps(self) -> list[Any]:
        """Return what tells whether the base's files changed: their inodes, sizes and times.

        The time of the last change (ctime) cannot be set back, as mtime can.
        """
        paths = [file.path for file in self.base.files]
        paths += [self.base.path / other for other in self.base.others]
        return [
            (str(path.resolve()), at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
            for path in paths
            for at in [path.stat()]
        ]

    def report(
        self, measured: dict[str, dict[str, Any]] | None = None, *, resumed: bool = False
    ) -> CheckpointReport:
        """Return the report of what was done, or would be."""
        base, changes = self.base, self.changes
        folded = [
            FoldedTensor.of(
                name,
                base.tensors[name].code,
                changes.folded[name].entries,
                {k: v for k, v in (measured or {}).get(name, {}).items() if k != "base"},
            )
            for name in base.tensors
            if name in changes.folded
        ]
        replaced = tuple(name for name in base.tensors if name in changes.replaced)
        return CheckpointReport(
            tuple(folded),
            replaced,
            len(base.tensors) - len(folded) - len(replaced),
            base.size,
            str(changes.prefix),
            tuple(map(str, base.left)),
            resumed,
        )


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return parts of a tensor, of a few megabytes: consecutive ones, if it is contiguous."""
    if tensor.is_contiguous():
        return tensor.flatten().split(_PART)
    return tensor.split(max(1, _PART // max(1, math.prod(tensor.shape[1:]))))


@contextmanager
def _opened(path: Path) -> Generator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror or error}.") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def skeleton(model: Model) -> Skeleton:
    """Return a model, built on the meta device if it is not built yet.

    Raises:
        ConfigError: it is no model, cannot be built, or has parameters without a shape.
    """
    given = model
    if not isinstance(model, nn.Module) and callable(model):
        try:
            with torch.device("meta"):
                model = model()
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"the model cannot be built on the meta device, without memory for its weights: "
                f"{type(error).__name__}: {error}. Give a function without arguments that reads no "
                "values of weights, or the model itself."
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model must be an nn.Module, or a function that builds one, not {shown(given)}."
        )
    held = model.state_dict(keep_vars=True)
    if lazy := [name for name, tensor in held.items() if is_lazy(tensor)]:
        raise ConfigError(f"the model has no shapes yet for {some(lazy)}: call it once before.")
    return Skeleton(model)
