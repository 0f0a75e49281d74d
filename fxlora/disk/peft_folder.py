"""Read PEFT's folder: its tensors say what is adapted, its configuration how they are scaled.

A name in the configuration that matches nothing is no error, as for PEFT; a tensor that finds no
place in the module is one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import ALL_LINEAR, LoraConfig, Rule
from ..errors import AdapterError, ConfigError, NoMatchError, UnsupportedOpError
from ..lora.inits import FILLS, STARTS
from ..matching import matched
from ..matching.choice import by_pattern
from ..matching.targets import Targets
from ..module import CapturedModule
from ..names import shown
from ..plan import Entry, Plan
from ..reads.sites import Site, find_sites
from ..tables import some
from .folder import Folder, descriptions_in
from .fused import BIAS, A, Adapted, fused
from .keys import CONFIG
from .limits import is_plain_layer
from .own_folder import counted, misshapen
from .peft import ROOT, Wrappers, groups_of, is_transposed
from .peft_rest import Rest, rest_of
from .peft_tensors import Pair, PeftTensors
from .reading import Reading
from .renaming import advice
from .saved import is_below
from .tied_pairs import joined, wrapped
from .token_rows import token_rules, token_starts

# Inits that leave the base weight unchanged. For an adapter from a file, they do not matter.
_INITS_KEEPING_BASE = (*FILLS, "eva", "mica")


def read_peft(module: CapturedModule, content: Folder, adapter_name: str) -> Reading:
    """Return what PEFT's folder, whose configuration was checked, says about a module.

    Raises:
        AdapterError: a tensor does not fit the module, or has no equal in it.
    """
    tensors = PeftTensors.of(module, content)
    sites = {name: site for site in find_sites(module) for name in site.names}
    one_each, sites = joined(content, tensors, sites)
    reading = _PeftReader(module, content, adapter_name, one_each, sites).read()
    return dataclasses.replace(reading, wrapped=wrapped(tensors, sites))


@dataclass(frozen=True)
class _PeftReader:
    """Reads one folder.

    Attributes:
        module: the captured module.
        content: the folder.
        adapter: the adapter's name in the module.
        tensors: the folder's tensors.
        sites: the module's sites by every name; of a tie that PEFT adapts as one, the whole.
        missing, strange, misshapen: what does not fit.
    """

    module: CapturedModule
    content: Folder
    adapter: str
    tensors: PeftTensors
    sites: Mapping[str, Site]
    missing: list[str] = field(default_factory=list[str])
    strange: list[str] = field(default_factory=list[str])
    misshapen: list[str] = field(default_factory=list[str])

    def read(self) -> Reading:
        unread = [p.parameter for p in self.tensors.pairs if p.parameter not in self.sites]
        self._check_fits(self.tensors.strange)
        pairs = self._by_site()
        plan = self._plan(pairs)
        starts, biases = self._starts(plan, pairs)
        rest = rest_of(self.module, self.content, self.tensors, plan, biases)
        self.missing.extend(rest.missing)
        self.misshapen.extend(rest.misshapen)
        self.missing.extend(self._absent(pairs, rest))
        self._check_fits(())
        self._check_base(rest.clash)
        plan = counted(self.module, rest.planned(plan))
        plan = dataclasses.replace(plan, descriptions=descriptions_in(self.content))
        return Reading(plan, starts, dict(rest.stored), (*self._notes(pairs, unread), *rest.notes))

    def _notes(self, pairs: Mapping[tuple[str, ...], Adapted], unread: list[str]) -> list[str]:
        """Return what a user should know of pairs that have no effect, or that PEFT ties."""
        held = {name for names in pairs for name in names}
        tied = [names[0] for names in pairs if held.intersection(self.sites[names[0]].tied)]
        notes: list[str] = []
        if unread:
            notes.append(
                f"its adapters of {some(unread)} have no effect and are left out: nothing reads "
                "these weights."
            )
        if tied and self.content.config.get("ensure_weight_tying"):
            notes.append(
                f"PEFT trains the pairs of tied weights ({some(tied)}) as one "
                "(ensure_weight_tying); here each trains on its own."
            )
        return notes

    def _by_site(self) -> dict[tuple[str, ...], Adapted]:
        """Return the adapters of weights that a graph reads, by the names of their sites."""
        found: dict[tuple[str, ...], list[Pair]] = {}
        for pair in self.tensors.pairs:
            if site := self.sites.get(pair.parameter):
                found.setdefault(site.names, []).append(pair)
        return {names: self._adapted(self.sites[names[0]], pairs) for names, pairs in found.items()}

    def _adapted(self, site: Site, pairs: list[Pair]) -> Adapted:
        """Return the adapters of a weight from its pair, or from those of what it fuses."""
        given = [(pair, self._fields(pair, site)) for pair in pairs]
        if len(given) == 1:
            return Adapted(*given[0])
        if len({pair.parameter for pair in pairs}) > 1:
            raise AdapterError(
                f"{self.content.path} does not fit the module; it has a pair for each name of the "
                f"tied weight '{site.parameter}', whose reads no call site tells apart."
            )
        return fused(self.content, site, given)

    def _absent(self, pairs: Mapping[tuple[str, ...], Adapted], rest: Rest) -> list[str]:
        """Return the layers that PEFT would adapt by the configuration, and the file does not."""
        config = self.content.config
        targets = config.get("target_modules")
        unknown = bool(self.content.names) or config.get("layers_to_transform") is not None
        if not targets or targets == ALL_LINEAR or unknown:
            return []
        fields = {k: config[k] for k in ("target_modules", "exclude_modules") if config.get(k)}
        try:
            wanted = LoraConfig(**fields)
        except ConfigError:  # names that no module can have
            return []
        sites = tuple({id(site): site for site in self.sites.values()}.values())
        names = Targets(wanted, self.module, sites)
        return [
            site.name
            for site in sites
            if site.names not in pairs and is_plain_layer(site)
            if names.key(site) is not None
            if not any(is_below(site.parameter, path) for path in rest.paths)
        ]

    # ---- the plan -----------------------------------------------------------------------------

    def _plan(self, pairs: Mapping[tuple[str, ...], Adapted]) -> Plan:
        """Match a rule for each kind of adapter; ties are adapted where the file has a pair."""
        tokens = token_rules(self.module, self.content, self.tensors)
        if not (pairs or tokens):
            return Plan(())
        numbers: dict[tuple[str, tuple[str, ...]], int] = {}
        of_site: dict[str, int] = {}
        kinds: list[Adapted] = []
        for names, adapted in pairs.items():
            tied = names if self.sites[names[0]].tied else ()
            kind = repr((adapted.fields, adapted.parts)), tied
            if kind not in numbers:
                numbers[kind] = len(kinds)
                kinds.append(adapted)
            of_site |= dict.fromkeys(names, numbers[kind])
        try:
            rules = [_rule(number, adapted, of_site) for number, adapted in enumerate(kinds)]
            plan = matched(self.module, [*rules, *tokens], adapter_name=self.adapter)
        except (ConfigError, NoMatchError, UnsupportedOpError) as error:
            raise AdapterError(f"{self.content.path} does not fit the module: {error}") from error
        entries = tuple(
            entry if entry.tokens else _scaled(entry, pairs[entry.names].scaling) for entry in plan
        )
        named = (*self._named(rules, of_site), *tokens)
        return dataclasses.replace(plan, entries=entries, rules=named)

    def _named(self, rules: list[Rule], of_site: Mapping[str, int]) -> tuple[Rule, ...]:
        """Return the rules with names instead of functions: these can be written to a file."""
        names: dict[int, dict[str, None]] = {}
        for name, number in of_site.items():
            names.setdefault(number, {})[f"re:{re.escape(self.sites[name].name)}"] = None
        return tuple(
            dataclasses.replace(rule, name=tuple(names[number]), where=None)
            for number, rule in enumerate(rules)
        )

    def _fields(self, pair: Pair, site: Site) -> dict[str, Any]:
        """Return the fields of the LoraConfig for one weight."""
        config = self.content.config
        init = self._init()
        looked_up = site.op == "embedding" or "lora_embedding_A" in pair.tensors
        starts = init in STARTS and not looked_up and not pair.bare
        return {
            "r": by_pattern(config.get("rank_pattern") or {}, pair.target, _given(config, "r", 8)),
            "lora_alpha": by_pattern(
                config.get("alpha_pattern") or {}, pair.target, _given(config, "lora_alpha", 8)
            ),
            "lora_dropout": 0.0 if pair.bare else config.get("lora_dropout") or 0.0,
            "use_rslora": bool(config.get("use_rslora")),
            "use_dora": bool(config.get("use_dora")),
            # PEFT computes the initial pair again from the base weight, of layers with matrices.
            "init_lora_weights": init if starts else True,
        }

    def _init(self) -> bool | str:
        """Return the init by which PEFT changes the base weights, or True where it does not.

        Raises:
            AdapterError: it changes them by an init that fxlora does not have.
        """
        init = self.content.config.get("init_lora_weights", True)
        if isinstance(init, str) and init in STARTS:
            return init
        if not isinstance(init, bool | str) or init not in _INITS_KEEPING_BASE:
            raise AdapterError(
                f"{self.content.path / CONFIG} has init_lora_weights={shown(init)}, which changes "
                "the weights that the adapter is added to. Convert it with PEFT's "
                "save_pretrained(…, path_initial_model_for_weight_conversion=…)."
            )
        return True

    # ---- values -------------------------------------------------------------------------------

    def _starts(
        self, plan: Plan, pairs: Mapping[tuple[str, ...], Adapted]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the values of adapters by name, and what `lora_bias` adds to biases by name."""
        starts: dict[str, torch.Tensor] = {}
        biases: dict[str, torch.Tensor] = {}
        starts |= token_starts(self.module, plan, self.tensors, self.misshapen)
        for group in groups_of(e for e in _as_peft_has(plan) if not e.tokens):
            entry, pair = group[0], pairs[group[0].names].pair
            wrappers = self._wrappers(entry, pair)
            shapes = {f"{pair.prefix}.{end}": s for end, s in wrappers.shapes(group).items()}
            given = {f"{pair.prefix}.{end}": t for end, t in pair.tensors.items() if end != BIAS}
            self.missing.extend(key for key in shapes if key not in given)
            self.strange.extend(key for key in given if key not in shapes)
            wrong = misshapen(given, shapes)
            if wrong and self.sites[entry.parameter].groups > 1:
                raise AdapterError(
                    f"{self.content.path}: PEFT's pair of '{entry.site}', a grouped convolution, "
                    "mixes the channels of all groups, which no change of its weight does. Train "
                    "it again here, or serve it in PEFT."
                )
            self.misshapen.extend(wrong)
            if given.keys() == shapes.keys() and not wrong:
                starts |= wrappers.decoded(group, pair.tensors)
            if BIAS in pair.tensors and not self.content.config.get("lora_bias"):
                self.strange.append(f"{pair.prefix}.{BIAS}")  # PEFT reads none
            elif BIAS in pair.tensors:
                biases[self._bias(entry, pair)] = entry.scaling * pair.tensors[BIAS]
        return starts, biases

    def _wrappers(self, entry: Entry, pair: Pair) -> Wrappers:
        """Return PEFT's layout for one weight; shapes say how a stack is laid out, if need be."""
        given = pair.tensors.get(A)
        inputs = given.shape[-1] if given is not None and given.ndim else 0
        first, last = entry.shape[-2:]
        transposed = is_transposed(self.module, entry) if entry.layout.stacked else False
        if transposed is None and first != last:
            transposed = inputs == first
        if transposed is None:
            transposed = pair.natural and entry.layout.in_first
        bare = pair.bare and not (pair.natural and not entry.layout.stacked)
        weight = frozenset((entry.parameter,))
        none = frozenset[str]()
        return Wrappers(
            {},
            bare=weight if bare else none,
            transposed=weight if transposed else none,
            lookups=weight if "lora_embedding_A" in pair.tensors else none,
        )

    def _bias(self, entry: Entry, pair: Pair) -> str:
        """Return the bias of an adapted layer, which B's own bias is added to."""
        bias = f"{entry.parameter.removesuffix('weight')}bias"
        held = dict(self.module.named_parameters(remove_duplicate=False))
        if pair.bare or bias not in held or held[bias].shape != pair.tensors[BIAS].shape:
            raise AdapterError(
                f"{self.content.path}: B of '{entry.site}' has a bias (lora_bias), and the layer "
                "has none that it could be added to. Give the layer one of zeros before you "
                "capture the model."
            )
        return bias

    # ---- errors -------------------------------------------------------------------------------

    def _check_fits(self, strange: tuple[str, ...]) -> None:
        problems = [
            ("missing in the file:", self.missing),
            ("unexpected in the file:", [*(ROOT + name for name in strange), *self.strange]),
            ("of another shape:", self.misshapen),
        ]
        if said := [f"{what} {some(names)}" for what, names in problems if names]:
            more = advice(self.module, strange) if strange else ""
            raise AdapterError(
                f"{self.content.path} does not fit the module; {'; '.join(said)}.{more}"
            )

    def _check_base(self, clash: Any) -> None:
        if clash:
            raise AdapterError(
                f"{self.content.path} was made for other base weights: it also has {some(clash)}, "
                "whose values are not the module's. Load them into the model before you capture it."
            )


def _rule(number: int, adapted: Adapted, of_site: Mapping[str, int]) -> Rule:
    def holds(site: Site) -> bool:
        return of_site.get(site.parameter) == number

    return Rule(lora=LoraConfig(**adapted.fields), parts=adapted.parts, where=holds)


def _scaled(entry: Entry, scaling: float | None) -> Entry:
    if scaling is None:
        return entry
    return dataclasses.replace(entry, alpha=scaling * entry.r, scaling=scaling)


def _given(config: Mapping[str, Any], field: str, default: Any) -> Any:
    value = config.get(field)
    return default if value is None else value


def _as_peft_has(plan: Plan) -> Plan:
    """Return the plan in the form of PEFT's file, which omits the initial pair of PiSSA and OLoRA.

    PEFT computes that pair again from the base weight.
    """
    entries = tuple(
        dataclasses.replace(e, variants=tuple(v for v in e.variants if v != "from_weight"))
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)
