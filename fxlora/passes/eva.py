"""A from data: the directions that the inputs of each site vary most in (Paischer et al. 2024,
EVA, §3). B stays zero, and so do the outputs as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ConfigError
from ..lora.ops import row_of
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..plan import Entry


@dataclass(frozen=True)
class Initialized:
    """What `initialize_from` did: the sites whose A is from the data; the others, with reasons."""

    sites: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        kept = [f"  {site} keeps its init: {why}" for site, why in self.kept]
        return "\n".join([f"A from the data at {len(self.sites)} sites.", *kept])


class _Tap(nn.Module):
    """Adds up XᵀX of the inputs X (rows, in) that pass: its eigenvectors are X's right singular
    vectors."""

    gram: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.detach().flatten(0, -2).double()
        found = rows.mT @ rows
        self.gram = found if self.gram is None else self.gram + found
        return x


@no_ambient_modes(defaults=False)  # it runs the graphs
@torch.no_grad()
def initialize_from(module: CapturedModule, batches: Iterable[Any]) -> Initialized:
    """Run the adapted graphs on data, and set each A, in place, to the r first right singular
    vectors of its inputs.

    That is known where A is multiplied with the inputs as they are (linear, addmm, matmul, and
    parts of these, in the branch form). It takes in² float64 numbers a site.

    Args:
        batches: what the module is called with: a tuple of arguments, a mapping of keywords, or
            one argument.

    Raises:
        ConfigError: there are no adapters or no batches, or no site's inputs are seen.
    """
    if not isinstance(module, CapturedModule) or module.plan is None:
        raise ConfigError("initialize_from takes an adapted module: inject a plan first.")
    watched = module.derive().eval()
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
        raise ConfigError(f"no A is set from the data: {next(iter(kept.values()))}.")
    for entry in done:
        gram = taps[entry.name_a].gram
        assert gram is not None
        vectors = torch.linalg.eigh(gram).eigenvectors  # of the smallest first
        module.get_parameter(entry.name_a).copy_(vectors.flip(-1)[:, : entry.r].mT)
    reasons = tuple((site, why) for site, why in kept.items() if why is not None)
    return Initialized(tuple(entry.site for entry in done), reasons)


def _tapped(module: CapturedModule, entry: Entry) -> _Tap | None:
    """A tap on what A is multiplied with, in the graphs of eval mode, or None."""
    tap = _Tap()
    name = f"{entry.prefix.replace('.', '_')}_{entry.adapter}_inputs"
    for program in module.programs:
        graph = program.graphs["eval"]
        for a in graph.find_nodes(op="get_attr", target=entry.name_a):
            for user in list(a.users):
                row = row_of(user, a)
                x = row.input_of(user, a) if row and row.kind == "linear" else None
                if isinstance(x, fx.Node):
                    module.add_module(name, tap)
                    with graph.inserting_before(user):
                        user.replace_input_with(x, graph.call_module(name, (x,)))
    return tap if name in module._modules else None


def _kept(module: CapturedModule, entry: Entry, tap: _Tap | None) -> str | None:
    if tap is None:
        return f"'{entry.site}' ({entry.op}, {entry.form} form) has no A that inputs meet alone"
    if tap.gram is None:
        return f"no batch reaches '{entry.site}'"
    if entry.r > tap.gram.shape[0]:
        return f"'{entry.site}' has {tap.gram.shape[0]} inputs, fewer than r={entry.r}"
    if bool(module.get_parameter(entry.name_b).any()):
        return f"B of '{entry.site}' is not zero: another A would change the outputs"
    return None
