"""A .safetensors file, by its header: which bytes are which tensor.

The file is 8 bytes with the length of the header, the header (JSON), and the tensors' bytes without
gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ...errors import ConfigError
from ...lora.layout import Shape

# The dtypes that an adapter can be folded into. Narrower ones are values of a quantisation, whose
# scales are elsewhere.
FOLDED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Those of tensors that an adapter's file may replace, such as a batch norm's counter.
REPLACED = FOLDED | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorAt:
    """A tensor in a file.

    Attributes:
        name: its name.
        code: its dtype as the header has it ("BF16").
        shape: its shape.
        start: its first byte in the file.
        stop: the byte after its last.
    """

    name: str
    code: str
    shape: Shape
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype, or None if nothing can be folded into it."""
        return FOLDED.get(self.code)


@dataclass(frozen=True)
class WeightsFile:
    """A .safetensors file.

    Attributes:
        path: of the file.
        size: of the file, in bytes.
        start: the first byte of its tensors.
        tensors: its tensors, in the order of their bytes.
        metadata: the header's texts by name.
    """

    path: Path
    size: int
    start: int
    tensors: tuple[TensorAt, ...]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> WeightsFile:
        """Read the header of a file.

        Raises:
            ConfigError: the file cannot be read, or is damaged.
        """
        try:
            with safe_open(path, framework="pt"):  # checks the header and the file's size
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                size = file.seek(0, 2)
        except OSError as error:
            raise ConfigError(f"checkpoint {path}: {error.strerror or error}.") from error
        except Exception as error:  # on damaged bytes, safetensors may raise anything
            raise ConfigError(
                f"checkpoint {path} is damaged, or no .safetensors file: {error}."
            ) from error
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        found = [
            TensorAt(
                name, of["dtype"], tuple(of["shape"]), *(start + n for n in of["data_offsets"])
            )
            for name, of in header.items()
        ]
        tensors = tuple(sorted(found, key=lambda tensor: (tensor.start, tensor.stop)))
        return cls(path, size, start, tensors, metadata)
