"""More calls of a module that is captured already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import (
    CaptureError,
    InputError,
    MisfitError,
    UnsupportedOpError,
)
from ..frontends import capture_recorded
from ..frontends.arguments import given_calls
from ..frontends.joined import check_same_model, joined
from ..module import CapturedModule, check_captured
from ..module.compiled import uncompiled
from ..module.example_calls import Call, MethodCalls
from ..passes import (
    Inject,
    Remove,
)
from ..plan import Plan


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
