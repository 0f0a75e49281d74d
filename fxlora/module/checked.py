"""check_captured: the check that every function makes of its module."""

from __future__ import annotations

from torch import nn

from ..errors import InjectError, NotCapturedError
from ..tables import some
from .captured import CapturedModule


def check_captured(module: object, verb: str, *, routed: bool = False) -> None:
    """Raise unless a function was given a captured module that runs only its own graphs.

    Args:
        module: the argument to check.
        verb: the function's name, for the message.
        routed: whether the function also takes a routed module.

    Raises:
        NotCapturedError: it is not a captured module.
        InjectError: it is a routed or a simplified module, which the function does not take.
        SubmoduleError: one of its outlined submodules was replaced by a module without a graph.
    """
    if not isinstance(module, CapturedModule):
        own = getattr(module, "__dict__", {})
        if isinstance(own.get("_captured"), CapturedModule) and "_peft" in own:
            raise NotCapturedError(
                f"{verb} takes the captured module itself, not a PeftModel that runs it: pass "
                "model.captured_module."
            )
        if isinstance(own.get("_captured"), CapturedModule):
            raise NotCapturedError(
                f"{verb} takes the captured module itself, not a host that runs it: pass the "
                "module that hosted(model, module) was given."
            )
        if inside := _captured_inside(module):
            raise NotCapturedError(
                f"{verb} takes the captured module itself, not the {type(module).__name__} around "
                f"it: pass it .get_submodule('{inside}') of that."
            )
        raise NotCapturedError(
            f"{verb} takes a captured module, not {type(module).__name__}: "
            "fxlora.capture(model, args) makes one."
        )
    module.check_blocks(verb)
    if module.known.simplified and verb not in _FOR_INFERENCE:
        raise InjectError(
            f"{verb} does not take a simplified module, whose layers are not the model's any more: "
            "call it on the module that was given to simplify."
        )
    if module.known.routing and not routed:
        raise InjectError(
            f"{verb} does not take a routed module: take_adapter(module, slot) makes a module with "
            "one of its adapters, and remove(module) one without any."
        )


_FOR_INFERENCE = ("export",)  # functions that take a simplified module


def check_one_adapter(module: CapturedModule, verb: str) -> None:
    """Raise InjectError if several adapters are active, where a function takes one."""
    if len(active := module.known.active) > 1:
        raise InjectError(
            f"{verb} takes one adapter, and {some(active)} are active: "
            f"activate(module, '{active[0]}') gives it one of them."
        )


def _captured_inside(module: object) -> str:
    """Return the path of the only captured module inside a wrapper (compiled, DDP, EMA), or ""."""
    parts = module.named_modules() if isinstance(module, nn.Module) else ()
    found = [path for path, part in parts if isinstance(part, CapturedModule)]
    return found[0] if len(found) == 1 else ""
