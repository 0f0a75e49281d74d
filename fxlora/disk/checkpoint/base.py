"""A checkpoint: a .safetensors file, or a folder with one or with several and their index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data import as_path, parsed, read_text
from ...errors import ConfigError
from ...names import shown
from ...tables import some
from .weights_file import TensorAt, WeightsFile

INDEX = ".safetensors.index.json"
_PART = 2**20  # bytes that are compared at a time
# Files that may hold weights, in which the adapter would not be folded.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".npz", ".pkl", ".tflite", ".pte", ".pt2", ".data"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, of which only headers have been read.

    Attributes:
        path: the file or the folder.
        files: its .safetensors files.
        others: its other files (configuration, tokenizer), by their paths in the folder.
        left: files beside it that may hold other weights.
        config: the content of its config.json, or {}.
    """

    path: Path
    files: tuple[WeightsFile, ...]
    others: tuple[Path, ...] = ()
    left: tuple[Path, ...] = ()
    config: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read the headers of a checkpoint.

        Raises:
            ConfigError: there is none, or a file is missing or damaged.
        """
        path = as_path(path, ConfigError)
        try:
            if path.is_dir():
                return _folder(path)
            if not path.is_file():
                raise ConfigError(f"no checkpoint at {path}: no such file or folder.")
        except OSError as error:
            raise ConfigError(f"checkpoint {path}: {error.strerror or error}.") from error
        try:
            return cls(path, (WeightsFile.read(path),), config=_config(path.parent))
        except ConfigError as error:
            raise ConfigError(f"{error}{_of_pickles([path])}") from error

    @property
    def is_folder(self) -> bool:
        return self.path != self.files[0].path

    def inside(self, file: Path) -> Path:
        """Return the path of one of its files in the folder; for a single file, its name."""
        return file.relative_to(self.path) if self.is_folder else Path(file.name)

    @cached_property
    def tensors(self) -> dict[str, TensorAt]:
        """Its tensors by name."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def size(self) -> int:
        """The bytes of all its weights."""
        return sum(file.size for file in self.files)

    @cached_property
    def ties(self) -> dict[str, str]:
        """Names that the files leave out, and the names that they are tied to.

        safetensors' save_model notes them in the header.
        """
        return {
            name: kept
            for file in self.files
            for name, kept in file.metadata.items()
            if kept in self.tensors and name not in self.tensors
        }

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape have the same dtype and the same bytes."""
        here, there = (self.tensors[name] for name in (one, other))
        if here.code != there.code:
            return False
        with self._holding(one).open("rb") as left, self._holding(other).open("rb") as right:
            left.seek(here.start)
            right.seek(there.start)
            for at in range(here.start, here.stop, _PART):
                size = min(_PART, here.stop - at)
                if left.read(size) != right.read(size):
                    return False
        return True

    def _holding(self, name: str) -> Path:
        return next(f.path for f in self.files if self.tensors[name] in f.tensors)


def _folder(path: Path) -> Checkpoint:
    inside = sorted(_walk(path, path))
    top = [name for name in inside if name.parent == Path()]
    indices = [name for name in top if name.name.endswith(INDEX)]
    weights = [name for name in top if name.suffix == ".safetensors"]
    if not indices and not weights:
        raise ConfigError(f"checkpoint {path} has no .safetensors file.{_of_pickles(top)}")
    if len(indices) > 1 or (not indices and len(weights) != 1):
        what = f"{len(indices)} indices" if indices else f"{len(weights)} .safetensors files"
        raise ConfigError(
            f"checkpoint {path} has {what} ({some(map(str, indices or weights))}), but needs one "
            f"file, or one index (…{INDEX}). Name the file itself."
        )
    files = _of_index(path, indices[0]) if indices else [WeightsFile.read(path / weights[0])]
    mine = {file.path.relative_to(path) for file in files}
    rest = [name for name in inside if name not in mine]
    left = [name for name in rest if name.suffix.lower() in _WEIGHTS]
    others = [name for name in rest if name not in left]
    return Checkpoint(path, tuple(files), tuple(others), tuple(left), _config(path))


def _of_pickles(names: Iterable[Path]) -> str:
    """Say what to do about files of torch.save."""
    found = [name for name in names if name.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt")]
    if not found:
        return ""
    return (
        f" {some(map(str, found))} may be a pickle, which can run code when it is read: save the "
        "weights again with safetensors (model.save_pretrained, safetensors.torch.save_file)."
    )


def _config(folder: Path) -> Mapping[str, Any]:
    """Return the content of a folder's config.json, or {}."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    found: Any = parsed(read_text(path, str(path), ConfigError), str(path), ConfigError)
    return found if isinstance(found, Mapping) else {}


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    """Yield the files in a folder, relative to it, without hidden ones; links are followed once."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path)
        elif not path.exists():
            raise ConfigError(f"{path} is a link to a file that is not there.")
        elif path.is_file():
            yield path.relative_to(root)


def _of_index(path: Path, index: Path) -> list[WeightsFile]:
    """Return the files that an index names, which must hold exactly the tensors that it says."""
    source = str(path / index)
    data = parsed(read_text(path / index, source, ConfigError), source, ConfigError)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{source} is not an index: it has no weight_map.")
    for name in places.values():
        plain = isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        if not plain or "\0" in name:
            raise ConfigError(f"{source} names {shown(name)}, which is no file of its folder.")
    names = list(dict.fromkeys(places.values()))
    files = [WeightsFile.read(path / name) for name in names]
    held = [(tensor.name, file.path.name) for file in files for tensor in file.tensors]
    if wrong := dict(held).items() ^ places.items() or len(held) != len(places):
        names = sorted({name for name, _ in wrong}) if isinstance(wrong, set) else places
        raise ConfigError(
            f"{source} does not say what the files hold: {some(names)}. Is a file of another "
            "checkpoint, or missing a part?"
        )
    return files
