"""The arguments of a host's call, as those of the captured call that it is like."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..errors import InputError
from ..fx.literals import same_literal
from ..module import CapturedModule
from ..module.contract import ConstantInput, InputSpec
from ..module.several_calls import no_call_like


def align(
    module: CapturedModule,
    method: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as those of the captured call that it is like.

    Raises:
        InputError: no captured call has an argument that is given, and not its default.
    """
    refusals: list[InputError] = []
    calls = module.captured_calls(method)
    if not calls:
        return args, kwargs  # the module refuses the call
    for call in calls:
        try:
            aligned = _align_with(call.contract, signature, args, kwargs)
            if call.contract is not None and len(calls) > 1:
                call.contract.check(*aligned, assume=False)
            return aligned
        except InputError as error:
            refusals.append(error)
    raise no_call_like(calls, refusals)


def _align_with(
    spec: InputSpec | None, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the captured arguments of a call; all others must have their default values.

    Raises:
        InputError: an argument that the graph was not captured with, and that is not the default.
    """
    parameters = list(signature.parameters.values())
    if spec is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return args, kwargs
    given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
    defaults = {p.name: p.default for p in parameters}
    for name, value in given.items():
        if name not in spec.names and not _is_default(value, defaults.get(name)):
            raise InputError(
                f"{name}: not among the captured arguments ({', '.join(spec.names)}), and "
                f"{_word(value)} may change the result. Capture again with it."
            )
    left_out = {n: v for n, v in _constants(spec).items() if _is_default(v, defaults.get(n))}
    given = left_out | given
    return (), {name: given[name] for name in spec.names if name in given}


def _constants(spec: InputSpec) -> dict[str, Any]:
    """Return the arguments that capture baked in as constants, by name."""
    found: dict[str, Any] = {}
    for name, leaves in zip(spec.names, spec.leaves, strict=True):
        if len(leaves) == 1 and isinstance(leaves[0], ConstantInput):
            found[name] = leaves[0].value
    return found


def _is_default(value: object, default: object) -> bool:
    """Whether passing a value is the same as leaving the argument out."""
    plain = type(value) in (bool, int, float, str)
    return value is default or (plain and same_literal(value, default))


def _word(value: object) -> str:
    return type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)[:40]
