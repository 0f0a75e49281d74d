"""Remove: undo an injection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import InjectError
from ..module import CapturedModule
from ..module.casts import base_dtype
from ..module.state import State, aside
from .active import check_known, leave_graphs, put_in, remove_nodes, take_out
from .base import Pass


@dataclass(frozen=True)
class Remove(Pass):
    """Take adapters out of the graphs, and delete their parameters.

    Attributes:
        restore: whether to also restore buffers and the parameters trained in full to their values
            before injection.
        names: the adapters to remove; None for all. The others stay as they are, active or not.
    """

    restore: bool = True
    names: Sequence[str] | None = None

    def check(self, module: CapturedModule) -> None:
        if not module.known.adapters:
            raise InjectError("nothing to remove: the module has no adapters.")
        check_known(module, self.names or ())

    def rewrite(self, module: CapturedModule) -> State:
        names = tuple(module.known.adapters) if self.names is None else tuple(self.names)
        active = module.known.active
        if not self.restore:
            remove_nodes(module)
            return drop_adapters(module)
        take_out(module)
        for name in names:
            _delete(module, name)
        if not module.known.adapters:
            return module.known.without_adapters()
        put_in(module, tuple(name for name in active if name not in names))
        return module.known


def _delete(module: CapturedModule, adapter: str) -> None:
    """Delete the tensors of an adapter that is not active."""
    known = module.known
    plan = known.adapters[adapter]
    for name in (*(n for e in plan for n in e.tensors), *(aside(adapter, n) for n in plan.trained)):
        module.remove_parameter(name)
    module.known = replace(
        known,
        adapters={name: plan for name, plan in known.adapters.items() if name != adapter},
        buffers={name: held for name, held in known.buffers.items() if name != adapter},
    )


def drop_adapters(module: CapturedModule) -> State:
    """Delete the parameters of all adapters, and require gradients where the source model did.

    Returns:
        The module's state without adapters.
    """
    for name in module.adapter_parameters():
        module.remove_parameter(name)
    _round_trained(module)
    leave_graphs(module)
    return module.known.without_adapters()


def _round_trained(module: CapturedModule) -> None:
    """Round the parameters trained in full to the model's dtype, as their casts in graphs do."""
    aliases = module.aliases() if module.trained else {}
    for name in module.trained:
        parameter, dtype = module.get_parameter(name), base_dtype(module, name)
        if parameter.dtype != dtype:
            rounded = nn.Parameter(parameter.detach().to(dtype))
            for alias in aliases[name]:
                module.set_parameter(alias, rounded)
