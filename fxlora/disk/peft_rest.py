"""The tensors of PEFT's file besides its pairs: what trained in full, and base weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..module import CapturedModule
from ..module.sharded import whole
from ..plan import Plan
from ..tables import some
from .folder import Folder
from .peft_tensors import PeftTensors
from .saved import is_below, paths_of
from .values import same, tensor_of


@dataclass(frozen=True)
class Rest:
    """What a file holds besides pairs.

    Attributes:
        stored: values of parameters that train in full and of buffers, by name.
        trained: names of these parameters, in the module's order.
        untied: other names of each such tensor, which do not train with it.
        paths: the modules that PEFT wrapped for `modules_to_save`.
        missing: tensors of these modules that the file lacks.
        misshapen: the keys of tensors of another shape than the module's, with both shapes.
        clash: keys of other base weights than the module's, under adapters.
        notes: warnings.
    """

    stored: Mapping[str, torch.Tensor]
    trained: tuple[str, ...]
    untied: Mapping[str, tuple[str, ...]]
    paths: tuple[str, ...]
    missing: Sequence[str]
    misshapen: Sequence[str]
    clash: Sequence[str]
    notes: tuple[str, ...]

    def planned(self, plan: Plan) -> Plan:
        """Return a plan that also trains the parameters."""
        return dataclasses.replace(
            plan, trained=self.trained, untied=self.untied, modules_to_save=self.paths
        )


def rest_of(
    module: CapturedModule,
    content: Folder,
    tensors: PeftTensors,
    plan: Plan,
    biases: Mapping[str, torch.Tensor],
) -> Rest:
    """Sort out a file's tensors other than pairs.

    Args:
        module: the captured module.
        content: the folder.
        tensors: its tensors.
        plan: the adapters.
        biases: what the file adds to biases (PEFT's `lora_bias`), by name.
    """
    return _Sorted(module, content, tensors, plan).rest(biases)


@dataclass(frozen=True)
class _Sorted:
    module: CapturedModule
    content: Folder
    tensors: PeftTensors
    plan: Plan
    notes: list[str] = field(default_factory=list[str])

    def rest(self, biases: Mapping[str, torch.Tensor]) -> Rest:
        wrapped = self._wrapped()
        held = {name: whole(tensor_of(self.module, name).detach()) for name in self.tensors.rest}
        misshapen = [
            f"{self.tensors.keys[n]} ({tuple(t.shape)} in the file, {tuple(held[n].shape)} here)"
            for n, t in self.tensors.rest.items()
            if t.shape != held[n].shape
        ]
        stored = dict(self.tensors.rest)
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        for name, value in self.tensors.rest.items():
            if name in buffers or value.shape != held[name].shape:
                continue
            trains = self._path(name, wrapped) or self._is_bias(name)
            if not trains and same(held[name].cpu(), value.to(held[name].dtype)):
                del stored[name]  # a copy of the base's, as of embeddings
        adapted = {name for entry in self.plan for name in entry.names}
        clash = [self.tensors.keys[name] for name in stored if name in adapted]
        loose = [n for n in stored if n not in buffers and not self._path(n, wrapped)]
        if others := [n for n in loose if not self._is_bias(n) and n not in clash]:
            self.notes.append(
                f"holds other values of {some(others)} than the module, without training them by "
                "its configuration: they are loaded, and train in full."
            )
        for name, more in biases.items():
            now = stored.get(name, whole(tensor_of(self.module, name).detach()).cpu())
            stored[name] = now + more.to(torch.promote_types(now.dtype, more.dtype))
        trained, untied = self._ties(stored, buffers, wrapped)
        return Rest(
            stored={**{n: t for n, t in stored.items() if n in buffers}, **trained},
            trained=tuple(trained),
            untied=untied,
            paths=tuple(path for path in wrapped if any(is_below(n, path) for n in stored)),
            missing=self._missing(wrapped),
            misshapen=misshapen,
            clash=clash,
            notes=tuple(self.notes),
        )

    def _wrapped(self) -> tuple[str, ...]:
        """Return the modules that PEFT wraps: a name is the end of their paths, dot or not.

        Those inside of another one train with it.
        """
        names = filter(None, self.content.config.get("modules_to_save") or ())
        given = {self.content.names(str(name)): str(name) for name in names}
        ends = tuple({*given, *given.values()})
        found = [path for path in paths_of(self.module) if ends and path.endswith(ends)]
        return tuple(p for p in found if not any(p != o and is_below(p, o) for o in found))

    def _missing(self, wrapped: Sequence[str]) -> list[str]:
        """Return the tensors of wrapped modules that a file without renamed keys lacks."""
        if self.content.names:
            return []
        state = self.module.state_dict()
        named = [n for n in state if self._path(n, wrapped)]
        return [n for n in named if n not in self.tensors.rest]

    @staticmethod
    def _path(name: str, wrapped: Sequence[str]) -> str | None:
        return next((path for path in wrapped if is_below(name, path)), None)

    def _is_bias(self, name: str) -> bool:
        return self.content.config.get("bias") in ("all", "lora_only") and name.endswith("bias")

    def _ties(
        self, stored: Mapping[str, torch.Tensor], buffers: Mapping[str, Any], wrapped: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]]]:
        """Return the values of what trains, by one name for each tensor, and the ties it splits.

        The copies of wrapped modules are tensors of their own, unless the file has one value for
        all names. A value under another key goes into the base's tensor, under all its names.
        """
        trained: dict[str, torch.Tensor] = {}
        untied: dict[str, tuple[str, ...]] = {}
        for names in self.module.aliases().values():
            given = [name for name in names if name in stored]
            if not given or given[0] in buffers:
                continue
            first = stored[given[0]]
            alike = all(same(stored[name], first) for name in given)
            if len(given) == len(names) and alike:
                trained[names[0]] = first
                continue
            groups: dict[str | None, list[str]] = {}
            for name in names:
                groups.setdefault(self._path(name, wrapped), []).append(name)
            for mine in groups.values():
                if held := [stored[name] for name in mine if name in stored]:
                    trained[mine[0]] = held[0]
                    if others := tuple(name for name in names if name not in mine):
                        untied[mine[0]] = others
        return trained, untied
