"""The adapter's names and the checkpoint's: one may have a prefix that the other lacks.

Other differences are the user's to say (`key_mapping`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from ...errors import AdapterError
from ...tables import did_you_mean, some
from ..folder import Names


@dataclass(frozen=True)
class Prefix:
    """How a name of the adapter becomes one of the checkpoint.

    Attributes:
        dropped: a prefix that only the adapter's names have ("model.").
        added: one that only the checkpoint's have.
        mapped: what is done to the adapter's names before.
    """

    dropped: str = ""
    added: str = ""
    mapped: Names = field(default_factory=Names)

    def __call__(self, name: str) -> str:
        return self.added + self.mapped(name).removeprefix(self.dropped)

    def __str__(self) -> str:
        names = "the adapter's names" + (" by key_mapping" if self.mapped else "")
        if self.dropped:
            return f"{names}, without '{self.dropped}'"
        return f"{names}, after '{self.added}'" if self.added else names


def find_prefix(
    names: Collection[str],
    held: Collection[str],
    misfit: Callable[[Prefix], str | None],
    adapter: str,
    base: str,
    mapped: Names,
) -> Prefix:
    """Return the one prefix under which everything in an adapter fits the checkpoint.

    Args:
        names: names of tensors or modules that the adapter needs.
        held: names of the checkpoint's tensors.
        misfit: says what does not fit under a prefix, or None.
        adapter, base: their descriptions, for messages.
        mapped: what is done to the adapter's names before.

    Raises:
        AdapterError: there is none, or several; or two names become one.
    """
    plain = Prefix(mapped=mapped)
    why = misfit(plain)
    shorter = [replace(p, mapped=mapped) for p in _candidates([*map(mapped, names)], held)]
    found = [plain] if why is None else [prefix for prefix in shorter if misfit(prefix) is None]
    if len(found) > 1:
        said = some(f"'{prefix.added or prefix.dropped}'" for prefix in found)
        raise AdapterError(
            f"{adapter} fits several parts of {base}: with the prefixes {said}. Pass the "
            "model (--model module:callable), or rename the adapter's tensors."
        )
    if not found:
        first, paths = min(map(mapped, names)), {path for name in held for path in _paths(name)}
        near = "" if first in paths else did_you_mean(first, paths)
        raise AdapterError(
            f"{adapter} does not fit {base}: {why}.{near} If the model has other names than its "
            "files, say how they become those of the files: key_mapping={expression: text} "
            "(--key-mapping expression=text). If it joins or splits tensors of the files, fold "
            "with the model: fxlora fold MODEL --adapter …"
        )
    if len(set(map(found[0], names))) < len(set(names)):
        raise AdapterError(f"{adapter}: several of its names are one of {base}, by {found[0]}.")
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
