"""Parameters trained in full, in addition to the adapters: modules (as copies) and biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from ..config import LoraConfig, Rule
from ..errors import ConfigError, UnsupportedOpError, warn
from ..lora.dtypes import DtypeRule
from ..module import CapturedModule
from ..module.quantised import is_quantised
from ..plan import Entry
from ..reads.sites import Site
from ..tables import some
from .choice import Choice, Chosen, matches
from .targets import is_suffix
from .unmatched import Unmatched


def modules_to_save(choice: Choice, chosen: Chosen, unmatched: Unmatched) -> dict[str, int]:
    """Return the paths of modules and bare parameters that train in full.

    Each has the number of the first rule that trains it.

    Raises:
        NoMatchError: a name in `modules_to_save` matches nothing.
    """
    holders = _holders(choice.module)
    found: list[tuple[str, int]] = []
    for number, rule in enumerate(choice.rules, 1):
        if rule.lora is not None:
            paths = _heads(rule.lora, holders)
            paths += _saved(number, rule.lora, holders, paths, unmatched)
            found += [(path, number) for path in paths]
        found += [(path, number) for path in without_sites(choice, rule)]
    for site, number in chosen:
        if (rule := choice.rule(number)) and rule.train:
            found.append((_trained_path(site, rule), number))
    saved: dict[str, int] = {}
    for path, number in found:
        saved.setdefault(path, number)
    return saved


def _heads(config: LoraConfig, holders: Iterable[str]) -> list[str]:
    """Return the modules that `task_type` trains in full, as PEFT finds them: by last letters."""
    found = [path for path in holders if path.endswith(config.heads)]
    if config.heads and not found and not config.modules_to_save:
        warn(
            f"task_type={config.task_type!r} trains the head in full, and no module has a name "
            f"that ends in {' or '.join(config.heads)}: the head stays frozen. Name it in "
            "modules_to_save."
        )
    return found


def _saved(
    number: int,
    config: LoraConfig,
    holders: Iterable[str],
    heads: Sequence[str],
    unmatched: Unmatched,
) -> list[str]:
    """Return the modules that `modules_to_save` trains in full.

    Args:
        number: the number of the rule.
        config: its configuration.
        holders: the paths of all modules with parameters.
        heads: those that `task_type` trains, for which PEFT's folders have names of no module.
        unmatched: raises for a name that matches nothing.
    """
    names = config.modules_to_save or ()
    found = {name: [p for p in holders if is_suffix(name, p)] for name in names}
    known = {*heads, *(path for paths in found.values() for path in paths)}
    for name, paths in found.items():
        if not paths and name not in config.heads:
            unmatched.no_match(f"modules_to_save of rule {number} ('{name}')", name, holders)
        within = (p for p in holders if p.endswith(name))
        if more := [p for p in within if not any(is_below(p, path) for path in known)]:
            raise ConfigError(
                f"modules_to_save of rule {number}: '{name}' is {some(map(repr, paths))}, and for "
                f"PEFT also {some(map(repr, more))}, whose name ends in its letters. Add that name "
                "to train both, or write the whole name in a Rule(name, train=True)."
            )
    return [path for paths in found.values() for path in paths]


def _trained_path(site: Site, rule: Rule) -> str:
    """Return the path that trains for a site: its layer, or only the parameter.

    It is the layer if the parameter is the layer's `weight` or the rule names the layer.
    """
    owner = site.parameter.rpartition(".")[0]
    layer = site.parameter == f"{owner}.weight"
    asked = rule.name is not None and _named(rule, owner)
    return owner if owner and (layer or asked) else site.parameter


def _holders(module: CapturedModule) -> dict[str, nn.Module]:
    return {
        path: held
        for path, held in module.named_modules()
        if path and next(held.parameters(), None) is not None
    }


def without_sites(choice: Choice, rule: Rule) -> Iterator[str]:
    """Yield the paths without a site that a `train=True` rule names: norms, biases, vectors."""
    keys = (rule.op, rule.where, rule.kernel_size, *rule.bounds)
    if not rule.train or any(key is not None for key in keys):
        return
    weights = {name for site in choice.sites for name in (*site.names, *site.tied)}
    parameters = [n for n, _ in choice.module.named_parameters(remove_duplicate=False)]
    for path in _holders(choice.module):
        below = [name for name in parameters if is_below(name, path)]
        if not weights.intersection(below) and _named(rule, path):
            yield path
    yield from (name for name in parameters if name not in weights and _named(rule, name))


def _named(rule: Rule, name: str) -> bool:
    return rule.name is None or any(matches(pattern, (name,)) for pattern in rule.name)


def trained(module: CapturedModule, paths: Iterable[str]) -> set[str]:
    """Return the names of the parameters below these paths, tied ones under all their names."""
    tied = {name: names for names in module.aliases().values() for name in names}
    found: set[str] = set()
    for path in paths:
        for name in (n for n in tied if is_below(n, path)):
            if outside := [n for n in tied[name] if not is_below(n, path)]:
                warn(
                    f"modules_to_save '{path}': '{name}' is the same tensor as "
                    f"{', '.join(outside)}, which trains with it."
                )
            found |= set(tied[name])
    return found


def biases(choice: Choice, entries: Iterable[Entry]) -> dict[str, int]:
    """Return the names of the biases that `bias=` trains, each with the first rule that does.

    As in PEFT, these are parameters named `bias`; an `in_proj_bias` or `bias_ih` is none.
    """
    every = [n for n, _ in choice.module.named_parameters() if n.rpartition(".")[2] == "bias"]
    by_owner: dict[str, list[str]] = {}
    for name in every:
        by_owner.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, int] = {}
    for entry in entries:
        rule = choice.rule(entry.rule)
        lora = rule and rule.lora
        mine = by_owner.get(entry.parameter.rpartition(".")[0], [])
        chosen = {"all": every, "lora_only": mine}.get(lora.bias if lora else "none", [])
        for name in chosen:
            found.setdefault(name, entry.rule)
    return found


def dtype_rules(
    choice: Choice, names: Iterable[str], saved: Mapping[str, int], biased: Mapping[str, int]
) -> dict[str, DtypeRule]:
    """Return the `autocast_adapter_dtype` of parameters trained in full, where it is not True.

    Args:
        choice: the rules and the module.
        names: the parameters.
        saved: the paths that train in full, each with the number of its rule.
        biased: the biases that train, likewise.
    """
    tied = {name: names for names in choice.module.aliases().values() for name in names}
    found: dict[str, DtypeRule] = {}
    for name in names:
        paths = (p for p in saved if any(is_below(other, p) for other in tied[name]))
        number = next((saved[path] for path in paths), biased.get(name))
        rule = None if number is None else choice.rule(number)
        if rule and rule.lora and rule.lora.dtype_rule is not True:
            found[name] = rule.lora.dtype_rule
    return found


def check_trained(site: Site, number: int, rule: Rule | None, saved: Mapping[str, int]) -> None:
    """Raise if a rule adapts a weight that a later rule, or a tie, trains in full.

    Raises:
        ConfigError: names the conflict, and how to resolve it.
    """
    if rule is None or rule.lora is None:
        return
    paths = [path for name in site.names for path in saved if is_below(name, path)]
    if not paths:
        raise ConfigError(
            f"rule {number} adapts '{site.name}', which is tied to {', '.join(site.tied)}, trained "
            "in full. Adapt both names or train both, or untie them in the model."
        )
    later = min(saved[path] for path in paths)
    if later > number:
        raise ConfigError(
            f"rule {number} adapts '{site.name}', and rule {later} trains '{paths[0]}', which "
            f"contains it, in full. Put rule {later} before rule {number} to train it too, or name "
            f"single parameters in rule {later}."
        )


def check_trains(site: Site) -> None:
    """Raise if a weight is to train in full, but no gradient reaches it.

    Raises:
        UnsupportedOpError: names the weight, and the reason.
    """
    if site.readers and all(reader.untrained for reader in site.readers):
        raise UnsupportedOpError(
            f"'{site.name}' is to train in full, but is read only {site.readers[0].untrained}: no "
            "gradient reaches it. Leave it out of train= and modules_to_save, or change the model "
            "so that the gradient reaches it."
        )


def check_own_memory(module: CapturedModule, names: Iterable[str]) -> None:
    """Raise if a parameter that is to train in full is quantised, or shares memory with another.

    It trains as a copy, and the other tensor would not change with it. No gradient changes the
    codes of a quantised one.

    Raises:
        UnsupportedOpError: names the tensors.
    """
    for name in names:
        if is_quantised(module.get_parameter(name)):
            raise UnsupportedOpError(
                f"'{name}' is to train in full, and is quantised: no optimizer changes its codes. "
                "Quantise the model without it (the filter_fn of torchao's quantize_), or adapt it "
                "instead."
            )
        if others := module.known.mirrors.get(name):
            raise UnsupportedOpError(
                f"'{name}' is to train in full, and shares memory with '{others[0]}', which is "
                "another tensor: training one would not change the other. Make them one Parameter "
                f"(b.weight = a.weight), or leave '{name}' out of train=, modules_to_save and "
                "bias=."
            )


def is_below(parameter: str, path: str) -> bool:
    return parameter == path or parameter.startswith(f"{path}.")
