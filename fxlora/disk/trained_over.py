"""The base that an adapter was trained over: fingerprints of its weights, in the file's header.

They are those that injection makes anyway, of a weight's bits in its dtype. If the weight is held
in a wider dtype now, it is compared as rounded to the narrower one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, warn
from ..lora.dtypes import DTYPES, name_of
from ..module import CapturedModule
from ..module.fingerprints import fingerprint
from ..tables import some
from .folder import Folder

Base = Mapping[str, Any]  # as in the header


def base_data(module: CapturedModule) -> dict[str, Any]:
    """Return the fingerprints of the weights under a module's adapters, and one of all others.

    A weight that no graph reads does not count; neither does one whose bits cannot be read.
    """
    marks = module.known.base_fingerprints
    of_name = {name: mark for names, mark in marks.items() for name in names}
    adapted = {name for entry in module.plan or () for name in (*entry.names, *entry.tied)}
    weights = {
        e.parameter: [_dtype(module, e.parameter), mark_text(of_name[e.parameter])]
        for e in module.plan or ()
        if of_name.get(e.parameter)
    }
    read = {
        str(node.target)
        for graph in module.distinct_graphs()
        for node in graph.find_nodes(op="get_attr")
        if node.users
    }
    others = sorted(
        (names[0], mark)
        for names, mark in marks.items()
        if adapted.isdisjoint(names) and not read.isdisjoint(names)
    )
    digest = hashlib.blake2b(repr(others).encode(), digest_size=8).hexdigest()
    return {"weights": weights, "others": digest if all(mark for _, mark in others) else None}


def check_base(module: CapturedModule, content: Folder, strict: bool) -> None:
    """Warn if a loaded module's base is another one than its adapter was trained over.

    Args:
        module: the module with the adapter.
        content: the folder.
        strict: whether to raise instead, also if the folder has no fingerprints.

    Raises:
        AdapterError: `strict`, and the base is another one or unknown.
    """
    base = (content.header or {}).get("base")
    if base is None:
        if strict:
            raise AdapterError(
                f"{content.path} has no fingerprints of the base that it was trained over (PEFT "
                "writes none): load it without strict_base."
            )
        return
    if said := _differing(module, content, base, strict):
        if strict:
            raise AdapterError(f"{content.path}: {said}")
        warn(f"{content.path}: {said}")


def _differing(module: CapturedModule, content: Folder, base: Any, strict: bool) -> str:
    """Return in what the base differs from a recorded one, with advice, or ""."""
    weights = recorded_weights(content, base)
    now = base_data(module)
    other: list[str] = []
    rounded: list[str] = []
    for name, recorded in weights.items():
        held = content.names(name)
        if held not in now["weights"]:
            continue
        alike = _alike(module, held, recorded, now["weights"][held])
        if alike is None:
            rounded.append(f"{held} ({recorded[0]})")
        elif not alike:
            other.append(held)
    if strict and (unknown := now["weights"].keys() - map(content.names, weights)):
        return f"it has no fingerprint of {some(sorted(unknown))}, which it adapts."
    if other:
        return (
            f"the adapter was trained over other weights: {some(other)}. Load it onto the base "
            "that it was trained over, with the adapters folded that were folded there."
        )
    if rounded:
        return (
            f"the adapter was trained over weights in a wider dtype: {some(rounded)}. Whether they "
            "are the same is not known."
        )
    same_dtypes = all(now["weights"].get(n, held)[0] == held[0] for n, held in weights.items())
    known = None not in (base.get("others"), now["others"])
    if not content.names and same_dtypes and known and base.get("others") != now["others"]:
        return (
            "the adapter was trained over another base: the weights that it adapts are the same, "
            "and others differ."
        )
    return ""


def recorded_weights(content: Folder, base: Any) -> dict[str, list[str]]:
    """Return the dtypes and fingerprints of weights, by name, in the data of a header.

    Raises:
        AdapterError: the data is damaged.
    """
    weights = base.get("weights") if isinstance(base, dict) else None
    if not isinstance(weights, dict):
        raise _damaged(content.path)
    for recorded in weights.values():
        pair = isinstance(recorded, list) and len(recorded) == 2
        if not pair or not isinstance(recorded[0], str) or recorded[0] not in DTYPES:
            raise _damaged(content.path)
    return weights


def _alike(module: CapturedModule, name: str, recorded: list[Any], now: list[Any]) -> bool | None:
    """Whether a weight is the recorded one; None if its dtype is too narrow to tell."""
    then, held = DTYPES[recorded[0]], module.get_parameter(name)
    if then == held.dtype:
        return recorded[1] == now[1]
    if torch.promote_types(then, held.dtype) != held.dtype:
        return None
    return recorded[1] == mark_text(fingerprint(held.detach().to(then)))


def _dtype(module: CapturedModule, name: str) -> str:
    return name_of(module.get_parameter(name).dtype)


def mark_text(mark: int) -> str:
    """Return a fingerprint as headers have it."""
    return f"{mark & (2**64 - 1):016x}"


def _damaged(path: Path) -> AdapterError:
    return AdapterError(f"{path}: its plan is damaged: base must be fingerprints of weights.")
