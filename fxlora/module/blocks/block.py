"""Block: an outlined submodule, which is in the module tree and is called like any module."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ...errors import InputError, SubmoduleError
from ...fx.autocast import current_autocast
from ..autocasts import UNKNOWN
from ..contract import ConstantInput, InputSpec
from ..guarded import Guarded, check_tensor
from ..host_attributes import DATA, is_private
from ..program import (
    FACADE,
    MODES,
    OUTER,
    Program,
    ProgramModule,
    code_of,
    forward_function,
    tensors_of,
)
from ..seal import Seal
from ..several_calls import CHOOSER, choosing_program, first_that_holds, signature_of_all
from ..submodules import (
    Container,
    NoAttributeError,
    container,
    may_note,
    plain_view,
    subclass,
)
from .calls import BlockCall, Calls
from .checks import same


class BlockGraphs(ProgramModule):
    """Runs one graph of a block in each mode.

    It takes the source's arguments and returns the source's result.

    Attributes:
        path: the block's path in the whole model.
        only: the call that each mode's graph was captured for; empty if the graph is one that
            chooses among several.
    """

    path: str
    only: Mapping[str, BlockCall]

    @property
    def contract(self) -> InputSpec | None:
        call = self.only.get(self.mode)
        return call and (call.any_float if current_autocast() else call.inputs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.only:
            return super().run(args, kwargs)
        call = self.only[self.mode]
        pairs = call.inputs.pairs(args, kwargs)
        given = [value for leaf, value in pairs if not isinstance(leaf, ConstantInput)]
        leaves = self._forwards[self.training](self._view, *given)
        return pytree.tree_unflatten(leaves, call.recorded.output.structure)

    def check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().check_arguments(args, kwargs)
        self._check_alike(args, kwargs)
        self.program.autocasts.get(self.mode, UNKNOWN).check()

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._check(args, kwargs)
        try:
            self._check_alike(args, kwargs)
        except InputError as error:
            raise self._refusal(error) from None

    def _check_alike(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise InputError for two tensors where the graph has one, as for `self(x, x)`."""
        call = self.only.get(self.mode)
        if call is None or not call.alike:
            return
        pairs = call.inputs.pairs(args, kwargs)
        for index, other in call.alike:
            (one, value), (two, second) = pairs[index], pairs[other]
            if not same(value, second):
                raise InputError(
                    f"{one.name} and {two.name}: captured as one value that was given for both, "
                    "called with different ones (or with one whose gradient goes elsewhere). Give "
                    "the same for both, or capture a model that gives different ones."
                )

    def _refusal(self, error: InputError) -> InputError:
        return InputError(f"'{self.path}': {error}")


class _CallRunner(BlockGraphs):
    """Runs one of the calls of a block that has several in a mode, on the block's tensors."""

    _block: Block

    def __new__(cls, block: Block, call: BlockCall) -> _CallRunner:
        return object.__new__(_runner_class(code_of(call.graph)))

    def __init__(self, block: Block, call: BlockCall) -> None:
        only: dict[str, BlockCall] = dict.fromkeys(MODES, call)
        self.__dict__.update(_block=block, path=block.path, only=only)
        super().__init__(block, _program(block.path, only), type(block).__name__, training=True)

    def look(self) -> None:
        self.__dict__["_view"] = self._block.view()


class Block(Guarded, BlockGraphs):
    """A submodule whose part of the graph is a graph of its own, per mode and way of calling it.

    Hooks, wrappers, `train()` and `eval()` work on it as on any module, and it may be replaced.

    Attributes:
        calls: the calls of it, by mode.
        runners: runners of the calls, by mode; empty if each mode has one call.
    """

    calls: Calls
    runners: Mapping[str, Sequence[_CallRunner]]

    def __new__(cls, held: nn.Module, path: str, calls: Calls) -> Block:
        code = (code_of(graph) for graph in _program_for(path, calls).graphs.values())
        return object.__new__(_block_class(_source_class(held), *code))

    def __init__(self, held: nn.Module, path: str, calls: Calls) -> None:
        kind = _source_class(held)
        self.__dict__.update(_kind=kind, path=path, runners={})
        self._note(calls)
        super().__init__(held, _program_for(path, calls), kind.__name__, held.training)
        self._make_runners()

    def _note(self, calls: Calls) -> None:
        self.__dict__.update(calls=calls, only=_only(calls))

    def _make_runners(self) -> None:
        made = {} if self.only else self.calls
        self.runners = {mode: [_CallRunner(self, c) for c in of] for mode, of in made.items()}

    def renew(self, calls: Calls) -> None:
        """Take the graphs of the whole model after a change; hooks and wrappers stay."""
        self._note(calls)
        self.program = _program_for(self.path, calls)
        self._make_runners()
        self.forget_code()

    def look_from(self, outer: nn.Module) -> None:
        """Have the graphs' code find the tensors of the whole model, as `outer`."""
        self.__dict__["_outer"] = outer
        self.look()

    def look(self) -> None:
        self.__dict__["_view"] = self.view()
        for runner in (runner for runners in self.runners.values() for runner in runners):
            runner.look()

    def view(self) -> nn.Module:
        """Return the module that the code of the block's graphs runs on."""
        view = plain_view(self, self.wrapped_blocks())
        view.__dict__.update({FACADE: self, OUTER: self.__dict__.get("_outer"), CHOOSER: self})
        return view

    def wrapped_blocks(self) -> Mapping[int, nn.Module]:
        seal: Seal | None = self.__dict__.get("_seal")
        owner = seal.owner if seal else None
        return owner.wrapped_blocks() if isinstance(owner, ProgramModule) else {}

    @property
    def call_chooser(self) -> Block:
        """The block itself, for the graph that chooses (see module/several_calls.py)."""
        return self

    def chosen_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockGraphs:
        """Return the module whose graph runs a call in the block's mode.

        Raises:
            InputError: none of the captured calls is like this one.
        """
        return self._chosen(self.mode, args, kwargs)

    def _chosen(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockGraphs:
        if self.only:
            return self
        if not self.runners[mode]:
            raise self._refusal(InputError(f"the model was not seen to call it in {mode} mode."))
        try:
            return first_that_holds(self.runners[mode], args, kwargs)
        except InputError as error:
            raise self._refusal(error) from None

    def _sign(self, signature: inspect.Signature) -> None:
        contracts = [call.inputs for mode in MODES for call in self.calls[mode]]
        super()._sign(signature_of_all(contracts))

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seal: Seal = self.__dict__["_seal"]
        if self.training is not seal.owner.training and not self._modes_fit(args, kwargs):
            raise SubmoduleError(
                f"'{self.path}' takes or returns other things in train mode than in eval mode, so "
                "its mode cannot be set apart from the module's."
            )
        super()._check(args, kwargs)

    def _modes_fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether both modes take these arguments, and return the same structure."""
        chosen = (self._chosen(mode, args, kwargs).only[mode].recorded for mode in MODES)
        train, evaluation = chosen
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
        if name == "training" or isinstance(value, nn.Module):
            return True
        if is_private(name):
            return may_note(self, name, value, self.__dict__["_seal"])
        return name.startswith("_") or (
            hasattr(ProgramModule, name) and not isinstance(value, DATA)
        )

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


@functools.cache
def _runner_class(code: str) -> type[_CallRunner]:
    """Return the class of all runners whose graph has this code, as `_block_class` does."""
    names = {"__module__": __name__, "forward": forward_function()}
    return types.new_class("_CallRunner", (_CallRunner,), exec_body=lambda ns: ns.update(names))


def _only(calls: Calls) -> dict[str, BlockCall]:
    """Return the call of each mode if each has one, else nothing."""
    only = all(len(found) == 1 for found in calls.values())
    return {mode: found[0] for mode, found in calls.items()} if only else {}


def _program_for(path: str, calls: Calls) -> Program:
    return _program(path, only) if (only := _only(calls)) else choosing_program()


def _program(path: str, calls: Mapping[str, BlockCall]) -> Program:
    return Program(
        {mode: call.graph for mode, call in calls.items()},
        {mode: call.inputs for mode, call in calls.items()},
        path,
        autocasts={mode: call.autocasts for mode, call in calls.items()},
    )


def _source_class(held: nn.Module) -> type[nn.Module]:
    """Return the source's class of a container, or of a block over it."""
    if isinstance(held, Block):
        return held._kind
    return held.source_class if isinstance(held, Container) else nn.Module
