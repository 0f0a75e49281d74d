"""A module with graphs for several calls: the runner of each, and the graph that chooses one."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import fx, nn

from ..errors import InputError
from .autocasts import EVERY
from .contract import InputSpec, OtherArgumentsError, OtherStructureError
from .program import FACADE, MODES, Program, ProgramModule

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

    def wrapped_blocks(self) -> Mapping[int, nn.Module]:
        return self._owner.wrapped_blocks()

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
    """Return a signature with the arguments of every call; those that not all have are optional.

    Those that have the same position in all calls may be given by position.
    """
    names = [contract.names if contract else () for contract in contracts]
    leading = [found[: c and c.positional] for found, c in zip(names, contracts, strict=True)]
    columns = itertools.zip_longest(*leading)
    agreed = itertools.takewhile(lambda column: len({*column} - {None}) == 1, columns)
    positional = [next(name for name in column if name) for column in agreed]
    by_position, by_name = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    made = [inspect.Parameter("self", by_position)]
    for name in positional:
        after_optional = made[-1].default is None
        always = all(name in found for found in names) and not after_optional
        made.append(inspect.Parameter(name, by_position, default=_EMPTY if always else None))
    for name in dict.fromkeys(itertools.chain(*names)):
        if name not in positional:
            always = all(name in found for found in names)
            made.append(inspect.Parameter(name, by_name, default=_EMPTY if always else None))
    return inspect.Signature(made)


_EMPTY = inspect.Parameter.empty


def no_call_like(calls: Sequence[ProgramModule], refusals: Sequence[InputError]) -> InputError:
    """Return the error about a call that no graph holds for, with the reasons of the nearest."""
    if len(refusals) == 1:
        return refusals[0]
    nearest = min(map(_distance, refusals))
    reasons: dict[str, list[str]] = {}
    for call, error in zip(calls, refusals, strict=True):
        if _distance(error) == nearest:
            names = call.contract.names if call.contract else ()
            reasons.setdefault(str(error), []).append(f"({', '.join(names)})")
    why = " ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    only = "" if sum(map(len, reasons.values())) == len(calls) else " The nearest:"
    return InputError(f"none of the {len(calls)} captured calls is like this one.{only} {why}")


def _distance(error: InputError) -> int:
    """Return how far a call is from a captured one: a size or value, a structure, or arguments."""
    if isinstance(error, OtherArgumentsError):
        return 2
    return 1 if isinstance(error, OtherStructureError) else 0
