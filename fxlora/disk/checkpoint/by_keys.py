"""What an adapter folder from PEFT changes in a checkpoint, by its configuration and its keys."""

from __future__ import annotations

from ...errors import AdapterError
from ...tables import some
from ..folder import Folder
from ..peft import is_bare, owner_of
from .base import Checkpoint
from .changes import Changes, Fold
from .model import Skeleton
from .names import held_in, misfit_of, misfit_of_model, plain_name, prefix_of
from .pairs import Pairs
from .prefix import Prefix
from .settings import Settings


def by_keys(base: Checkpoint, content: Folder, model: Skeleton | None) -> Changes:
    """Return the changes that PEFT's configuration and keys define."""
    settings = Settings.of(content)
    pairs, plain_keys = Pairs.of(content)
    plain = {plain_name(key): content.tensors[key] for key in plain_keys}
    if len(plain) != len(plain_keys):
        raise AdapterError(f"{content.path} has several tensors for one of {some(plain)}.")

    def misfit(prefix: Prefix) -> str | None:
        return (
            pairs.misfit(settings, base, prefix)
            or misfit_of(plain, prefix, base)
            or misfit_of_model(model, base, prefix)
        )

    if not (pairs.owners or plain):
        raise AdapterError(f"{content.path} has no tensors.")
    prefix = prefix_of([*pairs.owners, *plain], misfit, base, content)
    folded: dict[str, Fold] = {}
    for entry, values in pairs.entries(settings, base, prefix, model):
        if prefix(entry.parameter) in folded:
            raise AdapterError(f"{content.path} has two pairs for '{entry.parameter}'.")
        folded[prefix(entry.parameter)] = Fold((entry,), values)
    owners = {owner_of(e) for fold in folded.values() for e in fold.entries if not is_bare(e)}
    trained = {n for n in plain if settings.trains(n, owners)}
    held, together = held_in({prefix(n): t for n, t in plain.items() if n in trained}, base)
    same, _ = held_in({prefix(n): t for n, t in plain.items() if n not in trained}, base)
    return Changes(folded, held, same, prefix, together=together)
