"""Whether several adapted modules are on one base: the same weights, buffers and names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import AdapterError
from ..module import CapturedModule
from ..module.sharded import whole
from ..tables import some


def check_bases(modules: Sequence[CapturedModule]) -> None:
    """Raise AdapterError unless all modules have the base weights and the buffers of the first.

    Weights that were written to since the adapter was injected count as others.
    """
    for module in modules:
        if changed := module.changed_weights():
            raise AdapterError(
                f"{some(changed)} was written to after the adapter was injected, so the adapters "
                "are not on one base. Save the adapters, and load all of them onto one captured "
                "model."
            )
    first, *others = modules
    for module in others:
        _check_names(first, module)
        if other := _other_weights(first, module):
            raise AdapterError(
                f"the adapters are on different bases: {some(other)} differs. Load all of them "
                "onto one captured model."
            )
        if other := _other_buffers(first, module):
            raise AdapterError(
                f"the adapters' modules differ in the buffers {some(other)}, as batch norms do "
                "after training. Choose which to keep: copy the buffers of one module to the "
                "others (other.get_buffer(name).copy_(one.get_buffer(name)))."
            )


def _check_names(first: CapturedModule, module: CapturedModule) -> None:
    ours, theirs = (
        {name for name, _ in m.named_parameters(remove_duplicate=False)} - m.adapter_parameters()
        for m in (first, module)
    )
    if differ := sorted(ours ^ theirs):
        raise AdapterError(
            f"the adapters are of different models: not all of them have {some(differ)}. Load all "
            "of them onto one captured model."
        )


def _other_weights(first: CapturedModule, module: CapturedModule) -> list[str]:
    """Return the names of weights that differ, other than those that one of the two trains."""
    marks, theirs = (_marks(m) for m in (first, module))
    return [
        name
        for name in marks.keys() & theirs.keys()
        if marks[name] != theirs[name] or (not marks[name] and not _is_one(first, module, name))
    ]


def _marks(module: CapturedModule) -> dict[str, int]:
    recorded = module.known.base_fingerprints
    return {name: mark for names, mark in recorded.items() for name in names}


def _is_one(first: CapturedModule, module: CapturedModule, name: str) -> bool:
    """Whether two weights without a fingerprint are one: on the meta device, or in one memory."""
    ours, theirs = first.get_parameter(name), module.get_parameter(name)
    if ours.is_meta or theirs.is_meta:
        return ours.is_meta and theirs.is_meta and ours.shape == theirs.shape
    return ours is theirs


def _other_buffers(first: CapturedModule, module: CapturedModule) -> list[str]:
    ours, theirs = (dict(m.named_buffers()) for m in (first, module))
    shared = [name for name in ours if name in theirs]
    return [n for n in shared if not _equal(whole(ours[n]), whole(theirs[n]))]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    return one.shape == other.shape and torch.equal(one, other.to(one.device))
