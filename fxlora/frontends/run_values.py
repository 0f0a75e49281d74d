"""The results of a run on fake tensors, as values that can be compared between runs.

A value identifies how numbers were computed: by which op, from which values. A tensor is described
by the value in its storage, with its dtype, sizes and strides. So two runs with equal results do
the same ops on the same numbers, whatever else they do in between: views, casts to the same dtype
and unused computations leave no trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..fx.effects import arguments_of
from ..module.memory import memory_id
from .places import called_at

# A constant with more entries is known by its memory, not by its numbers.
_FEW = 4096


class Value:
    """A value, identified by how it was made: `made`. Equal values are one object."""

    __slots__ = ("made",)

    def __init__(self, made: Any) -> None:
        self.made = made


class Moved(NamedTuple):
    """A real tensor, and the fake one that it would be on another device."""

    real: torch.Tensor
    fake: torch.Tensor


class Values:
    """The values of all runs that are to be compared; and the results of ops, by sizes.

    Attributes:
        fakes: the mode of all runs, so that a real tensor has one fake tensor.
        outcomes: the results of ops, by the forms of their arguments.
        held: the memory of the inputs, and of the buffers that are the graph's and the source's.
            Two of them are two values, even if their numbers are equal in the example.
    """

    fakes: FakeTensorMode

    def __init__(self) -> None:
        self.renew()
        self._known: dict[Any, Value] = {}
        self.outcomes: dict[Any, tuple[list[_Outcome], Any] | None] = {}
        self.held: set[int] = set()

    def renew(self) -> None:
        """Start with new fake tensors, as is necessary after a run that changed one in place."""
        self.fakes = FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True
        )
        self._moved: dict[Any, Moved] = {}
        self.moved: dict[int, Moved] = {}  # by storage of the fake tensor

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the fake tensor, always the same, that a real one would be on another device."""
        key = id(tensor), device
        if key not in self._moved:
            form = tensor.size(), tensor.stride()
            meta = torch.empty_strided(*form, dtype=tensor.dtype, device="meta")
            fake: Any = FakeTensor(self.fakes, meta, device)
            fake.requires_grad_(tensor.requires_grad)
            fake._is_param = isinstance(tensor, torch.nn.Parameter)
            self._moved[key] = self.moved[memory_id(fake)] = Moved(tensor, fake)
        return self._moved[key].fake

    def of(self, made: Any) -> Value:
        """Return the value that was made in this way."""
        found = self._known.get(made)
        if found is None:
            found = self._known[made] = Value(made)
        return found


class Unknown(Exception):
    """The value of something in a run is not known, so that runs cannot be compared."""


class Outcome(NamedTuple):
    """The values that a run computed.

    Attributes:
        leaves: the value and the autograd state of each leaf of the results and of the inputs.
        structure: the pytree structure of both, as text.
        writes: pairs of values, before and after, of tensors that existed before the run.
        draws: the number of ops that drew random numbers.
    """

    leaves: tuple[Any, ...]
    structure: str
    writes: frozenset[tuple[Value, Value]]
    draws: int


class Run(TorchDispatchMode):
    """One run on fake tensors.

    Args:
        values: shared by the runs that are to be compared.
        locate: number of an op whose place in the model's code is wanted.

    Attributes:
        ops: for each op, in the order of the run: its value, and whether it computes something: a
            write, or a result that is neither a view nor a copy.
        place: the `file:line` in the model's code of the op with the number `locate`.
        draws: number of ops that drew random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self, values: Values, locate: int = -1) -> None:
        super().__init__()
        self.values, self.locate = values, locate
        self.fakes = values.fakes
        self.fakes.shape_env = ShapeEnv()  # so that each run counts its unknown sizes from 0
        self.ops: list[tuple[Value, bool]] = []
        self.place = ""
        self.draws = 0
        self._states: dict[int, Value] = {}  # by storage
        self._symbols: dict[str, Value] = {}
        self._origins: dict[int, Value] = {}  # of the storages that were there before the run
        self._written: dict[Value, Value] = {}
        self._touched: set[int] = set()  # storages that were written to
        self._trained: set[int] = set()  # storages through which a gradient passes
        self._kept: list[Any] = []  # so that no storage's key is used again
        self._faked: list[tuple[torch.Tensor, torch.Tensor]] = []  # real tensors and their fakes

    def of(self, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Outcome:
        """Return the results of a call, and its writes to tensors that existed before, as values.

        Raises:
            Unknown: a part of it cannot be compared.
        """
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        try:
            with self.fakes, self:
                results = call(*args, **kwargs)
        finally:
            if any(self._changed(real, fake) for real, fake in self._faked):
                self.values.renew()
        leaves, structure = pytree.tree_flatten((results, args, kwargs))
        described = tuple((_settled(self._described(leaf)), _gradient(leaf)) for leaf in leaves)
        return Outcome(described, str(structure), frozenset(self._written.items()), self.draws)

    def _changed(self, real: torch.Tensor, fake: torch.Tensor) -> bool:
        """Whether the run left a fake tensor unlike its real one: in its graph, or in its form."""
        if (real.requires_grad, real.is_leaf) != (fake.requires_grad, fake.is_leaf):
            return True
        if memory_id(fake) not in self._touched:
            return False
        (dtype, _, *form), (fake_dtype, _, *fake_form) = _form(real), _form(fake)
        return dtype != fake_dtype or form != fake_form

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            raise Unknown(f"it calls {func}")
        kwargs = kwargs or {}
        given, shape = _flat(args, kwargs)
        if func is not torch.ops.aten.lift_fresh.default and any(map(_is_real, given)):
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._fake, (args, kwargs))
            given, shape = _flat(args, kwargs)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        self.draws += drawn
        operands = tuple(map(self._described, given))
        recorded = self._recorded(given)
        told, random = tuple(map(_settled, operands)), self.draws if drawn else 0
        made = self.values.of((func, shape, told, random, recorded))
        if len(self.ops) == self.locate:
            self.place = called_at()
        result = self._result(func, args, kwargs, given, (func, shape, operands))
        self._note_all(func, given, result, made)
        if any(recorded):
            leaves = pytree.tree_leaves(result)
            self._trained |= {memory_id(t) for t in leaves if isinstance(t, torch.Tensor)}
        if func._schema.is_mutable:
            self._write(func, args, kwargs, made)
        return result

    # ---- values -----------------------------------------------------------------------------

    def _recorded(self, given: list[Any]) -> tuple[bool, ...]:
        """Return for each argument whether autograd sends a gradient through it.

        That is one for a tensor that was there before the run: a tensor that the run makes, and
        has a gradient for its own, changes no gradient of others.
        """
        enabled = torch.is_grad_enabled()
        return tuple(enabled and _gradient(g) and memory_id(g) in self._trained for g in given)

    def _note_all(self, func: Any, given: list[Any], result: Any, made: Value) -> None:
        leaves = [result] if isinstance(result, torch.Tensor) else pytree.tree_leaves(result)
        same = self._copied(func, given, result)
        new = [self._note(leaf, same or made, n) for n, leaf in enumerate(leaves)]
        self.ops.append((made, func._schema.is_mutable or (any(new) and same is None)))

    def _note(self, leaf: Any, value: Value, number: int) -> bool:
        """Give a result its value, unless it is a view of a tensor that has one already."""
        if number:
            value = self.values.of((value, number))
        if isinstance(leaf, torch.Tensor):
            new = memory_id(leaf) not in self._states
            if new:
                self._kept.append(leaf)
                self._states[memory_id(leaf)] = value
            for size in leaf.shape:
                if type(size) is not int:
                    self._note(size, value, 0)
            return new
        if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
            for symbol in leaf.node.expr.free_symbols:
                self._symbols.setdefault(str(symbol), value)
        return False

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], made: Value) -> None:
        for number, (argument, given) in enumerate(arguments_of(func, args, kwargs)):
            if not (argument.alias_info and argument.alias_info.is_write):
                continue
            for place, leaf in enumerate(pytree.tree_leaves(given)):
                if isinstance(leaf, torch.Tensor):
                    after = self.values.of((made, "writes", number, place))
                    self._states[memory_id(leaf)] = after
                    self._touched.add(memory_id(leaf))
                    if origin := self._origins.get(memory_id(leaf)):
                        self._written[origin] = after

    def _copied(self, func: Any, given: list[Any], result: Any) -> Value | None:
        """Return the value of a result that holds the numbers of its argument, or None.

        Such results are copies, casts to a wider dtype, and casts that undo one, as autocast makes.
        """
        if func not in _COPIES or not isinstance(result, torch.Tensor):
            return None
        (state, form), copied = self._tensor(given[0]), _form(result)
        if form == copied:
            return state
        if isinstance(state.made, _Widened) and state.made.form == copied:
            return state.made.source
        if _is_exact(form[0], copied[0]):
            return self.values.of(_Widened(state, form, copied))
        return None

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fake tensor for a real one, always the same."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self.fakes.from_tensor(tensor, static_shapes=True)
        if memory_id(fake) not in self._states:
            self._begin(tensor, fake)
        return fake

    def _begin(self, tensor: torch.Tensor, fake: torch.Tensor) -> None:
        """Give the fake tensor of a real one its value at the start of the run."""
        self._kept.append(fake)
        self._faked.append((tensor, fake))
        value = self._real(tensor)
        if memory_id(fake) in self.values.moved:  # views of one storage are apart on the device
            value = self.values.of((value, _form(tensor)))
        self._states[memory_id(fake)] = self._origins[memory_id(fake)] = value
        if tensor.requires_grad:
            self._trained.add(memory_id(fake))

    def _real(self, tensor: torch.Tensor) -> Value:
        """Return the value of a real tensor: its memory, or few numbers of a constant."""
        is_number = tensor.layout is torch.strided and not tensor.is_meta
        held = isinstance(tensor, torch.nn.Parameter) or memory_id(tensor) in self.values.held
        if held or not is_number or tensor.numel() > _FEW:
            return self.values.of(("memory", memory_id(tensor)))
        with _disable_current_modes():
            numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
        return self.values.of(("numbers", digest))

    def _tensor(self, tensor: torch.Tensor) -> Any:
        key = memory_id(tensor)
        if key not in self._states:  # a real tensor, or one that the run was not seen to make
            if key in self.values.moved:
                self._begin(*self.values.moved[key])
            elif isinstance(tensor, FakeTensor):
                raise Unknown("it computes with a tensor of another run")
            else:
                self._kept.append(tensor)
                self._states[key] = self._real(tensor)
                if tensor.requires_grad:
                    self._trained.add(key)
        return self._states[key], _form(tensor)

    def _described(self, value: Any) -> Any:
        """Return an argument of an op as a value that can be hashed."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            names = sorted(map(str, value.node.expr.free_symbols))
            return str(value.node.expr), tuple(self._symbols.get(name, name) for name in names)
        if isinstance(value, float):
            return "float", value.hex()
        if not isinstance(value, _PLAIN):
            return type(value), repr(value)
        return type(value), value

    # ---- fake tensors -----------------------------------------------------------------------

    def _result(
        self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Any], op: Any
    ) -> Any:
        """Return an op's result on fake tensors; from `outcomes` where the forms are known."""
        if not all(map(_is_plain, given)) or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)  # `transpose_` changes its argument's form
        forms = tuple(told if told[0].__class__ is not Value else told[1] for told in op[2])
        key = (func, op[1], forms, torch.get_default_dtype())
        known = self.values.outcomes.get(key, _NEW)
        if known is _NEW:
            result = func(*args, **kwargs)
            self.values.outcomes[key] = _outcomes(result, given)
            return result
        if known is None:
            return func(*args, **kwargs)
        with no_dispatch():
            made = [outcome.make(self.fakes, given) for outcome in known[0]]
        return made[0] if known[1] is None else pytree.tree_unflatten(made, known[1])


_NEW: Any = object()


class _Widened(NamedTuple):
    """How the value of a cast to a wider dtype, which is exact, was made."""

    source: Value
    form: Any
    wide: Any


# Ops that copy their first argument, if its dtype and strides are also the result's. If one is
# missing here, some runs that are equal are not known to be.
_COPIES = (
    torch.ops.aten.clone.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten._to_copy.default,
)


class _Outcome(NamedTuple):
    """A result of an op: a new tensor, a view of the argument number `view`, or that argument."""

    form: Any
    view: int = -1
    same: bool = False

    def make(self, fakes: FakeTensorMode, given: list[Any]) -> torch.Tensor:
        if self.same:
            return given[self.view]
        dtype, device, size, (stride, offset), *_ = self.form
        if self.view < 0:
            meta = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        else:
            storage = given[self.view].untyped_storage()
            meta = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, size, stride)
        return FakeTensor(fakes, meta, device)


def _outcomes(result: Any, given: list[Any]) -> tuple[list[_Outcome], Any] | None:
    """Describe an op's results and their structure; None unless the forms determine them."""
    leaves, structure = pytree.tree_flatten(result)
    if not all(isinstance(leaf, FakeTensor) and _is_plain(leaf) for leaf in leaves):
        return None
    owners = {memory_id(g): n for n, g in enumerate(given) if isinstance(g, FakeTensor)}
    made: list[_Outcome] = []
    new: set[int] = set()
    for leaf in leaves:
        same = next((n for n, g in enumerate(given) if g is leaf), -1)
        view = owners.get(memory_id(leaf), -1)
        if view < 0 and (leaf.storage_offset() or memory_id(leaf) in new):
            return None
        new.add(memory_id(leaf))
        made.append(_Outcome(_form(leaf), same if same >= 0 else view, same >= 0))
    return made, None if isinstance(result, torch.Tensor) else structure


def _is_plain(value: Any) -> bool:
    """Whether a value is known by its form: a constant, or a fake tensor without symbolic sizes."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, _PLAIN)
    if type(value) is not FakeTensor or value.constant is not None:
        return False
    odd = value.is_sparse or value.is_nested or value.is_quantized or value.is_mkldnn
    if odd or value.is_conj() or value.is_neg():
        return False
    return all(type(size) is int for size in (*value.shape, *value.stride()))


_PLAIN = (
    *(int, float, bool, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the arguments of an op as one list, and the place of each."""
    leaves: list[Any] = []
    shape: list[Any] = []
    for name, value in (*enumerate(args), *kwargs.items()):
        several = isinstance(value, list | tuple)
        leaves += value if several else [value]
        shape.append((name, len(value) if several else -1))
    return leaves, tuple(shape)


def _form(tensor: torch.Tensor) -> Any:
    device = tensor.fake_device if type(tensor) is FakeTensor else tensor.device
    try:
        place: Any = (tensor.stride(), tensor.storage_offset())
        if any(type(n) is not int for n in place[0]) or type(place[1]) is not int:
            place = (tuple(map(_number, place[0])), _number(place[1]))
    except RuntimeError:  # not strided
        place = tensor.layout
    size = tuple(tensor.shape)
    if any(type(n) is not int for n in size):
        size = tuple(map(_number, size))
    return tensor.dtype, device, size, place, tensor.is_conj(), tensor.is_neg()


def _settled(described: Any) -> Any:
    """Return a described argument without the strides that step over nothing, of dimensions of 1.

    They depend on how torch made the tensor, and lead to no other number.
    """
    if described[0].__class__ is not Value or 1 not in described[1][2]:
        return described
    state, (dtype, device, size, place, *rest) = described
    if not isinstance(place, tuple):  # not strided
        return described
    strides, offset = place
    strides = tuple(0 if n == 1 else stride for n, stride in zip(size, strides, strict=True))
    return state, (dtype, device, size, (strides, offset), *rest)


def _number(size: Any) -> Any:
    return size if type(size) is int else str(size)


def _gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _is_exact(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every number of the narrow dtype is also a number of the wide one."""
    if not (narrow.is_floating_point and wide.is_floating_point):
        return False
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return b.eps <= a.eps and b.tiny <= a.tiny and b.max >= a.max
