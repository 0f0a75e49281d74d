"""From an adapted module to one without adapters: fold, unfold, remove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..config import is_finite
from ..errors import (
    ConfigError,
    InjectError,
    warn,
)
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.fsdp import refuse_copy
from ..names import shown
from ..passes import (
    FoldConstants,
    Inject,
    Remove,
    Unroute,
    chosen,
)
from ..passes.active import as_names
from ..passes.fold_constants import quantised_sites
from ..passes.fold_quantised import QuantisedFold
from ..tables import some


@no_ambient_modes()
def fold(
    module: CapturedModule,
    *,
    adapter: str | Sequence[str] | None = None,
    inplace: bool = False,
    keep: bool = False,
    allow_nonfinite: bool = False,
    quantised: str | None = None,
    quantiser: Any = None,
    min_retention: float = 0.9,
) -> CapturedModule:
    """Return a new module with every adapted weight W0 replaced by `W0 + s·BA`.

    Its graphs are the captured ones, node for node, and none of its parameters requires gradients.
    Each folded weight is summed in float64, from A and B in their own dtypes, and rounded once.
    Weights that were not adapted share storage with the source. Folding twice changes nothing.

    Args:
        module: an adapted module; it is not changed, unless `inplace`.
        adapter: the name or names of the adapters to fold; by default the active ones. The result
            has no adapters, so the others are not in it.
        inplace: fold the module itself: it loses its adapters, and is returned. A weight whose
            memory no other tensor holds is overwritten, without a second copy. The source and the
            captured module hold it, so delete them first; where one is left, its weights stay as
            they are, and the folded ones get memory of their own.
        keep: keep the weights and the adapters of now in the result, for `unfold`. They are held
            besides the folded weights, also with `inplace`.
        allow_nonfinite: whether the adapters, and so the folded weights, may have NaN or
            infinities.
        quantised: what to do with adapted weights that are quantised, which are refused otherwise:
            "keep" their branches, which the result then still has; "dequantise" them: they become
            plain weights in the dtype that they compute in; or "requantise" them, with fresh
            scales. `result.retention` then says how much of s·BA each kept.
        quantiser: the function (tensor → quantised tensor) or the configuration of torchao's
            `quantize_` that made the quantised weights; by default it is found by their class.
        min_retention: the least retention ⟨Q(W + d) - Q(W), d⟩ / ‖d‖² of d = s·BA for each
            weight that is quantised anew, also without the largest entries, rows and columns of d;
            one above 2 - min_retention is refused, too, as noise, and a quantiser that changes W
            itself by more than that many times d.

    Returns:
        The folded module.

    Warns:
        FxLoraWarning: the fold splits a tie, because its names were adapted differently.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: the module never had adapters, or they have NaN or infinities; or as for
            `activate`.
        QuantisedError: an adapted weight is quantised, and `quantised` does not say what to do;
            its layer computes more than a product; no quantiser is known, or it loses s·BA.
        ConfigError: `adapter` together with `inplace`; or an argument about quantised weights has
            no meaning.

    Example:
        >>> import torch, fxlora
        >>> x, rule = torch.randn(2, 6), fxlora.Rule(lora=fxlora.LoraConfig(r=2))
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), x, rules=rule).eval()
        >>> torch.allclose(fxlora.fold(lora)(x), lora(x), atol=1e-6)
        True
    """
    check_captured(module, "fold")
    if inplace and adapter is not None:
        raise ConfigError("fold(…, inplace=True) folds the active adapters: activate them first.")
    module = chosen(module, adapter)
    if module.plan is None and (module.known.adapters or not module.folded):
        raise InjectError(f"nothing to fold: {without_adapter(module)}")
    for groups in module.plan.split_ties if module.plan else ():
        names = " from ".join(some(group) for group in groups[::-1])
        warn(
            f"fold splits a tie: {names}. They are separate parameters of the folded module, so "
            "load_state_dict into the model's own class would tie them again, wrongly. To keep "
            'the tie, adapt every read of it alike (LoraConfig(tied="share")).'
        )
    how = _of_quantised(module, quantised, quantiser, min_retention)
    if quantised == "keep" and (branches := quantised_sites(module)):
        if inplace or keep:
            raise ConfigError('quantised="keep" gives a new module: leave out inplace and keep.')
        return _fold_others(module, set(branches), allow_nonfinite)
    kept = module.derive() if keep and module.plan is not None else None
    step = FoldConstants(inplace=inplace, allow_nonfinite=allow_nonfinite, quantised=how)
    if inplace:
        refuse_copy(module)
        step.apply(module)
        result = module
    else:
        result = step(module)
    if kept is not None or module.plan is not None:
        result.update_state(unfolded=kept)
    return result


def without_adapter(module: CapturedModule) -> str:
    """Return why no adapter is in a module's graphs, and what to do."""
    if known := module.known.adapters:
        return f"none of its adapters is active. activate(module, '{next(iter(known))}')."
    return "the module has no adapters."


_HOW = ("keep", "dequantise", "requantise")


def _of_quantised(
    module: CapturedModule, how: Any, quantiser: Any, least: Any
) -> QuantisedFold | None:
    """Return what a fold does with quantised weights, by the user's arguments."""
    if how is not None and how not in _HOW:
        raise ConfigError(f"quantised must be one of {', '.join(_HOW)}, not {shown(how)}.")
    if quantiser is not None and how != "requantise":
        raise ConfigError('quantiser needs quantised="requantise".')
    if not is_finite(least) or least > 1:
        raise ConfigError(f"min_retention must be a number up to 1, not {shown(least)}.")
    if how in (None, "keep"):
        return None
    known = module.known.merge_aware if how == "requantise" and quantiser is None else {}
    return QuantisedFold(how, quantiser, float(least), known)


def _fold_others(
    module: CapturedModule, branches: set[str], allow_nonfinite: bool
) -> CapturedModule:
    """Fold the adapters of all sites but some, which keep their branches."""
    assert module.plan is not None
    values = {name: module.get_parameter(name).detach() for name in module.adapter_parameters()}
    left = [entry for entry in module.plan if entry.site in branches]
    others = [entry for entry in module.plan if entry.site not in branches]
    result = Remove(restore=False)(module)
    for entries, trained in ((others, ()), (left, ())):
        if not entries:
            continue
        plan = replace(module.plan, entries=tuple(entries), trained=trained, trained_dtypes={})
        plan = replace(plan, untied={}, modules_to_save=(), trained_parameters=0)
        starts = {name: values[name] for entry in entries for name in entry.tensors}
        result = Inject(plan, starts)(result)
        if entries is others:
            result = FoldConstants(allow_nonfinite=allow_nonfinite)(result)
    return result.train(module.training)


@no_ambient_modes()
def unfold(module: CapturedModule) -> CapturedModule:
    """Return the adapted module that `fold(…, keep=True)` was called with, as it was then.

    W0 is the very tensor that was folded, not a difference: its bits are the same. A, B and the
    buffers have their values of then, too.

    Args:
        module: a folded module; it is not changed.

    Returns:
        The adapted module, in the folded one's mode, and on the device that it was on.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: it is not folded, or its fold kept nothing; or weights of the adapted module
            were written to since, as where the source, which shares them, was trained.

    Example:
        >>> import torch, fxlora
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=config)
        >>> again = fxlora.unfold(fxlora.fold(lora, keep=True))
        >>> torch.equal(again.get_parameter("weight"), lora.get_parameter("weight"))
        True
    """
    check_captured(module, "unfold")
    if module.plan is not None or module.known.unfolded is None:
        raise InjectError(
            "nothing to unfold: the module was not folded with keep=True. Keep the adapted module "
            "itself, or load its adapter again (fxlora.load_adapter)."
        )
    if written := module.known.unfolded.changed_weights():
        raise InjectError(
            f"nothing to unfold to: {some(written)} was written to since the adapter was injected, "
            "as where the source, which shares its memory, was trained. Capture a copy of the "
            "source (copy.deepcopy), or load its weights and the adapter again."
        )
    result = module.known.unfolded.derive()
    return result.train(module.training)


@no_ambient_modes()
def remove(module: CapturedModule, *, adapter: str | Sequence[str] | None = None) -> CapturedModule:
    """Return a new module without the adapters, as it was before `inject`.

    Weights, parameters that were trained in full, and buffers have their values from before the
    injection.

    Args:
        module: an adapted or a routed module; it is not changed.
        adapter: the name or names of the adapters to remove; by default all. The others stay as
            they are.

    Returns:
        The captured module again.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: the module has no adapters.

    Example:
        >>> import torch, fxlora
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=config)
        >>> list(fxlora.remove(lora).state_dict())
        ['weight', 'bias']
    """
    check_captured(module, "remove", routed=True)
    if module.known.routing:
        return Unroute()(module)
    return Remove(names=None if adapter is None else as_names(adapter))(module)
