"""What injection adds, as it starts."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError, InjectError
from ..lora.inits import FILLS, STARTS, embedding
from ..lora.ops import LOOKUPS
from ..lora.variants import VARIANTS
from ..plan import Entry
from .adapted_weight import sum_matrix


@torch.no_grad()
def new_tensors(entry: Entry, weight: torch.Tensor) -> dict[str, nn.Parameter]:
    """Fresh A and B for an entry, and what its variants hold beside them, by name.

    They are on the weight's device and in its dtype; what the entry does not train is frozen.
    """
    if entry.rows is not None:
        start, stop = entry.rows
        weight = weight.narrow(entry.layout.part_dim, start, stop - start)
    try:
        started = _started(entry, weight)
    except RuntimeError as error:  # of a kernel, or of a decomposition that does not converge
        raise InjectError(
            f"'{entry.site}' ({weight.dtype}, init_lora_weights={entry.init!r}): A and B cannot "
            f"start: {error} The weight must be of a dtype that torch computes in, and finite "
            "where they start from its values. Convert it, or take another init."
        ) from error
    a, b = entry.layout.packed(*started, entry.covered)
    if entry.padding_idx is not None:
        # No gradient reaches this column, so the row it stands for stays as it was for good.
        a.select(-1, entry.padding_idx).zero_()
    tensors = {entry.name_a: a, entry.name_b: b}
    for variant, held in entry.extras.items():
        before = entry.upto(variant)  # what a variant starts from has those before it
        adapted = sum_matrix(before, weight, tensors)
        by_output = entry.layout.by_output(adapted, entry.covered)
        try:
            values = VARIANTS[variant].start(by_output, a, b)
        except ConfigError as error:
            raise ConfigError(f"'{entry.site}': {error}") from error
        tensors |= {n: v.reshape(held[n]) for n, v in zip(held, values, strict=True)}
    return {
        name: nn.Parameter(tensor.to(weight.dtype).contiguous(), name in entry.trainable)
        for name, tensor in tensors.items()
    }


def _started(entry: Entry, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A as (…, r, in) and B as (…, out, r), kernels flat."""
    stack, d0, d1 = entry.layout.sizes(entry.covered)
    size_i, size_o = (d0, d1) if entry.layout.in_first else (d1, d0)
    if start := STARTS.get(entry.init):
        matrix = entry.layout.matrix(weight, entry.covered)
        by_output = matrix.mT if entry.layout.in_first else matrix
        wide = by_output.to(torch.promote_types(weight.dtype, torch.float32))
        down, up = start(wide, entry.r, entry.scaling)
        return down.to(weight.dtype), up.to(weight.dtype)
    down = weight.new_empty(*stack, entry.r, size_i)
    up = weight.new_empty(*stack, size_o, entry.r)
    fill = embedding if entry.init is True and entry.op in LOOKUPS else FILLS[entry.init]
    fill(down, up)
    return down, up
