"""State: the data that a captured module holds besides its graphs and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..fast import Fast
from ..plan import Plan
from .quantiser import Quantiser
from .routing import Routing
from .simplified import Simplification

if TYPE_CHECKING:
    from .captured import CapturedModule


@dataclass(frozen=True)
class State:
    """The data that every copy of a captured module carries over, as one value so none is lost.

    Attributes:
        plan: the injected plan, or None.
        folded: the plans folded into the weights, in order.
        originals: buffers and parameters trained in full, by name, as they were before injection.
        base_fingerprints: a fingerprint of every weight that an adapted module does not change,
            keyed by all names of the weight.
        grads: names of parameters that required gradients in the source.
        outputs: names of the source's output embeddings, which "all-linear" leaves out.
        linears: paths of the source's linear layers (nn.Linear, transformers' Conv1D), which
            "all-linear" means.
        model_type: `config.model_type` of the source, or "".
        outlined: paths of the submodules that are modules of their own, which the graph calls.
        written: names of the parameters that the graphs write to, or whose memory they write to.
            They are treated as buffers are: each copy of the module has its own.
        apart: paths of the submodules that were in another mode than the model at the capture.
        mirrors: by a parameter's name, the names of buffers, constants and other parameters in its
            memory, through which the graphs may read it too.
        read_values: the numbers, strings and flags that the captured calls read in the source, by
            the name of the attribute.
        optimized: how the fast graphs that run are derived, or None if the explicit ones run.
        merge_aware: the quantisers of the weights that calls read as a fold makes them, by the
            names of their parameters; empty if calls read them as they are.
        unfolded: the adapted module that a fold with `keep` was of, or None.
        simplified: the passes that made the module smaller for inference, or None.
        retention: how much of s·BA a fold kept in each weight that it quantised anew, by site.
        routing: the adapters that the graphs choose among for each sample, or None.
    """

    plan: Plan | None = None
    folded: tuple[Plan, ...] = ()
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    base_fingerprints: Mapping[tuple[str, ...], int] = field(
        default_factory=dict[tuple[str, ...], int]
    )
    grads: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    linears: frozenset[str] = frozenset()
    model_type: str = ""
    outlined: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    read_values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    optimized: Fast | None = None
    merge_aware: Mapping[str, Quantiser] = field(default_factory=dict[str, Quantiser])
    unfolded: CapturedModule | None = None
    simplified: Simplification | None = None
    retention: Mapping[str, float] = field(default_factory=dict[str, float])
    routing: Routing | None = None

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters, other than the adapters', that train (in full, as copies)."""
        return frozenset(() if self.plan is None else self.plan.trained)  # an empty plan is falsy

    @property
    def adapter_parameters(self) -> frozenset[str]:
        """Names of the parameters that injection added: A, B, and a variant's own."""
        routed = self.routing.parameters if self.routing else ()
        return frozenset([*(n for entry in self.plan or () for n in entry.tensors), *routed])

    def with_originals(self, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """Return the state with `change` (a clone or a move) applied to the original tensors."""
        originals = {name: change(tensor) for name, tensor in self.originals.items()}
        return replace(self, originals=originals)

    def with_mirrors(self, found: Mapping[str, Sequence[str]]) -> State:
        """Return the state with further names added to `mirrors`."""
        mirrors = dict(self.mirrors)
        for name, others in found.items():
            mirrors[name] = tuple(dict.fromkeys((*mirrors.get(name, ()), *others)))
        return replace(self, mirrors=mirrors)

    def without_adapters(self) -> State:
        """Return the state as it was before injection."""
        return replace(self, plan=None, originals={}, base_fingerprints={}, merge_aware={})
