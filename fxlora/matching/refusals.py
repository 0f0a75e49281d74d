"""Sites that no form can adapt: a row for each reason, with what to do instead.

Parts, variants and sparse gradients are refused where they are worked out: in `entries.py` and
`forms.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedOpError
from ..reads.facts import padding_row
from ..reads.sites import Site

LEAVE_OUT = "Leave it out of the rule (Rule(name, lora=None) before it)"


def _shared_memory(site: Site) -> str:
    return (
        f"shares memory with '{site.overlaps[0]}', which is another tensor: an adapter on one "
        "would leave the other behind. Tie them as one Parameter (b.weight = a.weight), and read "
        "that."
    )


def _written(site: Site) -> str:
    assert site.writer is not None
    where = site.writer.describe().replace(" reads", "")
    return (
        f"cannot be adapted: its weight is written to in every call, by {where}, which an adapter "
        "would change. "
        f"{LEAVE_OUT}, or take that out of the forward (of an embedding: max_norm=None)."
    )


def _untrained(site: Site) -> str:
    ways = " and ".join(dict.fromkeys(reader.untrained for reader in site.readers))
    return (
        f"is read only {ways}: no gradient passes, so its adapter would never train. {LEAVE_OUT}, "
        "or take away what stops the gradient (a reentrant checkpoint runs under no_grad: "
        "use_reentrant=False)."
    )


def _kept_whole(site: Site) -> str:
    whole = next(reader for reader in site.readers if reader.node.op == "call_module")
    return (
        f"is read inside {whole.kind}, which the tracer keeps whole: capture with example inputs, "
        "which sees inside."
    )


def _pads_a_part(site: Site) -> bool:
    return any(
        reader.way and padding_row(reader.node, 1 << 62) is not None for reader in site.readers
    )


def _padded(site: Site) -> str:
    reader = next(reader for reader in site.readers if reader.way)
    return (
        f"is looked up through {reader.through} with a padding_idx, which is a row of the table "
        f"that this makes, not of the weight. {LEAVE_OUT}, or look up in the weight itself."
    )


# Whether a site is one of these, and what is said of it then; the first that holds.
_REFUSALS: tuple[tuple[Callable[[Site], bool], Callable[[Site], str]], ...] = (
    (
        lambda site: site.outside is not None,
        lambda site: f"{site.why_outside}, where no adapter can be added. {LEAVE_OUT}.",
    ),
    (lambda site: bool(site.overlaps), _shared_memory),
    (lambda site: site.writer is not None, _written),
    (_pads_a_part, _padded),
    (lambda site: all(reader.untrained for reader in site.readers), _untrained),
    (lambda site: any(r.node.op == "call_module" for r in site.readers), _kept_whole),
)


def check_supported(site: Site, number: int) -> None:
    """Raise unless some form can adapt every read of the site that rule `number` targets.

    Raises:
        UnsupportedOpError: says the read, and what to do instead.
    """
    for holds, why in _REFUSALS:
        if holds(site):
            raise UnsupportedOpError(f"'{site.name}' (rule {number}) {why(site)}")
