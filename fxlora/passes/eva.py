"""EVA: initialize A from data, as the leading right singular vectors of each site's inputs.

Source: Paischer et al. 2024, EVA, §3. B stays zero, so the outputs do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ConfigError
from ..lora.ops import row_of
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.casts import is_cast
from ..plan import Entry


@dataclass(frozen=True)
class Initialized:
    """The result of `initialize_from`.

    Attributes:
        sites: names of the sites whose A was set from the data.
        kept: (site, reason) for every site that keeps its init.
    """

    sites: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        kept = [f"  {site} keeps its init: {why}" for site, why in self.kept]
        return "\n".join([f"A from the data at {len(self.sites)} sites.", *kept])


class _Tap(nn.Module):
    """Identity module that accumulates the Gram matrix XᵀX of its inputs X (rows, in), and sums.

    The eigenvectors of XᵀX are the right singular vectors of X.
    """

    gram: torch.Tensor | None = None
    total: torch.Tensor | float = 0.0
    count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.detach().flatten(0, -2).double()
        found = rows.mT @ rows  # (in, rows) @ (rows, in) -> (in, in)
        self.gram = found if self.gram is None else self.gram + found
        self.total, self.count = self.total + rows.sum(0), self.count + len(rows)
        return x

    def moments(self, centered: bool) -> torch.Tensor:
        """Return XᵀX, of X less its mean if `centered`."""
        assert self.gram is not None and isinstance(self.total, torch.Tensor)
        return self.gram - torch.outer(self.total, self.total) / self.count * centered


@no_ambient_modes(defaults=False)  # the graphs may use the process's default dtype and device
@torch.no_grad()
def initialize_from(
    module: CapturedModule, batches: Iterable[Any], *, centered: bool = False
) -> Initialized:
    """Set each A, in place, to the r leading right singular vectors of its site's inputs.

    The inputs are collected by running the eval graphs on the batches. This works where a linear
    op has just A as its weight: for linear, addmm and matmul, and parts of their weights, in the
    branch form. Other sites keep their init. Each site needs a float64 matrix (in, in).

    Args:
        module: an adapted module.
        batches: inputs to call the module with. Each is a tuple of positional arguments, a mapping
            of keyword arguments, or a single argument.
        centered: subtract the mean of the inputs first, so that A has their principal components.
            PEFT does so (`initialize_lora_eva_weights`), and the paper does not.

    Returns:
        The sites whose A was set, and the reasons for the others.

    Raises:
        NotCapturedError: the module is not a captured one.
        ConfigError: the module has no adapters, or no A could be set (for example because there
            are no batches); gives the first site's reason.

    Example:
        >>> import torch, fxlora
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> lora = fxlora.adapt(model, torch.randn(3, 6), rules=config)
        >>> fxlora.initialize_from(lora, [torch.randn(32, 6) for _ in range(4)]).sites
        ('0',)
    """
    check_captured(module, "initialize_from")
    if module.plan is None:
        raise ConfigError("initialize_from takes an adapted module: inject a plan first.")
    watched = module.derive().eval()
    with watched.editing():
        taps = {entry.name_a: tap for entry in module.plan if (tap := _tapped(watched, entry))}
    watched.refresh()
    for batch in batches:
        if isinstance(batch, Mapping):
            watched(**batch)
        else:
            watched(*(batch if isinstance(batch, tuple) else (batch,)))
    kept = {entry.site: _kept(module, entry, taps.get(entry.name_a)) for entry in module.plan}
    done = [entry for entry in module.plan if kept[entry.site] is None]
    if not done:
        why = next(iter(kept.values()), "the plan has no entries")
        raise ConfigError(f"no A is set from the data: {why}.")
    for entry in done:
        vectors = torch.linalg.eigh(
            taps[entry.name_a].moments(centered)
        ).eigenvectors  # columns, by ascending eigenvalue
        module.get_parameter(entry.name_a).copy_(vectors.flip(-1)[:, : entry.r].mT)
    reasons = tuple((site, why) for site, why in kept.items() if why is not None)
    return Initialized(tuple(entry.site for entry in done), reasons)


def _tapped(module: CapturedModule, entry: Entry) -> _Tap | None:
    """Insert a tap on the input of every linear op of the eval graphs that has A as its weight.

    Returns:
        The tap, or None if no linear op has A as its weight.
    """
    tap = _Tap()
    name = f"{entry.prefix.replace('.', '_')}_{entry.adapter}_inputs"
    for program in module.programs:
        graph = program.graphs["eval"]
        for a in graph.find_nodes(op="get_attr", target=entry.name_a):
            read = next(filter(is_cast, a.users), a)
            for user in list(read.users):
                row = row_of(user, read)
                x = row.input_of(user, read) if row and row.kind == "linear" else None
                if isinstance(x, fx.Node):
                    module.add_module(name, tap)
                    with graph.inserting_before(user):
                        user.replace_input_with(x, graph.call_module(name, (x,)))
    return tap if name in module._modules else None


def _kept(module: CapturedModule, entry: Entry, tap: _Tap | None) -> str | None:
    """Return why a site keeps its init, or None if its A can be set from the data."""
    if tap is None:
        return f"at '{entry.site}' ({entry.op}, {entry.form} form) no op has just A as its weight"
    if tap.gram is None:
        return f"no batch reaches '{entry.site}'"
    if entry.r > tap.gram.shape[0]:
        return f"'{entry.site}' has {tap.gram.shape[0]} inputs, fewer than r={entry.r}"
    if bool(module.get_parameter(entry.name_b).any()):
        return f"B of '{entry.site}' is not zero, so changing A would change the outputs"
    return None
