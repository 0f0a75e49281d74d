"""Many adapters on one graph: route, and what changes the adapters of a routed module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .config import is_whole
from .disk.load import load_adapter
from .errors import ConfigError, InjectError
from .module import CapturedModule, check_captured, check_one_adapter
from .module.ambient import no_ambient_modes
from .names import shown
from .passes.active import Activate, as_names
from .passes.inject import Inject
from .passes.remove import Remove
from .passes.route import Route
from .passes.stacks import Values, slot_values, write_slot
from .passes.unroute import Unroute
from .plan import Plan
from .tables import some


@no_ambient_modes()
def route(
    modules: CapturedModule | Sequence[CapturedModule],
    *,
    adapters: Sequence[str] | None = None,
    slots: int | None = None,
    rank: int | None = None,
    batch: str | Mapping[str, int] | None = None,
    weights: bool = False,
    mixture: int = 1,
) -> CapturedModule:
    """Return a module that gives each sample of a batch an adapter of its own.

    Its graphs have one more argument, `adapter_ids`, an int64 tensor (batch,): the position in
    `modules` (or in `adapters`) of the adapter that a sample gets, or -1 for none. A and B of all
    adapters are stacked (slots + 1, …) in the graphs, with the base in the last row, and gathered
    for each sample. They train: the gradient of a sample reaches its own adapter only.

    Args:
        modules: a module with several adapters, or adapted modules over one captured model, with
            one active adapter each; they are not changed.
        adapters: the names of the adapters of a module with several, active or not; by default all.
        slots: the number of adapters that the module has room for; by default the number of those
            given. `swap_adapter` fills the others.
        rank: the rank that each adapted place has room for at least.
        batch: the argument whose first dimension counts the samples, if arguments have different
            dynamic first dimensions; or the dimension of each argument that has samples, if it is
            not the first: {"x": 1}.
        weights: whether the graphs have a second argument, `adapter_weights`, float32 in the shape
            of `adapter_ids`, which multiplies the effect of the adapter on each sample, s·BA.
        mixture: the number of adapters of each sample, whose effects are summed. Above 1,
            `adapter_ids` is (batch, mixture), padded with -1.

    Returns:
        The routed module. It shares the base weights with the given ones.

    Raises:
        NotCapturedError: a module is not a captured one.
        ConfigError: there are no adapters or more than `slots`; or `slots`, `rank` or `mixture` is
            no number above 0.
        InjectError: a module has no adapters, none of such a name or several active ones, or is
            over another base.
        InputError: the capture does not tell which dimension counts the samples.
        UnsupportedOpError: at a weight, the adapters differ in more than rank, scaling and values;
            or it is read where the samples cannot be told apart, or in a way that takes no
            weights and no mixture. Names the weight.

    Example:
        >>> import torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6))
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        >>> loras = [fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(2)]
        >>> routed, x = fxlora.route(loras), torch.randn(3, 6)
        >>> y = routed(x, adapter_ids=torch.tensor([1, 0, -1]))
        >>> torch.allclose(y[0], loras[1](x)[0], atol=1e-6), torch.allclose(y[2], gm(x)[2])
        (True, True)
    """
    modules = _each(modules, adapters)
    slots = len(modules) if slots is None else slots
    numbers = {"slots": slots, "rank": 1 if rank is None else rank, "mixture": mixture}
    for name, value in numbers.items():
        if not is_whole(value, 1, 2**16):
            raise ConfigError(f"{name} must be a number from 1 to {2**16}, not {shown(value)}.")
    _check_batch(batch)
    if len(modules) > slots:
        raise ConfigError(f"{len(modules)} adapters do not fit into {slots} slots.")
    for module in modules:
        check_captured(module, "route")
        check_one_adapter(module, "route")
        if module.plan is None:
            raise InjectError("route takes adapted modules: inject a plan first.")
        _check_same_base(module, modules[0])
    given = [_adapter(module) for module in modules]
    empty = [None] * (slots - len(given))
    routed = Route([*given, *empty], rank, batch, weights, mixture)(Remove()(modules[0]))
    routed.training = modules[0].training
    return routed


def _check_batch(batch: object) -> None:
    """Raise ConfigError unless this is an argument's name, or dimensions by such names."""
    named = isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch)
    whole = isinstance(batch, Mapping) and all(is_whole(dim, 0, 2**8) for dim in batch.values())
    if not (batch is None or isinstance(batch, str) or (batch and named and whole)):
        raise ConfigError(
            "batch must be an argument's name, or {name: dimension} with dimensions from 0, not "
            f"{shown(batch)}."
        )


def _each(
    given: CapturedModule | Sequence[CapturedModule], adapters: Sequence[str] | None
) -> Sequence[CapturedModule]:
    """Return a module for each adapter, in which it is active."""
    if not isinstance(given, CapturedModule):
        if adapters is not None:
            raise ConfigError("adapters= names those of one module: give it instead of a list.")
        if not given:
            raise ConfigError("route takes a module with adapters, or a list with at least one.")
        return given
    check_captured(given, "route")
    names = list(given.known.adapters) if adapters is None else as_names(adapters)
    if not names:
        raise InjectError("route takes a module with adapters: inject a plan first.")
    return [Activate([name])(given) for name in names]


def _adapter(module: CapturedModule) -> tuple[Plan, Values]:
    """Return the plan of an adapted module, and the values of all that it trains."""
    assert module.plan is not None
    names = (*(n for entry in module.plan for n in entry.tensors), *module.plan.trained)
    return module.plan, {name: module.get_parameter(name).detach() for name in names}


def _check_same_base(module: CapturedModule, other: CapturedModule) -> None:
    """Raise InjectError unless a module has the base of another, and calls left its buffers so."""
    ours, theirs = _base(module), _base(other)
    differ = [n for n in ours.keys() | theirs.keys() if not _alike(ours.get(n), theirs.get(n))]
    if differ or len(module.programs) != len(other.programs):
        what = some(sorted(differ)) or "calls"
        raise InjectError(
            f"the modules have different base weights or calls ({what}): inject all plans into one "
            "captured module."
        )
    before = {**other.state_tensors(), **other.known.originals}
    for one in (module, other):
        held = {n: t for n, t in one.state_tensors().items() if n not in one.trained}
        if changed := [n for n, t in held.items() if n in before and not _alike(t, before[n])]:
            raise InjectError(
                f"calls of an adapted module changed {some(changed)}, of which a routed graph has "
                "only one. Train with these in eval(), so that all adapters have the base's."
            )


def _base(module: CapturedModule) -> dict[str, torch.Tensor]:
    """Return a module's parameters, by all of their names, as they are without adapters."""
    own, known = module.adapter_parameters(), module.known
    named = module.named_parameters(remove_duplicate=False)
    held: dict[str, torch.Tensor] = {name: p for name, p in named if name not in own}
    for names in module.aliases().values() if module.trained else ():
        for name in module.trained.intersection(names):
            held |= dict.fromkeys(names, known.originals[name])
    return held


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    same_memory = (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())
    return one.is_meta or same_memory or torch.equal(one, other)


@no_ambient_modes()
def swap_adapter(module: CapturedModule, slot: int, source: CapturedModule | str | Path) -> None:
    """Write an adapter into a slot of a routed module, in place.

    No graph changes, so a compiled module is not compiled again.

    Args:
        module: a routed module.
        slot: the position of the adapter to replace.
        source: an adapter folder, or an adapted module over the same base.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: it is not routed, or the source has another base.
        ConfigError: there is no such slot.
        AdapterError: the folder is damaged, or the adapter does not fit: it has a higher rank than
            the slot has room for, or adapts a weight that the module has no place for. Nothing is
            written then.

    Example:
        >>> import torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6))
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        >>> one, two = [fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(2)]
        >>> routed, x = fxlora.route([one]), torch.randn(3, 6)
        >>> fxlora.swap_adapter(routed, 0, two)
        >>> y = routed(x, adapter_ids=torch.tensor([0, 0, 0]))
        >>> torch.allclose(y, two(x), atol=1e-6)
        True
    """
    _check_slot(module, slot, "swap_adapter")
    given = isinstance(source, CapturedModule)
    adapted = source if given else load_adapter(Unroute()(module), source)
    check_captured(adapted, "swap_adapter")
    check_one_adapter(adapted, "swap_adapter")
    if adapted.plan is None:
        raise InjectError("swap_adapter takes an adapted module, or the folder of an adapter.")
    _check_same_base(adapted, module)  # of a folder, the buffers that it brings
    plan, values = _adapter(adapted)
    write_slot(module, slot, plan, values)


@no_ambient_modes()
def take_adapter(module: CapturedModule, slot: int) -> CapturedModule:
    """Return a module with the adapter of one slot of a routed module, to save or fold it.

    Args:
        module: a routed module; it is not changed.
        slot: the position of the adapter.

    Returns:
        The adapted module, with the present values.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: it is not routed, or the slot is empty.
        ConfigError: there is no such slot.

    Example:
        >>> import torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6))
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> routed = fxlora.route([fxlora.inject(gm, fxlora.match(gm, config))])
        >>> list(fxlora.take_adapter(routed, 0).state_dict())[2:]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    _check_slot(module, slot, "take_adapter")
    plan, values = slot_values(module, slot)
    result = Inject(plan, {n: v for n, v in values.items() if n not in plan.trained})(
        Unroute()(module)
    )
    with torch.no_grad():
        for name in plan.trained:
            result.get_parameter(name).copy_(values[name])
    result.training = module.training
    return result


def _check_slot(module: CapturedModule, slot: int, verb: str) -> None:
    check_captured(module, verb, routed=True)
    routing = module.known.routing
    if routing is None:
        raise InjectError(f"{verb} takes a routed module: route([…]) makes one.")
    if not is_whole(slot, 0, routing.slots - 1):
        raise ConfigError(f"slot must be from 0 to {routing.slots - 1}, not {shown(slot)}.")
