"""Tied weights in a checkpoint, which holds them once: a change of one name changes all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AdapterError, warn
from ...tables import some
from ..folder import Folder
from .base import Checkpoint
from .model import Skeleton
from .prefix import Prefix

if TYPE_CHECKING:
    from .changes import Fold

ADVICE = (
    'Adapt all names of the tie alike (LoraConfig(tied="share")), or export the folded model '
    "(fxlora export), which can hold two weights."
)


def check_ties(
    base: Checkpoint,
    content: Folder,
    folded: Mapping[str, Fold],
    replaced: Mapping[str, torch.Tensor],
    prefix: Prefix,
    model: Skeleton | None,
) -> None:
    """Raise if a name that the adapter leaves alone would change with one that it changes.

    The model tells the ties, the files' headers, the plan of the adapter, or the configuration of
    a transformers model. Without any, an embedding that may be tied to a head is refused if the
    configuration has its size, and else a warning says what is not known.

    Raises:
        AdapterError: the adapter splits a tie.
    """
    changed = {
        n: {prefix(other) for e in f.entries for other in e.names} for n, f in folded.items()
    }
    changed |= {name: {name} for name in replaced}
    for name, together in changed.items():
        apart = _tied(base, name, prefix, model, folded) - together - set(changed)
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
            fold = folded.get(name)
            if len(together) == 1 and _is_embedding(base, name, fold):
                planned = fold is not None and content.header is not None
                _check_embedding(base, content, name, planned)


def _tied(
    base: Checkpoint,
    name: str,
    prefix: Prefix,
    model: Skeleton | None,
    folded: Mapping[str, Fold],
) -> set[str]:
    """Return the names that are known to be tied to one."""
    found = {other for other, kept in base.ties.items() if kept == name}
    if name in folded:
        found |= {prefix(other) for e in folded[name].entries for other in e.tied}
    if model is not None:
        mine = [n for n in model.module.state_dict() if prefix(n) == name]
        found |= {prefix(other) for n in mine for other in model.tied(n)}
    return found - {name}


# ---- embeddings without a model -----------------------------------------------------------------


def _is_embedding(base: Checkpoint, name: str, fold: Fold | None) -> bool:
    """Whether a changed tensor is an embedding or a head: PEFT's pair, or its size, tells."""
    shape = base.tensors[name].shape
    by_pair = fold is not None and any(entry.op == "embedding" for entry in fold.entries)
    return len(shape) == 2 and (by_pair or shape[0] in _sizes(base))


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
    advice = f"Pass the model (--model module:callable, model=…), which tells. {ADVICE}"
    if True in said or (shape[0] in _sizes(base) and not others):
        raise AdapterError(
            f"{where}: the other one may be tied to it (tie_word_embeddings), and would change, "
            f"too. {advice}"
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
