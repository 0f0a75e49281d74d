"""The adapters of one PeftModel: adapted modules over the same base tensors, and their hosts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..api import fold
from ..config import LoraConfig
from ..errors import ConfigError
from ..hosts.host import hosted
from ..module import CapturedModule
from ..module.quantised import stored
from ..names import shown
from ..tables import some

Fn = Callable[[torch.Tensor], torch.Tensor]


class Adapters:
    """The adapters of a model, of which one runs; or the base model runs, or a merged one.

    Attributes:
        source: the user's model.
        base: the module captured from it, without adapters.
        modules: the adapted modules, by the names of their adapters. They share the memory of all
            weights that none of them trains.
        configs: their configurations.
        active: the name of the active adapter.
        enabled: whether it runs, and not the base model.
        merged: the name of the adapter that is merged, or None.
        quantised: what a merge does with quantised weights, as for `fold`.
    """

    def __init__(self, source: nn.Module, base: CapturedModule) -> None:
        self.source = source
        self.base = base
        base.requires_grad_(False)  # it runs where the adapters are disabled, and never trains
        self.modules: dict[str, CapturedModule] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active = ""
        self.enabled = True
        self.merged: str | None = None
        self.quantised: str | None = None
        self._hosts: dict[int, nn.Module] = {}  # by the id of their module, which they keep alive

    def add(self, name: str, module: CapturedModule, config: LoraConfig) -> None:
        """Add an adapter, which is not active and so does not train."""
        self.modules[name] = module
        self.configs[name] = config
        self.active = self.active or name

    def check_new(self, name: str) -> None:
        """Raise ConfigError if there is an adapter of this name already."""
        if name in self.modules:
            raise ConfigError(f"there is an adapter {shown(name)} already: give another name.")

    def check_known(self, name: str) -> None:
        """Raise ConfigError unless there is an adapter of this name."""
        if name not in self.modules:
            raise ConfigError(f"no adapter {shown(name)}: there are {some(self.modules)}.")

    def running(self) -> nn.Module:
        """Return the host of the module that is to run."""
        if not self.enabled:
            return self._host(self.base)
        module = self.modules[self.active]
        if self.merged is None:
            return self._host(module)
        return hosted(self.source, fold(module, quantised=self.quantised))

    def _host(self, module: CapturedModule) -> nn.Module:
        if id(module) not in self._hosts:
            self._hosts[id(module)] = hosted(self.source, module)
        return self._hosts[id(module)]

    def train_only(self, name: str, requires_grad: bool = True) -> None:
        """Set which adapter trains: this one, or none."""
        for other, module in self.modules.items():
            set_trained(module, other == name and requires_grad)

    def others(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters of the adapters that are not active, by PEFT's names."""
        for adapter, module in self.modules.items():
            plan = module.plan
            if adapter == self.active or plan is None:
                continue
            for name in sorted(module.adapter_parameters()):
                yield name, module.get_parameter(name)
            for name in plan.trained:
                owner, _, last = name.rpartition(".")
                path = f"{owner}.modules_to_save.{adapter}.{last}".removeprefix(".")
                yield path, module.get_parameter(name)

    def remove(self, name: str) -> None:
        self._hosts.pop(id(self.modules.pop(name)), None)
        del self.configs[name]

    def apply(self, fn: Fn) -> None:
        """Move all modules, whose shared tensors stay shared."""
        every = [self.base, *self.modules.values()]
        once = _once_for_shared(every, fn)
        for module in every:
            module._apply(once)

    def copied(self, memo: dict[int, Any]) -> Adapters:
        """Return copies of all modules. The source stays the same."""
        result = Adapters(self.source, copy.deepcopy(self.base, memo))
        for name, module in self.modules.items():
            result.add(name, copy.deepcopy(module, memo), self.configs[name])
        result.active, result.enabled = self.active, self.enabled
        result.merged, result.quantised = self.merged, self.quantised
        return result


def set_trained(module: CapturedModule, requires_grad: bool) -> None:
    """Set whether a module's adapter and its parameters trained in full train."""
    assert module.plan is not None
    for name in (*(n for entry in module.plan for n in entry.trainable), *module.plan.trained):
        module.get_parameter(name).requires_grad_(requires_grad)


def _once_for_shared(modules: list[CapturedModule], fn: Fn) -> Fn:
    """Return a move that gives parameters in one place of memory one result."""
    places: dict[int, tuple[Any, ...]] = {}
    for module in modules:
        for parameter in module.parameters():
            start = next(stored(parameter)).data_ptr()
            place = (start, parameter.shape, parameter.stride(), parameter.dtype)
            if parameter.numel() and parameter.device.type != "meta":
                places[id(parameter)] = (*place, parameter.device)
    moved: dict[tuple[Any, ...], torch.Tensor] = {}

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if (place := places.get(id(tensor))) is None:
            return fn(tensor)
        if place not in moved:
            moved[place] = fn(tensor)
        return moved[place]

    return once
