"""FoldConstants: evaluate W + s·BA, which depends on parameters alone."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import InjectError
from ..module import CapturedModule
from ..plan import Entry, scales_outputs
from ..tables import some
from .remove import drop_adapters
from .structure import Insertion, insertions, take_out


@dataclass(frozen=True)
class FoldConstants(PassBase):
    """One new Parameter per adapted weight, under the old name; no adapter node is left.

    The result is frozen: what was not adapted still shares storage with the source model.

    The sum is one addmm in the weight's dtype, which accumulates in float32 (float64) and
    rounds once.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule)
        result = graph_module.derive()
        plan = graph_module.plan
        if plan is None:
            return PassResult(result, False)
        folded: dict[str, nn.Parameter] = {}
        for graph in result.distinct_graphs():
            standing = insertions(result, graph)
            for chain in _by_weight(standing):
                entry = chain[0].entry
                _check_tie(result, entry)
                if entry.parameter not in folded:
                    folded |= dict.fromkeys(entry.names, _evaluated(result, chain))
            for insertion in reversed(standing):
                take_out(insertion)
        for name, parameter in folded.items():
            result.set_parameter(name, parameter)
        result.folded = (*result.folded, plan)
        drop_adapters(result)
        result.requires_grad_(False)  # the rest still is the source's storage
        return PassResult(result, True)


def _check_tie(module: CapturedModule, entry: Entry) -> None:
    if len({id(module.get_parameter(name)) for name in entry.names}) > 1:
        raise InjectError(
            f"'{entry.site}': {some(entry.names)} were one tensor when the adapter was injected, "
            "and are several now (load_state_dict with assign=True, or a weight set anew): one "
            "folded weight cannot be all of them. Tie them again (b.weight = a.weight)."
        )


def _by_weight(standing: list[Insertion]) -> list[list[Insertion]]:
    """The adapters of each weight (of its parts), each behind the one before."""
    chains: dict[tuple[str, ...], list[Insertion]] = {}
    for insertion in standing:
        if insertion.form != "weight":
            raise InjectError(f"'{insertion.entry.site}' is a branch: distribute first.")
        chains.setdefault(insertion.entry.names, []).append(insertion)
    return list(chains.values())


def _evaluated(module: CapturedModule, chain: list[Insertion]) -> nn.Parameter:
    """The value of an adapted weight, rounded once to its dtype.

    An addmm does that by itself. What takes more than sums is computed in float32 at least.
    """
    wide = any(scales_outputs(insertion.entry) for insertion in chain)

    def value(node: fx.Node) -> Any:
        if node.op == "get_attr":
            tensor = module.get_parameter(str(node.target)).detach()
            return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if wide else tensor
        assert callable(node.target)
        return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))

    weight = module.get_parameter(chain[0].entry.parameter)
    with torch.no_grad(), full_precision():
        folded = value(chain[-1].output).to(weight.dtype)
        if folded.stride() != weight.stride():  # channels last, for one
            folded = torch.empty_like(weight).copy_(folded)
        return nn.Parameter(folded)


@contextmanager
def full_precision() -> Generator[None]:
    """Matrix products without TF32 and without reductions in half precision."""
    settings = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    before = {name: getattr(settings, name) for name in names}
    try:
        for name in names:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
