"""Several adapters of a PeftModel at once: one module with the tensors of each."""

from __future__ import annotations

from collections.abc import Sequence

from ..api import inject
from ..module import CapturedModule


def joined(base: CapturedModule, modules: Sequence[CapturedModule]) -> CapturedModule:
    """Return a module in which the adapters of several modules are active, and its sum of them.

    What it trains are the very parameters of these modules.

    Args:
        base: the module without adapters that all of them share.
        modules: modules with one adapter each.

    Raises:
        InjectError: the adapters have no sum (see `fxlora.activate`).
    """
    result = base
    for module in modules:
        assert module.plan is not None
        starts = {n: module.get_parameter(n) for e in module.plan for n in e.tensors}
        result = inject(result, module.plan, starts=starts)
    with result.editing():
        for module in modules:
            _share(result, module)
    result.refresh()
    return result


def _share(result: CapturedModule, module: CapturedModule) -> None:
    """Give a module the parameters that the adapter of another one trains."""
    plan = module.plan
    assert plan is not None
    for name in sorted(module.adapter_parameters()):
        result.set_parameter(name, module.get_parameter(name))
    for name in plan.trained:
        held = result.get_parameter(name)
        named = result.named_parameters(remove_duplicate=False)
        for alias in [alias for alias, parameter in named if parameter is held]:
            result.set_parameter(alias, module.get_parameter(name))
