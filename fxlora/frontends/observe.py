"""Run a model and record the calls of its submodules and the ops that read its parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from ..fx.effects import arguments_of
from ..fx.literals import same_literal
from ..module import example_calls
from ..module.constants import CONSTANTS
from ..module.memory import memory_id
from ..module.program import MODES
from .caller_modes import contexts, under
from .kept.generators import Draws, current
from .kept.undisturbed import mode_of, undisturbed
from .places import called_at
from .tree import attribute_that_reaches_modules, separate_copy

_LITERALS = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class TensorLike:
    """The shape, dtype and device of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return zeros of the given shape, with this dtype and device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a submodule.

    Attributes:
        mode: the model's mode at the call.
        structure: the pytree structure of `(args, kwargs)`.
        leaves: a TensorLike for each plain tensor, any other leaf as it is.
    """

    mode: str
    structure: Any
    leaves: tuple[Any, ...]

    @property
    def opaque(self) -> bool:
        """Whether a leaf is neither a plain tensor nor a constant."""
        return not all(isinstance(leaf, (TensorLike, *_LITERALS)) for leaf in self.leaves)

    def like(self, other: Call) -> bool:
        """Whether the calls differ at most in tensor sizes, so that one graph may serve both."""
        pairs = zip(self.leaves, other.leaves, strict=True)
        return self.structure == other.structure and all(_alike(a, b) for a, b in pairs)

    def cast_in(self, other: Call) -> frozenset[int] | None:
        """Return the numbers of the float32 leaves that are bfloat16 in another call.

        None if the calls differ in more.
        """
        if self.structure != other.structure:
            return None
        pairs = list(enumerate(zip(self.leaves, other.leaves, strict=True)))
        cast = {number for number, (leaf, found) in pairs if _is_cast(leaf, found)}
        same = all(number in cast or _alike(leaf, found) for number, (leaf, found) in pairs)
        return frozenset(cast) if same else None

    def inputs(
        self, tensors: Sequence[torch.Tensor] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `(args, kwargs)` like the call's, with the given tensors or else with zeros."""
        given = iter(tensors if tensors is not None else ())
        values = [
            leaf
            if not isinstance(leaf, TensorLike)
            else leaf.make(leaf.shape)
            if tensors is None
            else next(given)
            for leaf in self.leaves
        ]
        return pytree.tree_unflatten(values, self.structure)


@dataclass
class Observation:
    """The record of one run of the model per mode and call.

    Attributes:
        calls: the calls of each submodule, by path.
        reads: for each parameter that an op reads, by name: the paths of the submodules around
            the op, outermost first, mapped to the `file:line` of the first read inside them.
        failures: the exceptions that the model raised, by mode and number of the call.
        given: the model's inputs in each call.
        outcomes: the model's output tensors and its buffers after each call, by mode and
            number of the call.
        under_autocast: the calls of each submodule, by path, when the model's is made under
            autocast to bfloat16.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]])
    under_autocast: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]])
    reads: dict[str, dict[tuple[str, ...], str]] = field(
        default_factory=dict[str, dict[tuple[str, ...], str]]
    )
    failures: dict[tuple[str, int], Exception] = field(default_factory=dict[Any, Exception])
    given: Sequence[example_calls.Call] = ()
    outcomes: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict[Any, Any])

    def unrun(self) -> Exception | None:
        """Return the exception of the first call that ran in no mode, or None."""
        for number in range(len(self.given)):
            found = [self.failures.get((mode, number)) for mode in MODES]
            if all(found):
                return found[-1]
        return None

    def ran(self, module: nn.Module, mode: str, number: int) -> bool:
        """Whether a module's outcome of a call equals the model's, up to rounding.

        Args:
            module: the module to call, in this mode; the call may write to its buffers.
            mode: the mode.
            number: the number of a call that the model ran in this mode.
        """
        try:
            with undisturbed(module), Draws():
                found = outcome(module, *self.given[number])
        except Exception:  # noqa: BLE001 - any error is a difference: the model raised none
            return False
        expected = self.outcomes[mode, number]
        return len(found) == len(expected) and all(map(_same, found, expected))

    def outside(self, regions: set[str]) -> dict[str, str]:
        """Map each parameter that is read outside of all these submodules to where it is read."""
        found: dict[str, str] = {}
        for name, places in self.reads.items():
            for inside, line in places.items():
                if regions.isdisjoint(inside):
                    found.setdefault(name, line)
        return found


def observe(model: nn.Module, calls: Sequence[example_calls.Call]) -> Observation:
    """Run copies of the model (over the same parameters) in each mode, and record the runs."""
    seen = Observation(given=calls)
    for mode, (number, call) in itertools.product(MODES, enumerate(calls)):
        twin = separate_copy(model)
        try:
            with mode_of(twin, mode == "train"), Draws(), _Watch(twin, mode, seen):
                seen.outcomes[mode, number] = outcome(twin, *call)
        except CaptureError:  # a write to a parameter, which no copy of the model is safe from
            raise
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            seen.failures[mode, number] = error
    return seen


def observe_autocast(model: nn.Module, seen: Observation) -> None:
    """Run copies of the model under autocast to bfloat16, and record the calls of its submodules.

    They tell which inputs of a region autocast casts; to which dtype does not matter. A run that
    fails tells nothing, and the graphs of the regions then hold for no autocast.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    half = [context for context in contexts(devices) if context[0][1] is torch.bfloat16]
    runs = [key for key in seen.outcomes if len(half) == 1]
    for mode, number in runs:
        copied, found = separate_copy(model), Observation()
        try:
            with (
                mode_of(copied, mode == "train"),
                Draws(),
                _Watch(copied, mode, found),
                under(half[0]),
            ):
                outcome(copied, *seen.given[number])
        except Exception:  # noqa: BLE001 - the model may raise anything
            continue
        for path, calls in found.calls.items():
            seen.under_autocast.setdefault(path, []).extend(calls)


def outcome(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the output tensors of a call and the buffers after it, under a fixed seed."""
    args, kwargs = pytree.tree_map(_cloned, (args, kwargs))
    current().seed_all(0)
    leaves = pytree.tree_leaves(module(*args, **kwargs))
    _refuse_traces(module, leaves)
    buffers = [b for name, b in module.named_buffers() if not name.startswith(CONSTANTS)]
    return [t.detach() for t in (*leaves, *buffers) if isinstance(t, torch.Tensor)]


def _refuse_traces(module: nn.Module, outputs: Sequence[Any]) -> None:
    """Raise if the forward computed with a tensor of an earlier trace, which it kept somewhere."""
    if any(isinstance(output, FakeTensor) for output in outputs):
        raise CaptureError(
            f"{type(module).__name__} keeps a tensor that its forward makes in a place of Python's "
            "where a capture cannot put it back (a global object with __slots__, threading.local, "
            "a ContextVar, a large dict). It holds a tensor of the trace now: clear it. Call the "
            "model once before the capture, so that the tensor is made then."
        )


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.is_meta or not first.numel():
        return True
    if not first.is_floating_point():
        return bool((first == second).all())
    tolerance = 1000 * torch.finfo(first.dtype).eps
    return torch.allclose(first, second, tolerance, tolerance, equal_nan=True)


def refuse_closures(model: nn.Module, failure: CaptureError) -> None:
    """Raise if an attribute holds a function with a module or tensor in its closure.

    In a copy of the model, the function would still use the original.

    Raises:
        CaptureError: names the attribute.
    """
    if attribute := attribute_that_reaches_modules(model):
        raise CaptureError(
            f"{failure} Its submodules cannot be captured instead: '{attribute}' holds a function "
            "with a module or tensor in its closure, which a copy of the model would share. Make "
            "it a method."
        )


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


class _Watch(TorchDispatchMode):
    """Records calls of submodules, and ops on parameters with the submodules around each op."""

    def __init__(self, model: nn.Module, mode: str, seen: Observation) -> None:
        super().__init__()
        self.mode, self.seen = mode, seen
        self.inside: list[str] = []
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(memory_id(parameter), []).append(name)
        for path, module in model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                # Before the module's own hooks: an export of the module runs them, too.
                module.register_forward_pre_hook(
                    functools.partial(self._enter, path), prepend=True, with_kwargs=True
                )
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        leaves, structure = pytree.tree_flatten(_plain((args, kwargs)))
        call = Call(self.mode, structure, tuple(map(_described, leaves)))
        self.seen.calls.setdefault(path, []).append(call)
        self.inside.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, given in arguments_of(func, args, kwargs):
            for name in self._parameters(given):
                self._note(name)
                if argument.alias_info and argument.alias_info.is_write:
                    raise CaptureError(
                        f"{called_at()}: Python code outside of any graph writes in place to "
                        f"'{name}', a parameter of the source model. Copy it there before the "
                        "write."
                    )
        return func(*args, **kwargs)

    def _parameters(self, values: Any) -> Iterator[str]:
        """Yield the names of parameters among an op's arguments, also through views of them."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor):
                yield from self.names.get(memory_id(value), ())

    def _note(self, name: str) -> None:
        places = self.seen.reads.setdefault(name, {})
        inside = tuple(self.inside)
        if inside not in places:
            places[inside] = called_at()


def _plain(given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Replace each torch.Size among the arguments by a tuple, as torch.export does."""
    args, kwargs = given

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, torch.Size) else value

    return tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or type(leaf) not in (torch.Tensor, nn.Parameter):
        return leaf
    return TensorLike(tuple(leaf.shape), leaf.dtype, leaf.device)


def _is_cast(first: Any, second: Any) -> bool:
    """Whether two leaves are alike, but for the dtypes: float32 and bfloat16."""
    return (
        isinstance(first, TensorLike)
        and isinstance(second, TensorLike)
        and (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
        and (len(first.shape), first.device) == (len(second.shape), second.device)
    )


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, TensorLike) and isinstance(second, TensorLike):
        kinds = [(len(leaf.shape), leaf.dtype, leaf.device) for leaf in (first, second)]
        return kinds[0] == kinds[1]
    return same_literal(first, second)
