"""scale_adapter: multiply the scaling factor s of every adapter."""

from __future__ import annotations

import dataclasses

from ..config import is_finite
from ..errors import ConfigError, InjectError
from ..module import CapturedModule, check_captured, check_one_adapter
from ..module.ambient import no_ambient_modes
from ..names import shown
from .rebuilt import with_adapters


@no_ambient_modes()
def scale_adapter(module: CapturedModule, factor: float) -> CapturedModule:
    """Return a new module with the scaling factor s of every adapter multiplied.

    The adapted weight W0 + s·BA becomes W0 + factor·s·BA. With DoRA, m·V/‖V‖ becomes the same of
    V = W0 + factor·s·BA, with the magnitudes m as they are: s is multiplied inside the norm, as by
    `set_scale` of PEFT's layers. (So a DoRA adapter scaled by 0 is not the base model.) With PiSSA
    and OLoRA, which start at s·B'A', the update s·(BA - B'A') is multiplied, so that 0 gives the
    base model; PEFT's `set_scale` multiplies s·BA alone. Parameters trained in full and buffers
    stay as they are.

    The result is an adapted module like any other: it trains, is saved, folded and removed. Its
    plan has the new s, and the `alpha` that gives it.

    Args:
        module: an adapted module with one active adapter; it is not changed.
        factor: a finite number, which may be negative or 0.

    Returns:
        The module with scaled adapters, with parameters of its own.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: the module has no adapters, or several are active.
        ConfigError: the factor is not a finite number.

    Example:
        >>> import torch, fxlora
        >>> config = fxlora.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
        >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=config)
        >>> [entry.scaling for entry in fxlora.scale_adapter(lora, 0.5).plan]
        [1.0]
    """
    check_captured(module, "scale_adapter")
    check_one_adapter(module, "scale_adapter")
    if module.plan is None:
        raise InjectError("nothing to scale: the module has no adapters (before fold, not after).")
    if not is_finite(factor):
        raise ConfigError(f"factor must be a finite number, not {shown(factor)}.")
    entries = tuple(
        dataclasses.replace(e, alpha=e.alpha * factor, scaling=e.scaling * factor)
        for e in module.plan
    )
    plan = dataclasses.replace(module.plan, entries=entries)
    adapters = {n: module.get_parameter(n) for entry in plan for n in entry.tensors}
    result = with_adapters(module, plan, adapters, dict.fromkeys(plan.trained, module))
    for name in {*adapters, *plan.trained}:  # what the user froze stays frozen
        result.get_parameter(name).requires_grad_(module.get_parameter(name).requires_grad)
    return result
