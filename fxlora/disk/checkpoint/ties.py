"""Tied weights in a checkpoint, which holds them once: a change of one name changes all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

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
    a transformers model; without any, a warning says what is not known.

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
        for name in _possible_heads(base, changed):
            _check_embedding(base, content, name, known=len(changed[name]) > 1)


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


def _possible_heads(base: Checkpoint, changed: Iterable[str]) -> list[str]:
    """Return the changed embeddings that no other tensor equals in shape, as a head would."""
    config = base.config or {}
    text = config.get("text_config")
    sizes = [c.get("vocab_size") for c in (config, text if isinstance(text, dict) else {})]
    shapes = [tensor.shape for tensor in base.tensors.values()]
    matrices = [n for n in changed if len(base.tensors[n].shape) == 2]
    alone = [n for n in matrices if shapes.count(base.tensors[n].shape) == 1]
    return [n for n in alone if base.tensors[n].shape[0] in sizes]


def _check_embedding(base: Checkpoint, content: Folder, name: str, known: bool) -> None:
    tied = (base.config or {}).get("tie_word_embeddings", True)
    if tied is not False and not known:
        raise AdapterError(
            f"{content.path} changes '{name}', the embedding of {base.path}, to which the model's "
            "head may be tied (tie_word_embeddings): then it would change, too. Pass the model "
            f"(--model module:callable), which tells. {ADVICE}"
        )
