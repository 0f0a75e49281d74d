"""What each further rank of a site is worth, by which a budget is shared out.

    spectrum   σᵢ² / Σσ², of the singular values of the weight: a flat spectrum needs more ranks
    eva        λᵢ / Σλ, of the second moments of the site's inputs: the variance that the i-th
               direction of A explains (Paischer et al. 2024, EVA, §3.2)
    fisher     Σ σᵢ², of the gradients of the weight, summed over batches: the part of the trace of
               the empirical Fisher information that a change of rank i can reach

The first two are shares, so that every site counts alike; the last compares sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from ..lora.layout import Layout
from ..lora.ops import OPS, is_lookup
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..module.sharded import whole
from ..names import shown
from ..plan import Entry
from ..tables import some

Gains = Mapping[str, Sequence[float]]  # by an entry's site: the worth of rank 1, 2, …, falling
Loss = Callable[[Any], torch.Tensor]

KINDS = ("eva", "fisher", "spectrum")


def check_rank_by(rank_by: Any, budget: Any, data: Any, loss: Any) -> None:
    """Raise ConfigError for a measure that is unknown, or for arguments that it does not use."""
    if rank_by not in (*KINDS, None):
        raise ConfigError(f"rank_by must be one of {', '.join(KINDS)}, not {shown(rank_by)}.")
    if rank_by is not None and budget is None:
        raise ConfigError(f'rank_by="{rank_by}" shares out a budget: give budget=.')
    needs_data = rank_by in ("eva", "fisher")
    if needs_data and data is None:
        raise ConfigError(f'rank_by="{rank_by}" needs data=: batches to call the module with.')
    if data is not None and not needs_data:
        raise ConfigError('data= is for rank_by="eva" and "fisher": leave it out.')
    if loss is not None and rank_by != "fisher":
        raise ConfigError('loss= is for rank_by="fisher": leave it out.')


@no_ambient_modes(defaults=False)  # the graphs may use the process's default dtype and device
def gains_of(
    module: CapturedModule, entries: Sequence[Entry], rank_by: str, data: Any, loss: Loss | None
) -> Gains:
    """Return what each rank of each entry is worth.

    Raises:
        ConfigError: it cannot be measured at a site; names it.
    """
    if rank_by == "spectrum":
        weights = {e.parameter: whole(module.get_parameter(e.parameter).detach()) for e in entries}
        return {e.site: _shares(_squares(e, weights[e.parameter])) for e in entries}
    watched = module.derive().eval()
    if rank_by == "eva":
        return _by_inputs(watched, entries, data)
    return _by_gradients(watched, entries, data, loss or _own_loss)


def _squares(entry: Entry, tensor: torch.Tensor) -> list[float]:
    """Return the squares of the singular values of a tensor in a weight's shape, or of its part.

    Of a stack, the squares are added up, as one rank is a rank of each matrix.
    """
    if entry.rows is not None:
        start, stop = entry.rows
        tensor = tensor.narrow(entry.layout.part_dim, start, stop - start)
    matrix = entry.layout.matrix(tensor.double(), entry.adapted_shape)
    squares = torch.linalg.svdvals(matrix).square()
    return squares.flatten(0, -2).sum(0).tolist() if squares.dim() > 1 else squares.tolist()


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


# ---- inputs -------------------------------------------------------------------------------------


@dataclass
class _Inputs(TorchFunctionMode):
    """Adds up XᵀX of the inputs X (rows, in) of every op that multiplies them by a watched weight.

    Attributes:
        names: the names of the weights, by their identity.
        moments: the sums, by name.
    """

    names: Mapping[int, str]
    moments: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        for position, given in enumerate(args):
            row = OPS.get((func, position)) if id(given) in self.names else None
            # x @ W and the like: x (…, in), and outputs (…, out)
            if row is None or row.output != -1 or row.kernel or is_lookup(row.kind):
                continue
            x = args[row.input]
            if isinstance(x, torch.Tensor) and given.dim() == 2:
                self._add(self.names[id(given)], x.detach())
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, x: torch.Tensor) -> None:
        rows = x.flatten(0, -2).double() if x.dim() > 1 else x[None].double()
        found = rows.mT @ rows  # (in, rows) @ (rows, in) -> (in, in)
        self.moments[name] = self.moments[name] + found if name in self.moments else found


def _by_inputs(module: CapturedModule, entries: Sequence[Entry], data: Any) -> Gains:
    weights = {id(module.get_parameter(e.parameter)): e.parameter for e in entries}
    with _Inputs(weights) as inputs, torch.no_grad():
        for batch in _batches(data):
            _called(module, batch)
    missing = [
        e.site
        for e in entries
        if e.parameter not in inputs.moments
        or len(inputs.moments[e.parameter]) != _inputs_of(e.layout, e.shape)
    ]
    if missing:
        raise ConfigError(
            f'rank_by="eva" cannot measure {some(missing)}: no batch reaches it, or no op '
            'multiplies an input by just this weight. Take rank_by="spectrum" or "fisher", or '
            "leave it out of the rules."
        )
    return {e.site: _shares(_eigenvalues(inputs.moments[e.parameter], e)) for e in entries}


def _inputs_of(layout: Layout, shape: tuple[int, ...]) -> int:
    return layout.features(shape)[0]


def _eigenvalues(moments: torch.Tensor, entry: Entry) -> list[float]:
    """Return the eigenvalues of XᵀX, the largest first, as many as the weight can have ranks."""
    values = torch.linalg.eigvalsh(moments).flip(-1).clamp(min=0).tolist()
    most = entry.layout.max_rank(entry.adapted_shape)
    rest = sum(values[most:])  # no rank of this weight explains it, but it counts in the total
    return [*values[:most], *([rest] if rest else [])]


# ---- gradients ----------------------------------------------------------------------------------


def _by_gradients(module: CapturedModule, entries: Sequence[Entry], data: Any, loss: Loss) -> Gains:
    names = list(dict.fromkeys(entry.parameter for entry in entries))
    weights = [module.get_parameter(name).requires_grad_(True) for name in names]
    found: dict[str, list[float]] = {}
    for batch in _batches(data):
        value = loss(_called(module, batch))
        if not isinstance(value, torch.Tensor) or value.dim() or not value.requires_grad:
            raise ConfigError(f"loss must return a number that depends on weights: {shown(value)}.")
        given: Any = torch.autograd.grad(value, weights, allow_unused=True)  # None where unused
        gradients = dict(zip(names, given, strict=True))
        for entry in entries:
            gradient = gradients[entry.parameter]
            if gradient is not None:
                more = _squares(entry, whole(gradient))
                before = found.get(entry.site, [0.0] * len(more))
                found[entry.site] = [a + b for a, b in zip(before, more, strict=True)]
    if missing := [entry.site for entry in entries if entry.site not in found]:
        raise ConfigError(f'rank_by="fisher": no gradient reaches {some(missing)} from the data.')
    return found


def _own_loss(output: Any) -> torch.Tensor:
    """Return the loss that a model computes itself."""
    held = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = output if isinstance(output, torch.Tensor) and not output.dim() else held
    if not isinstance(found, torch.Tensor):
        raise ConfigError(
            'rank_by="fisher" needs loss=, a function of the outputs: the outputs have no loss of '
            "their own."
        )
    return found


def _batches(data: Any) -> Iterable[Any]:
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str | torch.Tensor):
        raise ConfigError(f"data must be a list of batches, not {shown(type(data).__name__)}.")
    return data


def _called(module: CapturedModule, batch: Any) -> Any:
    """Call a module with a tuple of arguments, a mapping of keyword arguments, or one argument."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*(batch if isinstance(batch, tuple) else (batch,)))
