"""What a module returns in a wider dtype: the outputs that its own differ from by rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import FxLoraError
from ..module import CapturedModule
from ..module.program import ProgramModule
from ..module.quantised import is_quantised
from ..module.sizes import Arguments

_HALF = {torch.float16, torch.bfloat16}
# What a module may raise in another dtype than it was captured in, or for want of memory.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, FxLoraError)


class Wider:
    """A module in a wider dtype, which is made when it is asked for.

    Args:
        module: the module.
        runner: returns what runs the call of a module like it.
    """

    def __init__(
        self,
        module: CapturedModule,
        runner: Callable[[CapturedModule, Callable[[Any], Any]], ProgramModule],
    ) -> None:
        self._module, self._runner = module, runner
        tensors = [*module.parameters(), *module.buffers()]
        self._dtypes = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
        self._dtype = torch.float32 if self._dtypes <= _HALF else torch.float64
        known = self._dtypes <= {*_HALF, torch.float32} and bool(self._dtypes)
        self._exists = known and not any(map(is_quantised, tensors))

    def outputs(
        self, called: Arguments, returned: Callable[[Any], Any]
    ) -> tuple[torch.Tensor, ...] | None:
        """Return the tensors that a call returns, or None if the module has no wider dtype."""
        module = self._made if self._exists else None
        if module is None:
            return None
        args, kwargs = self._cast(called)
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                output = returned(module.forward(*args, **kwargs))
        except _FAILURES:
            return None
        return tuple(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))

    @functools.cached_property
    def _made(self) -> ProgramModule | None:
        try:
            return self._runner(self._module.derive().to(self._dtype), self._cast)
        except _FAILURES:
            return None

    def _cast(self, arguments: Any) -> Any:
        """Return copies of arguments, whose tensors follow the module's."""

        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            copied = leaf.detach().clone()
            return copied.to(self._dtype) if leaf.dtype in self._dtypes else copied

        return pytree.tree_map(cast, arguments)
