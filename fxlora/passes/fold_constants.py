"""FoldConstants: evaluate W0 + s·BA, which depends only on parameters."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import InjectError, QuantisedError
from ..module import CapturedModule
from ..module.folded_weight import folded_weight, is_bounded
from ..module.memory import held_alone
from ..module.quantised import dequantised, is_quantised
from ..module.state import State
from ..plan import Entry
from ..tables import some
from .base import Pass
from .fold_quantised import QuantisedFold, check_products
from .remove import drop_adapters
from .structure import Insertion, insertions, remove_insertion


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace each adapted weight by a Parameter with its value, and remove the adapters' nodes.

    The new Parameter has the weight's names. A branch adds s·B(A(x)) to op(x, W0), which is
    op(x, W0 + s·BA), because the op is linear in its weight. All parameters of the result are
    frozen, because those that were not adapted share storage with the source model.

    The sum is in float64, from A and B in their own dtypes, and is rounded once.

    Attributes:
        inplace: whether a weight whose memory nothing else holds keeps it, and is overwritten.
        allow_nonfinite: whether values may be NaN or infinite.
        quantised: what to do with quantised weights; None refuses them.
    """

    inplace: bool = False
    allow_nonfinite: bool = False
    quantised: QuantisedFold | None = None

    def check(self, module: CapturedModule) -> None:
        sites = quantised_sites(module)
        if sites and self.quantised is None:
            raise QuantisedError(
                f"the weights of {some(sites)} are quantised, and lie on a grid: how to add s·BA "
                "to them is for you to say, by quantised= of fxlora.fold, which takes "
                '"keep" (these sites keep their branches), "dequantise" (they become plain '
                'weights, in the dtype that they compute in) or "requantise" (they are quantised '
                "anew, with the retention of s·BA checked)."
            )

    def rewrite(self, module: CapturedModule) -> State:
        plan = module.plan
        if plan is None:
            return module.known
        if not self.allow_nonfinite:
            check_finite(module)
        inserted = [insertions(module, graph) for graph in module.distinct_graphs()]
        weights = _weights(module, inserted)
        overwritten = _expendable(module, weights) if self.inplace else []
        finite = not self.allow_nonfinite
        # What may fail comes before the first weight is overwritten.
        folded = {w.names: w.folded(finite=finite) for w in weights if w not in overwritten}
        retention = self._stored(weights, folded, inserted)
        for insertion in reversed([i for of_graph in inserted for i in of_graph]):
            remove_insertion(insertion)
        folded |= {w.names: w.folded(into=w.weight, finite=finite) for w in overwritten}
        for names, value in folded.items():
            parameter = nn.Parameter(value, requires_grad=False)
            for name in names:
                module.set_parameter(name, parameter)
        state = drop_adapters(module)
        module.requires_grad_(False)  # unadapted weights share the source model's storage
        return replace(state, folded=(*state.folded, plan), retention=retention)

    def _stored(
        self,
        weights: list[_Weight],
        folded: dict[tuple[str, ...], torch.Tensor],
        inserted: list[list[Insertion]],
    ) -> dict[str, float]:
        """Have the folded weights of quantised sites stored as asked; return their retention."""
        retention: dict[str, float] = {}
        for weight in weights:
            if self.quantised is None or not is_quantised(weight.weight):
                continue
            site = weight.entries[0].site
            if self.quantised.how == "dequantise":
                mine = [i for one in inserted for i in one if i.entry in weight.entries]
                check_products(site, weight.weight, [i.read for i in mine])
            given = (site, weight.entries[0].parameter, weight.weight, folded[weight.names])
            folded[weight.names] = self.quantised.stored(*given, retention)
        if self.quantised is not None and not self.quantised.known:
            self.quantised.check(retention)
        return retention


def quantised_sites(module: CapturedModule) -> list[str]:
    """Return the sites of a module's plan whose weights are quantised."""
    plan = module.plan or ()
    return [e.site for e in plan if is_quantised(module.get_parameter(e.parameter))]


def check_finite(module: CapturedModule) -> None:
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


def _weights(module: CapturedModule, inserted: list[list[Insertion]]) -> list[_Weight]:
    """Return the adapted weights.

    A packed weight has one entry per adapted part, in graph order; a tied weight is fetched under
    several names.
    """
    entries: dict[tuple[str, ...], dict[str, Entry]] = {}
    for insertion in (i for of_graph in inserted for i in of_graph):
        entry = insertion.entry
        if entry.name_a not in entries.setdefault(entry.names, {}):
            _check_tie(module, entry)
            entries[entry.names][entry.name_a] = entry
    return [_Weight.of(module, names, list(found.values())) for names, found in entries.items()]


def _expendable(module: CapturedModule, weights: list[_Weight]) -> list[_Weight]:
    """Return the weights that can be overwritten: held by nothing else, and with a finite sum."""
    aliases = {name: names for names in module.aliases().values() for name in names}
    plain = [weight for weight in weights if not is_quantised(weight.weight)]
    whole = [w for w in plain if set(aliases[w.names[0]]) == set(w.names)]  # no tie is split
    keys = [id(module.get_parameter(weight.names[0])) for weight in whole]
    alone = held_alone(module)
    if not alone.issuperset(keys):
        gc.collect()  # a deleted module refers to itself, and may still hold its weights
        alone = held_alone(module)
    return [w for w, key in zip(whole, keys, strict=True) if key in alone and w.is_bounded()]


@dataclass(frozen=True, eq=False)
class _Weight:
    """An adapted weight.

    Attributes:
        names: all its names.
        entries: its adapters, in the order in which they apply.
        module: the module that holds it.
        values: the adapters' tensors, by name.
    """

    names: tuple[str, ...]
    entries: list[Entry]
    module: CapturedModule
    values: dict[str, torch.Tensor]

    @classmethod
    def of(cls, module: CapturedModule, names: tuple[str, ...], entries: list[Entry]) -> _Weight:
        held = [name for entry in entries for name in entry.tensors]
        return cls(names, entries, module, {n: module.get_parameter(n).detach() for n in held})

    @property
    def weight(self) -> torch.Tensor:
        """W0; not kept, so that only the module holds it."""
        return self.module.get_parameter(self.names[0]).detach()

    def is_bounded(self) -> bool:
        """Whether the sum is known to be finite."""
        return is_bounded(self.entries, self.weight, self.values)

    def folded(self, into: torch.Tensor | None = None, *, finite: bool = True) -> torch.Tensor:
        """Return W0 + s·BA, rounded once to the dtype of W0."""
        weight = self.weight
        with torch.no_grad():
            folded = folded_weight(self.entries, dequantised(weight), self.values, into)
        if finite and into is None and overflows(folded, weight):
            raise InjectError(
                f"'{self.entries[0].site}': W0 + s·BA is not finite in {folded.dtype}: A and B are "
                "too large. Train again with a smaller learning rate, or take the adapter out "
                "(fxlora.remove)."
            )
        return folded


def overflows(folded: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether an entry is not finite where the weight's is."""
    weight = dequantised(weight)
    if folded.is_meta or bool(folded.sum().isfinite()):  # the sum reads the entries only once
        return False
    return bool((~folded.isfinite() & weight.isfinite()).any())
