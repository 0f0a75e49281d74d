"""What an adapter folder with a plan, which fxlora wrote, changes in a checkpoint."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

from ...errors import AdapterError
from ...names import shown
from ...plan import Entry, Plan
from ...tables import some
from ..folder import Folder, plan_from_header
from ..keys import CONFIG, FileLayout
from ..peft import Wrappers, owner_of
from ..peft_config import configuration
from ..saved import Saved
from .base import Checkpoint
from .changes import Changes, Fold
from .model import Skeleton
from .names import WITH_MODEL, held_in, misfit_of, misfit_of_model, plain_name, prefix_of
from .prefix import Prefix
from .trained_over import TrainedOver

ADAPTER_NAME = "default"


def by_plan(
    base: Checkpoint, content: Folder, header: dict[str, Any], model: Skeleton | None
) -> Changes:
    """Return the changes that the plan in fxlora's own folders defines."""
    plan, pefts = plan_from_header(header, content.path, ADAPTER_NAME)
    _check_config(plan, pefts, content)
    if rows := [entry.site for entry in plan if entry.tokens]:
        raise AdapterError(
            f"{content.path} has rows of {some(rows)} that train alone (tokens=), which cannot be "
            "folded into a checkpoint yet: fold with the model (fxlora fold MODEL --adapter …)."
        )
    layout = FileLayout(plan, _wrappers(plan, content, model) if pefts else None)
    shapes = layout.shapes()
    trained = {layout.key(name): name for name in plan.trained}
    more = {key: plain_name(key) for key in content.tensors if key not in (*shapes, *trained)}
    if missing := [key for key in (*shapes, *trained) if key not in content.tensors]:
        raise AdapterError(f"{content.path} is damaged; missing in the file: {some(missing)}.")
    for key, shape in shapes.items():
        if tuple(content.tensors[key].shape) != shape:
            raise AdapterError(
                f"{content.path} is damaged; '{key}' is {tuple(content.tensors[key].shape)}, where "
                f"its plan has {shape}."
            )
    plain = {name: content.tensors[key] for key, name in (trained | more).items()}

    def misfit(prefix: Prefix) -> str | None:
        for entry in plan:
            held = [n for n in map(prefix, entry.names) if n in base.tensors]
            if not held:
                return f"the checkpoint has no {some(map(prefix, entry.names))}"
            if wrong := [n for n in held if base.tensors[n].shape != entry.shape]:
                return f"'{wrong[0]}' is {base.tensors[wrong[0]].shape}, not {entry.shape}"
        return misfit_of(plain, prefix, base) or misfit_of_model(model, base, prefix)

    prefix = prefix_of([*(e.parameter for e in plan), *plain], misfit, base, content)
    values = layout.values(content.tensors)
    groups: dict[str, list[Entry]] = {}
    for entry in plan:
        for name in map(prefix, entry.names):
            if name in base.tensors:
                groups.setdefault(name, []).append(entry)
    marks = TrainedOver.in_header(content, header)
    folded = {
        name: Fold(
            tuple(entries),
            {tensor: values[tensor] for e in entries for tensor in e.tensors},
            marks.get(entries[0].parameter),
        )
        for name, entries in groups.items()
    }
    untied = {prefix(n): tuple(map(prefix, others)) for n, others in plan.untied.items()}
    held, together = held_in({prefix(n): t for n, t in plain.items()}, base)
    return Changes(folded, held, prefix=prefix, untied=untied, together=together)


def _check_config(plan: Plan, pefts: bool, content: Folder) -> None:
    """Raise if the configuration, which PEFT reads, contradicts the plan."""
    if not pefts:
        return
    nothing: Any = SimpleNamespace(  # of the module, only target_modules depends on more
        state_dict=dict, named_parameters=_no_parameters, adapter_parameters=set
    )
    expected = configuration(nothing, plan, Saved((), (), ()))
    about = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    differ = [key for key in (*about, "peft_type") if content.config.get(key) != expected[key]]
    if differ:
        said = some(f"{k}={shown(content.config.get(k))} for {shown(expected[k])}" for k in differ)
        raise AdapterError(
            f"{content.path / CONFIG} contradicts the plan that was saved with it: {said}. Save "
            "the adapter again instead of editing it."
        )


def _no_parameters(**_: object) -> tuple[()]:
    return ()


def _wrappers(plan: Plan, content: Folder, model: Skeleton | None) -> Wrappers:
    """Return PEFT's wrappers: one for each adapted parameter of a module, in the module's order.

    Raises:
        AdapterError: the shapes in the file fit several, and no model tells which.
    """
    held: dict[str, list[Entry]] = {}
    for entry in plan:
        held.setdefault(owner_of(entry), []).append(entry)
    found = {o: _wrappers_of(o, mine, content, model) for o, mine in held.items()}
    targets = {owner: wrappers.targets[owner] for owner, wrappers in found.items()}
    return Wrappers.over(plan, targets, {n for w in found.values() for n in w.transposed})


def _wrappers_of(
    owner: str, entries: list[Entry], content: Folder, model: Skeleton | None
) -> Wrappers:
    """Return the wrappers of one module: their order, and which stacks are (e, in, out) to PEFT."""
    names = list(dict.fromkeys(entry.parameter for entry in entries))
    stacks = {entry.parameter for entry in entries if entry.layout.stacked}
    if model is not None:
        order = tuple(n for n in model.order(owner) if n in names)
        turned = stacks if model.transposes_stacks(owner) else ()
        return Wrappers.over(entries, {owner: order}, turned)
    orders = itertools.permutations(names) if len(names) <= 5 else ()
    ways = [
        Wrappers.over(entries, {owner: order}, turned)
        for order in orders
        for turned in ({frozenset[str](), frozenset(stacks)})
    ]
    fitting = [way for way in ways if _has_shapes(way, entries, content)]
    if len(ways) > 1 and len(fitting) != 1:
        raise AdapterError(
            f"{content.path}: the file does not tell which tensors are for which of "
            f"{some(names)}, or their dimensions. {WITH_MODEL}."
        )
    return fitting[0] if fitting else Wrappers.over(entries, {owner: tuple(names)})


def _has_shapes(wrappers: Wrappers, entries: list[Entry], content: Folder) -> bool:
    shapes = FileLayout(Plan(tuple(entries)), wrappers).shapes()
    found = content.tensors
    return all(k in found and tuple(found[k].shape) == shape for k, shape in shapes.items())
