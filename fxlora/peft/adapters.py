"""The adapters of one PeftModel: adapted modules over the same base tensors, and their hosts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from .joined import joined

Fn = Callable[[torch.Tensor], torch.Tensor]


class Adapters:
    """The adapters of a model, of which some run; or the base model runs, or a merged one.

    Attributes:
        source: the user's model.
        base: the module captured from it, without adapters.
        modules: the adapted modules, by the names of their adapters. They share the memory of all
            weights that none of them trains.
        configs: their configurations.
        active: the names of the active adapters.
        enabled: whether they run, and not the base model.
        merged: the names of the adapters that are merged; empty if none is.
        quantised: what a merge does with quantised weights, as for `fold`.
    """

    def __init__(self, source: nn.Module, base: CapturedModule) -> None:
        self.source = source
        self.base = base
        base.requires_grad_(False)  # it runs where the adapters are disabled, and never trains
        self.modules: dict[str, CapturedModule] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.quantised: str | None = None
        self._joined: dict[tuple[str, ...], CapturedModule] = {}  # of several adapters
        self._hosts: dict[int, nn.Module] = {}  # by the id of their module, which they keep alive

    def add(self, name: str, module: CapturedModule, config: LoraConfig) -> None:
        """Add an adapter, which is not active and so does not train."""
        self.modules[name] = module
        self.configs[name] = config
        self.active = self.active or (name,)

    def check_new(self, name: str) -> None:
        """Raise ConfigError if there is an adapter of this name already."""
        if name in self.modules:
            raise ConfigError(f"there is an adapter {shown(name)} already: give another name.")

    def check_known(self, *names: str) -> None:
        """Raise ConfigError unless there are adapters of these names."""
        for name in names:
            if name not in self.modules:
                raise ConfigError(f"no adapter {shown(name)}: there are {some(self.modules)}.")

    def with_active(self, names: Sequence[str]) -> CapturedModule:
        """Return the module in which these adapters are active.

        Raises:
            ConfigError: there is none of such a name, or no name.
            InjectError: the adapters have no sum.
        """
        self.check_known(*names)
        if not names:
            raise ConfigError("give the name of an adapter; disable_adapter_layers runs the base.")
        key = tuple(name for name in self.modules if name in names)
        if len(key) == 1:
            return self.modules[key[0]]
        if key not in self._joined:
            self._joined[key] = joined(self.base, [self.modules[name] for name in key])
        return self._joined[key]

    def running(self) -> nn.Module:
        """Return the host of the module that is to run."""
        if not self.enabled:
            return self._host(self.base)
        if not self.merged:
            return self._host(self.with_active(self.active))
        folded = fold(self.with_active(self.merged), quantised=self.quantised)
        return hosted(self.source, folded)

    def _host(self, module: CapturedModule) -> nn.Module:
        if id(module) not in self._hosts:
            self._hosts[id(module)] = hosted(self.source, module)
        return self._hosts[id(module)]

    def train_only(self, names: Sequence[str], requires_grad: bool = True) -> None:
        """Set which adapters train: these, or none."""
        for name, module in self.modules.items():
            set_trained(module, name in names and requires_grad)

    def others(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters of the adapters that are not active, by PEFT's names."""
        for adapter, module in self.modules.items():
            plan = module.plan
            if adapter in self.active or plan is None:
                continue
            for name in sorted(module.adapter_parameters()):
                yield name, module.get_parameter(name)
            for name in plan.trained:
                owner, _, last = name.rpartition(".")
                path = f"{owner}.modules_to_save.{adapter}.{last}".removeprefix(".")
                yield path, module.get_parameter(name)

    def remove(self, name: str) -> None:
        gone = [self.modules.pop(name)]
        gone += [self._joined.pop(names) for names in list(self._joined) if name in names]
        for module in gone:
            self._hosts.pop(id(module), None)
        del self.configs[name]

    def apply(self, fn: Fn) -> None:
        """Move all modules, whose shared tensors stay shared."""
        every = [self.base, *self.modules.values(), *self._joined.values()]
        once = _once_for_shared(every, fn)
        for module in every:
            module._apply(once)

    def copied(self, memo: dict[int, Any]) -> Adapters:
        """Return copies of all modules. The source stays the same."""
        result = Adapters(self.source, copy.deepcopy(self.base, memo))
        for name, module in self.modules.items():
            result.add(name, copy.deepcopy(module, memo), self.configs[name])
        for names, module in self._joined.items():
            for tensor, held in _pairs(result.with_active(names), module):
                tensor.copy_(held)
        result.active, result.enabled = self.active, self.enabled
        result.merged, result.quantised = self.merged, self.quantised
        return result


def _pairs(
    copied: CapturedModule, module: CapturedModule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the buffers of a copy of a module, each with that of the module."""
    held = module.state_tensors()
    yield from ((tensor.detach(), held[name]) for name, tensor in copied.state_tensors().items())


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
