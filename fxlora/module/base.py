"""The base under adapters: whether its weights were written to, also across a load."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .fingerprints import fingerprint

if TYPE_CHECKING:
    from .captured import CapturedModule


def base_fingerprints(
    module: CapturedModule, known: Mapping[tuple[str, ...], int] | None = None
) -> dict[tuple[str, ...], int]:
    """Return the fingerprints of the weights that the module's plan does not train.

    Each is keyed by all names of its weight. Empty if the module has no plan.

    Args:
        module: the module.
        known: fingerprints to keep, of a time when the weights were the base's.
    """
    trains, known = module.known.adapter_parameters | module.trained, known or {}
    return {
        tuple(names): known[tuple(names)]
        if tuple(names) in known
        else fingerprint(module.get_parameter(names[0]))
        for names in module.aliases().values()
        if module.plan is not None and trains.isdisjoint(names)
        if module.known.written.isdisjoint(names)
    }


def changed_fingerprints(module: CapturedModule) -> dict[tuple[str, ...], int]:
    """Return the recorded fingerprints whose weights were written to or untied since."""
    return {
        names: mark
        for names, mark in module.known.base_fingerprints.items()
        if len({id(module.get_parameter(name)) for name in names}) > 1
        or fingerprint(module.get_parameter(names[0])) != mark
    }


@contextmanager
def loading(module: CapturedModule, names: AbstractSet[str]) -> Generator[None]:
    """Within the context, the named tensors are loaded: their new values are the base's.

    Weights that were written to before, and are not loaded, still count as changed.
    """
    changed = changed_fingerprints(module)
    yield
    left = {tied: mark for tied, mark in changed.items() if names.isdisjoint(tied)}
    held = module.state_tensors()
    given = {id(held[name]) for name in names if name in held}
    loaded = {
        name: tensor.detach().clone()
        for name, tensor in held.items()
        if name in module.known.originals and id(tensor) in given
    }
    module.update_state(
        base_fingerprints={**base_fingerprints(module), **left},
        originals={**module.known.originals, **loaded},
    )
