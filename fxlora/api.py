"""The functions that turn one module into another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import matching
from .config import Rules, is_finite
from .errors import (
    CaptureError,
    ConfigError,
    InjectError,
    InputError,
    MisfitError,
    UnsupportedOpError,
    warn,
)
from .fast import Fast
from .frontends import capture, capture_recorded
from .frontends.arguments import given_calls
from .frontends.joined import check_same_model, joined
from .lora.dtypes import dtype_rule
from .matching.importance import Loss
from .module import CapturedModule, check_captured
from .module.ambient import no_ambient_modes
from .module.blocks.chosen import Modules
from .module.compiled import uncompiled
from .module.example_calls import Call, MethodCalls
from .module.fsdp import refuse_copy
from .names import shown
from .passes import (
    Activate,
    FoldConstants,
    Inject,
    MergeAware,
    Optimize,
    Remove,
    Unroute,
    chosen,
)
from .passes.active import as_names
from .passes.fold_constants import quantised_sites
from .passes.fold_quantised import QuantisedFold
from .plan import Plan
from .tables import some


def match(
    module: CapturedModule,
    rules: Rules | str | Path,
    *,
    adapter_name: str = "default",
    budget: int | str | None = None,
    rank_by: str | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Plan:
    check_captured(module, "match")
    if isinstance(adapter_name, str) and adapter_name in module.known.adapters:
        raise ConfigError(
            f"the module has an adapter {shown(adapter_name)} already: give another adapter_name, "
            "or fold or remove that one first."
        )
    base = Remove()(module) if module.known.adapters else module
    return matching.match(
        base,
        rules,
        adapter_name=adapter_name,
        budget=budget,
        rank_by=rank_by,
        data=data,
        loss=loss,
    )


match.__doc__ = matching.match.__doc__  # it matches the base: the adapters are no part of it


@no_ambient_modes()
def inject(
    module: CapturedModule,
    plan: Plan,
    *,
    starts: Mapping[str, torch.Tensor] | None = None,
    adapter_dtype: bool | str | torch.dtype | None = None,
) -> CapturedModule:
    """Return a new module with the plan's adapters as graph nodes.

    Only A, B and the parameters that the plan trains in full require gradients. With the default
    init B is zero, and the outputs equal the given module's bit for bit.

    A module that has adapters gets another one beside them, if the plan was matched with another
    `adapter_name`. Those that are active stay so: their branches are summed. See `activate`.

    Args:
        module: a captured module; it is not changed.
        plan: from `match` on this module.
        starts: initial values of adapter tensors by name, of the shapes `(r, in_features)` for A
            and `(out_features, r)` for B; the others are initialised as the plan says.
        adapter_dtype: the dtype of all adapters and of the parameters trained in full, instead of
            the plan's: True, False or a dtype, as in `LoraConfig.autocast_adapter_dtype`.

    Returns:
        The adapted module. It shares the frozen weights' storage with the given one.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: the plan does not fit the module; the module has an adapter of this name; or
            the new adapter and those that are active have no sum.
        ConfigError: adapter_dtype is no dtype in which an adapter can be trained.

    Example:
        >>> import torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Linear(6, 4), torch.randn(2, 6))
        >>> plan = fxlora.match(gm, fxlora.Rule(op="linear", lora=fxlora.LoraConfig(r=2)))
        >>> lora = fxlora.inject(gm, plan)
        >>> [tuple(p.shape) for p in fxlora.lora_parameters(lora)]
        [(2, 6), (4, 2)]
    """
    if not isinstance(plan, Plan):
        raise InjectError(f"inject takes a Plan, not {type(plan).__name__}: match makes one.")
    check_captured(module, "inject")
    if adapter_dtype is not None:
        plan = plan.with_adapter_dtype(dtype_rule(adapter_dtype, "adapter_dtype"))
    return Inject(plan, starts or {})(module)


def activate(module: CapturedModule, adapters: str | Sequence[str]) -> CapturedModule:
    """Return a module with other graphs over the same tensors: those of some of its adapters.

    The branches of several adapters are summed; `[]` gives the base. The others stay in the result
    as parameters that no graph reads. Only active adapters train. The two modules share the memory
    of all adapters, so what one trains, the other has; the buffers are each module's own.

    Args:
        module: an adapted module; it is not changed.
        adapters: the name or names of the adapters that are to be active.

    Returns:
        The module with these adapters in its graphs.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: it has no such adapter; or the sum of these is not what each adds to the base:
            one scales the outputs (DoRA) of a weight that another adapts, two train one parameter
            in full, or calls changed buffers in the training of one of them.
        ConfigError: the names are none.

    Example:
        >>> import torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6))
        >>> config, lora = fxlora.LoraConfig(r=2, target_modules="all-linear"), gm
        >>> for name in ("a", "b"):
        ...     lora = fxlora.inject(lora, fxlora.match(gm, config, adapter_name=name))
        >>> only = fxlora.activate(lora, "b")
        >>> [name for name, p in only.named_parameters() if p.requires_grad]
        ['0.lora_A.b.weight', '0.lora_B.b.weight']
    """
    check_captured(module, "activate")
    return Activate(as_names(adapters))(module)


@no_ambient_modes()
def adapt(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    rules: Rules | str | Path | None = None,
    *,
    calls: Sequence[Call] | None = None,
    methods: Mapping[str, MethodCalls] | None = None,
    budget: int | str | None = None,
    dynamic_shapes: Any = None,
    modules: Modules | None = None,
    adapter_name: str = "default",
    adapter_dtype: bool | str | torch.dtype | None = None,
) -> CapturedModule:
    """Capture a model, match rules against it and inject the adapters, in one call.

    Args:
        model: any nn.Module; it is not changed.
        args, kwargs, calls, methods: example inputs, as for `capture`.
        rules: a LoraConfig, a Rule, a list of these, or the path of a rules file, as for `match`.
        budget: the most parameters of all A and B together, as for `match`.
        dynamic_shapes, modules: as for `capture`.
        adapter_name: the adapter's name.
        adapter_dtype: the dtype of all adapters, as for `inject`.

    Returns:
        The adapted module.

    Raises:
        CaptureError: the model has no graph.
        NoMatchError, UnsupportedOpError, ConfigError: as for `match`.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU())
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(model, torch.randn(3, 6), rules=config)
        >>> [name for name, p in lora.named_parameters() if p.requires_grad]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    if rules is None:
        raise ConfigError("adapt needs rules: a LoraConfig, Rules, or the path of a rules file.")
    module = capture(
        model,
        args,
        kwargs,
        calls=calls,
        methods=methods,
        dynamic_shapes=dynamic_shapes,
        modules=modules,
    )
    plan = match(module, rules, adapter_name=adapter_name, budget=budget)
    return inject(module, plan, adapter_dtype=adapter_dtype)


def capture_more(
    module: CapturedModule,
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    calls: Sequence[Call] | None = None,
    methods: Mapping[str, MethodCalls] | None = None,
    dynamic_shapes: Any = None,
) -> CapturedModule:
    """Return a new module that also runs further calls of its model, under the same adapters.

    The new graphs get the adapters of every weight that they read. A, B, the parameters trained in
    full and the buffers have the module's values; an optimizer must be made anew.

    Args:
        module: a captured module, with or without adapters; it is not changed.
        model: the model that it was captured from, with the weights of then.
        args, kwargs, calls, methods, dynamic_shapes: the further calls, as for `capture`.

    Returns:
        The module with more graphs.

    Raises:
        NotCapturedError: the module is not a captured one.
        CaptureError: there is no whole graph of the calls, or of the module's own.
        InputError: no call is given, the module runs one of them already, or it was not captured
            from this model.
        MisfitError, UnsupportedOpError: a new graph reads an adapted weight in a way for which the
            module's plan has no place: match again.

    Example:
        >>> import torch, fxlora
        >>> class Scaled(torch.nn.Linear):
        ...     def forward(self, x, scale=None):
        ...         return super().forward(x) if scale is None else super().forward(x) * scale
        >>> model, x = Scaled(6, 4), torch.randn(3, 6)
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(model, x, rules=config)
        >>> more = fxlora.capture_more(lora, model, (x, torch.rand(3, 1)))
        >>> torch.equal(more(x), lora(x)), more(x, torch.rand(3, 1)).shape
        (True, torch.Size([3, 4]))
    """
    check_captured(module, "capture_more")
    if module.folded:
        raise InputError("a folded module has other weights than its model: capture before fold.")
    if module.parent_module or not module.exported:
        raise CaptureError(
            "only a module of whole graphs from example inputs can get more of them: capture the "
            "model with all its calls. Adapters that are trained already move to it: "
            "new = inject(captured, lora.plan), and new.load_state_dict(lora.state_dict())."
        )
    if len(module.known.adapters) > len(module.known.active[:1]):
        raise InputError(
            "capture_more takes a module with one adapter, an active one. Take the others out, "
            "capture more, and load them again: save_adapter(module, folder, adapter=name), then "
            "remove(module, adapter=name), and load_adapter(more, folder, adapter_name=name)."
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture_more takes the nn.Module, not {type(model).__name__}.")
    model = uncompiled(model, CaptureError)
    given = given_calls(model, args, kwargs, calls, methods)
    if not given:
        raise InputError("give the further calls: capture_more(module, model, args, …).")
    for method, of_method in given.items():
        for call in of_method:
            _refuse_captured(module, method, call)
    more = capture_recorded(
        model,
        args,
        kwargs,
        calls=calls,
        methods=methods,
        dynamic_shapes=dynamic_shapes,
        modules=module.known.outlined,
    )
    if more.parent_module:
        raise CaptureError(f"the further calls have no whole graph: {more.parent_module.why}")
    check_same_model(module, more)
    base = Remove(restore=False)(module) if module.plan is not None else module.derive()
    result = joined(base, more)
    return result if module.plan is None else _adapted_like(module, module.plan, result)


def _adapted_like(module: CapturedModule, plan: Plan, result: CapturedModule) -> CapturedModule:
    """Return a module with a module's plan, and with its values of all that the plan trains."""
    adapters = {name: module.get_parameter(name) for name in module.adapter_parameters()}
    try:
        result = Inject(plan, adapters)(result)
    except (MisfitError, UnsupportedOpError) as error:
        raise type(error)(
            f"a further call reads an adapted weight in another way. {error} Or capture the model "
            "with all its calls, and match there."
        ) from error
    with torch.no_grad():
        for name in {*adapters, *module.trained}:
            ours, theirs = result.get_parameter(name), module.get_parameter(name)
            ours.copy_(theirs).requires_grad_(theirs.requires_grad)
    result.update_state(
        originals=module.known.originals, base_fingerprints=module.known.base_fingerprints
    )
    result.training = module.training
    return result


def _refuse_captured(module: CapturedModule, method: str, call: Call) -> None:
    """Raise InputError if the graphs of a mode hold for a call, which no new graph would get."""
    for known in module.captured_calls(method):
        if any(
            spec is not None and spec.holds_for(*call) for spec in known.program.inputs.values()
        ):
            names = ", ".join(known.contract.names) if known.contract else ""
            raise InputError(
                f"the module runs a call like one of these already ({method} with {names}). Leave "
                "that call out."
            )


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
            weight that is quantised anew; one above 2 - min_retention is refused, too, as noise.

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
        raise InjectError(f"nothing to fold: {_without_adapter(module)}")
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


def _without_adapter(module: CapturedModule) -> str:
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
def optimize(
    module: CapturedModule, *, recompute: bool = False, chunked_loss: bool = False
) -> CapturedModule:
    """Return a module whose calls run faster graphs, equal to the explicit ones.

    Adapted layers with one input (q, k and v) become one op, which reads x once for all A, adds
    each branch to its layer's output in place, and has one gradient of x. It saves what the
    explicit nodes save. The module's graphs stay the explicit ones, so every other function takes
    the result, and adapters and optimizer states are the same. `module.schedule` tells for each
    adapter whether it is in such an op, and why not.

    Args:
        module: an adapted module; it is not changed.
        recompute: also compute chains of elementwise ops (a GELU that is written out, a gate)
            again in the backward, where less memory is saved for it then. It takes more time.
        chunked_loss: also compute a linear head and the cross-entropy of its logits for some rows
            at a time, and again in the backward, where the graph returns the loss and not the
            logits. The logits of all tokens are never held.

    Returns:
        The optimized module.

    Raises:
        NotCapturedError: the module is not a captured one.

    Example:
        >>> import torch, fxlora
        >>> rule = fxlora.Rule(lora=fxlora.LoraConfig(r=2))
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=rule)
        >>> print(fxlora.optimize(lora).schedule)
        sites    modes        form           numbers per row of x    explicit
        -------  -----------  -----------  ----------------------  ----------
        weight   train, eval  1 in one op                      72         100
    """
    return Optimize(Fast(recompute=recompute, chunked_loss=chunked_loss))(module)


@no_ambient_modes()
def explicit(module: CapturedModule) -> CapturedModule:
    """Return a module whose calls run the explicit graphs again.

    It undoes `optimize` and `merge_aware`.

    Args:
        module: an optimized module; it is not changed.

    Returns:
        The module with explicit nodes only.

    Raises:
        NotCapturedError: the module is not a captured one.

    Example:
        >>> import torch, fxlora
        >>> rule = fxlora.Rule(lora=fxlora.LoraConfig(r=2))
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=rule)
        >>> fxlora.explicit(fxlora.optimize(lora)).schedule is None
        True
    """
    return Optimize(None)(module)


@no_ambient_modes()
def merge_aware(module: CapturedModule, *, quantiser: Any = None) -> CapturedModule:
    """Return a module whose calls read each quantised weight W as a fold makes it: Q(W + s·BA).

    What is trained is then what `fold(…, quantised="requantise")` ships: its outputs have the same
    bits. Gradients pass to A and B straight through the rounding (Bengio et al. 2013). A, B and the
    optimizer's state are those of the given module's form; `explicit` leads back to it.

    Args:
        module: an adapted module over a quantised base, without lora_dropout; it is not changed.
        quantiser: as for `fold`.

    Returns:
        The module that runs merge-aware graphs, in both modes.

    Raises:
        NotCapturedError: the module is not a captured one.
        QuantisedError: no adapted weight is quantised, or no quantiser is known.
        ConfigError: an adapter has dropout.
        InjectError: the module is optimized, or has no whole graphs.

    Example:
        >>> import torch, fxlora
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=fxlora.Rule(
        ...     lora=fxlora.LoraConfig(r=2)))
        >>> fxlora.merge_aware(lora)
        Traceback (most recent call last):
        fxlora.errors.QuantisedError: no adapted weight is quantised.
    """
    check_captured(module, "merge_aware")
    return MergeAware(quantiser)(module)


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


def lora_parameters(
    module: CapturedModule,
    groups: bool = False,
    *,
    lr: float | None = None,
    lr_ratio: float | None = None,
) -> list[Any]:
    """Return the parameters for an optimizer: A, B, and the parameters trained in full.

    Args:
        module: an adapted or a routed module.
        groups: return parameter groups ("lora_A", "lora_B" and, if any, "full") instead.
        lr: learning rate of the groups. Without it the groups have no learning rate of their own.
        lr_ratio: B learns at `lr * lr_ratio` (LoRA+, Hayou et al. 2024, who use 16); needs lr.

    Returns:
        Parameters, or dicts with "name", "params" and, if lr is given, "lr".

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: the module has no adapters, or a parameter that is not in the plan requires
            gradients.
        ConfigError: lr without groups or lr_ratio without lr, which would have no effect; or one
            of them is not a finite number above 0.

    Example:
        >>> import torch, fxlora
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=config)
        >>> groups = fxlora.lora_parameters(lora, groups=True, lr=1e-4, lr_ratio=16)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('lora_A', 0.0001), ('lora_B', 0.0016)]
    """
    check_captured(module, "lora_parameters", routed=True)
    if module.plan is None and module.known.routing is None:
        raise InjectError(f"no adapters to train: {_without_adapter(module)}")
    if module.known.routing and module.training and (written := module.written_tensors()):
        warn(
            f"calls of the routed module change {some(sorted(written))}, of which all adapters "
            "have the same. Train with these modules in eval(), set before the capture."
        )
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio)):
        if value is not None and not (is_finite(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number > 0, not {shown(value)}.")
    if lr is not None and not groups:
        raise ConfigError(f"lr={lr} needs groups=True: a list of parameters has no learning rate.")
    if lr_ratio is not None and lr is None:
        raise ConfigError(f"lr_ratio={lr_ratio} needs groups=True and lr=….")
    if stray := module.unplanned():
        raise InjectError(
            f"'{stray[0]}' requires gradients but is not in the plan, so it would neither be saved "
            "nor kept apart from the source model. Put its module into modules_to_save."
        )
    frozen = module.plan is not None and module.plan.inference_mode
    if frozen and not any(p.requires_grad for p in module.parameters()):
        raise InjectError(
            "no parameter to train: LoraConfig(inference_mode=True) froze them. Match without it, "
            "or call requires_grad_(True) on those to train."
        )
    routing = module.known.routing
    entries = (*(module.plan or ()), *(routing.entries if routing else ()))
    trained = [] if module.plan is None else [*module.plan.trained]
    trained += routing.names_of_full if routing else ()
    planned = [name for entry in entries for name in entry.trainable]
    into_a = {entry.name_a for entry in entries}
    a = [module.get_parameter(name) for name in planned if name in into_a]
    b = [module.get_parameter(name) for name in planned if name not in into_a]
    full = [module.get_parameter(name) for name in trained]
    if not groups:
        return [*a, *b, *full]
    named = (("lora_A", a, 1.0), ("lora_B", b, lr_ratio or 1.0), ("full", full, 1.0))
    return [
        {"name": name, "params": params} | ({} if lr is None else {"lr": lr * factor})
        for name, params, factor in named
        if params
    ]
