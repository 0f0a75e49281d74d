"""combine: one adapter from several on the same base, as PEFT's add_weighted_adapter does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..config import is_finite
from ..errors import AdapterError, ConfigError, InjectError
from ..module import CapturedModule, check_captured, check_one_adapter
from ..module.ambient import no_ambient_modes
from ..names import ADAPTER_RULE, is_adapter, shown
from ..plan import Entry, Plan, scales_outputs
from ..tables import some
from .combination import Combination
from .rebuilt import with_adapters
from .same_base import check_bases
from .shares import Share, shares_of


@no_ambient_modes()
@torch.no_grad()
def combine(
    adapters: Sequence[CapturedModule],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    adapter_name: str = "default",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> CapturedModule:
    """Return a new module with one adapter, made of those of several modules on one base.

    The combination types are those of PEFT's `add_weighted_adapter`, with equal results. At each
    site, over the adapters i that have it, with their weights wᵢ and scaling factors sᵢ:

    - "cat": A and B are concatenated, so that the update is Σ wᵢ·sᵢ·BᵢAᵢ; the rank is the sum.
    - "svd": the nearest pair of rank `svd_rank` to Σ wᵢ·sᵢ·BᵢAᵢ.
    - "linear": A = Σ ±√|wᵢsᵢ|·Aᵢ and B = Σ √|wᵢsᵢ|·Bᵢ. It has terms BᵢAⱼ of different adapters.
    - "magnitude_prune", "dare_linear", "ties", "dare_ties": as "linear", with A and B merged as
      `fxlora.arithmetic.merges` says.
    - The same names with "_svd": sᵢ·BᵢAᵢ are merged, and the result is cut to `svd_rank`.

    The new adapter has s = 1. (PEFT multiplies by √r once more if the first adapter is rsLoRA.)
    PiSSA and OLoRA count as the pair of rank 2r that they add to the base. All is computed in
    float64 and rounded once. Buffers must be equal in all modules; a parameter that one of them
    trains in full is taken from it, whatever its weight.

    Args:
        adapters: adapted modules, captured from one model.
        weights: a number for each, which may be negative.
        combination_type: one of the above. One adapter alone is always combined as "linear".
        adapter_name: the adapter's name in the new module.
        svd_rank: the rank of types with "svd"; the largest of all adapters by default.
        svd_clamp: a quantile of the entries of A and B, in [0, 1], at which both are cut off.
        density: the share of entries that ties, dare and magnitude_prune keep, in [0, 1].
        majority_sign_method: how ties elects a sign: by the sum of the entries ("total"), or by
            the number of adapters that have it ("frequency").
        generator: draws the entries that dare drops; by default torch's own. The masks are drawn
            in PEFT's order: site by site in the order of the model's parameters, for each adapter's
            A, then for each one's B. (PEFT draws the start of the new adapter before them, so for
            its masks, its generator must be in the same state after that.)

    Returns:
        The adapted module, on the base of the first.

    Raises:
        NotCapturedError: one of the modules is not a captured one.
        InjectError: one has no adapters.
        AdapterError: they are on different bases, adapt one weight differently, have different
            ranks where A and B are merged, are DoRA, or differ in buffers.
        ConfigError: another argument is invalid, missing or of no effect.

    Example:
        >>> import torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Linear(6, 4), torch.randn(2, 6))
        >>> plans = [fxlora.match(gm, fxlora.Rule(lora=fxlora.LoraConfig(r=r))) for r in (1, 2)]
        >>> both = fxlora.combine([fxlora.inject(gm, p) for p in plans], [0.7, 0.3], "cat")
        >>> [(entry.r, entry.scaling) for entry in both.plan]
        [(3, 1.0)]
    """
    options = Combination(
        combination_type, svd_rank, svd_clamp, density, majority_sign_method, generator
    )
    options.check()
    plans = _checked(adapters, weights)
    if not is_adapter(adapter_name):
        raise ConfigError(f"adapter_name must be {ADAPTER_RULE}, not {shown(adapter_name)}.")
    check_bases(adapters)
    if len(adapters) == 1:
        options = dataclasses.replace(options, type="linear")
    sites = shares_of(adapters, plans, weights)
    largest = max((share.rank for shares in sites.values() for share in shares), default=1)
    values: dict[str, torch.Tensor] = {}
    entries: list[Entry] = []
    for name in _in_order(adapters[0], sites):
        shares = sites[name]
        a, b = options.pair(shares, largest)
        first = shares[0].entry
        entry = _with_rank(first, a.shape[first.layout.rank_dims[0]], adapter_name)
        entries.append(entry)
        if entry.padding_idx is not None:  # an SVD leaves rounding errors where A is zero
            a.select(-1, entry.padding_idx).zero_()
        values |= {entry.name_a: a, entry.name_b: b}
    in_full = {name: m for m, plan in zip(adapters, plans, strict=True) for name in plan.trained}
    try:
        plan = _plan(plans, entries)
    except ConfigError as error:  # overlapping parts, or a tie adapted in two ways
        raise AdapterError(
            f"{error} Give all adapters the same parts, and the same ties: match their rules on "
            "one captured model."
        ) from error
    return with_adapters(adapters[0], plan, values, in_full)


def _checked(adapters: Sequence[CapturedModule], weights: Sequence[float]) -> list[Plan]:
    """Return the plans of the modules.

    Raises:
        ConfigError: there are no modules, or not a finite weight for each.
        InjectError: a module has no adapters, or several active ones.
        AdapterError: an adapter cannot be combined.
    """
    if not isinstance(adapters, Sequence) or not adapters:
        raise ConfigError(f"combine takes a list of adapted modules, not {shown(adapters)}.")
    plans: list[Plan] = []
    for module in adapters:
        check_captured(module, "combine")
        check_one_adapter(module, "combine")
        if module.plan is None:
            raise InjectError("nothing to combine: a module has no adapters (before fold).")
        plans.append(module.plan)
    if not isinstance(weights, Sequence) or not all(map(is_finite, weights)):
        raise ConfigError(f"weights must be finite numbers, not {shown(weights)}.")
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(weights)} weights for {len(adapters)} adapters: give one each.")
    if scaled := [entry.site for plan in plans for entry in plan if scales_outputs(entry)]:
        raise AdapterError(
            f"{some(scaled)}: DoRA scales the outputs, so the sum of two such adapters is none. "
            "Make each a plain adapter first: fxlora.extract(base, fxlora.fold(adapter), rules, "
            "rank=…), where base is the captured model and the rules are plain LoRA."
        )
    trained = [name for plan in plans for name in plan.trained]
    if twice := sorted({name for name in trained if trained.count(name) > 1}):
        raise AdapterError(
            f"{some(twice)} is trained in full in more than one of the adapters, and only A and B "
            "are combined. Train all but one of them without it (modules_to_save, bias)."
        )
    return plans


def _in_order(module: CapturedModule, sites: Mapping[str, Sequence[Share]]) -> list[str]:
    """Return the sites in the order of the model's parameters, in which PEFT draws."""
    named = module.named_parameters(remove_duplicate=False)
    order = {name: number for number, (name, _) in enumerate(named)}
    return sorted(sites, key=lambda name: order[sites[name][0].entry.parameter])


def _with_rank(entry: Entry, r: int, adapter: str) -> Entry:
    """Return an entry of plain LoRA at the same place, with s = 1."""
    return dataclasses.replace(
        entry, r=r, alpha=float(r), scaling=1.0, init=True, variants=(), adapter=adapter
    )


def _plan(plans: Sequence[Plan], entries: Sequence[Entry]) -> Plan:
    """Return the plan of the new module: the entries, and all that any of the plans trains."""
    dtypes = {name: rule for plan in plans for name, rule in plan.trained_dtypes.items()}
    adapted = {entry.site for entry in entries}
    return Plan(
        entries=tuple(entries),
        trained=tuple(dict.fromkeys(name for plan in plans for name in plan.trained)),
        skipped=tuple((site, why) for site, why in plans[0].skipped if site not in adapted),
        modules_to_save=tuple(dict.fromkeys(n for p in plans for n in p.modules_to_save)),
        model_parameters=plans[0].model_parameters,
        trained_parameters=sum(plan.trained_parameters for plan in plans),
        trained_dtypes=dtypes,
        descriptions=plans[0].descriptions,
    )
