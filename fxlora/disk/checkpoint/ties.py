"""Tied weights in a checkpoint, which holds them once: a change of one name changes all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import AdapterError, warn
from ...lora.layout import Shape
from ...tables import some
from ..folder import Folder
from .base import Checkpoint
from .changes import Changes
from .model import Skeleton

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # of a layer: "model.layers.3.up.weight"

ADVICE = (
    'Adapt all names of the tie alike (LoraConfig(tied="share")), or export the folded model '
    "(fxlora export), which can hold two weights."
)


def check_ties(base: Checkpoint, content: Folder, changes: Changes, model: Skeleton | None) -> None:
    """Raise if a name that the adapter leaves alone would change with one that it changes.

    The model tells the ties, the files' headers, the plan of the adapter, or the configuration of
    a transformers model. Without any, a tensor that may be an embedding tied to a head is refused,
    unless another one of its shape may be that head: then a warning says what is not known.

    Raises:
        AdapterError: the adapter splits a tie.
    """
    prefix = changes.prefix
    changed = {
        n: {prefix(other) for e in f.entries for other in e.names}
        for n, f in changes.folded.items()
    }
    changed |= {name: {name} | changes.together.get(name, set()) for name in changes.replaced}
    for name, together in changed.items():
        apart = _tied(base, name, changes, model) - together - set(changed)
        if missing := apart - set(base.tensors):
            raise AdapterError(
                f"{content.path} changes '{name}' and not {some(sorted(missing))}, which is tied "
                f"to it: {base.path} holds one tensor for both. {ADVICE}"
            )
        if apart:
            warn(
                f"{content.path} changes '{name}' and not {some(sorted(apart))}, which is tied to "
                "it: a class that ties them makes one of the two weights, wrongly."
            )
    if model is None:
        for name, together in changed.items():
            if len(together) == 1 and _may_be_embedding(base, name, changes):
                _check_embedding(base, content, name, planned=changes.untied is not None)


def _tied(base: Checkpoint, name: str, changes: Changes, model: Skeleton | None) -> set[str]:
    """Return the names that are known to be tied to one."""
    prefix = changes.prefix
    found = {other for other, kept in base.ties.items() if kept == name}
    found |= set((changes.untied or {}).get(name, ()))
    if name in changes.folded:
        found |= {prefix(other) for e in changes.folded[name].entries for other in e.tied}
    if model is not None:
        mine = [n for n in model.module.state_dict() if prefix(n) == name]
        found |= {prefix(other) for n in mine for other in model.tied(n)}
    return found - {name}


# ---- embeddings without a model -----------------------------------------------------------------


def _may_be_embedding(base: Checkpoint, name: str, changes: Changes) -> bool:
    """Whether a changed tensor may be an embedding or a head that shares its tensor with the other.

    PEFT's pair tells, or its size, if the configuration has that of the vocabulary. If nothing
    does, each matrix that is replaced may be one, and of those that get a pair the one with the
    most rows and those outside the repeated layers, unless it has a bias, as embeddings do not.
    """
    shape, fold = base.tensors[name].shape, changes.folded.get(name)
    if len(shape) != 2:
        return False
    if fold is not None and any(entry.op == "embedding" for entry in fold.entries):
        return True
    if sizes := _sizes(base):
        return shape[0] in sizes
    if f"{name.rpartition('.')[0]}.bias" in base.tensors:
        return False
    return fold is None or _may_be_head(base, name)


def _may_be_head(base: Checkpoint, name: str) -> bool:
    """Whether a matrix is none of repeated layers, and the file has such, or none has more rows.

    What repeats has the same name in another module, or with another number, and the same shape.
    """

    def kind(name: str) -> tuple[str, Shape]:
        return ".".join(_NUMBER.sub("#", name).split(".")[-2:]), base.tensors[name].shape

    matrices = [n for n, t in base.tensors.items() if len(t.shape) == 2]
    counts = Counter(map(kind, matrices))
    rows, columns = base.tensors[name].shape
    most = rows > columns and rows == max(base.tensors[n].shape[0] for n in matrices)
    return counts[kind(name)] == 1 and (max(counts.values()) > 1 or (most and len(matrices) > 1))


def _check_embedding(base: Checkpoint, content: Folder, name: str, planned: bool) -> None:
    """Raise if a head may be tied to an embedding that alone is changed; warn if nothing tells.

    Args:
        planned: whether the adapter's plan has the ties of the model that it was trained on.
    """
    said = list(_values(base.config, "tie_word_embeddings"))
    top = (base.config or {}).get("tie_word_embeddings")
    if True not in said and (planned or top is False):
        return
    shape = base.tensors[name].shape
    others = [n for n, t in base.tensors.items() if t.shape == shape and n != name]
    where = f"{content.path} changes '{name}', an embedding or a head of {base.path}"
    beside = "" if base.config else ", or put its config.json beside the weights"
    advice = f"Pass the model (--model module:callable, model=…), which tells{beside}. {ADVICE}"
    sizes = _sizes(base)
    if True in said or (not others and (shape[0] in sizes or not sizes)):
        raise AdapterError(
            f"{where}: the other one may be tied to it (tie_word_embeddings), and would change, "
            f"too. {advice}"
        )
    if copies := [n for n in others if base.same_bytes(n, name)]:
        raise AdapterError(
            f"{where}, and {some(copies)} has the same values: both may be one tied weight "
            f"(tie_word_embeddings), of which only one would change. {advice}"
        )
    like = f"{some(others)}, of the same shape, may not be the other one" if others else "it may be"
    warn(f"{where}, and nothing says whether these are tied: {like}. {advice}")


def _sizes(base: Checkpoint) -> set[Any]:
    """Return the sizes of vocabularies in a configuration."""
    return {size for size in _values(base.config, "vocab_size") if isinstance(size, int)}


def _values(config: Any, end: str) -> Iterator[Any]:
    """Yield the values of all keys with an end, also in the configurations of parts of a model."""
    waiting = [config]
    while waiting:
        held = waiting.pop()
        if isinstance(held, Mapping):
            yield from (v for k, v in held.items() if str(k).endswith(end))
            waiting += held.values()
        elif isinstance(held, list):
            waiting += held
