"""Sites that no form can adapt: a table with a row for each reason, and advice to the user.

Parts, variants and sparse gradients are checked where they are handled: in `entries.py` and
`forms.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedOpError
from ..fx.effects import is_python_function
from ..reads.facts import padding_row
from ..reads.sites import Site

LEAVE_OUT = "Leave it out of the rule (Rule(name, lora=None) before it)"


def _no_region(site: Site) -> str:
    remedy = (
        "move the read into a submodule, which is then captured"
        if site.outside
        else "give capture an example that runs it: capture(model, calls=[(args, kwargs), …])"
    )
    return f"{site.why_outside}, so no adapter can be added. {LEAVE_OUT}, or {remedy}."


def _shared_memory(site: Site) -> str:
    return (
        f"shares memory with '{site.overlaps[0]}', which is another tensor: an adapter on one "
        "would not change the other. Make them one Parameter (b.weight = a.weight), and read "
        "that."
    )


def _written(site: Site) -> str:
    assert site.writer is not None
    where = site.writer.describe().replace(" reads", "")
    if is_python_function(site.writer.node) and "val" not in site.writer.node.meta:
        return (
            f"cannot be adapted: a graph without example values does not tell whether {where} "
            f"writes to its weight. {LEAVE_OUT}, or capture with example inputs "
            "(fxlora.capture(model, args); --input on the command line)."
        )
    return (
        f"cannot be adapted: its weight is written to in every call, by {where}, which an adapter "
        "would change. "
        f"{LEAVE_OUT}, or remove the write from the forward (of an embedding: max_norm=None)."
    )


def _untrained(site: Site) -> str:
    ways = " and ".join(dict.fromkeys(reader.untrained for reader in site.readers))
    return (
        f"is read only {ways}: no gradient passes, so its adapter would never train. {LEAVE_OUT}, "
        "or change the model so that the gradient reaches it (a reentrant checkpoint runs under "
        "no_grad: use_reentrant=False)."
    )


def _kept_whole(site: Site) -> str:
    whole = next(reader for reader in site.readers if reader.node.op == "call_module")
    return (
        f"is read inside {whole.kind}, which the tracer keeps whole: capture with example inputs "
        "to trace into it."
    )


def _pads_a_part(site: Site) -> bool:
    return any(
        reader.ops_between and padding_row(reader.node, 1 << 62) is not None
        for reader in site.readers
    )


def _padded(site: Site) -> str:
    reader = next(reader for reader in site.readers if reader.ops_between)
    return (
        f"is looked up through {reader.through} with a padding_idx, which is a row of the "
        f"computed table, not of the weight. {LEAVE_OUT}, or look up in the weight itself."
    )


# (condition on a site, message about it); the first condition that holds counts.
_REFUSALS: tuple[tuple[Callable[[Site], bool], Callable[[Site], str]], ...] = (
    (lambda site: site.outside is not None, _no_region),
    (lambda site: bool(site.overlaps), _shared_memory),
    (lambda site: site.writer is not None, _written),
    (_pads_a_part, _padded),
    (lambda site: all(reader.untrained for reader in site.readers), _untrained),
    (lambda site: any(r.node.op == "call_module" for r in site.readers), _kept_whole),
)


def check_supported(site: Site, number: int) -> None:
    """Raise unless some form can adapt every read of the site that rule `number` targets.

    Raises:
        UnsupportedOpError: gives the reason, with advice.
    """
    if why := why_unsupported(site):
        raise UnsupportedOpError(f"'{site.name}' (rule {number}) {why}")


def why_unsupported(site: Site) -> str:
    """Return why no form can adapt every read of a site, with advice, or ""."""
    return next((why(site) for holds, why in _REFUSALS if holds(site)), "")
