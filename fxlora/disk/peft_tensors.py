"""The tensors of PEFT's file, sorted out: the pairs of adapted weights, and the rest by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..module import CapturedModule
from .folder import Folder
from .peft import ROOT
from .peft_tokens import END as TOKENS
from .saved import paths_of
from .values import same

_KEY = re.compile(r"(?P<path>.+)\.(?P<kind>lora_[A-Za-z_]+)(?P<end>\.weight|\.bias)?", re.ASCII)
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_AROUND = "base_layer"  # PEFT's name for what a wrapper wraps


@dataclass(frozen=True)
class Pair:
    """The tensors of one of PEFT's wrappers, and the weight that they adapt.

    Attributes:
        parameter: the weight's name in the module.
        target: the name that PEFT's patterns of ranks and alphas match: of the layer, or of the
            parameter, as the file has it.
        bare: whether PEFT targets the weight as a parameter, not as the weight of a layer.
        prefix: the file's key without its end.
        tensors: by the ends of their keys.
        natural: whether A acts on the inputs of the weight, whatever PEFT takes for these.
    """

    parameter: str
    target: str
    bare: bool
    prefix: str
    tensors: Mapping[str, torch.Tensor]
    natural: bool = False


@dataclass(frozen=True)
class PeftTensors:
    """The tensors of a file.

    Attributes:
        pairs: those of wrappers, in the order of the file.
        tokens: rows that train alone (tokens, features), by the path of their module here, each
            with its path in the file.
        rest: other tensors, by the names of the module's tensors that they are for.
        keys: the keys of these.
        strange: keys that are for nothing in the module, without PEFT's root.
    """

    pairs: tuple[Pair, ...]
    tokens: Mapping[str, tuple[str, torch.Tensor]]
    rest: Mapping[str, torch.Tensor]
    keys: Mapping[str, str]
    strange: tuple[str, ...]

    def misfits(self, module: CapturedModule) -> list[str]:
        """Return the names in the file that find no place in a module, or one of another shape."""
        weights = dict(module.named_parameters(remove_duplicate=False))
        wrong = [p.prefix for p in self.pairs if not _fits(p, tuple(weights[p.parameter].shape))]
        held = {**weights, **dict(module.named_buffers(remove_duplicate=False))}
        for path, (_, rows) in self.tokens.items():
            weight = weights.get(f"{path}.weight")
            if weight is None or rows.shape[1:] != weight.shape[1:]:
                wrong.append(path)
        wrong += [self.keys[n] for n, t in self.rest.items() if t.shape != held[n].shape]
        return [*self.strange, *(key.removeprefix(ROOT) for key in wrong)]

    @classmethod
    def of(cls, module: CapturedModule, content: Folder) -> PeftTensors:
        """Sort out the tensors of a folder, by its names for a module's."""
        sorting = _Sorting.of(module, content)
        for key, tensor in content.tensors.items():
            sorting.add(key, tensor)
        pairs = tuple(sorting.pairs())
        return cls(pairs, sorting.tokens, sorting.rest, sorting.keys, tuple(sorting.strange))


@dataclass(frozen=True)
class _Sorting:
    """Sorts tensors out.

    Attributes:
        content: the folder.
        held: the names of the module's parameters and buffers.
        paths: the paths of its modules.
        own: the parameters that each module itself holds, in order.
        wrappers: the tensors of each wrapper: by the path in the module with its `base_layer`s, and
            the path in the file.
        tokens, rest, keys, strange: as in `PeftTensors`.
    """

    content: Folder
    held: frozenset[str]
    paths: frozenset[str]
    own: Mapping[str, list[str]]
    wrappers: dict[tuple[str, str], dict[str, torch.Tensor]] = field(default_factory=dict[Any, Any])
    tokens: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict[Any, Any])
    rest: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    keys: dict[str, str] = field(default_factory=dict[str, str])
    strange: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, module: CapturedModule, content: Folder) -> _Sorting:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        own: dict[str, list[str]] = {}
        for name in parameters:
            own.setdefault(name.rpartition(".")[0], []).append(name)
        return cls(content, frozenset({*parameters, *buffers}), frozenset(paths_of(module)), own)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Put one tensor where it belongs."""
        given = key.removeprefix(ROOT)
        name = self.content.names(given)
        here, there = _KEY.fullmatch(name), _KEY.fullmatch(self.content.names.before(given))
        if given == key and not self.content.names:
            self.strange.append(key)
            return
        if name not in self.held and here and there and here["kind"] in _KINDS:
            end = "" if here["kind"] == "lora_magnitude_vector" else here["end"] or ""
            ends = self.wrappers.setdefault((here["path"], there["path"]), {})
            if here["kind"] + end in ends:  # as of two adapters, or with and without a prefix
                self.strange.append(given)
            ends.setdefault(here["kind"] + end, tensor)
            return
        if name.endswith(f".{TOKENS}"):
            path, there = (n.removesuffix(f".{TOKENS}") for n in (name, given))
            self.tokens[self._place(path)[0]] = _unwrapped(there), tensor
            return
        owner, _, last = name.rpartition(".")
        found = ".".join(filter(None, (self._place(owner)[0], last)))
        if self._is_repeated(owner, last, tensor):
            return
        if found not in self.held or found in self.rest:
            self.strange.append(given)
        else:
            self.rest[found], self.keys[found] = tensor, key

    def _is_repeated(self, owner: str, last: str, tensor: torch.Tensor) -> bool:
        """Whether a key is PEFT's second one for a tensor of a module that trains in full.

        With a bias mode, PEFT saves its biases once more, and those of the module that it replaced.
        """
        place, _, wrapper = owner.rpartition(".")
        name = f"{place}.{last}"
        if owner in self.paths or name not in self.held:
            return False
        again = same(tensor, self.content.tensors.get(f"{ROOT}{name}"))
        return wrapper == "original_module" or (wrapper == "modules_to_save" and again)

    def pairs(self) -> Iterable[Pair]:
        """Yield a pair for each wrapper; those of no weight become strange."""
        depths: dict[str, set[int]] = {}
        for path, _ in self.wrappers:
            place, depth = self._place(path)
            depths.setdefault(place, set()).add(depth)
        for (path, there), tensors in self.wrappers.items():
            place, depth = self._place(path)
            found = self._weight(place, depth, max(depths[place]), _unwrapped(there))
            if found is None:
                self.strange.extend(f"{there}.{end}" for end in tensors)
            else:
                yield Pair(*found, f"{ROOT}{there}", tensors)

    def _place(self, path: str) -> tuple[str, int]:
        """Return a path without the `base_layer`s that are not the model's, and how many end it."""
        found, depth = "", 0
        for part in path.split(".") if path else ():
            step = f"{found}.{part}".removeprefix(".")
            if part == _AROUND and step not in self.paths:
                depth += 1
            else:
                found, depth = step, 0
        return found, depth

    def _weight(
        self, place: str, depth: int, deepest: int, there: str
    ) -> tuple[str, str, bool] | None:
        """Return the parameter, the target and whether it is bare; None if there is no such weight.

        Args:
            place: path in the module.
            depth: the number of wrappers around this one.
            deepest: the largest such number.
            there: path in the file.
        """
        if place in self.held:  # a key mapping may name the parameter itself
            return place, there, True
        own = self.own.get(place, [])
        last = {name: name.rpartition(".")[2] for name in own}
        targets = self.content.config.get("target_parameters") or ()
        bare = [n for n in own if any(_is_suffix(t, f"{there}.{last[n]}") for t in targets)]
        if bare and deepest == len(bare) - 1:  # the first parameter's wrapper is the innermost
            name = bare[deepest - depth]
            return name, f"{there}.{last[name]}", True
        if bare or deepest:
            return None
        if f"{place}.weight" in own:
            return f"{place}.weight", there, False
        packed = f"{place}.in_proj_weight"  # of a MultiheadAttention
        return (packed, there, True) if packed in own else None


def _fits(pair: Pair, shape: tuple[int, ...]) -> bool:
    """Whether the shapes of A and B may be those for a weight of this shape, in any layout."""
    sides = {end[:-7] if end.endswith(".weight") else end: t for end, t in pair.tensors.items()}
    a = sides.get("lora_A", sides.get("lora_embedding_A"))
    b = sides.get("lora_B", sides.get("lora_embedding_B"))
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return False
    if len(shape) == 2 or pair.bare:
        return sorted((a.shape[1], b.shape[0])) == sorted(shape[-2:])
    return a.shape[1:] == shape[1:] and b.shape[0] == shape[0]


def _unwrapped(path: str) -> str:
    """Return a path in the file as PEFT calls the module there."""
    return ".".join(part for part in path.split(".") if part != _AROUND)


def _is_suffix(target: Any, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
