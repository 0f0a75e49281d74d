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
from ..errors import AdapterError, ConfigError, warn
from ..lora.inits import STARTS
from ..matching import match
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.sharded import whole, write
from ..names import shown
from ..plan import Entry
from ..tables import some
from .differences import Checkpoint, Differences, relative
from .pairs import product, singular


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
) -> CapturedModule:
    """Return a base with an adapter that makes it a tuned model, as far as low rank allows.

    At each site that the rules match, s·BA is the nearest matrix of its rank to W_tuned - W_base
    (Eckart and Young 1936), by a full SVD in float64: with ΔW = USVᵀ, B = U√(S/s) and A = √(S/s)Vᵀ,
    each cut to the rank. The form, s and dropout are those that the rules give. Parameters that the
    rules train in full, and buffers, have the tuned values.

    The printed plan says of each site how large the change is, ‖ΔW‖ / ‖W‖, and which part of it the
    pair misses, ‖ΔW - s·BA‖ / ‖ΔW‖, in Frobenius norms, with A and B as they are held.

    Args:
        base: a captured module without adapters; it is not changed.
        tuned: a model of the same class, a captured one, or a state dict.
        rules: a LoraConfig, a Rule, a list of these, or a rules file, as for `match`.
        rank: the rank of all sites, as far as their weights have it; by default the rules' ranks.
        energy: the share of each ‖ΔW‖² to keep, in (0, 1], instead of a rank.
        leave: leave what differs and no rule covers as the base has it, and warn, instead of
            raising.
        adapter_name: the adapter's name.

    Returns:
        The adapted module. Print its plan for the error of each site.

    Warns:
        FxLoraWarning: something differs and is left as in the base; names it.

    Raises:
        NotCapturedError: the base is not a captured module.
        AdapterError: the tuned model has other names, shapes or ties than the base, or values that
            are not finite; or something differs that no rule covers; names it.
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
        >>> lora = fxlora.extract(gm, tuned, config).eval()
        >>> torch.allclose(lora(x), tuned(x), atol=1e-5)
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
    _check_left(differences, leave)
    starts = {name: value for pair in pairs for name, value in pair.values.items()}
    result = inject(base, plan, starts=starts)
    held = {**dict(result.named_parameters(remove_duplicate=False)), **result.state_tensors()}
    for name in differences.in_full:
        write(held[name], checkpoint.of_name(name).to(held[name].dtype))
    return result


def _check_left(differences: Differences, leave: bool) -> None:
    """Raise for what differs and no rule covers, or warn if it is to be left."""
    if not differences.left:
        return
    listed = some(f"{name} ({size:.1e})" for name, size in differences.left.items())
    said = f"{listed} differ in the tuned model (relative change), and no rule covers them."
    if not leave:
        raise AdapterError(
            f"{said} Adapt them, train them in full (modules_to_save=, bias=, Rule(train=True)), "
            "or give leave=True to leave them as the base has them."
        )
    warn(f"{said} They are left as in the base.")


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
    """The pair of one entry, whose notes say what it misses.

    Attributes:
        entry: the entry, with its rank.
        values: A and B by name, in their dtype.
    """

    entry: Entry
    values: dict[str, torch.Tensor]


def _of_least_rank(rule: Rule) -> Rule:
    """Return a rule whose ranks do not matter, so that none is too large for a weight."""
    if rule.lora is None or rule.tokens is not None:
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
        if entry.tokens:
            return self._rows(entry, before, change)
        layout, shape = entry.layout, entry.adapted_shape
        u, s, vh = singular(layout, change, shape)
        r = self._rank(entry, s)
        scaling = config.scaling(r, entry.alpha)
        root = (s[..., :r] / scaling).sqrt()
        down, up = root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)
        a, b = layout.with_kernels(down, up, shape)
        if entry.padding_idx is not None:  # this row does not train
            a.select(-1, entry.padding_idx).zero_()
        dtype = entry.dtype_over(self.base.get_parameter(entry.parameter).dtype)
        a, b = a.to(dtype), b.to(dtype)
        left = change - scaling * product(entry, a.to(change), b.to(change))
        reason = _with_errors(entry, before, change, left)
        sized = dataclasses.replace(entry, r=r, scaling=scaling, reason=reason)
        return _Pair(sized, {sized.name_a: a, sized.name_b: b})

    def _rows(self, entry: Entry, before: torch.Tensor, change: torch.Tensor) -> _Pair:
        """Return what trains of an entry of rows: their change, as it is."""
        rows = change[list(entry.tokens)]  # (tokens, features)
        left = change.index_fill(0, torch.tensor(entry.tokens, device=change.device), 0.0)
        dtype = entry.dtype_over(self.base.get_parameter(entry.parameter).dtype)
        (name,) = entry.trainable
        value = (rows.mT if entry.layout.in_first else rows).to(dtype)
        noted = dataclasses.replace(entry, reason=_with_errors(entry, before, change, left))
        return _Pair(noted, {name: value})

    def _change(self, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W and ΔW in float64, of the part if the entry adapts one."""
        before = whole(self.base.get_parameter(entry.parameter)).detach().double()
        change = self.checkpoint.of_name(entry.parameter).to(before) - before
        if not bool(change.isfinite().all()):
            raise AdapterError(f"'{entry.parameter}' differs by NaN or infinities.")
        if entry.rows is None:
            return before, change
        start, stop = entry.rows
        dim = entry.layout.part_dim
        return before.narrow(dim, start, stop - start), change.narrow(dim, start, stop - start)

    def _rank(self, entry: Entry, s: torch.Tensor) -> int:
        if self.energy is not None:
            return _least(s, self.energy)
        return min(self.rank or entry.r, entry.layout.max_rank(entry.adapted_shape))


def _with_errors(
    entry: Entry, before: torch.Tensor, change: torch.Tensor, left: torch.Tensor
) -> str:
    """Return an entry's notes with the relative sizes of its change, and of what it leaves."""
    size, missed = float(change.norm()), float(left.norm())
    note = f"change {relative(size, float(before.norm())):.1e}, error {relative(missed, size):.1e}"
    return "; ".join(filter(None, (entry.reason, note)))


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
