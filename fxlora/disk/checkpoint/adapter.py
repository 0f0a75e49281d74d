"""Read an adapter folder for a checkpoint: which of its tensors change, and how."""

from __future__ import annotations

import torch

from ...errors import AdapterError
from ...tables import some
from ..folder import Folder
from .base import Checkpoint
from .by_keys import by_keys
from .by_plan import by_plan
from .changes import Changes
from .model import Skeleton
from .ties import check_ties
from .weights_file import REPLACED


def changes_of(base: Checkpoint, content: Folder, model: Skeleton | None = None) -> Changes:
    """Return what an adapter folder changes in a checkpoint.

    The folder's `names` are what the user says of its names in the checkpoint.

    Raises:
        AdapterError: the adapter does not fit the checkpoint, or names or layouts are ambiguous.
        ConfigError: the model is not the checkpoint's.
    """
    if content.header is None:
        changes = by_keys(base, content, model)
    else:
        changes = by_plan(base, content, content.header, model)
    for name in (*changes.folded, *changes.replaced):
        known = base.tensors[name]
        given = changes.replaced.get(name)
        dtype = REPLACED.get(known.code)
        if given is not None and dtype is not None and not _holds(dtype, given):
            raise AdapterError(
                f"'{name}' is {known.code} in {base.path}, which cannot hold the {given.dtype} in "
                f"{content.path}, as in a quantised checkpoint. Fold into the checkpoint that it "
                "was made from."
            )
        if known.dtype is None and (name in changes.folded or known.code not in REPLACED):
            raise AdapterError(
                f"'{name}' is {known.code} in {base.path}, as in a quantised checkpoint, into "
                "which nothing can be folded exactly. Fold into the checkpoint that it was made "
                "from."
            )
    if twice := changes.folded.keys() & changes.replaced.keys():
        raise AdapterError(
            f"{content.path} has both a pair and the whole tensor for {some(sorted(twice))}: which "
            "of them counts is not known."
        )
    check_ties(base, content, changes, model)
    return changes


def _holds(dtype: torch.dtype, value: torch.Tensor) -> bool:
    """Whether a dtype can hold values: rounded if both have fractions, else exactly."""
    if dtype == value.dtype or (dtype.is_floating_point and value.is_floating_point()):
        return True
    if value.is_floating_point() or value.is_complex():
        return False
    return torch.equal(value.to(dtype).to(value.dtype), value)
