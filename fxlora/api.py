"""The verbs that turn one module into another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import Rules, is_finite
from .errors import ConfigError, InjectError
from .frontends import capture
from .matching import match
from .module import CapturedModule
from .module.ambient import no_ambient_modes
from .names import shown
from .passes import Chain, FoldConstants, Inject, Remove, ToWeightForm
from .plan import Plan

# Linear in the weights, so that branches can go into them; then a constant each.
FOLD = Chain((ToWeightForm(), FoldConstants()))


@no_ambient_modes()
def inject(
    module: CapturedModule, plan: Plan, *, starts: Mapping[str, torch.Tensor] | None = None
) -> CapturedModule:
    """A new module with the plan's adapters as explicit nodes; the given one stays as it is.

    Only A, B and what the plan trains in full require gradients. With the default init B is
    zero, and the outputs are bit for bit the given module's.

    Args:
        starts: values of the adapters' tensors by their names, in place of fresh ones.

    Raises:
        InjectError: the plan does not fit the module, or it has adapters already.
    """
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InjectError(f"inject takes a Plan, not {type(plan).__name__}: match makes one.")
    return Inject(plan, starts or {})(module)


def adapt(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    rules: Rules | str | Path,
    dynamic_shapes: Any = None,
    adapter_name: str = "default",
) -> CapturedModule:
    """capture, match and inject in one call."""
    module = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return inject(module, match(module, rules, adapter_name=adapter_name))


@no_ambient_modes()
def fold(module: CapturedModule) -> CapturedModule:
    """A new module with `W0 + s·BA` in place of every adapted weight, and no adapter node.

    Its graphs are node for node the captured ones, and nothing in it requires gradients (what was
    not adapted shares storage with the source). Folding a folded module changes nothing.

    Raises:
        InjectError: the module never had adapters.
    """
    if isinstance(module, CapturedModule) and module.plan is None and not module.folded:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InjectError("nothing to fold: the module has no adapters.")
    return FOLD(module)


@no_ambient_modes()
def remove(module: CapturedModule) -> CapturedModule:
    """A new module without the adapters: weights, heads and buffers as before injection.

    Raises:
        InjectError: the module has no adapters.
    """
    return Remove()(module)


def lora_parameters(
    module: CapturedModule,
    groups: bool = False,
    *,
    lr: float | None = None,
    lr_ratio: float | None = None,
) -> list[Any]:
    """What an optimizer should train: A, B, and the parameters trained in full.

    Args:
        groups: return parameter groups ("lora_A", "lora_B" and, if any, "full") instead.
        lr: learning rate of the groups. Without it they carry names only, for you to set their
            rates.
        lr_ratio: with lr, B learns at `lr * lr_ratio` (LoRA+, Hayou et al. 2024, who take 16).

    Raises:
        InjectError: the module has no adapters, or a parameter that is not in the plan
            requires gradients.
        ConfigError: lr without groups, or lr_ratio without lr, which would have no effect; or
            they are not above 0.
    """
    if not isinstance(module, CapturedModule) or module.plan is None:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InjectError("no adapters to train: inject a plan first.")
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio)):
        if value is not None and not (is_finite(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number > 0, not {shown(value)}.")
    if lr is not None and not groups:
        raise ConfigError(f"lr={lr} needs groups=True: parameters alone carry no learning rate.")
    if lr_ratio is not None and lr is None:
        raise ConfigError(f"lr_ratio={lr_ratio} needs groups=True and lr=….")
    if stray := module.unplanned():
        raise InjectError(
            f"'{stray[0]}' requires gradients but is not in the plan, so it would neither be saved "
            "nor kept apart from the source model. Put its module into modules_to_save."
        )
    planned = [name for entry in module.plan for name in entry.trainable]
    into_a = {entry.name_a for entry in module.plan}
    a = [module.get_parameter(name) for name in planned if name in into_a]
    b = [module.get_parameter(name) for name in planned if name not in into_a]
    full = [module.get_parameter(name) for name in module.plan.trained]
    if not groups:
        return [*a, *b, *full]
    named = (("lora_A", a, 1.0), ("lora_B", b, lr_ratio or 1.0), ("full", full, 1.0))
    return [
        {"name": name, "params": params} | ({} if lr is None else {"lr": lr * factor})
        for name, params, factor in named
        if params
    ]
