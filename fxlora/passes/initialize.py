"""Initial values of the parameters that injection adds."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError, InjectError
from ..lora.inits import FILLS, STARTS, embedding
from ..lora.ops import is_lookup
from ..lora.variants import VARIANTS
from ..module.adapted_weight import sum_matrix
from ..module.quantised import dequantised
from ..plan import Entry


@torch.no_grad()
def new_tensors(entry: Entry, weight: torch.Tensor) -> dict[str, nn.Parameter]:
    """Return new parameters for an entry, by name: A, B and the tensors of its variants.

    They have the device of the weight, and the entry's dtype over it. Those that the entry does not
    train are frozen.

    Args:
        weight: the whole weight, also for an entry that adapts a part of it.

    Raises:
        InjectError: torch cannot compute A and B from this weight.
        ConfigError: the init does not allow the rank, or a variant does not allow the weight.
    """
    if entry.variants or entry.init in STARTS or entry.rows:  # others need only its shape
        weight = dequantised(weight)
    if entry.rows is not None:
        start, stop = entry.rows
        weight = weight.narrow(entry.layout.part_dim, start, stop - start)
    try:
        started = _started(entry, weight)
    except RuntimeError as error:  # no kernel for the dtype, or a decomposition does not converge
        raise InjectError(
            f"'{entry.site}' ({weight.dtype}, init_lora_weights={entry.init!r}): A and B cannot "
            f"be initialized: {error} The weight must have a dtype that torch can compute in and, "
            "if the init uses its values, be finite. Convert it, or use another init."
        ) from error
    a, b = entry.layout.with_kernels(*started, entry.adapted_shape)
    if entry.padding_idx is not None:
        # No gradient reaches this column: it stays zero, and W0's padding row stays unchanged.
        a.select(-1, entry.padding_idx).zero_()
    tensors = {entry.name_a: a, entry.name_b: b}
    for variant, held in entry.variant_tensors.items():
        before = entry.before_variant(
            variant
        )  # a variant starts from V with those before it applied
        # V as the graph computes it, so that the variant starts as the identity: (…, d0, d1)
        cast = {name: tensor.to(weight.dtype) for name, tensor in tensors.items()}
        adapted = sum_matrix(before, weight, cast)
        outputs_first = entry.layout.outputs_first(adapted, entry.adapted_shape)
        wide = outputs_first.to(torch.promote_types(weight.dtype, a.dtype))
        try:
            values = VARIANTS[variant].start(wide, a, b)
        except ConfigError as error:
            raise ConfigError(f"'{entry.site}': {error}") from error
        tensors |= {n: v.reshape(held[n]) for n, v in zip(held, values, strict=True)}
    return {
        name: nn.Parameter(tensor.to(a.dtype).contiguous(), name in entry.trainable)
        for name, tensor in tensors.items()
    }


def _started(entry: Entry, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the initial A (…, r, in) and B (…, out, r), with kernel dimensions flattened."""
    dtype = entry.dtype_over(weight.dtype)
    if entry.tokens:
        return _selected(entry, weight, dtype)
    stack, d0, d1 = entry.layout.sizes(entry.adapted_shape)
    size_i, size_o = (d0, d1) if entry.layout.in_first else (d1, d0)
    if start := STARTS.get(entry.init):
        matrix = entry.layout.matrix(weight, entry.adapted_shape)
        outputs_first = matrix.mT if entry.layout.in_first else matrix  # (…, out, in)
        wide = outputs_first.to(torch.promote_types(weight.dtype, torch.float32))
        down, up = start(wide, entry.r, entry.scaling)
        return down.to(dtype), up.to(dtype)
    down = torch.empty(*stack, entry.r, size_i, dtype=dtype, device=weight.device)
    up = torch.empty(*stack, size_o, entry.r, dtype=dtype, device=weight.device)
    # An A of zeros would leave B without a gradient for ever if it does not train.
    looked_up = is_lookup(entry.op) and entry.layout.in_first
    drawn = looked_up and entry.name_a in entry.trainable
    fill = embedding if entry.init is True and drawn else FILLS[entry.init]
    fill(down, up)
    return down, up


def _selected(
    entry: Entry, weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (tokens, in) and B (out, tokens): a 1 for each token, and zeros to train."""
    rows, features = entry.shape
    tokens = torch.tensor(entry.tokens, device=weight.device)
    chosen = nn.functional.one_hot(tokens, rows).to(dtype)  # (tokens, rows)
    nothing = torch.zeros(features, len(tokens), dtype=dtype, device=weight.device)
    return (chosen, nothing) if entry.layout.in_first else (nothing.mT, chosen.mT)
