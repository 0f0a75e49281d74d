"""State: all that a captured module knows besides its graphs and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..plan import Plan


@dataclass(frozen=True)
class State:
    """What every copy of a captured module takes along as one value, so that none forgets a part.

    Attributes:
        plan: what was injected, or None.
        folded: what was folded into the weights, in order.
        originals: the tensors that training may change, as they were before injection.
        fingerprints: of every weight that an adapted module leaves as it is, by all its names.
        grads: names of parameters that required gradients in the source.
        outputs: names of the source's output embeddings (what "all-linear" leaves out).
        mirrors: names of buffers, constants and other parameters in a parameter's memory, by its
            name: the graphs read it there, too.
    """

    plan: Plan | None = None
    folded: tuple[Plan, ...] = ()
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    fingerprints: Mapping[tuple[str, ...], int] = field(default_factory=dict[tuple[str, ...], int])
    grads: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def trained(self) -> frozenset[str]:
        """Names of parameters outside A and B that train (in full, as copies)."""
        return frozenset(() if self.plan is None else self.plan.trained)  # an empty plan is false

    @property
    def adapter_parameters(self) -> frozenset[str]:
        """Names of what injection added: A, B, and what a variant holds beside them."""
        return frozenset(name for entry in self.plan or () for name in entry.tensors)

    def with_originals(self, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """The state over other tensors: clones, or moved ones."""
        originals = {name: change(tensor) for name, tensor in self.originals.items()}
        return replace(self, originals=originals)

    def with_mirrors(self, found: Mapping[str, Sequence[str]]) -> State:
        """The state with more names in the memory of parameters."""
        mirrors = dict(self.mirrors)
        for name, others in found.items():
            mirrors[name] = tuple(dict.fromkeys((*mirrors.get(name, ()), *others)))
        return replace(self, mirrors=mirrors)

    def without_adapters(self) -> State:
        """The state before injection."""
        return replace(self, plan=None, originals={}, fingerprints={})
