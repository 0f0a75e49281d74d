"""Stacks: the tensors of several adapters in one, with a row for each slot.

Ranks are padded with zeros. A row without an adapter has no effect: A and B are zero, and a
variant's tensors are those with which it starts. Such zeros stay in training: where A and B are
zero, both gradients are (∂L/∂B = s·∂L/∂y·(A·x)ᵀ and ∂L/∂A = s·Bᵀ·∂L/∂y·xᵀ), and weight decay
shrinks zero to zero.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import AdapterError, InjectError, UnsupportedOpError, warn
from ..lora.variants import VARIANTS
from ..module import CapturedModule
from ..module.adapted_weight import sum_matrix
from ..module.routing import ROUTED, Routing, dropout_of, scaling_of
from ..plan import Entry, Plan, overlap, scales_outputs
from ..tables import some

Values = Mapping[str, Tensor]


# ---- entries ------------------------------------------------------------------------------------


def stacked_entries(plans: Sequence[Plan | None], rank: int | None) -> tuple[Entry, ...]:
    """Return an entry for every place that a plan adapts, with the largest rank.

    Raises:
        UnsupportedOpError: two adapters differ in more than rank, scaling and values at a place.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in (entry for plan in plans for entry in plan or ()):
        groups.setdefault(entry.prefix, []).append(entry)
    entries = tuple(_stacked(entries, rank) for entries in groups.values())
    _check_apart(entries)
    return entries


_COMMON = ("names", "op", "shape", "layout", "rows", "padding_idx", "variants", "tokens")


def _stacked(entries: Sequence[Entry], rank: int | None) -> Entry:
    first = entries[0]
    if why := next(filter(None, (_difference(first, entry) for entry in entries)), None):
        raise UnsupportedOpError(
            f"'{first.site}': the adapters differ in {why}, which one graph cannot choose for each "
            "sample. Route adapters apart that differ in it, in a graph each."
        )
    ranks = [entry.r for entry in entries] + ([] if rank is None or first.tokens else [rank])
    r, dropout = max(ranks), max(entry.dropout for entry in entries)
    same = dataclasses.replace(first, adapter=ROUTED, form="branch", rule=1)
    return dataclasses.replace(same, r=r, alpha=1.0, scaling=1.0, dropout=dropout)


def _difference(one: Entry, other: Entry) -> str | None:
    """Return how two entries of one place differ, other than in the values of a row."""
    for what in (*_COMMON, "autocast_adapter_dtype"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if mine != theirs:
            return f"{what} ({mine} and {theirs})"
    return None


def _check_apart(entries: Sequence[Entry]) -> None:
    """Raise if a place with a gain overlaps another place of the same weight."""
    for one, other in itertools.combinations(entries, 2):
        gains = scales_outputs(one) or scales_outputs(other)
        if gains and set(one.names) & set(other.names) and overlap(one, other):
            raise UnsupportedOpError(
                f"'{one.site}' and '{other.site}' are adapted by different adapters, one of which "
                "scales the outputs (DoRA). Route them apart, in a graph each."
            )


# ---- values -------------------------------------------------------------------------------------


def add_stacks(
    module: CapturedModule, routing: Routing, adapters: Sequence[tuple[Plan, Values] | None]
) -> None:
    """Add the stacks to a module, with the adapters' values in their slots."""
    for entry in routing.entries:
        weight = module.get_parameter(entry.parameter)
        dtype = entry.dtype_over(weight.dtype)
        rows = [row_of(module, entry, adapter) for adapter in (*adapters, None)]
        for name in entry.tensors:
            stack = torch.stack([tensors[name].to(dtype) for tensors, _ in rows])
            parameter = nn.Parameter(stack.contiguous(), name in entry.trainable)
            module.set_parameter(name, parameter)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for name in rows[0][1]:
            # In two dimensions, because AOTInductor writes small vectors into its code as literals,
            # which `load_constants` does not change.
            numbers = torch.tensor([[own[name]] for _, own in rows], dtype=torch.float64)
            numbers = numbers.to(weight.device, wide)
            module.set_parameter(name, nn.Parameter(numbers, requires_grad=False))
    for stack_name, names in routing.names_of_full.items():
        base = module.get_parameter(names[0]).detach()
        given = [_whole_value(names, a[1], base) if a else base for a in adapters]
        dtype = base.dtype
        for value in given:
            dtype = torch.promote_types(dtype, value.dtype)
        stack = torch.stack([value.to(base.device, dtype) for value in given])
        module.set_parameter(stack_name, nn.Parameter(stack))
    for name, place in routing.owned.items():
        # Of integers, because onnxruntime takes no bool in the file of an adapter.
        flags = [[int(bool(a) and _owns(routing, a[0], place))] for a in adapters]
        device = next(module.parameters()).device
        module.set_parameter(name, nn.Parameter(torch.tensor(flags, device=device), False))


def _owns(routing: Routing, plan: Plan, place: Entry | str) -> bool:
    """Whether an adapter adapts a place of the stacks, or trains the parameter of a stack."""
    if isinstance(place, str):
        return any(routing.full[name] == place for name in plan.trained)
    return any(entry.prefix == place.prefix for entry in plan)


def _whole_value(names: Sequence[str], values: Values, base: Tensor) -> Tensor:
    """Return an adapter's value of a parameter, under any of its names, or else the base's."""
    return next((values[name] for name in names if name in values), base)


def row_of(
    module: CapturedModule, entry: Entry, adapter: tuple[Plan, Values] | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors and the numbers of one row of an entry's stacks, by their names.

    Args:
        module: a module with the base weights.
        entry: an entry of stacks.
        adapter: the plan of an adapter, and its tensors by name; None for a row without effect.
    """
    own = next((e for e in (adapter[0] if adapter else ()) if e.prefix == entry.prefix), None)
    if own is None or adapter is None:
        return _without_effect(module, entry), _numbers(entry, 0.0, 0.0)
    pairs = zip(entry.tensors.items(), own.tensors, strict=True)
    device = module.get_parameter(entry.parameter).device
    row = {
        name: _padded(adapter[1][mine].detach().to(device), shape) for (name, shape), mine in pairs
    }
    return row, _numbers(entry, own.scaling, own.dropout)


def _numbers(entry: Entry, scaling: float, dropout: float) -> dict[str, float]:
    numbers = {scaling_of(entry): scaling}
    return numbers | ({dropout_of(entry): dropout} if entry.dropout else {})


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    padded = tensor.new_zeros(tuple(shape))
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


@torch.no_grad()
def _without_effect(module: CapturedModule, entry: Entry) -> dict[str, Tensor]:
    """Return a row without effect: A = B = 0, and each variant as it starts."""
    weight = module.get_parameter(entry.parameter).detach()
    dtype = entry.dtype_over(weight.dtype)
    row = {
        name: torch.zeros(shape, dtype=dtype, device=weight.device)
        for name, shape in entry.tensors.items()
    }
    if entry.rows is not None:
        start, stop = entry.rows
        weight = weight.narrow(entry.layout.part_dim, start, stop - start)
    for variant, held in entry.variant_tensors.items():
        cast = {name: tensor.to(weight.dtype) for name, tensor in row.items()}
        matrix = sum_matrix(entry.before_variant(variant), weight, cast)
        matrix = entry.layout.outputs_first(matrix, entry.adapted_shape)
        wide = matrix.to(torch.promote_types(weight.dtype, dtype))
        started = VARIANTS[variant].start(wide, row[entry.name_a], row[entry.name_b])
        row |= {n: v.reshape(held[n]).to(dtype) for n, v in zip(held, started, strict=True)}
    return row


# ---- one slot -----------------------------------------------------------------------------------


def misfit(routing: Routing, plan: Plan) -> str | None:
    """Return why an adapter does not fit a slot, or None if it does."""
    places = {entry.prefix: entry for entry in routing.entries}
    unknown = [entry.site for entry in plan if entry.prefix not in places]
    unknown += [name for name in plan.trained if name not in routing.full]
    if unknown:
        return f"it adapts {some(unknown)}, where the routed graph has no adapter"
    for entry in plan:
        place = places[entry.prefix]
        if entry.r > place.r:
            return (
                f"'{entry.site}' has rank {entry.r}, and the slots have room for rank {place.r}: "
                f"route(…, rank={entry.r}) leaves room for it"
            )
        same = dataclasses.replace(entry, autocast_adapter_dtype=place.autocast_adapter_dtype)
        if why := _difference(place, same):
            return f"'{entry.site}' differs in {why}"
    return None


def write_slot(module: CapturedModule, slot: int, plan: Plan, values: Values) -> None:
    """Write an adapter's values into a slot, in place: all of them, or none.

    Raises:
        AdapterError: the adapter does not fit, or its values are not finite.
    """
    routing = module.known.routing
    assert routing is not None
    if why := misfit(routing, plan):
        raise AdapterError(f"the adapter does not fit slot {slot}: {why}.")
    writes: list[tuple[Tensor, Tensor]] = []
    for entry in routing.entries:
        row, numbers = row_of(module, entry, (plan, values))
        wide = {n: torch.tensor([number], dtype=torch.float64) for n, number in numbers.items()}
        writes += [(module.get_parameter(n), value) for n, value in {**row, **wide}.items()]
    for stack, names in routing.names_of_full.items():
        value = _whole_value(names, values, module.get_parameter(names[0]))
        writes.append((module.get_parameter(stack), value))
    for name, place in routing.owned.items():
        owns = torch.tensor([int(_owns(routing, plan, place))])
        writes.append((module.get_parameter(name), owns))
    ready: list[tuple[Tensor, Tensor]] = []
    for stack, value in writes:
        target = stack.detach()[slot]
        held = value.detach().to(target.device, target.dtype)
        if held.shape != target.shape or not bool(held.isfinite().all()):
            raise AdapterError(
                f"the adapter does not fit slot {slot}: a tensor of the shape "
                f"{tuple(held.shape)} is not finite, or not {tuple(target.shape)} as the slot's."
            )
        ready.append((target, held))
    with torch.no_grad():
        for target, held in ready:
            target.copy_(held)
    _warn_of_dropout(module, routing, plan)
    plans = list(routing.plans)
    plans[slot] = plan
    module.update_state(routing=dataclasses.replace(routing, plans=tuple(plans)))


def _warn_of_dropout(module: CapturedModule, routing: Routing, plan: Plan) -> None:
    """Warn of an adapter with dropout where the train graphs of a training module have none."""
    dropping = {entry.prefix for entry in routing.entries if entry.dropout}
    if not module.training:
        return
    if sites := [e.site for e in plan if e.dropout and e.prefix not in dropping]:
        warn(
            f"{some(sites)}: no adapter had lora_dropout there when the module was routed, so it "
            "does not apply in training. Give route one that has."
        )


def slot_values(module: CapturedModule, slot: int) -> tuple[Plan, dict[str, Tensor]]:
    """Return the plan of the adapter in a slot, and its tensors by name, without padding.

    Raises:
        InjectError: the slot is empty.
    """
    routing = module.known.routing
    assert routing is not None
    plan = routing.plans[slot]
    if plan is None:
        raise InjectError(f"slot {slot} is empty: swap an adapter in first (swap_adapter).")
    places = {entry.prefix: entry for entry in routing.entries}
    values: dict[str, Tensor] = {}
    for entry in plan:
        pairs = zip(entry.tensors.items(), places[entry.prefix].tensors, strict=True)
        for (name, shape), stack in pairs:
            row = module.get_parameter(stack).detach()[slot]
            values[name] = row[tuple(slice(size) for size in shape)].clone()
    for name in plan.trained:
        values[name] = module.get_parameter(routing.full[name]).detach()[slot].clone()
    return plan, values
