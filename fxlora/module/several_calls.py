"""A module with graphs for several calls of the whole model: the graph that chooses one of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..errors import InputError
from .autocasts import EVERY
from .contract import InputSpec
from .program import MODES, Program

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


def run_chosen(module: Any, args: Any, kwargs: Any) -> Any:
    """Run the graph of a captured module that holds for a call.

    This is the target of the only call in `choosing_program`. torch.fx's Interpreter, which knows
    no keywords, gives all arguments in a list.
    """
    args, kwargs = tuple(args), dict(kwargs)
    return module.chosen_call(args, kwargs)(*args, **kwargs)


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


def no_call_like(contracts: Sequence[InputSpec | None], refusals: Sequence[InputError]) -> str:
    """Return the message about a call that no graph holds for, with the reason of each."""
    reasons: dict[str, list[str]] = {}
    for contract, error in zip(contracts, refusals, strict=True):
        names = contract.names if contract else ()
        reasons.setdefault(str(error), []).append(f"({', '.join(names)})")
    why = " ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return f"none of the {len(contracts)} captured calls is like this one. {why}"
