"""What trains, and what the calls run meanwhile: fast graphs, or the weights of a fold."""

from __future__ import annotations

from typing import Any

from ..config import is_finite
from ..errors import (
    ConfigError,
    InjectError,
    warn,
)
from ..fast import Fast
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..names import shown
from ..passes import (
    MergeAware,
    Optimize,
)
from ..tables import some
from .folding import without_adapter


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
        raise InjectError(f"no adapters to train: {without_adapter(module)}")
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


@no_ambient_modes()
def optimize(
    module: CapturedModule, *, recompute: bool = False, chunked_loss: bool = False
) -> CapturedModule:
    """Return a module whose calls run faster graphs, equal to the explicit ones.

    Adapted layers with one input (q, k and v) become one op, which reads x once for all A, adds
    each branch to its layer's output in place, and has one gradient of x. It saves what the
    explicit nodes save. The module's graphs stay the explicit ones, so every other function takes
    the result, and adapters and optimizer states are the same. `module.schedule` tells for each
    adapter whether it is in such an op, and why not. Convolutions of 1x1 with few channels run with
    the one weight W + s·BA, and ops of libraries leave out the gradients of frozen weights.

    Args:
        module: an adapted module; it is not changed.
        recompute: also compute chains of elementwise ops (a GELU that is written out, a gate)
            again in the backward, where less memory is saved for it then. It takes more time.
        chunked_loss: also compute a linear head and the cross-entropy of its logits for some rows
            at a time, and again in the backward, where the graph returns the loss and not the
            logits. The logits of all tokens are never held. The cross-entropy may be written as
            log_softmax with nll_loss or gather.

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
