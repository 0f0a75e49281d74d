"""State: the data that a captured module holds besides its graphs and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..fast import Fast
from ..plan import Plan, joined
from .quantiser import Quantiser
from .routing import Routing
from .simplified import Simplification

if TYPE_CHECKING:
    from .captured import CapturedModule


@dataclass(frozen=True)
class State:
    """The data that every copy of a captured module carries over, as one value so none is lost.

    Attributes:
        adapters: the plan of each adapter that the module holds, by its name.
        active: the names of those in the graphs, in the order of injection. The tensors of the
            others are parameters that no graph reads (see `passes/active.py`).
        buffers: the buffers that calls changed under an adapter that is not active, by its name.
        folded: the plans folded into the weights, in order.
        originals: buffers and parameters trained in full, by name, as they were before injection.
        base_fingerprints: a fingerprint of every weight that an adapted module does not change,
            keyed by all names of the weight.
        grads: names of parameters that required gradients in the source.
        outputs: names of the source's output embeddings, which "all-linear" leaves out.
        embedding: path of the source's input embedding, whose rows are those of tokens, or "".
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

    adapters: Mapping[str, Plan] = field(default_factory=dict[str, Plan])
    active: tuple[str, ...] = ()
    buffers: Mapping[str, Mapping[str, torch.Tensor]] = field(
        default_factory=dict[str, Mapping[str, torch.Tensor]]
    )
    folded: tuple[Plan, ...] = ()
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    base_fingerprints: Mapping[tuple[str, ...], int] = field(
        default_factory=dict[tuple[str, ...], int]
    )
    grads: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    embedding: str = ""
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

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of the active adapters, or None if no adapter is active."""
        return joined([self.adapters[name] for name in self.active]) if self.active else None

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters, other than the adapters', that train (in full, as copies)."""
        return frozenset(() if self.plan is None else self.plan.trained)  # an empty plan is falsy

    @property
    def adapter_parameters(self) -> frozenset[str]:
        """Names of the parameters that injection added: A, B, and a variant's own.

        Also of adapters that are not active, with what these train in full.
        """
        routed = self.routing.parameters if self.routing else ()
        held = [n for plan in self.adapters.values() for entry in plan for n in entry.tensors]
        return frozenset([*held, *self.kept_aside, *routed])

    @property
    def kept_aside(self) -> dict[str, tuple[str, str]]:
        """Names of the values that inactive adapters train in full: (adapter, parameter)."""
        return {
            aside(adapter, name): (adapter, name)
            for adapter, plan in self.adapters.items()
            if adapter not in self.active
            for name in plan.trained
        }

    def with_originals(self, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """Return the state with `change` (a clone or a move) applied to the original tensors."""
        originals = {name: change(tensor) for name, tensor in self.originals.items()}
        buffers = {
            adapter: {name: change(tensor) for name, tensor in held.items()}
            for adapter, held in self.buffers.items()
        }
        return replace(self, originals=originals, buffers=buffers)

    def with_plans(self, change: Callable[[Plan], Plan]) -> State:
        """Return the state with `change` applied to the plan of every adapter."""
        return replace(self, adapters={name: change(p) for name, p in self.adapters.items()})

    def with_mirrors(self, found: Mapping[str, Sequence[str]]) -> State:
        """Return the state with further names added to `mirrors`."""
        mirrors = dict(self.mirrors)
        for name, others in found.items():
            mirrors[name] = tuple(dict.fromkeys((*mirrors.get(name, ()), *others)))
        return replace(self, mirrors=mirrors)

    def without_adapters(self) -> State:
        """Return the state as it was before injection."""
        none = State()
        return replace(
            self,
            adapters=none.adapters,
            active=none.active,
            buffers=none.buffers,
            originals=none.originals,
            base_fingerprints=none.base_fingerprints,
            merge_aware=none.merge_aware,
        )


def aside(adapter: str, name: str) -> str:
    """Return the name of a parameter that trains in full while its adapter is not active (PEFT's).

    >>> aside("a", "classifier.weight")
    'classifier.modules_to_save.a.weight'
    """
    owner, _, last = name.rpartition(".")
    return ".".join(filter(None, (owner, "modules_to_save", adapter, last)))
