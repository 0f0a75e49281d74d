"""Names of layers in a file, resolved to the sites of a module, in the one way that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import AdapterError
from ...reads.sites import Site
from ...tables import did_you_mean, some
from .format import Format


@dataclass(frozen=True)
class Resolved:
    """The sites of a file's layers.

    Attributes:
        sites: the sites that each layer's name fits; one of them, by the shapes of its tensors.
        prefix: the prefix that the names have in the file, and the module does not.
    """

    sites: Mapping[str, tuple[Site, ...]]
    prefix: str


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


def resolved(names: list[str], index: SiteNames, form: Format, component: str | None) -> Resolved:
    """Return the sites of each layer's name.

    The names are taken as they are, and without the name of a model that all of them begin with.
    One of the two must give sites for all layers; of a model that the user named, the latter counts
    first.

    Raises:
        AdapterError: neither does, or both do; names the layers.
    """
    ways = {p: _found(names, p, index) for p in ("", *_common(names, form, component))}
    whole = [prefix for prefix, way in ways.items() if all(way.values())]
    if len(whole) > 1 and component is None:
        raise AdapterError(
            f"the layers' names fit the module both with and without {some(whole[1:])}: give "
            f"component={whole[1].rstrip('._')!r} or component=''."
        )
    if whole:
        own = [p for p in form.prefixes if all(name.startswith(p) for name in names)]
        return Resolved(ways[whole[-1]], whole[-1] or max(own, key=len, default=""))
    models = _components(names, form)
    if component is None and len(models) > 1:
        raise AdapterError(
            f"the file is for several models ({some(models)}), and the module is one of them: "
            f"give component={models[0]!r}, or another of these."
        )
    prefix, way = min(ways.items(), key=lambda item: sum(not found for found in item[1].values()))
    missing = [name for name, found in way.items() if not found]
    raise AdapterError(
        f"the module has no layer for {some(missing)}."
        + index.nearest(missing[0].removeprefix(prefix))
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


def _components(names: Iterable[str], form: Format) -> list[str]:
    """Return the models that the names of a file's layers begin with."""
    found = {p: any(name.startswith(p) for name in names) for p in form.prefixes}
    return [prefix.rstrip("._") for prefix, there in found.items() if there]
