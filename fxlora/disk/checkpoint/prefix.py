"""The adapter's names and the checkpoint's: one may have a prefix that the other lacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from ...errors import AdapterError
from ...tables import did_you_mean, some


@dataclass(frozen=True)
class Prefix:
    """How a name of the adapter becomes one of the checkpoint.

    Attributes:
        dropped: a prefix that only the adapter's names have ("model.").
        added: one that only the checkpoint's have.
    """

    dropped: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        return self.added + name.removeprefix(self.dropped)

    def __str__(self) -> str:
        if self.dropped:
            return f"the adapter's names, without '{self.dropped}'"
        return f"the adapter's names, after '{self.added}'" if self.added else "the adapter's names"


def find_prefix(
    names: Collection[str],
    held: Collection[str],
    misfit: Callable[[Prefix], str | None],
    adapter: str,
    base: str,
) -> Prefix:
    """Return the one prefix under which everything in an adapter fits the checkpoint.

    Args:
        names: names of tensors or modules that the adapter needs.
        held: names of the checkpoint's tensors.
        misfit: says what does not fit under a prefix, or None.
        adapter, base: their descriptions, for messages.

    Raises:
        AdapterError: there is none, or several.
    """
    why = misfit(Prefix())
    if why is None:
        return Prefix()
    found = [prefix for prefix in _candidates(names, held) if misfit(prefix) is None]
    if len(found) > 1:
        said = some(f"'{prefix.added or prefix.dropped}'" for prefix in found)
        raise AdapterError(
            f"{adapter} fits several parts of {base}: with the prefixes {said}. Pass the "
            "model (--model module:callable), or rename the adapter's tensors."
        )
    if not found:
        first = min(names)
        near = did_you_mean(first, {*held, *(name.rpartition(".")[0] for name in held)})
        raise AdapterError(f"{adapter} does not fit {base}: {why}.{near}")
    return found[0]


def _candidates(names: Collection[str], held: Collection[str]) -> Iterator[Prefix]:
    """Yield the prefixes under which the shortest of the names is a name, or a module, there."""
    name = min(names, key=lambda n: (n.count("."), len(n), n))
    paths = {path for full in held for path in _paths(full)}
    for end in [n for n, letter in enumerate(name) if letter == "."]:
        if name[end + 1 :] in paths:
            yield Prefix(dropped=name[: end + 1])
    for path in sorted(paths):
        if path.endswith(f".{name}"):
            yield Prefix(added=path.removesuffix(name))


def _paths(name: str) -> Iterator[str]:
    """Yield a tensor's name, and the names of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
