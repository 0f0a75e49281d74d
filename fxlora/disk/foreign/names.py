"""Names of layers in a file, resolved to the sites of a module, in the one way that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ...errors import AdapterError
from ...reads.sites import Site
from ...tables import did_you_mean, some
from .format import Format


@dataclass(frozen=True)
class Way:
    """One way to read the names of a file's layers.

    Attributes:
        sites: the sites that each layer's name fits; one of them, by the shapes of its tensors.
        prefix: the prefix that names a model in the file ("unet."), or "".
        note: what the user should know about it, or "".
    """

    sites: Mapping[str, tuple[Site, ...]]
    prefix: str
    note: str = ""

    @property
    def key(self) -> tuple[int, ...]:
        """What tells ways apart: the sites of the layers, in their order."""
        return tuple(id(site) for sites in self.sites.values() for site in sites)


class SiteNames:
    """Index of a module's sites by their names, as a format spells them."""

    def __init__(self, sites: Iterable[Site], form: Format) -> None:
        self._form = form
        self._sites: dict[str, list[Site]] = {}
        for site in sites:
            for name in {self._spelled(alias) for alias in (site.name, *site.aliases)}:
                self._sites.setdefault(name, []).append(site)

    def _spelled(self, name: str) -> str:
        return name.replace(".", "_") if self._form.flat else name

    def find(self, name: str) -> tuple[Site, ...]:
        """Return the sites that a layer's name may mean."""
        found: dict[int, Site] = {}
        for spelling in self._form.spellings(name):
            found |= {id(site): site for site in self._sites.get(self._spelled(spelling), ())}
        return tuple(found.values())

    def ends(self, name: str) -> list[tuple[str, str]]:
        """Return how the beginning of a layer's name must change to give a site's: cut or added.

        Each is (what to cut off, what to put in front), one of which is "".
        """
        mark = "_" if self._form.flat else "."
        found: dict[tuple[str, str], None] = {}
        for mine in map(self._spelled, self._form.spellings(name)):
            for other in self._sites:
                if mine.endswith(f"{mark}{other}"):
                    found[mine.removesuffix(other), ""] = None
                elif other.endswith(f"{mark}{mine}"):
                    found["", other.removesuffix(mine)] = None
        return list(found)

    def nearest(self, name: str) -> str:
        """Return a question with the names most similar to one that no site has."""
        return did_you_mean(self._spelled(name), self._sites)


def in_component(names: Iterable[str], form: Format, component: str | None) -> list[str]:
    """Return the names of the layers that are for the module: all, or those of one model.

    Raises:
        AdapterError: no layer is of this model.
    """
    listed = list(names)
    if not component:
        return listed
    found = [name for name in listed if _prefix(name, component)]
    if not found:
        raise AdapterError(
            f"the file has nothing for component={component!r}; it has "
            f"{some(_components(listed, form)) or 'one model only, without a name'}."
        )
    return found


def ways(names: list[str], index: SiteNames, form: Format, component: str | None) -> list[Way]:
    """Return the ways of reading the names that give sites for all layers.

    The names are taken as they are, and without the name of a model that all of them begin with; of
    a model that the user named, only the latter where it gives all. If neither does, the module may
    be an inner or an outer one of the file's: then all names lose or get the same beginning.

    Raises:
        AdapterError: there is none; names the layers.
    """
    prefixes = ["", *_common(names, form, component)]
    direct = {prefix: _found(names, prefix, index) for prefix in prefixes}
    whole = [Way(way, p or _own(names, form)) for p, way in direct.items() if all(way.values())]
    if whole:
        return whole[-1:] if component is not None else whole
    other = [way for prefix in reversed(prefixes) for way in _with_ends(names, prefix, index)]
    if other:
        return list({way.key: way for way in reversed(other)}.values())
    models = _components(names, form)
    if component is None and len(models) > 1:
        raise AdapterError(
            f"the file is for several models ({some(models)}), and the module is one of them: "
            f"give component={models[0]!r}, or another of these."
        )
    prefix, way = min(direct.items(), key=lambda item: sum(not s for s in item[1].values()))
    missing = [name for name, found in way.items() if not found]
    raise AdapterError(
        f"the module has no layer for {some(missing)}."
        + index.nearest(missing[0].removeprefix(prefix))
    )


def _with_ends(names: list[str], prefix: str, index: SiteNames) -> Iterator[Way]:
    """Yield the ways in which all names lose, or get, one more beginning."""
    bare = [name.removeprefix(prefix) for name in names]
    for cut, front in index.ends(bare[0]):
        if all(name.startswith(cut) for name in bare):
            pairs = zip(names, bare, strict=True)
            found = {name: index.find(front + inner[len(cut) :]) for name, inner in pairs}
            if all(found.values()):
                what = f"without '{cut}'" if cut else f"with '{front}' in front"
                yield Way(
                    found, prefix, f"its names are of another model ({names[0]}): read {what}."
                )


def _found(names: list[str], prefix: str, index: SiteNames) -> dict[str, tuple[Site, ...]]:
    return {name: index.find(name.removeprefix(prefix)) for name in names}


def _common(names: list[str], form: Format, component: str | None) -> list[str]:
    """Return the names of models that all names of layers begin with, as prefixes."""
    if component is not None:
        return list({_prefix(name, component) for name in names} if component else ())
    return [p for p in form.prefixes if all(n.startswith(p) and n != p for n in names)]


def _prefix(name: str, component: str) -> str:
    """Return the prefix of a name that names this model, or ""."""
    return next((p for p in (f"{component}.", f"{component}_") if name.startswith(p)), "")


def _own(names: list[str], form: Format) -> str:
    """Return the name of a model that all names begin with, as a prefix, or ""."""
    own = [p for p in form.prefixes if all(name.startswith(p) for name in names)]
    return max(own, key=len, default="")


def _components(names: Iterable[str], form: Format) -> list[str]:
    """Return the models that the names of a file's layers begin with."""
    found = {p: any(name.startswith(p) for name in names) for p in form.prefixes}
    return [prefix.rstrip("._") for prefix, there in found.items() if there]
