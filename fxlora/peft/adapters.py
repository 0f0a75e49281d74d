"""The adapters of one PeftModel: adapted modules over the same base tensors, and their hosts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
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
from .buffers import Buffers, is_saved, same
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
        loaded: whether the base has other weights than the user's model, from a state dict.
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
        self.loaded = False
        self._buffers = Buffers(base, self.modules)
        self._runs: tuple[CapturedModule, tuple[str, ...]] | None = None  # and with which adapters
        self._joined: dict[tuple[str, ...], CapturedModule] = {}  # of several adapters
        self._hosts: dict[int, nn.Module] = {}  # by the id of their module, which they keep alive

    def add(self, name: str, module: CapturedModule, config: LoraConfig) -> None:
        """Add an adapter, which is not active and so does not train.

        What is merged is not any more, as in PEFT.
        """
        self.merged = ()
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
        self.keep_buffers()
        key = tuple(name for name in self.modules if name in names)
        module = self.modules[key[0]] if len(key) == 1 else self._joined.get(key)
        if module is None:
            module = joined(self.base, [self.modules[name] for name in key])
            self._joined[key] = module
        self._buffers.give(module, key)
        return module

    def running(self) -> nn.Module:
        """Return the host of the module that is to run."""
        names = (self.merged or self.active) if self.enabled else ()
        if names:
            module = self.with_active(names)
        else:
            self.keep_buffers()
            module = self.base
        if folded := bool(self.enabled and self.merged):
            module = fold(module, quantised=self.quantised)
        self._runs = (module, names)
        return hosted(self.source, module) if folded else self._host(module)

    def keep_buffers(self) -> None:
        """Hold the buffers of the module that runs, for those that will run or be made."""
        if self._runs is not None:
            module, names = self._runs
            folded = bool(names) and module.plan is None
            self._buffers.keep(module, names, folded=folded)

    def _host(self, module: CapturedModule) -> nn.Module:
        if id(module) not in self._hosts:
            self._hosts[id(module)] = hosted(self.source, module)
        return self._hosts[id(module)]

    def train_only(self, names: Sequence[str], requires_grad: bool = True) -> None:
        """Set which adapters train: these, or none."""
        for name, module in self.modules.items():
            set_trained(module, name in names and requires_grad)

    def left_out(self) -> list[str]:
        """Return the active adapters that are not merged and adapt weights that those do not."""

        def adapted(name: str) -> set[str]:
            plan = self.modules[name].plan
            assert plan is not None
            return {*plan.trained, *(n for entry in plan for n in entry.names)}

        merged = {weight for name in self.merged for weight in adapted(name)}
        return [n for n in self.active if n not in self.merged and adapted(n) - merged]

    def others(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what trains, by PEFT's names, of the adapters that are not in what runs."""
        for adapter, module in self._not_run():
            assert module.plan is not None
            for name in sorted(module.adapter_parameters()):
                yield name, module.get_parameter(name)
            for name in module.plan.trained:
                yield saved_name(name, adapter), module.get_parameter(name)

    def other_tensors(self) -> dict[str, torch.Tensor]:
        """Return `others`, with the buffers of the modules that these train in full."""
        self.keep_buffers()
        result: dict[str, torch.Tensor] = dict(self.others())
        for adapter, module in self._not_run():
            state = module.state_dict(keep_vars=True)
            buffers = {name: t for name, t in state.items() if not isinstance(t, nn.Parameter)}
            result |= {saved_name(n, adapter): t for n, t in buffers.items() if is_saved(module, n)}
        return result

    def _not_run(self) -> Iterator[tuple[str, CapturedModule]]:
        branches = self.active if self.enabled and not self.merged else ()
        yield from ((name, self.modules[name]) for name in self.modules if name not in branches)

    def saved_names(self) -> dict[str, str]:
        """Return what adapters have in place of tensors of the base: `others`' name of each."""
        return {
            saved_name(name, adapter): name
            for adapter, module in self.modules.items()
            for name in own_names(module)
        }

    def names_of_base(self) -> set[str]:
        """Return the names of the base's tensors that are also those of the module that runs."""
        assert self._runs is not None
        return self.base.state_dict().keys() - own_names(self._runs[0])

    def share_base(self, names: Collection[str]) -> None:
        """Give all modules the values that the one that runs has under some names of the base."""
        assert self._runs is not None
        runs, _ = self._runs
        self.loaded |= runs is self.base
        held = runs.state_dict()
        for module in (self.base, *self.modules.values()):
            own, before = own_names(module), module.state_dict()
            wanted = (
                [n for n in names if n in before and n not in own] if module is not runs else ()
            )
            changed = {name: held[name] for name in wanted if not same(before[name], held[name])}
            if changed:
                self.loaded |= module is self.base
                module.load_state_dict(changed, strict=False)
        self._forget([n for n, module in self._joined.items() if module is not runs])

    def remove(self, name: str) -> None:
        self.keep_buffers()
        self._runs = None
        self._hosts.pop(id(self.modules.pop(name)), None)
        self._forget([names for names in self._joined if name in names])
        del self.configs[name]

    def _forget(self, several: Sequence[tuple[str, ...]]) -> None:
        """Drop modules of several adapters: the next use makes them anew."""
        for names in several:
            self._hosts.pop(id(self._joined.pop(names)), None)

    def apply(self, fn: Fn) -> None:
        """Move all modules, whose shared tensors stay shared."""
        self.keep_buffers()
        self._runs = None
        every = [self.base, *self.modules.values(), *self._joined.values()]
        once = _once_for_shared(every, fn)
        for module in every:
            module._apply(once)

    def copied(self, memo: dict[int, Any]) -> Adapters:
        """Return copies of all modules. The source stays the same."""
        self.keep_buffers()
        result = Adapters(self.source, copy.deepcopy(self.base, memo))
        for name, module in self.modules.items():
            result.add(name, copy.deepcopy(module, memo), self.configs[name])
        result.active, result.enabled, result.loaded = self.active, self.enabled, self.loaded
        result.merged, result.quantised = self.merged, self.quantised
        return result


def set_trained(module: CapturedModule, requires_grad: bool) -> None:
    """Set whether a module's adapter and its parameters trained in full train."""
    assert module.plan is not None
    for name in (*(n for entry in module.plan for n in entry.trainable), *module.plan.trained):
        module.get_parameter(name).requires_grad_(requires_grad)


def saved_name(name: str, adapter: str) -> str:
    """Return PEFT's name of a parameter that an adapter trains in full."""
    owner, _, last = name.rpartition(".")
    return f"{owner}.modules_to_save.{adapter}.{last}".removeprefix(".")


def own_names(module: CapturedModule) -> set[str]:
    """Return all names of the tensors that a module has in place of the base's."""
    state = module.state_dict(keep_vars=True)
    trained = () if module.plan is None else module.plan.trained
    own = {id(state[name]) for name in trained}
    return {name for name, tensor in state.items() if id(tensor) in own or is_saved(module, name)}


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
