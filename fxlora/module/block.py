"""Block: an outlined submodule, which is in the module tree and is called like any module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ..errors import InputError, SubmoduleError
from ..fx.autocast import current_autocast
from .autocasts import UNKNOWN
from .block_checks import same
from .block_contract import of_any_dtype, within
from .contract import ConstantInput, InputSpec
from .outlining import FACADE, OUTER, ModuleCall, OutlinedGraph
from .program import Program, ProgramModule, code_of, forward_function, tensors_of
from .submodules import (
    Container,
    Guarded,
    NoAttributeError,
    Seal,
    check_tensor,
    container,
    plain_view,
    subclass,
)


class Block(Guarded, ProgramModule):
    """A submodule whose part of the graph is a graph of its own, per mode.

    It takes the source's arguments and returns the source's result. Hooks, wrappers, `train()` and
    `eval()` work on it as on any module, and it may be replaced.

    Attributes:
        path: its path in the whole model.
        calls: the recorded call, by mode.
        alike: pairs of leaves of the arguments, by index, that were one value at capture, by mode.
        any_dtype: the contract for calls under autocast, which accepts any dtype, by mode.
    """

    calls: Mapping[str, ModuleCall]
    alike: Mapping[str, Sequence[tuple[int, int]]]
    any_dtype: Mapping[str, InputSpec]

    def __new__(
        cls, held: nn.Module, path: str, graphs: Mapping[str, OutlinedGraph], whole: Program
    ) -> Block:
        code = (code_of(made.graph) for made in graphs.values())
        return object.__new__(_block_class(_source_class(held), *code))

    def __init__(
        self, held: nn.Module, path: str, graphs: Mapping[str, OutlinedGraph], whole: Program
    ) -> None:
        self.__dict__["_kind"] = _source_class(held)
        program = _program(path, graphs, whole)
        super().__init__(held, program, _source_class(held).__name__, held.training)
        self.path = path
        self._note(graphs)

    def _note(self, graphs: Mapping[str, OutlinedGraph]) -> None:
        """Store the recorded calls, and the contracts that a call is checked against."""
        self.calls = {mode: made.call for mode, made in graphs.items()}
        self.alike = {mode: sorted(made.alike) for mode, made in graphs.items()}
        inputs = self.program.inputs.items()
        self.any_dtype = {mode: of_any_dtype(spec) for mode, spec in inputs if spec}

    def renew(self, graphs: Mapping[str, OutlinedGraph], whole: Program) -> None:
        """Take the graphs of the whole model after a change; hooks and wrappers stay."""
        self.program = _program(self.path, graphs, whole)
        self._note(graphs)
        self._generated.clear()
        self._forwards.clear()
        self.look()
        self._select_graph()

    def look_from(self, outer: nn.Module) -> None:
        """Have the graphs' code find the tensors of the whole model, as `outer`."""
        self.__dict__["_outer"] = outer
        self.look()

    def look(self) -> None:
        view = plain_view(self)
        view.__dict__.update({FACADE: self, OUTER: self.__dict__.get("_outer")})
        self.__dict__["_view"] = view

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, contract = self.calls[self.mode], self.contract
        assert contract is not None
        pairs = contract.pairs(args, kwargs)
        given = [value for leaf, value in pairs if not isinstance(leaf, ConstantInput)]
        leaves = self._forwards[self.training](self._view, *given)
        return pytree.tree_unflatten(leaves, call.output.structure)

    def _refusal(self, error: InputError) -> InputError:
        return InputError(f"'{self.path}': {error}")

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seal: Seal = self.__dict__["_seal"]
        if self.training is not seal.owner.training and not self._alike():
            raise SubmoduleError(
                f"'{self.path}' takes or returns other things in train mode than in eval mode, so "
                "its mode cannot be set apart from the module's."
            )
        contract = self.any_dtype[self.mode] if current_autocast() else self.contract
        assert contract is not None
        try:
            contract.check(args, kwargs)
            self._check_alike(contract, args, kwargs)
            self.program.autocasts.get(self.mode, UNKNOWN).check()
        except InputError as error:
            raise self._refusal(error) from None

    def _check_alike(self, contract: InputSpec, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise InputError for two tensors where the graph has one, as for `self(x, x)`."""
        pairs = contract.pairs(args, kwargs) if self.alike[self.mode] else []
        for index, other in self.alike[self.mode]:
            (one, value), (two, second) = pairs[index], pairs[other]
            if not same(value, second):
                raise InputError(
                    f"{one.name} and {two.name}: captured as one value that was given for both, "
                    "called with different ones (or with one whose gradient goes elsewhere). Give "
                    "the same for both, or capture a model that gives different ones."
                )

    def _alike(self) -> bool:
        train, evaluation = self.calls["train"], self.calls["eval"]
        return train.names == evaluation.names and train.output == evaluation.output

    def __getattr__(self, name: str) -> Any:
        try:
            value = super().__getattr__(name)
        except AttributeError as error:
            raise NoAttributeError.of(error) from None
        seal: Seal | None = self.__dict__.get("_seal")
        return value if seal is None else seal.outside(self.path, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        seal: Seal | None = self.__dict__.get("_seal")
        if seal is not None and not (seal.open or self._may_set(name, value)):
            raise SubmoduleError(
                f"setting '{name}' of '{self.path}' would have no effect: its graph was captured "
                "with the value that the source had. Set it on the source model, and capture that."
            )
        super().__setattr__(name, value)
        if name == "training" and seal is not None:
            seal.owner_set(self)

    def train(self, mode: bool = True) -> Block:
        super().train(mode)
        if seal := self.__dict__.get("_seal"):
            seal.all_set(self)
        return self

    def _may_set(self, name: str, value: Any) -> bool:
        """Whether an attribute may be set: it has an effect, or is a framework's own note."""
        if name in self._parameters or name in self._buffers:
            check_tensor(self, name, value)
            return True
        if name.startswith("_") or hasattr(ProgramModule, name) or name == "training":
            return True
        return isinstance(value, nn.Module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a container: the module that a copy belongs to outlines it again."""
        made = memo[id(self)] = container(self._kind)
        made.training = self.training
        for name, held in tensors_of(self).items():
            made.__dict__[name] = copy.deepcopy(held, memo)
        return made


@functools.cache
def _block_class(kind: type[nn.Module], *code: str) -> type[Block]:
    """Return the class of all blocks of a source class whose graphs have this code.

    Because such blocks share one forward, torch.compile compiles their code only once.
    """
    names = {"__module__": kind.__module__, "forward": forward_function()}
    return subclass(kind, (Block,), names)


def _program(path: str, graphs: Mapping[str, OutlinedGraph], whole: Program) -> Program:
    made = {mode: found.graph for mode, found in graphs.items()}
    inputs = {mode: within(found.inputs, whole.inputs[mode]) for mode, found in graphs.items()}
    return Program(made, dict(inputs), path, autocasts=whole.autocasts)


def _source_class(held: nn.Module) -> type[nn.Module]:
    """Return the source's class of a container, or of a block over it."""
    if isinstance(held, Block):
        return held._kind
    return held.source_class if isinstance(held, Container) else nn.Module
