"""How A and B are sharded over processes, by the placements of the weights that they adapt.

Tensor parallelism shards a weight by its outputs (column-wise) or its inputs (row-wise). Then A and
B need no communication besides that of the layer itself:

    column-wise   W (out/n, in)   A is copied, B is sharded by its outputs: so is B(A(x))
    row-wise      W (out, in/n)   A is sharded by its inputs, B is copied: s·A(x) is a partial sum

Weights sharded in other ways (parts of a packed weight, flattened dimensions) have A and B copied:
correct, with more communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import InjectError
from ..module import CapturedModule, check_captured
from ..module.fsdp import mesh_of
from ..module.sharded import distribute, from_first, is_sharded, placements_like
from ..plan import Entry, Plan
from ..tables import render

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class ShardedTensor:
    """How a tensor of an adapter is spread over processes.

    Attributes:
        name: its name.
        shape: its whole shape.
        weight: the placements of the weight that it adapts, one for each dimension of the mesh.
        placements: its own.
    """

    name: str
    shape: tuple[int, ...]
    weight: tuple[Placement, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class ShardPlan:
    """How the tensors of adapters are spread over processes. Print it for a table.

    Attributes:
        tensors: those whose weights are sharded; all others are whole on each process.
    """

    tensors: tuple[ShardedTensor, ...]

    def __str__(self) -> str:
        rows = [
            [t.name, str(t.shape), " ".join(map(str, t.weight)), " ".join(map(str, t.placements))]
            for t in self.tensors
        ]
        return render(["tensor", "shape", "weight", "placement"], rows)


def shard_plan(module: CapturedModule, plan: Plan | None = None) -> ShardPlan:
    """Return how the adapters of a module are sharded, as far as their weights are.

    `inject` on a module whose weights are sharded by torch's `parallelize_module` places A and B
    like this; nothing more is to be done.

    Args:
        module: a captured module.
        plan: the plan to inject; by default, the one that the module has.

    Returns:
        The placements of each A and B; print it for a table.

    Raises:
        NotCapturedError: `module` is not a captured module.
        InjectError: there is no plan, or it adapts a weight that the module does not have.

    Example:
        >>> import torch, fxlora
        >>> x, config = torch.randn(3, 6), fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(torch.nn.Sequential(torch.nn.Linear(6, 4)), x, rules=config)
        >>> fxlora.shard_plan(lora).tensors  # of one process
        ()
    """
    check_captured(module, "shard_plan")
    plan = module.plan if plan is None else plan
    if plan is None:
        raise InjectError("nothing to shard: give the plan that you are going to inject.")
    held = dict(module.named_parameters(remove_duplicate=False))
    if missing := [entry.parameter for entry in plan if entry.parameter not in held]:
        raise InjectError(f"the plan adapts '{missing[0]}', which this module does not have.")
    found: list[ShardedTensor] = []
    for entry in plan:
        if is_sharded(weight := held[entry.parameter]):
            placed = tuple(weight.placements)
            found += [
                ShardedTensor(name, shape, placed, tuple(_placements(entry, name, weight)))
                for name, shape in entry.tensors.items()
            ]
    return ShardPlan(tuple(found))


def _placements(entry: Entry, name: str, weight: DTensor) -> Sequence[Placement]:
    """Return the placements of a tensor of an entry."""

    def dim_of(dim: int) -> int | None:
        if entry.rows is not None and dim == entry.layout.part_dim:  # the shards are not the part's
            return None
        dims = entry.layout.factor_dims(dim)
        return {entry.name_a: dims[0], entry.name_b: dims[1]}.get(name)  # a variant's: copied

    return placements_like(weight, dim_of)


@torch.no_grad()
def shard_like_weight(
    entry: Entry, name: str, tensor: nn.Parameter, weight: torch.Tensor
) -> nn.Parameter:
    """Return a new tensor of an adapter, sharded as its weight asks for. Collective if that is."""
    if not is_sharded(weight):
        return tensor
    sharded = distribute(tensor.detach(), weight.device_mesh, _placements(entry, name, weight))
    return nn.Parameter(sharded, tensor.requires_grad)


def share_whole_adapters(module: CapturedModule) -> None:
    """Give all processes the first one's adapters of weights that are not sharded.

    Each process initialized them by its own random state. Collective if any weight is sharded.
    """
    if mesh := mesh_of(module):
        adapters = map(module.get_parameter, sorted(module.adapter_parameters()))
        from_first(mesh, (tensor.data for tensor in adapters if not is_sharded(tensor)))
