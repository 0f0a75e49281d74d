"""What differs between a module and a checkpoint of the same model, and what covers it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import AdapterError
from ..module import CapturedModule
from ..module.sharded import whole
from ..names import shown
from ..plan import Entry, Plan
from ..tables import some


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a tuned model, under all names of the base.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, base: CapturedModule, tuned: nn.Module | Mapping[str, torch.Tensor]) -> Checkpoint:
        """Return the checkpoint of a module or a state dict.

        Raises:
            AdapterError: it has adapters, or other names, shapes or ties than the base.
        """
        if isinstance(tuned, CapturedModule) and tuned.plan is not None:
            raise AdapterError("the tuned module has adapters: give its fold (fxlora.fold).")
        held = tuned.state_dict() if isinstance(tuned, nn.Module) else tuned
        if not isinstance(held, Mapping):
            raise AdapterError(f"the tuned model is a module or a state dict, not {shown(tuned)}.")
        ours = base.state_dict()
        tensors = [t for t in (*ours.values(), *held.values()) if isinstance(t, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            raise AdapterError("nothing to compare: a model is on the meta device, without values.")
        problems = [
            ("has no", [name for name in ours if name not in held]),
            ("has also", [str(name) for name in held if name not in ours]),
            ("has other shapes of", [n for n, t in ours.items() if _other_shape(held.get(n), t)]),
        ]
        if said := [f"{what} {some(names)}" for what, names in problems if names]:
            raise AdapterError(
                f"the tuned model is not one of the base's: it {'; it '.join(said)}."
            )
        for names in base.aliases().values():
            apart = [n for n in names[1:] if not torch.equal(held[n], held[names[0]])]
            if apart:
                raise AdapterError(
                    f"'{names[0]}' and {some(apart)} are one weight in the base, and differ in the "
                    "tuned model: capture a base whose weights are untied."
                )
        return cls(held)

    def of_name(self, name: str) -> torch.Tensor:
        return whole(self.tensors[name]).detach()


def _other_shape(tuned: object, own: torch.Tensor) -> bool:
    return tuned is not None and getattr(tuned, "shape", None) != own.shape


@dataclass(frozen=True)
class Differences:
    """What differs from the base, besides what the adapters approximate.

    Attributes:
        in_full: names of what takes the tuned values: parameters that the plan trains, and buffers.
        left: what neither these nor adapters cover, with the size of its relative change.
    """

    in_full: tuple[str, ...]
    left: dict[str, float]

    @classmethod
    def of(cls, base: CapturedModule, checkpoint: Checkpoint, plan: Plan) -> Differences:
        """Return what differs, by the names in the base."""
        adapted: dict[str, list[Entry]] = {}
        for entry in plan:
            for name in entry.names:
                adapted.setdefault(name, []).append(entry)
        aliases = {name: names for names in base.aliases().values() for name in names}
        trained = {alias for name in plan.trained for alias in aliases[name]}
        parameters = dict(base.named_parameters(remove_duplicate=False))
        in_full: list[str] = []
        left: dict[str, float] = {}
        for name in base.state_dict():
            own = whole(parameters[name] if name in parameters else base.get_buffer(name)).detach()
            given = checkpoint.of_name(name).to(own.device)
            if torch.equal(own, given.to(own.dtype)):
                continue
            if name in trained or name not in parameters:
                in_full.append(name)
                continue
            rest = given.double() - own.double()
            for entry in adapted.get(name, ()):
                _cover(rest, entry)
            if bool(rest.any()):
                left[name] = relative(float(rest.norm()), float(own.double().norm()))
        return cls(tuple(in_full), left)


def _cover(change: torch.Tensor, entry: Entry) -> None:
    """Set the part of a change to zero that an adapter may have, in place."""
    dim = entry.layout.part_dim
    start, stop = entry.rows or (0, change.shape[dim])
    padding = None if entry.padding_idx is None else change[entry.padding_idx].clone()
    change.narrow(dim, start, stop - start).zero_()
    if entry.padding_idx is not None and padding is not None:
        change[entry.padding_idx] = padding


def relative(size: float, of: float) -> float:
    """Return a size as a share of another; 0 of nothing is 0."""
    if size == 0:
        return 0.0
    return size / of if of else math.inf
