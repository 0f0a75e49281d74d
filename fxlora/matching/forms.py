"""Which form a site takes: the branch wherever every reader allows it, else the weight form."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, UnsupportedOpError
from ..fx.calls import named_argument
from ..fx.nested import grad_enabled
from ..lora.variants import VARIANTS
from ..reads.readers import Reader
from ..reads.sites import Site


def check_supported(site: Site, number: int) -> None:
    """Raise unless some form can adapt every read of the site that rule `number` targets.

    Raises:
        UnsupportedOpError: says the read, and what to do instead.
    """
    if site.outside is not None:
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}) {site.why_outside}, so that no adapter can stand "
            "there. Leave it out of the rule (Rule(name, lora=None) before it)."
        )
    if site.overlaps:
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}) shares memory with '{site.overlaps[0]}', "
            "which is another tensor: an adapter on one would leave the other behind. Tie them "
            "as one Parameter (b.weight = a.weight), and read that."
        )
    if writer := site.writer:
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}): its weight is written to in every call, by "
            f"{writer.describe().replace(' reads', '')}, which an adapter would change. Leave it "
            "out (Rule(name, lora=None) before it), or take that out of the forward (of an "
            "embedding: max_norm=None)."
        )
    if not any(not reader.detached and grad_enabled(reader.path) for reader in site.readers):
        reader = site.readers[0]
        how = f"through {reader.through}" if reader.detached else "under torch.no_grad()"
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}) is read {how} alone, where no gradient passes: its "
            "adapter would never train. Leave it out of the rule (Rule(name, lora=None) before "
            "it), or take the no_grad away (a reentrant checkpoint has one: use_reentrant=False)."
        )
    if whole := next((r for r in site.readers if r.node.op == "call_module"), None):
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}) is read inside {whole.kind}, which the tracer keeps "
            "whole: capture with example inputs, which sees inside."
        )


@dataclass(frozen=True)
class Form:
    """How a site is adapted: "branch" or "weight", and why."""

    name: str
    reason: str = ""


def choose_form(
    site: Site,
    r: int,
    dropout: float,
    rows: tuple[int, int] | None = None,
    variants: tuple[str, ...] = (),
) -> Form:
    """The form of a site, or of a part of it: the branch wherever every reader allows it.

    Raises:
        ConfigError: lora_dropout on a site whose form has no branch input.
        UnsupportedOpError: no form computes the right gradients.
    """
    found = (_obstacle(site, reader, rows, variants) for reader in site.readers)
    obstacle = next(filter(None, found), None)
    if obstacle and dropout:
        raise ConfigError(
            f"lora_dropout={dropout} on '{site.name}': {obstacle}, so its adapter is added "
            "to the weight and has no input to drop. Set lora_dropout=0 for it in a rule "
            "of its own."
        )
    if obstacle:
        return _weight_form(site, obstacle)
    ops = [(reader.op, reader.node) for reader in site.readers if reader.op]
    dearer = next(filter(None, (op.dearer(node, site.shape, r) for op, node in ops)), None)
    if dearer and not dropout:
        return _weight_form(site, dearer)
    if dropout and not all(op.dropout for op, _ in ops):
        return Form("branch", "indices take no dropout")
    return Form("branch")


def _obstacle(
    site: Site, reader: Reader, rows: tuple[int, int] | None, variants: tuple[str, ...]
) -> str | None:
    """Why no branch can stand beside a read, or None."""
    op = reader.op
    if reader.through:
        return f"read by {reader.kind} through {reader.through}"
    if op is None:
        return f"read by {reader.kind}"
    if reader.shared:
        return "in a graph that several calls share"
    if reader.beside:
        return "multiplied with another weight"  # two branches would miss Δu·Δv
    seen = op.layout_of(reader.node, reader.weight, len(site.shape))
    if site.layout not in (seen, seen.swapped):
        return f"read as {seen.roles} and as {site.layout.roles}"
    scales = any(VARIANTS[name].gain for name in variants)
    if (rows or scales) and (op.output is None or seen.stacked):
        return f"read by {reader.kind}, whose outputs are not in one dimension"
    if (rows or scales) and seen != site.layout:
        return f"read by {reader.kind}, whose outputs are what others take as inputs"
    if rows and site.groups > 1:
        return "a part of a grouped convolution"
    if scales and site.groups > 1 and site.layout.in_first:
        return "outputs that groups share"
    if scales and (rows or reader.path or op.result is not None):
        return f"{', '.join(variants)} scales its outputs"
    return op.obstacle(reader.node, reader.weight, site.shape)


def _weight_form(site: Site, reason: str) -> Form:
    """The weight form, unless a look-up would make a sparse gradient of the sum."""
    sparse = [r for r in site.readers if named_argument(r.node, "sparse") is True]
    if sparse:
        raise UnsupportedOpError(
            f"'{site.name}': {sparse[0].describe()} with sparse=True, and its adapter has to be "
            f"added to the weight ({reason}), where gradients cannot be sparse. Build the layer "
            "with sparse=False: the frozen weight has no gradient anyway."
        )
    return Form("weight", reason)
