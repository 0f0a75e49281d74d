"""What an adapter changes in a checkpoint: the weights to fold, and the tensors to replace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ...errors import AdapterError
from ...names import shown
from ...plan import Entry, Plan
from ...tables import some
from ..folder import Folder, plan_from_header
from ..keys import CONFIG, FileLayout
from ..peft import ROOT, Wrappers, is_bare, owner_of
from ..peft_config import configuration
from ..saved import Saved
from .base import Checkpoint
from .model import Skeleton
from .pairs import Pairs
from .prefix import Prefix, find_prefix
from .settings import Settings
from .ties import check_ties
from .trained_over import TrainedOver
from .weights_file import REPLACED

ADAPTER_NAME = "default"
WITH_MODEL = (
    "Pass the model that the checkpoint is of (--model module:callable, model=…), or fold with "
    "the model itself: fxlora fold MODEL --adapter …"
)


@dataclass(frozen=True)
class Fold:
    """The adapters of one weight.

    Attributes:
        entries: in the order in which they apply.
        values: their tensors, by name.
        base: the weight that they were trained over, if the adapter's file says.
    """

    entries: tuple[Entry, ...]
    values: Mapping[str, torch.Tensor]
    base: TrainedOver | None = None


@dataclass(frozen=True)
class Changes:
    """What happens to the tensors of a checkpoint, by their names there.

    Attributes:
        folded: weights that become W0 + s·BA.
        replaced: tensors that were trained in full, or buffers; as the adapter's file has them.
        same: tensors that the file repeats, and that must be the checkpoint's own.
        prefix: how the adapter's names become the checkpoint's.
        untied: other names of replaced tensors, which do not change with them, by their names;
            None if the adapter does not say.
        together: other names of replaced tensors, which the adapter has, too, and the checkpoint
            has not: it holds one tensor for all names of a tie.
    """

    folded: Mapping[str, Fold]
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    same: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    prefix: Prefix = field(default_factory=Prefix)
    untied: Mapping[str, tuple[str, ...]] | None = None
    together: Mapping[str, set[str]] = field(default_factory=dict[str, set[str]])


def changes_of(base: Checkpoint, content: Folder, model: Skeleton | None = None) -> Changes:
    """Return what an adapter folder changes in a checkpoint.

    The folder's `names` are what the user says of its names in the checkpoint.

    Raises:
        AdapterError: the adapter does not fit the checkpoint, or names or layouts are ambiguous.
        ConfigError: the model is not the checkpoint's.
    """
    if content.header is None:
        changes = _of_peft(base, content, model)
    else:
        changes = _of_plan(base, content, content.header, model)
    for name in (*changes.folded, *changes.replaced):
        known = base.tensors[name]
        given = changes.replaced.get(name)
        dtype = REPLACED.get(known.code)
        if given is not None and dtype is not None and not _holds(dtype, given):
            raise AdapterError(
                f"'{name}' is {known.code} in {base.path}, which cannot hold the {given.dtype} in "
                f"{content.path}, as in a quantised checkpoint. Fold into the checkpoint that it "
                "was made from."
            )
        if known.dtype is None and (name in changes.folded or known.code not in REPLACED):
            raise AdapterError(
                f"'{name}' is {known.code} in {base.path}, as in a quantised checkpoint, into "
                "which nothing can be folded exactly. Fold into the checkpoint that it was made "
                "from."
            )
    if twice := changes.folded.keys() & changes.replaced.keys():
        raise AdapterError(
            f"{content.path} has both a pair and the whole tensor for {some(sorted(twice))}: which "
            "of them counts is not known."
        )
    check_ties(base, content, changes, model)
    return changes


def _holds(dtype: torch.dtype, value: torch.Tensor) -> bool:
    """Whether a dtype can hold values: rounded if both have fractions, else exactly."""
    if dtype == value.dtype or (dtype.is_floating_point and value.is_floating_point()):
        return True
    if value.is_floating_point() or value.is_complex():
        return False
    return torch.equal(value.to(dtype).to(value.dtype), value)


# ---- folders with a plan ------------------------------------------------------------------------


def _of_plan(
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
    more = {key: _plain_name(key) for key in content.tensors if key not in (*shapes, *trained)}
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
        return _misfit(plain, prefix, base) or _misfit_of_model(model, base, prefix)

    prefix = _prefix([*(e.parameter for e in plan), *plain], misfit, base, content)
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
    held, together = _held({prefix(n): t for n, t in plain.items()}, base)
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


# ---- folders without a plan ---------------------------------------------------------------------


def _of_peft(base: Checkpoint, content: Folder, model: Skeleton | None) -> Changes:
    """Return the changes that PEFT's configuration and keys define."""
    settings = Settings.of(content)
    pairs, plain_keys = Pairs.of(content)
    plain = {_plain_name(key): content.tensors[key] for key in plain_keys}
    if len(plain) != len(plain_keys):
        raise AdapterError(f"{content.path} has several tensors for one of {some(plain)}.")

    def misfit(prefix: Prefix) -> str | None:
        return (
            pairs.misfit(settings, base, prefix)
            or _misfit(plain, prefix, base)
            or _misfit_of_model(model, base, prefix)
        )

    if not (pairs.owners or plain):
        raise AdapterError(f"{content.path} has no tensors.")
    prefix = _prefix([*pairs.owners, *plain], misfit, base, content)
    folded: dict[str, Fold] = {}
    for entry, values in pairs.entries(settings, base, prefix, model):
        if prefix(entry.parameter) in folded:
            raise AdapterError(f"{content.path} has two pairs for '{entry.parameter}'.")
        folded[prefix(entry.parameter)] = Fold((entry,), values)
    owners = {owner_of(e) for fold in folded.values() for e in fold.entries if not is_bare(e)}
    trained = {n for n in plain if settings.trains(n, owners)}
    held, together = _held({prefix(n): t for n, t in plain.items() if n in trained}, base)
    same, _ = _held({prefix(n): t for n, t in plain.items() if n not in trained}, base)
    return Changes(folded, held, same, prefix, together=together)


# ---- names --------------------------------------------------------------------------------------


def _plain_name(key: str) -> str:
    """Return the name of a tensor of the base model, from its key in PEFT's layout."""
    if not key.startswith(ROOT):
        raise AdapterError(f"an adapter's keys begin with '{ROOT}': {shown(key)} does not.")
    return ".".join(part for part in key.removeprefix(ROOT).split(".") if part != "base_layer")


def _misfit(tensors: Mapping[str, torch.Tensor], prefix: Prefix, base: Checkpoint) -> str | None:
    """Say which tensor of the base model the checkpoint does not have, in this shape."""
    found = {prefix(name): tensor for name, tensor in tensors.items()}
    for name, tensor in found.items():
        held = base.tensors.get(name)
        if held is None and _twin(name, found, base):
            continue
        if held is None:
            return f"the checkpoint has no '{name}'"
        if held.shape != tuple(tensor.shape):
            return f"'{held.name}' is {held.shape}, and {tuple(tensor.shape)} in the adapter"
    return None


def _twin(name: str, found: Mapping[str, torch.Tensor], base: Checkpoint) -> str | None:
    """Return the name of an equal tensor that the checkpoint has, of one that it has not.

    Equal numbers are a tie, unless they are one number: zeros and ones have no name.
    """
    mine = found[name]
    if not mine.numel() or torch.equal(mine, mine.flatten()[0].expand_as(mine)):
        return None
    others = ((n, t) for n, t in found.items() if n in base.tensors and t.dtype == mine.dtype)
    return next((n for n, t in others if torch.equal(t, mine)), None)


def _held(
    found: Mapping[str, torch.Tensor], base: Checkpoint
) -> tuple[dict[str, torch.Tensor], dict[str, set[str]]]:
    """Return the tensors that the checkpoint has, and the names of those equal to one of them."""
    together: dict[str, set[str]] = {}
    for name in found.keys() - base.tensors.keys():
        twin = _twin(name, found, base)
        if twin is None:
            raise AdapterError(
                f"the checkpoint has no '{name}', and the tensor of the adapter that equals it is "
                f"trained where this one is not, or the other way round. {WITH_MODEL}."
            )
        together.setdefault(twin, set()).add(name)
    return {n: t for n, t in found.items() if n in base.tensors}, together


def _misfit_of_model(model: Skeleton | None, base: Checkpoint, prefix: Prefix) -> str | None:
    if model is None or model.fits(base, prefix):
        return None
    return f"{type(model.module).__name__}, the given model, is not the checkpoint's"


def _prefix(names: Iterable[str], misfit: Any, base: Checkpoint, content: Folder) -> Prefix:
    described = str(content.path), f"the checkpoint {base.path}"
    return find_prefix(list(names), base.tensors, misfit, *described, content.names)
