"""A module with graphs for several calls: what runs each, and the graph that chooses one."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import fx

from ..errors import InputError
from .autocasts import EVERY
from .contract import InputSpec
from .outlining import FACADE
from .program import MODES, Program, ProgramModule

CHOOSER = "call_chooser"  # name under which the graph finds the captured module


def choosing_program() -> Program:
    """Return the program of such a module: it chooses the graph that holds for a call, and runs it.

    So whoever interprets or exports the module's graph, and not only its forward, gets the right
    one.
    """
    graph = fx.Graph()
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    module = graph.get_attr(CHOOSER)
    graph.output(graph.call_function(run_chosen, (module, args, kwargs)))
    return Program(
        dict.fromkeys(MODES, graph), dict.fromkeys(MODES), autocasts=dict.fromkeys(MODES, EVERY)
    )


class CallRunner(ProgramModule):
    """Runs one of the captured calls of a module, or one of its regions, on its tensors."""

    _owner: ProgramModule

    def __init__(self, owner: ProgramModule, program: Program, training: bool) -> None:
        self.__dict__["_owner"] = owner
        super().__init__(owner, program, type(owner).__name__, training)

    def look(self) -> None:
        super().look()
        self._view.__dict__[FACADE] = self._owner

    def running(self, graph: fx.Graph) -> fx.Graph:
        return self._owner.running(graph)


def run_chosen(module: Any, args: Any, kwargs: Any) -> Any:
    """Run the graph of a captured module that holds for a call.

    This is the target of the only call in `choosing_program`. torch.fx's Interpreter, which knows
    no keywords, gives all arguments in a list.
    """
    args, kwargs = tuple(args), dict(kwargs)
    return module.chosen_call(args, kwargs).forward(*args, **kwargs)  # hooks have run


_Runner = TypeVar("_Runner", bound=ProgramModule)


def first_that_holds(
    calls: Sequence[_Runner], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Runner:
    """Return the first module whose graph holds for a call.

    Raises:
        InputError: none does.
    """
    refusals: list[InputError] = []
    for call in calls:
        try:
            call.check_arguments(args, kwargs)
        except InputError as error:
            refusals.append(error)
        else:
            return call
    raise no_call_like(calls, refusals)


def signature_of_all(contracts: Sequence[InputSpec | None]) -> inspect.Signature:
    """Return a signature with the arguments of every call; those that not all have are optional."""
    names = [contract.names if contract else () for contract in contracts]
    always = [name for name in names[0] if all(name in others for others in names)]
    optional = [name for name in dict.fromkeys(itertools.chain(*names)) if name not in always]
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            *(inspect.Parameter(name, by_position) for name in ("self", *always)),
            *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in optional),
        ]
    )


def no_call_like(calls: Sequence[ProgramModule], refusals: Sequence[InputError]) -> InputError:
    """Return the error about a call that no graph holds for, with the reason of each."""
    if len(refusals) == 1:
        return refusals[0]
    reasons: dict[str, list[str]] = {}
    for call, error in zip(calls, refusals, strict=True):
        names = call.contract.names if call.contract else ()
        reasons.setdefault(str(error), []).append(f"({', '.join(names)})")
    why = " ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return InputError(f"none of the {len(calls)} captured calls is like this one. {why}")
