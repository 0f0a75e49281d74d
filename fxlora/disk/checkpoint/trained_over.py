"""Whether the weights of a checkpoint are those that an adapter was trained over.

fxlora's adapters have their fingerprints. They are computed from the pieces of a weight while it is
folded: a row of a fingerprint that begins in a piece is hashed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AdapterError, warn
from ...lora.dtypes import DTYPES
from ...module.fingerprints import ROW_BYTES, of_row_hashes, row_hashes
from ...tables import some
from ..folder import Folder
from ..trained_over import mark_text, recorded_weights

if TYPE_CHECKING:
    from .changes import Fold
    from .pieces import Rows
    from .weights_file import TensorAt


@dataclass(frozen=True)
class TrainedOver:
    """The weight under an adapter, as it was in training.

    Attributes:
        dtype: its dtype.
        mark: its fingerprint.
    """

    dtype: torch.dtype
    mark: str

    @classmethod
    def in_header(cls, content: Folder, header: Mapping[str, Any]) -> dict[str, TrainedOver]:
        """Return those of a folder by the names of weights.

        Raises:
            AdapterError: they are damaged.
        """
        if (base := header.get("base")) is None:
            return {}
        found = recorded_weights(content, base)
        return {name: cls(DTYPES[dtype], mark) for name, (dtype, mark) in found.items()}

    def comparable(self, dtype: torch.dtype | None) -> bool:
        """Whether a weight held in a dtype has all of its bits."""
        return dtype is not None and torch.promote_types(self.dtype, dtype) == dtype


def hashed_span(piece: Rows) -> tuple[int, int]:
    """Return the bytes (start, stop) of a piece's weight whose rows of a fingerprint are its."""
    base, dtype, tensor = piece.fold.base, piece.tensor.dtype, piece.tensor
    assert base is not None and dtype is not None
    step = ROW_BYTES // base.dtype.itemsize * dtype.itemsize  # of the file, for a row
    start, stop = (
        min(tensor.start + -(-(at - tensor.start) // step) * step, tensor.stop)
        for at in (piece.start, piece.stop)
    )
    return start, stop


def hashes(piece: Rows, content: torch.Tensor) -> torch.Tensor:
    """Return the row hashes of the bytes in a piece's `hashed_span`."""
    assert piece.fold.base is not None and piece.tensor.dtype is not None
    return row_hashes(content.view(piece.tensor.dtype).to(piece.fold.base.dtype))


def fingerprint_of(piece: Rows, found: list[torch.Tensor]) -> str | None:
    """Return the fingerprint of a piece's weight from the hashes of all its pieces."""
    if not found or piece.fold.base is None:
        return None
    return mark_text(of_row_hashes(torch.cat(found), piece.tensor.shape, piece.fold.base.dtype))


def comparable_marks(folded: Mapping[str, Fold], tensors: Mapping[str, TensorAt]) -> dict[str, str]:
    """Return the recorded fingerprints that those of a checkpoint's tensors can be compared to."""
    known = {name: fold.base for name, fold in folded.items() if fold.base is not None}
    return {n: base.mark for n, base in known.items() if base.comparable(tensors[n].dtype)}


def check_trained_over(
    path: object, folded: Mapping[str, Fold], marks: Mapping[str, str | None], strict: bool
) -> None:
    """Warn if weights are not those that their adapter was trained over.

    Args:
        path: the adapter, for messages.
        folded: what is folded into each weight.
        marks: the fingerprints of weights, as far as they are known.
        strict: whether to raise instead, also where it is not known.

    Raises:
        AdapterError: `strict`, and they are others or unknown.
    """
    known = {name: fold.base for name, fold in folded.items() if fold.base is not None}
    other = [n for n, base in known.items() if marks.get(n) not in (None, base.mark)]
    unknown = [name for name in folded if marks.get(name) is None]
    wider = [f"{n} ({known[n].dtype})" for n in unknown if n in known]
    said = ""
    if other:
        said = (
            f"the adapter was trained over other weights: {some(other)}. Fold it into the "
            "checkpoint that it was trained over, with the adapters folded that were folded there."
        )
    elif wider:
        said = (
            f"the adapter was trained over weights in a wider dtype: {some(wider)}. Whether they "
            "are the same is not known."
        )
    elif unknown and strict:
        said = (
            f"no fingerprint of {some(unknown)}, as it was in training (PEFT writes none): fold "
            "without strict_base (--strict-base)."
        )
    if said and strict:
        raise AdapterError(f"{path}: {said}")
    if said:
        warn(f"{path}: {said}")
