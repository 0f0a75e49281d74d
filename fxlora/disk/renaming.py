"""Names in an adapter file that are not the module's: how they are read, and when that is sure.

Names get wrapped (`_orig_mod.`, `module.`, `.default.`), models get wrapped (a language model in a
multimodal one), and weights get fused (`gate_proj` and `up_proj` in `gate_up_proj`). The user's
`key_mapping` says what to do, as for transformers and PEFT: the first regular expression that is
found in a name is replaced. Without one, another beginning of all names is recognised if exactly
one fits every tensor, in name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError, ConfigError, warn
from ..module import CapturedModule
from ..names import shown
from ..tables import some
from .folder import Folder, Names
from .saved import paths_of

# Modules that torch puts around others, and DDP's and DataParallel's, around the whole model.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTERMOST = ("module", "base_model.model")
_ADAPTER = re.compile(
    r"(?<![^.])(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)"
    r"(?=\.weight$|\.bias$|$)"
)
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")

Fits = Callable[[Folder], Sequence[str]]  # returns the names that find no place in the module
Mapped = dict[str, str]


def checked_mapping(key_mapping: Any) -> Names:
    """Return the user's mapping.

    Raises:
        ConfigError: it is not a mapping of regular expressions to replacements.
    """
    if not isinstance(key_mapping, Mapping):
        raise ConfigError(f"key_mapping must be a mapping of texts, not {shown(key_mapping)}.")
    found: list[tuple[re.Pattern[str], str]] = []
    for pattern, replacement in key_mapping.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise ConfigError(
                f"key_mapping maps regular expressions to texts, not {shown(pattern)} to "
                f"{shown(replacement)}."
            )
        try:
            compiled = re.compile(pattern)
            re.sub(pattern, replacement, "")
            compiled.sub(replacement, "", count=1)
        except (re.error, IndexError) as error:
            raise ConfigError(f"key_mapping[{shown(pattern)}]: {error}.") from error
        found.append((compiled, replacement))
    return Names(tuple(found))


def with_names(
    module: CapturedModule, content: Folder, key_mapping: Any, fits: Fits, names: Collection[str]
) -> Folder:
    """Return a folder that knows the module's names for its own.

    Args:
        module: the captured module.
        content: the folder.
        key_mapping: the user's, or None.
        fits: returns the names in a folder that find no place in the module.
        names: all names in the folder.

    Raises:
        AdapterError: several other beginnings of the names would fit, or those of one module's
            tensors differ.
        ConfigError: `key_mapping` is no mapping.
    """
    wraps = _Plain.of(module)
    if key_mapping is not None:
        return content.named(checked_mapping(key_mapping).after(wraps))
    if not (strange := fits(content)):
        return content
    plain = content.named(Names(before=wraps))
    if not (left := fits(plain)):
        _check_alike(content, wraps)
        warn(
            f"{content.path}: its names are of a wrapped model ({strange[0]}): read without the "
            "wrappers' names."
        )
        return plain
    mappings = [
        m for m in _beginnings(module, wraps(left[0])) if _keeps_apart(m, map(wraps, names))
    ]
    good = [m for m in mappings if not fits(content.named(checked_mapping(m).after(wraps)))]
    if len(good) > 1:
        raise AdapterError(
            f"{content.path} fits the module in several ways. Say which: "
            f"{' or '.join(map(_said, good))}."
        )
    if not good:
        return content
    if _renumbers(good[0]):
        raise AdapterError(
            f"{content.path} fits the module only in another layer than it names ({strange[0]}). "
            f"If that is meant, say so: {_said(good[0])}."
        )
    warn(
        f"{content.path}: its names are of another model ({strange[0]}): read as by "
        f"{_said(good[0])}."
    )
    return content.named(checked_mapping(good[0]).after(wraps))


@dataclass(frozen=True)
class _Plain:
    """Removes what wrappers add to names, other than names that the module itself has."""

    inner: tuple[str, ...]
    outer: tuple[str, ...]

    @classmethod
    def of(cls, module: CapturedModule) -> _Plain:
        paths = list(paths_of(module))
        own = {part for path in paths for part in path.split(".")}
        tops = tuple(t for t in _OUTERMOST if t.partition(".")[0] not in module._modules)
        return cls(tuple(w for w in _WRAPPERS if w not in own), tops)

    def __call__(self, name: str) -> str:
        parts = [part for part in name.split(".") if part not in self.inner]
        name = ".".join(parts)
        while outer := next((o for o in self.outer if name.startswith(f"{o}.")), None):
            name = name.removeprefix(f"{outer}.")
        return _SAVED.sub("", _ADAPTER.sub(_without_adapter, name))


def _without_adapter(found: re.Match[str]) -> str:
    """Return the kind of a tensor without the adapter's name, which a saved key does not have."""
    return found[0] if found[2] in ("weight", "bias") else found[1]


def _check_alike(content: Folder, plain: Callable[[str], str]) -> None:
    """Raise if the tensors of one module have several names of it, some with wrappers' names.

    Raises:
        AdapterError: names the module.
    """
    found: dict[str, set[str]] = {}
    for key in content.tensors:
        found.setdefault(_owner(plain(key)), set()).add(_owner(key))
    for owner, names in found.items():
        if len(names) > 1:
            raise AdapterError(
                f"{content.path} has tensors of '{owner}' under several names ({some(names)}), as "
                "a damaged file has. If they are those of one module, say so: "
                "load_adapter(…, key_mapping={})."
            )


def _owner(name: str) -> str:
    """Return the path of the module that a tensor is of."""
    owner, adapter, _ = name.partition(".lora_")
    return owner if adapter else name.rpartition(".")[0]


def _beginnings(module: CapturedModule, name: str) -> Iterator[Mapped]:
    """Yield mappings of the beginning of a name to that of a name in the module, once each."""
    path = name.partition(".lora_")[0].split(".")
    held = [*paths_of(module), *(n for n, _ in module.named_parameters(remove_duplicate=False))]
    seen: set[tuple[str, str]] = set()
    for other in held:
        there = other.split(".")
        common = 0
        while common < min(len(path), len(there)) and path[-1 - common] == there[-1 - common]:
            common += 1
        pair = ".".join(path[: len(path) - common]), ".".join(there[: len(there) - common])
        if common and pair not in seen:
            seen.add(pair)
            yield _mapping(*pair)


def _keeps_apart(mapping: Mapped, names: Iterable[str]) -> bool:
    """Whether no module gets some of its names by the mapping and has others by itself.

    Otherwise the file names that module already, and a name like it is damaged, or of another one.
    """
    renamed = checked_mapping(mapping)
    (new,) = mapping.values()
    moved: set[str] = set()
    kept: set[str] = set()
    for name in names:
        moves = renamed.number(name) == 0
        (moved if moves else kept).add(renamed(name))
    if new:
        return not any(name.startswith(new) for name in kept)
    return {name.partition(".")[0] for name in moved}.isdisjoint(
        name.partition(".")[0] for name in kept
    )


def _mapping(old: str, new: str) -> Mapped:
    return {f"^{re.escape(old)}\\." if old else "^": f"{new}." if new else ""}


def _renumbers(mapping: Mapped) -> bool:
    """Whether both beginnings of names have numbers, as those of layers, and others."""
    ((old, new),) = mapping.items()
    numbers = [re.findall(r"(?<![^.\\^])\d+(?=\\?\.|$)", text) for text in (old, new)]
    return bool(numbers[0]) and bool(numbers[1]) and numbers[0] != numbers[1]


def _said(mapping: Mapped) -> str:
    return f"load_adapter(…, key_mapping={mapping!r})"


# ---- advice -------------------------------------------------------------------------------------


def advice(module: CapturedModule, strange: Sequence[str]) -> str:
    """Return what to do about names that find no place: a key mapping, where one can be told."""
    plain = _Plain.of(module)
    paths = list(dict.fromkeys(plain(name).partition(".lora_")[0] for name in strange))
    if mapping := _fused(module, paths):
        return f" The module has these weights fused: {_said(mapping)}."
    return (
        " If the model has other names than the one that the adapter was trained on, say how they "
        "correspond: load_adapter(…, key_mapping={regular expression: replacement})."
    )


def _fused(module: CapturedModule, paths: Sequence[str]) -> Mapped:
    """Return the mapping of layers (of experts) to the weights that their names say are fused."""
    held = {n.removesuffix(".weight") for n, _ in module.named_parameters(remove_duplicate=False)}
    found: dict[tuple[int, str], tuple[str, str]] = {}
    for path in paths:
        owner, _, last = path.rpartition(".")
        container, _, number = owner.rpartition(".")
        stem, _, kind = last.rpartition("_")
        for whole in held:
            parent, _, name = whole.rpartition(".")
            at = name.find(stem) if stem else -1
            if at < 0 or not name.endswith(kind) or whole in paths:
                continue
            if parent == owner:
                old = rf"\b{last}\b"
                found[at, old] = (old, name)
            elif parent == container and number.isdigit():  # a stack of experts
                short = container.rpartition(".")[2]
                old = rf"\b{short}\.\d+\.{last}\b"
                found[at, old] = (old, f"{short}.{name}")
    return dict(found[key] for key in sorted(found))
