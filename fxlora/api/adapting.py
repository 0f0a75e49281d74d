"""From a captured module to an adapted one: match, inject, activate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import matching
from ..config import Rules
from ..errors import (
    ConfigError,
    InjectError,
)
from ..frontends import capture
from ..lora.dtypes import dtype_rule
from ..matching.importance import Loss
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.blocks.chosen import Modules
from ..module.example_calls import Call, MethodCalls
from ..names import shown
from ..passes import (
    Activate,
    Inject,
    Remove,
)
from ..passes.active import as_names
from ..plan import Plan


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
