"""extract: an adapter from two checkpoints of a model, by SVD of what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..api import inject
from ..config import MAX_RANK, LoraConfig, Rule, Rules, as_rules, is_finite, is_whole
from ..errors import AdapterError, ConfigError
from ..lora.inits import STARTS
from ..matching import match
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.sharded import whole, write
from ..names import shown
from ..plan import Entry
from ..tables import render, some
from .differences import Checkpoint, Differences, relative
from .pairs import product, singular


@dataclass(frozen=True)
class ExtractedSite:
    """What an adapter has of the change of one weight.

    Attributes:
        site: name of the site.
        r: the rank.
        change: ‖ΔW‖ / ‖W‖, in Frobenius norms.
        energy: the share of ‖ΔW‖² that the pair has; 1 where nothing changed.
        error: ‖ΔW - s·BA‖ / ‖ΔW‖, with A and B as they are held; 0 where nothing changed.
    """

    site: str
    r: int
    change: float
    energy: float
    error: float


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`; it prints as a table of its sites.

    Attributes:
        module: the base with the extracted adapter.
        sites: what the adapter has of each weight's change.
        in_full: names of the parameters and buffers that have the tuned values.
        left: names of what differs and has the base's values, with the size of its relative change.
    """

    module: CapturedModule
    sites: tuple[ExtractedSite, ...]
    in_full: tuple[str, ...]
    left: Mapping[str, float]

    def __str__(self) -> str:
        header = ["site", "r", "change", "energy", "error"]
        rows = [
            [s.site, s.r, f"{s.change:.2e}", f"{s.energy:.4f}", f"{s.error:.2e}"]
            for s in self.sites
        ]
        lines = [render(header, rows)]
        if self.in_full:
            lines.append(f"With the tuned values: {some(self.in_full)}.")
        lines += [f"Left as in the base: {name} ({size:.2e})." for name, size in self.left.items()]
        return "\n".join(lines)


@no_ambient_modes()
@torch.no_grad()
def extract(
    base: CapturedModule,
    tuned: nn.Module | Mapping[str, torch.Tensor],
    rules: Rules | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    leave: bool = False,
    adapter_name: str = "default",
) -> Extraction:
    """Return an adapter that turns a base model into a tuned one, as far as low rank allows.

    At each site that the rules match, s·BA is the nearest matrix of its rank to W_tuned - W_base
    (Eckart and Young 1936), by a full SVD in float64: with ΔW = USVᵀ, B = U√(S/s) and A = √(S/s)Vᵀ,
    each cut to the rank. The form, s and dropout are those that the rules give. Parameters that the
    rules train in full, and buffers, have the tuned values.

    Args:
        base: a captured module without adapters; it is not changed.
        tuned: a model of the same class, a captured one, or a state dict.
        rules: a LoraConfig, a Rule, a list of these, or a rules file, as for `match`.
        rank: the rank of all sites, as far as their weights have it; by default the rules' ranks.
        energy: the share of each ‖ΔW‖² to keep, in (0, 1], instead of a rank.
        leave: leave what differs and no rule covers as the base has it, instead of raising.
        adapter_name: the adapter's name.

    Returns:
        The adapted module, with the relative error of each site. Print it for a table.

    Raises:
        NotCapturedError: the base is not a captured module.
        AdapterError: the tuned model has other names, shapes or ties than the base, or something
            differs that no rule covers; names it.
        ConfigError: the rules ask for DoRA or an init that starts from the weight, or another
            argument is invalid.
        NoMatchError, UnsupportedOpError: as for `match`.

    Example:
        >>> import copy, torch, fxlora
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> gm, tuned = fxlora.capture(model, x), copy.deepcopy(model)
        >>> with torch.no_grad():
        ...     _ = tuned[0].weight.add_(torch.ones(4, 1) @ torch.ones(1, 6))
        >>> config = fxlora.LoraConfig(r=1, target_modules="all-linear")
        >>> found = fxlora.extract(gm, tuned, config)
        >>> torch.allclose(found.module.eval()(x), tuned(x), atol=1e-5)
        True
    """
    check_captured(base, "extract")
    _check_sizes(rank, energy)
    given = as_rules(rules)
    if rank is not None or energy is not None:
        given = [_of_least_rank(rule) for rule in given]
    plan = match(base, given, adapter_name=adapter_name)
    if varied := [entry.site for entry in plan if entry.variants]:
        raise ConfigError(
            f"{some(varied)}: extract gives plain LoRA. Leave out use_dora, variant= and an init "
            "that starts from the weight."
        )
    checkpoint = Checkpoint.of(base, tuned)
    configs = [plan.rules[entry.rule - 1].lora or LoraConfig() for entry in plan]
    cut = _Cut(base, checkpoint, rank, energy)
    pairs = [cut.pair(entry, config) for entry, config in zip(plan, configs, strict=True)]
    plan = dataclasses.replace(plan, entries=tuple(pair.entry for pair in pairs), rules=())
    differences = Differences.of(base, checkpoint, plan)
    if differences.left and not leave:
        listed = some(f"{name} ({size:.1e})" for name, size in differences.left.items())
        raise AdapterError(
            f"{listed} differ in the tuned model (relative change), and no rule covers them. Adapt "
            "them, train them in full (modules_to_save=, bias=, Rule(train=True)), or give "
            "leave=True to leave them as the base has them."
        )
    starts = {name: value for pair in pairs for name, value in pair.values.items()}
    result = inject(base, plan, starts=starts)
    held = {**dict(result.named_parameters(remove_duplicate=False)), **result.state_tensors()}
    for name in differences.in_full:
        write(held[name], checkpoint.of_name(name).to(held[name].dtype))
    sites = tuple(pair.measured(result) for pair in pairs)
    return Extraction(result, sites, tuple(differences.in_full), differences.left)


def _check_sizes(rank: int | None, energy: float | None) -> None:
    """Raise ConfigError unless one of the two at most is given, and valid."""
    if rank is not None and energy is not None:
        raise ConfigError("give a rank or an energy, not both.")
    if rank is not None and not is_whole(rank, 1, MAX_RANK):
        raise ConfigError(f"rank must be an integer ≥ 1, not {shown(rank)}.")
    if energy is not None and not (is_finite(energy) and 0 < energy <= 1):
        raise ConfigError(f"energy must be in (0, 1], not {shown(energy)}.")


@dataclass(frozen=True)
class _Pair:
    """The pair of one entry.

    Attributes:
        entry: the entry, with its rank.
        values: A and B by name, in float64.
        change: ΔW, or the part's slice of it, in float64.
        weight: ‖W‖, of the same.
    """

    entry: Entry
    values: dict[str, torch.Tensor]
    change: torch.Tensor
    weight: float

    def measured(self, module: CapturedModule) -> ExtractedSite:
        """Return what the adapter of a module has of the change."""
        entry = self.entry
        a, b = (
            whole(module.get_parameter(name)).to(self.change)
            for name in (entry.name_a, entry.name_b)
        )
        size = float(self.change.norm())
        rest = self.change - entry.scaling * product(entry, a, b)
        error = relative(float(rest.norm()), size)
        return ExtractedSite(
            entry.site, entry.r, relative(size, self.weight), max(0.0, 1 - error**2), error
        )


def _of_least_rank(rule: Rule) -> Rule:
    """Return a rule whose ranks do not matter, so that none is too large for a weight."""
    if rule.lora is None:
        return rule
    init = rule.lora.init_lora_weights
    lora = dataclasses.replace(
        rule.lora, r=1, rank_pattern={}, init_lora_weights=init if init in STARTS else True
    )
    return dataclasses.replace(rule, lora=lora)


@dataclass(frozen=True)
class _Cut:
    """Cuts what differs at a site to a rank.

    Attributes:
        base: the base.
        checkpoint: the tuned tensors.
        rank: the rank, or None for the entries' or an energy.
        energy: the share of the squares to keep, or None.
    """

    base: CapturedModule
    checkpoint: Checkpoint
    rank: int | None
    energy: float | None

    def pair(self, entry: Entry, config: LoraConfig) -> _Pair:
        """Return the pair of an entry, whose s is that of the configuration at the rank."""
        before, change = self._change(entry)
        layout, shape = entry.layout, entry.adapted_shape
        u, s, vh = singular(layout, change, shape)
        r = self._rank(entry, s)
        scaling = config.scaling(r, entry.alpha)
        root = (s[..., :r] / scaling).sqrt()
        down, up = root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)
        a, b = layout.with_kernels(down, up, shape)
        if entry.padding_idx is not None:  # this row does not train
            a.select(-1, entry.padding_idx).zero_()
        sized = dataclasses.replace(entry, r=r, scaling=scaling)
        return _Pair(sized, {sized.name_a: a, sized.name_b: b}, change, float(before.norm()))

    def _change(self, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W and ΔW in float64, of the part if the entry adapts one."""
        before = whole(self.base.get_parameter(entry.parameter)).detach().double()
        change = self.checkpoint.of_name(entry.parameter).to(before) - before
        if entry.rows is None:
            return before, change
        start, stop = entry.rows
        dim = entry.layout.part_dim
        return before.narrow(dim, start, stop - start), change.narrow(dim, start, stop - start)

    def _rank(self, entry: Entry, s: torch.Tensor) -> int:
        if self.energy is not None:
            return _least(s, self.energy)
        return min(self.rank or entry.r, entry.layout.max_rank(entry.adapted_shape))


def _least(s: torch.Tensor, energy: float) -> int:
    """Return the least rank, at least 1, that keeps a share of the sum of squares.

    Args:
        s: singular values (…, n); of a stack, the rank is that of the matrix that needs most.
        energy: the share.
    """
    squares = s.square()
    total = squares.sum(-1, keepdim=True)
    behind = total - squares.cumsum(-1)  # what a cut after each value leaves out
    noise = s.shape[-1] * torch.finfo(s.dtype).eps
    too_much = behind > max(1 - energy, noise) * total
    return min(int(too_much.sum(-1).max()) + 1, s.shape[-1])
