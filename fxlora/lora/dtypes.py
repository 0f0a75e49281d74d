"""The dtypes that A, B and parameters trained in full are held in.

A rule for them is True (float32, or the weight's dtype if that is wider), False (the weight's
dtype) or the name of a dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from ..names import shown

DtypeRule = bool | str

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module: "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_rule(value: Any, argument: str) -> DtypeRule:
    """Return a rule that a user gave, with a dtype as its name.

    Args:
        value: True, False, a dtype or the name of one ("float32", "torch.float32").
        argument: the argument's name, for the message.

    Raises:
        ConfigError: it is none of these, or a dtype in which nothing can be trained.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str | torch.dtype):
        name = str(value).removeprefix("torch.")
        if name in DTYPES:
            return name
    raise ConfigError(
        f"{argument} must be True, False or one of {', '.join(DTYPES)} (as a torch.dtype or a "
        f"name), not {shown(value)}."
    )


def held_dtype(rule: DtypeRule, weight: torch.dtype) -> torch.dtype:
    """Return the dtype that a rule gives over a weight of this dtype."""
    if isinstance(rule, str):
        return DTYPES[rule]
    if not rule or weight not in DTYPES.values():
        return weight
    return max(weight, torch.float32, key=lambda dtype: dtype.itemsize)


def rounds(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a conversion changes any value of a tensor; NaN counts as equal to NaN."""
    if value.dtype == dtype or value.is_meta:
        return False
    there_and_back = value.to(dtype).to(value.dtype)
    return not bool(((there_and_back == value) | (value != value)).all())


def correctly_rounded(
    exact: torch.Tensor,
    dtype: torch.dtype,
    into: torch.Tensor | None = None,
    single: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round float64 values to a dtype, once.

    torch converts float64 to a dtype of two bytes via float32, which rounds twice.

    Args:
        exact: the values.
        dtype: the dtype.
        into: the tensor to write to, of this dtype; by default a new one.
        single: contiguous memory of the same shape in float32, which is written to.
    """
    if dtype != torch.bfloat16 or exact.dim() < 2 or not exact.numel():
        found = exact if dtype.itemsize >= 4 else _rounded_via_odd(exact, dtype)
        return found.to(dtype) if into is None else into.copy_(found)
    if single is None:
        single = torch.empty(exact.shape, dtype=torch.float32, device=exact.device)
    rounded = torch.empty_like(single, dtype=dtype) if into is None else into
    rounded.copy_(single.copy_(exact))
    # bfloat16 is the first half of float32. Rounding twice differs only where the first step gives
    # a number halfway between two of bfloat16, whose second half is 0x8000: the least of int16.
    # (So is the first half of a negative zero.)
    rows = (single.view(torch.int16).amin(-1) == -(2**15)).nonzero(as_tuple=True)
    if len(rows[0]):
        *among, column = (single[rows].view(torch.int32) << 16 == -(2**31)).nonzero(as_tuple=True)
        at = (*(row[among[0]] for row in rows), column)
        rounded[at] = _rounded_via_odd(exact[at], dtype)
    return rounded


def _rounded_via_odd(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round via float32 to a dtype of two bytes, the first time to odd.

    The last bit that float32 keeps is set if any bit that it drops is. Then the second rounding is
    that of `exact` (Boldo and Melquiond 2008, Emulation of FMA, theorem 3).
    """
    bits = exact.view(torch.int64)
    dropped = 2**29 - 1  # float64 keeps 52 bits of a fraction, float32 keeps 23
    odd = (bits & dropped).add_(dropped).bitwise_or_(bits).bitwise_and_(~dropped)
    return odd.view(torch.float64).to(torch.float32).to(dtype)
