"""Shell: the source model's own Python around captured regions."""

from __future__ import annotations

import copy
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .errors import InputError, UnsupportedOpError
from .program import MODES, Program, ProgramModule


@dataclass(frozen=True, eq=False)
class RegionCall:
    """A call of a region, and what it returned."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(eq=False)
class Shell:
    """A copy of the source's modules, over the captured tree's tensors; regions run their graphs.

    Attributes:
        module: the copy.
        training: the mode that the source was captured in.
        flags: the training flag of every submodule in that mode, by path.
        reads: where Python reads a parameter outside of every region, by the parameter's name.
        why: why the model has no whole graph.
    """

    module: nn.Module
    training: bool
    flags: Mapping[str, bool]
    reads: Mapping[str, str]
    why: str
    _recorded: list[RegionCall] | None = field(default=None, init=False)

    def copied(self) -> Shell:
        """Other modules of the same kind, to be bound to another tree."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        module = copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})
        return Shell(module, self.training, self.flags, self.reads, self.why)

    def bind(self, tree: nn.Module, runners: Sequence[ProgramModule]) -> None:
        """Take the tensors of a tree, and run its regions."""
        containers = dict(tree.named_modules(remove_duplicate=False))
        for path, module in self.module.named_modules(remove_duplicate=False):
            if path in containers:  # a module without tensors has none
                module._parameters = containers[path]._parameters
                module._buffers = containers[path]._buffers
        for path in {runner.program.path for runner in runners}:
            own = [runner for runner in runners if runner.program.path == path]
            self.module.get_submodule(path).forward = _Region(self, path, own)

    @contextmanager
    def recorded(self) -> Generator[list[RegionCall]]:
        """Fills a list with the calls of regions."""
        calls: list[RegionCall] = []
        self._recorded = calls
        try:
            yield calls
        finally:
            self._recorded = None

    def kept(self, values: Any) -> Any:
        """A copy, if calls are recorded: Python may write into what a region takes and gives."""
        return values if self._recorded is None else pytree.tree_map(_copied, values)

    def note(self, path: str, given: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> None:
        """Keep a call of a region, if calls are recorded."""
        if self._recorded is not None:
            self._recorded.append(RegionCall(path, *given, self.kept(output)))

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one region."""
        region: Any = self.module.get_submodule(path).forward
        return region(*args, **kwargs)

    def choose(self, training: bool) -> None:
        """Take a mode; in the one that the source was in, flags are as they were there."""
        self.module.train(training)
        if training == self.training:
            for path, flag in self.flags.items():
                self.module.get_submodule(path).training = flag

    def shade(self, names: Collection[str]) -> None:
        """Put these parameters, which regions adapt, out of the reach of Python, and no others."""
        for path, module in self.module.named_modules(remove_duplicate=False):
            for name in module._parameters:
                full = f"{path}.{name}" if path else name
                if full in names:
                    module.__dict__[name] = _OutOfReach(full, module)
                elif isinstance(module.__dict__.get(name), _OutOfReach):
                    del module.__dict__[name]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def shell_program() -> Program:
    """The graph of a module whose regions are called by Python: one call of its shell."""
    graph = fx.Graph()
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    shell = graph.get_attr("shell")
    graph.output(graph.call_function(run_shell, (shell, args, kwargs)))
    return Program(dict.fromkeys(MODES, graph), dict.fromkeys(MODES))


def run_shell(shell: Shell, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the source's Python."""
    return shell(args, kwargs)


class _Region:
    """What stands in the place of a region's forward: the first of its graphs that holds."""

    def __init__(self, shell: Shell, path: str, runners: Sequence[ProgramModule]) -> None:
        self.shell, self.path = shell, path
        self.runners = tuple(runners)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for runner in self.runners:
            spec = runner.program.inputs[runner.mode]
            if spec is None or spec.holds_for(args, kwargs):
                given = self.shell.kept((args, kwargs))
                output = runner.forward(*args, **kwargs)
                if spec is not None:
                    spec.update(args, kwargs, output)
                self.shell.note(self.path, given, output)
                return output
        raise InputError(f"region '{self.path}': {self._refusal(args, kwargs)}")

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why the first graph does not hold, and how many others do not either."""
        first, *others = self.runners
        spec = first.program.inputs[first.mode]
        assert spec is not None
        try:
            spec.check(args, kwargs)
        except InputError as error:
            return f"{error}" + (f" ({len(others)} other graphs fit no better)" if others else "")
        raise AssertionError("the first graph holds")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Region:
        return self  # a copied shell is bound anew


# What is the same of a weight with an adapter and without.
_UNCHANGED = frozenset(
    "dtype device shape size ndim dim numel layout stride itemsize element_size requires_grad "
    "is_cuda is_meta is_floating_point is_complex".split()
)


class _OutOfReach:
    """Stands for a parameter whose adapter Python's own reads would miss: any use raises.

    What an adapter does not change (dtype, device, shape) may be asked for.
    """

    def __init__(self, name: str, owner: nn.Module) -> None:
        self.__dict__.update(name=name, owner=owner)

    def refuse(self) -> UnsupportedOpError:
        return UnsupportedOpError(
            f"'{self.__dict__['name']}' is adapted in the captured regions, but here the model's "
            "Python reads it outside of them. Leave it out of the rules (Rule(name, lora=None))."
        )

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in _UNCHANGED:
            raise self.refuse()
        parameter = self.__dict__["owner"]._parameters[self.__dict__["name"].rpartition(".")[2]]
        return getattr(parameter, attribute)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OutOfReach:
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        values = [*args, *(kwargs or {}).values()]
        raise next(value for value in values if isinstance(value, cls)).refuse()
