"""What an adapter changes in a checkpoint: the weights to fold, and the tensors to replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...plan import Entry
from .prefix import Prefix
from .trained_over import TrainedOver


@dataclass(frozen=True)
class Fold:
    """The adapters of one weight.

    Attributes:
        entries: in the order in which they apply.
        values: their tensors, by name.
        base: the weight that they were trained over, if the adapter's file says.
    """

    entries: tuple[Entry, ...]
    values: Mapping[str, torch.Tensor]
    base: TrainedOver | None = None


@dataclass(frozen=True)
class Changes:
    """What happens to the tensors of a checkpoint, by their names there.

    Attributes:
        folded: weights that become W0 + s·BA.
        replaced: tensors that were trained in full, or buffers; as the adapter's file has them.
        same: tensors that the file repeats, and that must be the checkpoint's own.
        prefix: how the adapter's names become the checkpoint's.
        untied: other names of replaced tensors, which do not change with them, by their names;
            None if the adapter does not say.
        together: other names of replaced tensors, which the adapter has, too, and the checkpoint
            has not: it holds one tensor for all names of a tie.
    """

    folded: Mapping[str, Fold]
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    same: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    prefix: Prefix = field(default_factory=Prefix)
    untied: Mapping[str, tuple[str, ...]] | None = None
    together: Mapping[str, set[str]] = field(default_factory=dict[str, set[str]])
