"""The sites that a LoraConfig's names mean: those that PEFT adapts, else those that have the names.

PEFT matches names of modules (its `check_target_module_exists`) and, for `target_parameters`, names
of parameters. Where it would find nothing, a name may also be that of a parameter or of a module
around one, and a model may begin with its list of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..config import ALL_LINEAR, LoraConfig, Names
from ..lora.ops import in_all_linear, is_lookup
from ..module import CapturedModule
from ..reads.sites import Site

# The layer number in a name: the first number after a dot, for PEFT never at a name's beginning.
_PEFTS_LAYER = r".*?\.[^.]*\.(?P<number>\d+)\."
_LAYER = r"(?:^|.*?\.)[^.]*\.(?P<number>\d+)\."


@dataclass(frozen=True)
class Target:
    """An item of a field of names: a name, a regular expression or "all-linear"."""

    text: str
    is_expression: bool = False

    def matches(self, name: str) -> bool:
        if self.is_expression:
            return re.fullmatch(self.text, name) is not None
        return is_suffix(self.text, name)


def listed(names: Names) -> list[Target]:
    """Return a field of names as targets; one string, unless "all-linear", is an expression."""
    if isinstance(names, str):
        return [Target(names, names != ALL_LINEAR)]
    return [Target(name) for name in names or ()]


@dataclass(frozen=True)
class Targets:
    """The sites that a configuration's names mean, each with the name under which they do.

    Attributes:
        config: the configuration.
        module: the captured module.
        sites: its sites.
    """

    config: LoraConfig
    module: CapturedModule
    sites: tuple[Site, ...]

    def key(self, site: Site) -> str | None:
        """Return the name under which the configuration means a site, or None if it does not.

        As in PEFT, `rank_pattern` and `alpha_pattern` are matched against it.
        """
        return next((self._keys[name] for name in site.names if name in self._keys), None)

    def meets(self, target: Target) -> bool:
        """Whether a target matches a name of any site, whatever the other fields say.

        The names are those of modules if PEFT adapts any of them, else also those of parameters.
        """
        return any(
            self._meets(target, name, site)
            for site in self.sites
            for name in (site.modules if self._is_pefts else site.aliases)
        )

    @cached_property
    def _keys(self) -> Mapping[str, str]:
        return {**self.by_parameter, **self.by_module}

    @cached_property
    def by_module(self) -> Mapping[str, str]:
        """The keys of the sites that `target_modules` means, by the names of their parameters."""
        if not self.config.has_targets:
            return _by_name((site, site.name) for site in self.sites if self._is_left(site))
        if self._is_pefts:
            return self._by_peft
        return _by_name(
            (site, self._key(target, site))
            for target in listed(self.config.target_modules)
            for site in self.sites
        )

    @cached_property
    def _by_peft(self) -> Mapping[str, str]:
        return _by_name(
            (site, self._pefts_key(target, site))
            for target in listed(self.config.target_modules)
            for site in self.sites
        )

    @cached_property
    def _is_pefts(self) -> bool:
        """Whether PEFT adapts anything by the configuration, so that it means what PEFT means."""
        return bool(self._by_peft or self.by_parameter)

    @cached_property
    def by_parameter(self) -> Mapping[str, str]:
        """The same for `target_parameters`, which no other field restricts."""
        targets = self.config.target_parameters or ()
        names = (name for site in self.sites for name in site.names)
        return {n: n for n in names if any(is_suffix(target, n) for target in targets)}

    @cached_property
    def linear(self) -> frozenset[str]:
        """The parameters that "all-linear" means.

        In PEFT, these are the weights of linear layers except output embeddings. In a model that
        has none: the weights that matrix products read, except those that are also looked up.
        """
        layers = frozenset(
            name for site in self.sites if self._is_layer(site) for name in site.names
        )
        return layers or frozenset(
            name for site in self.sites if self._is_product(site) for name in site.names
        )

    @cached_property
    def _weights(self) -> frozenset[str]:
        """Names of the weights that PEFT adapts in the modules that own several parameters."""
        names = (name for site in self.sites for name in site.aliases)
        return frozenset(name for name in names if name.endswith(".weight"))

    # ---- one site --------------------------------------------------------------------------------

    def _pefts_key(self, target: Target, site: Site) -> str | None:
        """Return the module by which PEFT adapts a site for one target, or None if it does not."""
        for key in site.modules:
            weight = f"{key}.weight"
            other = weight in self._weights and weight not in site.aliases
            if not other and self._meets(target, key, site) and not self._excludes(key):
                whole = not target.is_expression and key == target.text
                if whole or self._in_layers(key, _PEFTS_LAYER):
                    return key
        return None

    def _key(self, target: Target, site: Site) -> str | None:
        met = any(self._meets(target, alias, site) for alias in site.aliases)
        return site.name if met and self._is_left(site) else None

    def _is_left(self, site: Site) -> bool:
        """Whether no name of the site is excluded, and its layer is one of those to adapt."""
        excluded = any(self._excludes(alias) for alias in site.aliases)
        return not excluded and self._in_layers(site.name, _LAYER)

    def _excludes(self, key: str) -> bool:
        return any(target.matches(key) for target in listed(self.config.exclude_modules))

    def _meets(self, target: Target, key: str, site: Site) -> bool:
        if target == Target(ALL_LINEAR):
            return not self.linear.isdisjoint(site.names)
        return target.matches(key)

    def _in_layers(self, key: str, number: str) -> bool:
        """Whether the layer number in a name is one of `layers_to_transform`.

        Args:
            key: the name.
            number: the expression for the number, if `layers_pattern` gives none.
        """
        layers, given = self.config.layers_to_transform, self.config.layers_pattern
        if layers is None:
            return True
        assert isinstance(layers, tuple)
        patterns = (given,) if isinstance(given, str) else given or ()
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns]
        found = (re.match(expression, key) for expression in expressions or [number])
        first = next((match["number"] for match in found if match), None)
        return first is not None and int(first) in layers

    def _is_layer(self, site: Site) -> bool:
        """Whether the site is the weight of a linear layer that a graph reads, and no embedding."""
        if site.outside is not None or self._is_embedding(site):
            return False
        owners = (path for path in site.modules if f"{path}.weight" in site.aliases)
        return not self.module.known.linears.isdisjoint(owners)

    def _is_product(self, site: Site) -> bool:
        """Whether a matrix product reads the site, which is no factor of another weight.

        The main tensor of a torch parametrization counts as its weight.
        """
        layer, behind, _ = site.parameter.partition(".parametrizations.")
        read = any(r.kind == site.op and r.moved and r.moved.intact for r in site.readers)
        own = read or (behind and layer in site.aliases)
        return bool(in_all_linear(site.op) and own and not self._is_embedding(site))

    def _is_embedding(self, site: Site) -> bool:
        """Whether the site is an output embedding, or is also looked up."""
        looked_up = any(is_lookup(reader.kind) for reader in site.readers)
        return looked_up or not self.module.known.outputs.isdisjoint(site.names)


def _by_name(keys: Iterable[tuple[Site, str | None]]) -> dict[str, str]:
    return {name: key for site, key in keys if key is not None for name in site.names}


def is_suffix(target: str, name: str) -> bool:
    """Whether a name is the target, or ends with it after a dot."""
    return name == target or name.endswith(f".{target}")
