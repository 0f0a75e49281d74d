"""Pairs of several layers that the module holds as one weight: its parts, or a stack of experts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AdapterError
from ..names import is_word
from ..reads.sites import Site
from .folder import Folder
from .peft import ROOT
from .peft_tensors import Pair

Fields = Mapping[str, Any]  # of a LoraConfig
A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Adapted:
    """The adapters of one weight.

    Attributes:
        pair: the tensors.
        fields: of the LoraConfig.
        parts: the rows of the weight's parts, by name, or None if it is adapted as a whole.
        scaling: the scaling factor s, if it is not that of the fields.
    """

    pair: Pair
    fields: Fields
    parts: dict[str, tuple[int, int]] | None = None
    scaling: float | None = None


def fused(content: Folder, site: Site, pairs: Sequence[tuple[Pair, Fields]]) -> Adapted:
    """Return the adapters of a weight that fuses several layers of the file.

    The parts are in the order of the patterns that gave them the weight's name, experts in that of
    their numbers.

    Raises:
        AdapterError: the layers do not add up to the weight.
    """
    ordered = sorted(pairs, key=lambda given: _place(content, given[0]))
    names = [pair.prefix.removeprefix(ROOT) for pair, _ in ordered]
    rows = [pair.tensors[B].shape[0] for pair, _ in ordered if {A, B} <= pair.tensors.keys()]
    same = len({tuple(sorted(pair.tensors)) for pair, _ in ordered}) == 1
    experts = site.shape[0] if len(site.shape) == 3 else 1
    each = len(rows) // experts
    fits = same and len(rows) == len(pairs) == each * experts
    outputs = site.shape[-2:] if experts > 1 else (site.out_features,)
    if not fits or sum(rows[::experts]) not in outputs:
        raise AdapterError(
            f"{content.path} does not fit the module; {', '.join(names)} do not add up to "
            f"'{site.name}' {site.shape}."
        )
    if experts > 1:
        return _stacked(content, site, ordered, experts)
    alike = all(fields == ordered[0][1] for _, fields in ordered)
    last = [name.rpartition(".")[2] for name in names]
    if not alike or ordered[0][1]["use_dora"] or len(set(last)) < len(last):
        return _whole([pair for pair, _ in ordered], [fields for _, fields in ordered])
    pair = _joined([pair for pair, _ in ordered], [1.0] * len(ordered))
    ends = [sum(rows[: number + 1]) for number in range(len(rows))]
    words = [word if is_word(word) else f"part_{n}" for n, word in enumerate(last)]
    ranges = zip(words, ends, rows, strict=True)
    return Adapted(pair, ordered[0][1], {word: (end - size, end) for word, end, size in ranges})


def _place(content: Folder, pair: Pair) -> tuple[int, list[int], str]:
    """Return the place of a layer among those that are fused with it."""
    name = pair.prefix.removeprefix(ROOT)
    return content.names.number(f"{name}.{A}"), [int(n) for n in re.findall(r"\d+", name)], name


def _scaling(fields: Fields) -> float:
    r = fields["r"]
    return fields["lora_alpha"] / (math.sqrt(r) if fields["use_rslora"] else r)


def _joined(pairs: Sequence[Pair], scales: Sequence[float]) -> Pair:
    """Return one pair for several: the As below each other, the Bs as blocks on the diagonal."""
    scaled = list(zip(pairs, scales, strict=True))
    tensors = {
        A: torch.cat([pair.tensors[A] for pair in pairs]),
        B: torch.block_diag(*(_times(pair.tensors[B], scale) for pair, scale in scaled)),
    }
    if MAGNITUDE in pairs[0].tensors:
        tensors[MAGNITUDE] = torch.cat([pair.tensors[MAGNITUDE].flatten() for pair in pairs])
    if BIAS in pairs[0].tensors:
        tensors[BIAS] = torch.cat([_times(p.tensors[BIAS], scale) for p, scale in scaled])
    return dataclasses.replace(pairs[0], tensors=tensors, natural=True)


def _times(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """Return a product in at least float32, so that a scaled B is not rounded."""
    if scale == 1:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def _whole(pairs: Sequence[Pair], kinds: Sequence[Fields]) -> Adapted:
    """Return one adapter of the sum of the ranks, with the scalings in its B."""
    pair = _joined(pairs, [_scaling(fields) for fields in kinds])
    return Adapted(pair, _of_rank(kinds[0], pair.tensors[A].shape[0]), scaling=1.0)


def _of_rank(fields: Fields, r: int) -> Fields:
    return {**fields, "r": r, "lora_alpha": r, "use_rslora": False}


def _stacked(
    content: Folder, site: Site, ordered: Sequence[tuple[Pair, Fields]], experts: int
) -> Adapted:
    """Return the adapter of a stack, from a pair for each part of each expert."""
    biased = BIAS in ordered[0][0].tensors
    scales = {_scaling(fields) for _, fields in ordered}
    each = [[pair for pair, _ in ordered[number::experts]] for number in range(experts)]
    joined = [_joined(pairs, [1.0] * len(pairs)) for pairs in each]
    if biased or len(scales) > 1 or len({pair.tensors[A].shape for pair in joined}) > 1:
        raise AdapterError(
            f"{content.path} does not fit the module; the experts in '{site.name}' have biases or "
            "different ranks or scalings, which a stack has not."
        )
    down = torch.cat([pair.tensors[A] for pair in joined])  # (e·r, in)
    up = torch.stack([pair.tensors[B] for pair in joined]).permute(1, 2, 0).flatten(1)  # (out, r·e)
    pair = dataclasses.replace(joined[0], bare=True, tensors={A: down, B: up})
    rank = down.shape[0] // experts
    return Adapted(pair, _of_rank(ordered[0][1], rank), scaling=scales.pop())
