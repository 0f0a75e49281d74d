"""The form of a site: the branch, or the weight form.

The branch is chosen where every reader allows it and it costs no more than the weight form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError, UnsupportedOpError
from ..fx.calls import named_argument
from ..lora.layout import Layout
from ..lora.row import Op
from ..lora.variants import VARIANTS
from ..reads.readers import Reader
from ..reads.sites import Site


@dataclass(frozen=True)
class Form:
    """The form in which a site is adapted ("branch" or "weight"), and the reason for it."""

    name: str
    reason: str = ""


def choose_form(
    site: Site,
    r: int,
    dropout: float,
    rows: tuple[int, int] | None = None,
    variants: tuple[str, ...] = (),
) -> Form:
    """Choose the form of a site, or of a part of it.

    The branch is chosen where every reader allows it, unless it costs more than the weight form.
    With dropout, which needs a branch, the cost does not count.

    Args:
        site: the site.
        r: the rank, on which the cost depends.
        dropout: `lora_dropout`.
        rows: the outputs that the part covers, from and to, or None for the whole site.
        variants: the variants of LoRA to apply.

    Raises:
        ConfigError: lora_dropout on a site that cannot take a branch.
        UnsupportedOpError: no form computes the right gradients, as for a look-up with
            `sparse=True` that cannot take a branch.
    """
    obstacle = branch_obstacle(site, rows, variants)
    if obstacle and dropout:
        raise ConfigError(
            f"lora_dropout={dropout} on '{site.name}': {obstacle}, so its adapter is added "
            "to the weight and has no input to drop. Set lora_dropout=0 for it in a separate "
            "rule."
        )
    if obstacle:
        return _weight_form(site, obstacle)
    ops = [(reader.op, reader.node) for reader in site.readers if reader.op]
    costlier = next(filter(None, (op.costlier(node, site.shape, r) for op, node in ops)), None)
    if costlier and not dropout and not site.quantised:
        return _weight_form(site, costlier)
    if dropout and not all(op.dropout for op, _ in ops):
        return Form("branch", "indices take no dropout")
    return Form("branch")


@dataclass(frozen=True)
class _BranchRequest:
    """A request for a branch at one read: for a site, or for some rows of it, with variants."""

    site: Site
    reader: Reader
    rows: tuple[int, int] | None
    variants: tuple[str, ...]

    @property
    def op(self) -> Op:
        """The op's row in the table; `_OBSTACLES` excludes reads without one first."""
        assert self.reader.op is not None
        return self.reader.op

    @property
    def layout(self) -> Layout | None:
        return self.reader.layout

    @property
    def scales(self) -> bool:
        """Whether a variant scales the outputs."""
        return any(VARIANTS[name].gain for name in self.variants)

    @property
    def scaling(self) -> str:
        """The names of the requested variants, for messages."""
        return ", ".join(self.variants)

    @property
    def at_outputs(self) -> bool:
        """Whether the branch changes by output: of a part of them, or by a variant's scales.

        Where the read takes the part for inputs, the branch has a factor with zeros for the others.
        """
        return self.scales or (self.rows is not None and self.layout == self.site.layout)


# (reason why no branch can be added to a read, condition); the first condition that holds counts.
_OBSTACLES: tuple[tuple[str, Callable[[_BranchRequest], bool]], ...] = (
    ("read by {0.reader.kind} through {0.reader.through}", lambda a: bool(a.reader.through)),
    ("read by {0.reader.kind}", lambda a: a.reader.op is None),
    ("in a graph that several calls share", lambda a: a.reader.shared),
    # A branch on each of two factors u and v would omit Δu·Δv.
    ("multiplied with another weight", lambda a: a.reader.other_weight),
    (
        "read by {0.reader.kind} in a way that no low-rank branch computes",
        lambda a: a.layout is None,
    ),
    (
        "read as {0.layout.roles} and as {0.site.layout.roles}",
        lambda a: a.layout is not None and a.site.layout not in (a.layout, a.layout.swapped),
    ),
    (
        "read by {0.reader.kind}, whose outputs are not in one dimension",
        lambda a: a.at_outputs and (a.op.output is None or a.site.layout.stacked),
    ),
    (
        "read by {0.reader.kind}, whose outputs are the inputs of other readers",
        lambda a: a.scales and a.layout != a.site.layout,
    ),
    ("a part of a grouped convolution", lambda a: a.rows is not None and a.site.groups > 1),
    (
        "outputs that groups share",
        lambda a: a.scales and a.site.groups > 1 and a.site.layout.in_first,
    ),
    (
        "{0.scaling} reads the weight, which is quantised",
        lambda a: a.site.quantised and a.scales,
    ),
    (
        "{0.scaling} scales its outputs",
        lambda a: a.scales and bool(a.rows or a.reader.path or a.op.result is not None),
    ),
)


def branch_obstacle(
    site: Site, rows: tuple[int, int] | None, variants: tuple[str, ...]
) -> str | None:
    """Return why a site, or a part of it, cannot take a branch at one of its reads, or None."""
    found = (_obstacle(_BranchRequest(site, reader, rows, variants)) for reader in site.readers)
    return next(filter(None, found), None)


def _obstacle(asked: _BranchRequest) -> str | None:
    """Return why no branch can be added to a read, or None."""
    reason = next((text for text, holds in _OBSTACLES if holds(asked)), None)
    if reason is not None:
        return reason.format(asked)
    return asked.op.obstacle(asked.reader.node, asked.reader.weight, asked.site.shape)


def _weight_form(site: Site, reason: str) -> Form:
    """Return the weight form; raise if a look-up would give W + s·BA a sparse gradient."""
    if site.quantised:
        raise UnsupportedOpError(
            f"'{site.name}' is quantised, so that its adapter has to be added to the outputs of "
            f"its reads, and one of them does not allow that ({reason}). Leave it out of the rule "
            "(Rule(name, lora=None) before it), or quantise the model without it."
        )
    sparse = [r for r in site.readers if named_argument(r.node, "sparse") is True]
    if sparse:
        raise UnsupportedOpError(
            f"'{site.name}': {sparse[0].describe()} with sparse=True, and its adapter has to be "
            f"added to the weight ({reason}), where gradients cannot be sparse. Build the layer "
            "with sparse=False: the frozen weight has no gradient anyway."
        )
    return Form("weight", reason)


def notes(site: Site, form: Form, cut: str = "") -> str:
    """Return the notes on an entry that the plan shows: the reason for its form, and ties.

    Args:
        cut: what the site is cut along, if that is to be said.
    """
    notes = [cut, form.reason]
    if site.tied:
        notes.append(f"split from its tie with {', '.join(site.tied)}")
    elif len(site.names) > 1:
        notes.append("tied")
    if site.inseparable:
        notes.append("no call site tells its names apart: all are adapted")
    return "; ".join(filter(None, notes))
