"""ParentModule: the source model's own Python code around captured regions."""

from __future__ import annotations

import copy
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedOpError
from .autocasts import EVERY
from .program import MODES, Program, ProgramModule


@dataclass(frozen=True, eq=False)
class RegionCall:
    """A recorded call of a region, or of a method of the whole module, with its output."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    method: str = "forward"


@dataclass(eq=False)
class ParentModule:
    """A copy of the source model over the captured tree's tensors, with regions run as graphs.

    Attributes:
        module: the copy.
        training: the mode that the source was in when it was captured.
        flags: the training flag of every submodule at that time, by path.
        reads: where Python reads a parameter outside of every region, by the parameter's name.
        why: why no graph covers the whole model.
    """

    module: nn.Module
    training: bool
    flags: Mapping[str, bool]
    reads: Mapping[str, str]
    why: str
    _tensors: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _tree: nn.Module = field(default_factory=nn.Module, init=False)
    _runners: tuple[ProgramModule, ...] = field(default=(), init=False)
    _mode: bool | None = field(default=None, init=False)
    _recorded: list[RegionCall] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self._tensors:
            parameters = self.module.named_parameters(remove_duplicate=False)
            buffers = self.module.named_buffers(remove_duplicate=False)
            self._tensors = {**dict(parameters), **dict(buffers)}

    def copied(self) -> ParentModule:
        """Return an unbound copy, to be bound to another tree; `bind` copies the modules."""
        return replace(self)

    def bind(
        self, tree: nn.Module, runners: Sequence[ProgramModule], adapted: Collection[str] = ()
    ) -> None:
        """Replace the modules' tensors by those of a tree, and run the regions' graphs.

        Args:
            tree: the module whose parameters and buffers to use.
            runners: the programs of the regions.
            adapted: names of the parameters that regions adapt; reading their values in Python
                outside of the regions raises.
        """
        tensors: dict[str, Any] = dict(tree.named_buffers(remove_duplicate=False))
        for name, parameter in tree.named_parameters(remove_duplicate=False):
            tensors[name] = _AdaptedParameter(name, parameter) if name in adapted else parameter
        memo = {id(old): tensors[name] for name, old in self._tensors.items() if name in tensors}
        self.module = copied_module(self.module, memo)
        self._tensors, self._tree = tensors, tree
        self._runners, self._mode = tuple(runners), None
        for path in {runner.program.path for runner in runners}:
            own = [runner for runner in runners if runner.program.path == path]
            region = self.module.get_submodule(path)
            region.forward = _Region(self, path, own)
            for hooks in (region._forward_hooks, region._forward_pre_hooks):
                hooks.clear()  # the graph contains them
        self._sync()

    def open(self, paths: Sequence[str]) -> None:
        """Run the source's own code in these regions, instead of their graphs."""
        for path in paths:
            self.module.get_submodule(path).__dict__.pop("forward", None)

    def _sync(self) -> None:
        """Update the modules' parameters and buffers to those that the tree holds now."""
        containers = dict(self._tree.named_modules(remove_duplicate=False))
        for path, module in self.module.named_modules(remove_duplicate=False):
            if path in containers:  # a module without tensors has no container
                module._buffers = containers[path]._buffers
                module.__dict__["_parameters"] = {
                    name: self._seen(_joined(path, name), parameter)
                    for name, parameter in containers[path]._parameters.items()
                }

    def _seen(self, name: str, parameter: nn.Parameter | None) -> Any:
        """Return a parameter as Python gets it: a stand-in that raises, if regions adapt it."""
        held = self._tensors.get(name)
        return held if isinstance(held, _AdaptedParameter) else parameter

    @contextmanager
    def recorded(self) -> Generator[list[RegionCall]]:
        """Record the calls of regions in a `with` block, in the list that it yields."""
        calls: list[RegionCall] = []
        self._recorded = calls
        try:
            yield calls
        finally:
            self._recorded = None

    def kept(self, values: Any) -> Any:
        """Return a copy while recording: Python may write into a region's inputs and outputs."""
        if self._recorded is None:
            return values
        tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        clones = {id(tensor): tensor.clone() for tensor in tensors}  # with their gradients
        return pytree.tree_map_only(torch.Tensor, lambda tensor: clones[id(tensor)], values)

    def note(self, path: str, given: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> None:
        """Add a call of a region to the recorded calls, while recording."""
        if self._recorded is not None:
            self._recorded.append(RegionCall(path, *given, self.kept(output)))

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the region at a path."""
        self._follow()
        region: Any = self.module.get_submodule(path).forward
        return region(*args, **kwargs)

    def _follow(self) -> None:
        """Take on the tree's mode; in the mode of the capture, restore the source's flags."""
        training = self._tree.training
        if self._mode is training:
            return
        self._mode = training
        self.module.train(training)
        for runner in self._runners:
            runner.training = training
        if training == self.training:
            for path, flag in self.flags.items():
                self.module.get_submodule(path).training = flag

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._sync()
        self._follow()
        return self.module(*args, **kwargs)


def copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a module.

    Tensors that a past forward left on it and that are part of an autograd graph are detached,
    because deepcopy refuses them.
    """
    for part in module.modules():
        for value in pytree.tree_leaves(list(part.__dict__.values())):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(module, memo)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def parent_program() -> Program:
    """Return the program of a module captured by regions: one call of its parent_module."""
    graph = fx.Graph()
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    parent_module = graph.get_attr("parent_module")
    graph.output(graph.call_function(run_parent, (parent_module, args, kwargs)))
    return Program(
        dict.fromkeys(MODES, graph), dict.fromkeys(MODES), autocasts=dict.fromkeys(MODES, EVERY)
    )


def run_parent(parent_module: ParentModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the source's Python code: the target of the only call in `parent_program`."""
    return parent_module(args, kwargs)


class _Region:
    """A region's forward: runs the first of its graphs whose contract accepts the call."""

    def __init__(
        self, parent_module: ParentModule, path: str, runners: Sequence[ProgramModule]
    ) -> None:
        self.parent_module, self.path = parent_module, path
        self.runners = tuple(runners)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner = self._chosen(args, kwargs)
        given = self.parent_module.kept((args, kwargs))
        output = runner(*args, **kwargs)
        self.parent_module.note(self.path, given, output)
        return output

    def _chosen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProgramModule:
        """Return the first runner that accepts a call, or else the first, which raises."""
        first, *others = self.runners
        if not others:
            return first
        return next((runner for runner in self.runners if runner.holds_for(args, kwargs)), first)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Region:
        return self  # bind() sets a new one on a copied parent module


# Attributes and methods of a weight that an adapter does not change.
_UNCHANGED = frozenset(
    (
        *("dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout", "stride"),
        *("itemsize", "element_size", "requires_grad", "is_cuda", "is_meta"),
        *("is_floating_point", "is_complex"),
    )
)


class _AdaptedParameter:
    """Replaces an adapted parameter in Python outside of the regions; computing with it raises.

    Python would read the parameter without its adapter. Properties that an adapter does not change
    (dtype, device, shape) are available.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.__dict__.update(name=name, parameter=parameter)

    def refuse(self) -> UnsupportedOpError:
        return UnsupportedOpError(
            f"'{self.__dict__['name']}' is adapted in the captured regions, but here the model's "
            "Python reads it outside of them. Leave it out of the rules (Rule(name, lora=None))."
        )

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in _UNCHANGED:
            raise self.refuse()
        return getattr(self.__dict__["parameter"], attribute)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AdaptedParameter:
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, cls):
                raise value.refuse()
        raise UnsupportedOpError(f"{func} reads an adapted weight outside of captured regions.")
