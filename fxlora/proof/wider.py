"""A module in a wider dtype: what its own outputs differ from is their error of rounding."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import FxLoraError
from ..module import CapturedModule
from ..module.quantised import is_quantised

HALF = frozenset({torch.float16, torch.bfloat16})
# What a module may raise in another dtype than it was captured in, or for want of memory.
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, FxLoraError)


class Draws(RuntimeError):
    """A module draws random numbers, which are others in a wider dtype."""


@contextmanager
def no_draws() -> Generator[None]:
    """Within the context, no random numbers may be drawn.

    Raises:
        Draws: some were.
    """
    before = _states()
    yield
    if not all(map(torch.equal, before, _states())):
        raise Draws


def _states() -> list[torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


class Wider:
    """A module in float32, if all of its numbers are in half precision, or else in float64.

    It is made when it is asked for, and takes memory for its own weights.
    """

    def __init__(self, module: CapturedModule) -> None:
        self._narrow = module
        tensors = [*module.parameters(), *module.buffers()]
        self._dtypes = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
        self._dtype = torch.float32 if self._dtypes <= HALF else torch.float64
        known = self._dtypes <= {*HALF, torch.float32} and bool(self._dtypes)
        self._exists = known and not any(map(is_quantised, tensors))

    @functools.cached_property
    def module(self) -> CapturedModule | None:
        """The module; None if there is no wider dtype, or none that its graph can follow into."""
        try:
            return self._narrow.derive().to(self._dtype) if self._exists else None
        except FAILURES:
            return None

    def cast(self, arguments: Any) -> Any:
        """Return copies of arguments, whose tensors follow the module's."""

        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            copied = leaf.detach().clone()
            return copied.to(self._dtype) if leaf.dtype in self._dtypes else copied

        return pytree.tree_map(cast, arguments)
