"""FoldConstants: evaluate W0 + s·BA, which depends only on parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import InjectError
from ..module import CapturedModule
from ..module.adapted_weight import folded_weight
from ..module.state import State
from ..plan import Entry
from ..tables import some
from .base import Pass
from .remove import drop_adapters
from .structure import Insertion, insertions, remove_insertion


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace each adapted weight by a Parameter with its value, and remove the adapters' nodes.

    The new Parameter has the weight's names. Every adapter must be in the weight form: run
    ToWeightForm first. All parameters of the result are frozen, because those that were not adapted
    share storage with the source model.

    The sum is in float64, from A and B in their own dtypes, and is rounded once.
    """

    def rewrite(self, module: CapturedModule) -> State:
        plan = module.plan
        if plan is None:
            return module.known
        _check_finite(module)
        folded: dict[str, nn.Parameter] = {}
        for graph in module.distinct_graphs():
            inserted = insertions(module, graph)
            for chain in _by_weight(inserted):
                entry = chain[0].entry
                _check_tie(module, entry)
                if entry.parameter not in folded:
                    folded |= dict.fromkeys(entry.names, _evaluated(module, chain))
            for insertion in reversed(inserted):
                remove_insertion(insertion)
        for name, parameter in folded.items():
            module.set_parameter(name, parameter)
        state = drop_adapters(module)
        module.requires_grad_(False)  # unadapted weights share the source model's storage
        return replace(state, folded=(*state.folded, plan))


def _check_finite(module: CapturedModule) -> None:
    """Raise InjectError if an adapter, or a parameter trained in full, has NaN or infinities."""
    for name in sorted(module.adapter_parameters() | module.trained):
        parameter = module.get_parameter(name)
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise InjectError(
                f"'{name}' holds values that are not finite, and so would the folded module: the "
                "training diverged. Load an adapter from before that (fxlora.load_adapter), or "
                "take it out (fxlora.remove)."
            )


def _check_tie(module: CapturedModule, entry: Entry) -> None:
    """Raise InjectError if names that were one tied weight at injection no longer are one."""
    if len({id(module.get_parameter(name)) for name in entry.names}) > 1:
        raise InjectError(
            f"'{entry.site}': {some(entry.names)} were one tensor when the adapter was injected, "
            "and are several now (load_state_dict with assign=True, or a weight set anew): one "
            "folded weight cannot replace all of them. Tie them again (b.weight = a.weight)."
        )


def _by_weight(inserted: list[Insertion]) -> list[list[Insertion]]:
    """Group the adapters by weight, in graph order.

    A packed weight has one adapter per adapted part; each is applied to the previous one's output.
    """
    chains: dict[tuple[str, ...], list[Insertion]] = {}
    for insertion in inserted:
        if insertion.form != "weight":
            raise InjectError(
                f"'{insertion.entry.site}' is in branch form: run the pass ToWeightForm first."
            )
        chains.setdefault(insertion.entry.names, []).append(insertion)
    return list(chains.values())


def _evaluated(module: CapturedModule, chain: list[Insertion]) -> nn.Parameter:
    """Return the value of an adapted weight, rounded once to its dtype."""
    # once each: a tied weight is fetched under several names
    entries = list({insertion.entry.name_a: insertion.entry for insertion in chain}.values())
    weight = module.get_parameter(entries[0].parameter).detach()
    names = [name for entry in entries for name in entry.tensors]
    with torch.no_grad():
        values = {name: module.get_parameter(name).detach() for name in names}
        folded = folded_weight(entries, weight, values)
        if not weight.is_meta and bool((~folded.isfinite() & weight.isfinite()).any()):
            raise InjectError(
                f"'{entries[0].site}': W0 + s·BA is not finite in {weight.dtype}: A and B are "
                "too large. Train again with a smaller learning rate, or take the adapter out "
                "(fxlora.remove)."
            )
        return nn.Parameter(folded)
