"""Which form a site takes: the branch wherever every reader allows it, else the weight form."""

from __future__ import annotations

from torch import fx

from .errors import ConfigError, UnsupportedOpError
from .nested import grad_enabled, origin
from .ops import FLATTENED, is_transpose
from .readers import Reader
from .sites import Site


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
            "which is another parameter: an adapter on one would leave the other behind. Tie them "
            "as one Parameter (b.weight = a.weight)."
        )
    if writer := site.writer:
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}): {writer.kind} writes to its weight in every call, "
            "which an adapter would change. Leave it out, or build the "
            "layer without (an embedding: max_norm=None)."
        )
    if not any(grad_enabled(reader.path) for reader in site.readers):
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}) is read under torch.no_grad() alone: its adapter "
            "would never train. Leave it out of the rule (Rule(name, lora=None) before it), or "
            "take the no_grad away (a reentrant checkpoint has one: use_reentrant=False)."
        )
    if whole := next((r for r in site.readers if r.node.op == "call_module"), None):
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}) is read inside {whole.kind}, which the tracer keeps "
            "whole: capture with example inputs, which sees inside."
        )
    if len(site.shape) > 2 and FLATTENED.get(site.op) != len(site.shape):
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}): a weight of shape {site.shape} that "
            f"{site.readers[0].describe()} is no single matrix, and stacks of matrices are not "
            "supported yet. Leave it out of the rule (Rule(name, lora=None) before it)."
        )


def choose_form(site: Site, r: int, dropout: float) -> tuple[str, str]:
    """The form of a site, and why: the branch wherever every reader allows it.

    Raises:
        ConfigError: lora_dropout on a site whose form has no branch input.
    """
    for reader in site.readers:
        if reader.through:
            obstacle: str | None = f"read by {reader.kind} through {reader.through}"
        elif reader.op is None:
            obstacle = f"read by {reader.kind}"
        elif reader.shared:
            obstacle = "in a graph that several calls share"
        elif _multiplies_weights(reader):
            obstacle = "multiplied with another weight"  # two branches would miss Δu·Δv
        else:
            obstacle = reader.op.obstacle(reader.node, site.shape)
        if obstacle and dropout:
            raise ConfigError(
                f"lora_dropout={dropout} on '{site.name}': {obstacle}, so its adapter is added "
                "to the weight and has no input to drop. Set lora_dropout=0 for it in a rule "
                "of its own."
            )
        if obstacle:
            return "weight", obstacle
    ops = [(reader.op, reader.node) for reader in site.readers if reader.op]
    dearer = next(filter(None, (op.dearer(node, site.shape, r) for op, node in ops)), None)
    if dearer and not dropout:
        return "weight", dearer
    if dropout and not all(op.dropout for op, _ in ops):
        return "branch", "indices take no dropout"
    return "branch", "tied" if len(site.names) > 1 else ""


def _multiplies_weights(reader: Reader) -> bool:
    """Whether the branch's input is a weight itself (the indices of an embedding never are)."""
    source = reader.node.args[reader.op.input] if reader.op else None
    if not isinstance(source, fx.Node) or reader.kind == "embedding":
        return False
    source = origin(reader.path, source)
    while is_transpose(source):
        source = source.all_input_nodes[0]
    return source.op == "get_attr"
