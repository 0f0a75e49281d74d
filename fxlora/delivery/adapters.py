"""How a file holds adapters: folded in, as constants of their own, or as inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from ..lora.variants import VARIANTS
from ..module import CapturedModule
from ..module.quantised import is_quantised, stored
from ..module.routing import owned_of, scaling_of
from ..names import shown
from ..passes.fold_constants import FoldConstants
from ..passes.inject import Inject
from ..passes.remove import Remove
from ..passes.unroute import Unroute
from ..plan import Entry
from ..tables import some

WAYS = ("folded", "constants", "inputs")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Adapters:
    """The adapters of a file.

    Attributes:
        way: one of WAYS.
        values: the tensors that make the adapter, by their names in the module.
        neutral: values of these with which the module computes what it does without an adapter.
        aliases: by all names of each of these tensors in graphs, the name in `values`.
    """

    way: str
    values: Tensors = field(default_factory=dict[str, torch.Tensor])
    neutral: Tensors = field(default_factory=dict[str, torch.Tensor])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])


def check_way(way: object) -> None:
    """Raise ConfigError unless this is a way to hold adapters."""
    if way not in WAYS:
        raise ConfigError(f"adapters must be one of {', '.join(WAYS)}, not {shown(way)}.")


def held(module: CapturedModule, way: str) -> tuple[CapturedModule, Adapters]:
    """Return the module whose graph a file gets, and the adapters in it.

    Args:
        module: the module to export; it is not changed.
        way: one of WAYS.

    Raises:
        ConfigError: the module has no adapters that the way could hold.
    """
    routed = module.known.routing is not None
    if way == "folded":
        if routed:
            raise ConfigError(
                "a routed module has several adapters, which one weight cannot hold: export it "
                'with adapters="constants" or "inputs", or fold take_adapter(module, slot).'
            )
        return (module if module.plan is None else FoldConstants()(module)), Adapters(way)
    values = adapter_tensors(module)
    if way == "inputs":
        if not values:
            raise ConfigError(
                'adapters="inputs" needs adapters, and the module has none: inject a plan, or '
                "leave the argument out."
            )
        neutral = _neutral_slots(module) if routed else _neutral(module)
        return module, Adapters(way, values, neutral, _aliases(module, values))
    return module, Adapters(way, values, aliases=_aliases(module, values))


def adapter_tensors(module: CapturedModule) -> dict[str, torch.Tensor]:
    """Return what makes the active adapters of a module: A, B, and all else that its plan trains.

    Each tensor has its name in the module's `state_dict()`, which is also its name in files. No
    graph reads those of adapters that are not active.
    """
    plan, routing = module.plan, module.known.routing
    names = {name for entry in plan or () for name in entry.tensors} | module.trained
    names |= routing.parameters - routing.dropouts if routing else frozenset()
    return {name: p.detach() for name, p in module.named_parameters() if name in names}


def idle_tensors(module: CapturedModule) -> frozenset[str]:
    """Return the names of the tensors of adapters that are not active, which no graph reads."""
    known = module.known
    return frozenset() if known.routing else known.adapter_parameters - set(adapter_tensors(module))


def values_like(module: CapturedModule, like: CapturedModule) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's adapter, for a program of another module.

    Raises:
        ConfigError: the module has no adapters, or they do not fit into the program.
    """
    values, theirs = adapter_tensors(module), adapter_tensors(like)
    if not values:
        raise ConfigError("the module has no adapters: inject a plan first.")
    shapes, others = ({n: tuple(v.shape) for n, v in held.items()} for held in (values, theirs))
    if other := sorted(n for n in shapes | others if shapes.get(n) != others.get(n)):
        raise ConfigError(
            f"the adapter differs from the program's in {some(other)}: it must have the same "
            "targets, ranks, variants and name, and the same adapters must be active."
        )
    if other := [n for n in values if values[n].dtype is not theirs[n].dtype]:
        raise ConfigError(
            f"the adapter has other dtypes than the program's: {other[0]} is "
            f"{values[other[0]].dtype}, and {theirs[other[0]].dtype} there ({len(other)} tensors). "
            "Convert it first, as in `p.data = p.data.to(dtype)` for p in lora_parameters(module)."
        )
    held, there = _tensors(module), _tensors(like)
    changed = [n for n in held.keys() & there.keys() - values.keys() if _differ(held[n], there[n])]
    if changed:
        raise ConfigError(
            f"{some(sorted(changed))} differ from the program's, and are no part of an adapter's "
            "file: the base is another one, or batch norms were in train() in the training. Export "
            "the module itself; or train over the same base, with these modules in eval()."
        )
    entries = {entry.name_b: entry for entry in like.plan or ()}
    for entry in module.plan or ():
        ratio = entry.scaling / entries[entry.name_b].scaling
        if ratio != 1:
            if set(entry.tensors) - {entry.name_a, entry.name_b} - _of_gains(entry):
                raise ConfigError(
                    f"'{entry.site}' has another scaling than in the program (lora_alpha / r), and "
                    "its init is subtracted with it: give both the same lora_alpha."
                )
            values[entry.name_b] = (values[entry.name_b].double() * ratio).to(values[entry.name_b])
    return values


def _tensors(module: CapturedModule) -> Tensors:
    return {**dict(module.named_parameters()), **module.state_tensors()}  # ties under one name


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other or one.is_meta:
        return False
    forms = [(t.shape, t.dtype, t.device, is_quantised(t)) for t in (one, other)]
    if forms[0] != forms[1]:
        return True
    return not all(map(torch.equal, stored(one), stored(other)))


def base_of(module: CapturedModule) -> CapturedModule:
    """Return the module without its adapters."""
    return Unroute()(module) if module.known.routing else Remove()(module)


def _aliases(module: CapturedModule, values: Tensors) -> dict[str, str]:
    names = {id(module.get_parameter(name)): name for name in values}
    named = module.named_parameters(remove_duplicate=False)
    return {alias: names[id(p)] for alias, p in named if id(p) in names}


def _neutral(module: CapturedModule) -> dict[str, torch.Tensor]:
    """Return the values with which an adapted module is its base: A = B = 0, gains as they start.

    What a variant adds to A and B (the initial ones, to be subtracted) is 0 then, too.
    """
    plan = module.plan
    assert plan is not None
    factors = {n for entry in plan for n in set(entry.tensors) - _of_gains(entry)}
    identity = dataclasses.replace(plan, entries=tuple(map(_as_identity, plan)))
    start = Inject(identity)(Remove()(module))
    found = {name: start.get_parameter(name).detach() for name in adapter_tensors(module)}
    return {name: torch.zeros_like(v) if name in factors else v for name, v in found.items()}


def _as_identity(entry: Entry) -> Entry:
    """Return an entry whose adapter starts with B = 0, and its gains with 1."""
    return dataclasses.replace(entry, init=True)


def _of_gains(entry: Entry) -> set[str]:
    """Return the names of the tensors from which an entry's gains follow."""
    gains = (v for v in entry.variants if VARIANTS[v].gain is not None)
    return {name for variant in gains for name in entry.variant_tensors[variant]}


def _neutral_slots(module: CapturedModule) -> dict[str, torch.Tensor]:
    """Return stacks in which every slot has the base's row, the last one."""
    routing = module.known.routing
    assert routing is not None
    found = {name: torch.zeros_like(value) for name, value in adapter_tensors(module).items()}
    for entry in routing.entries:
        for name in (*entry.tensors, scaling_of(entry)):
            stack = module.get_parameter(name).detach()
            found[name] = stack[-1:].expand_as(stack).contiguous()
    for place in (*routing.entries, *routing.full.values()):
        if (name := owned_of(place)) in found:
            found[name] = torch.zeros_like(found[name])
    return found
