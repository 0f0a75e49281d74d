"""What PEFT trains in full: the modules that it wraps for `modules_to_save`, and their tensors.

PEFT copies each module of which a name in `modules_to_save` is the end (of "lm_head" as of "head"),
which splits the ties of its parameters, and reads every tensor of the copy from the file. Values
under other keys go into the base model's own tensors, whose ties stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..fx.calls import places
from ..module import CapturedModule
from ..plan import Plan
from ..reads.readers import readers_and_writers


@dataclass(frozen=True)
class Saved:
    """The modules that PEFT wraps when it reads a plan's adapter.

    Attributes:
        names: `modules_to_save` of PEFT's configuration.
        wrapped: the paths of the modules that PEFT wraps by these names.
        tensors: all names of the tensors that a file must hold for them, or that hold a trained
            value: those of the wrapped modules, and every name of a parameter trained in full.
    """

    names: tuple[str, ...]
    wrapped: tuple[str, ...]
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, base: CapturedModule, plan: Plan) -> Saved:
        """Return what PEFT wraps, given the module without adapters."""
        adapted = {entry.parameter.rpartition(".")[0] for entry in plan}
        paths = tuple(paths_of(base))
        names = tuple(n for n in _candidates(base, plan) if _wraps(n, paths, adapted))
        wrapped = tuple(path for path in paths if path.endswith(names)) if names else ()
        every = {**base.state_dict(), **dict(base.named_parameters(remove_duplicate=False))}
        kept = [n for n in every if any(is_below(n, path) for path in wrapped)]
        mine = [alias for names in trained_names(base, plan).values() for alias in names]
        return cls(names, wrapped, tuple(dict.fromkeys([*kept, *mine])))

    def holds(self, name: str) -> bool:
        """Whether a tensor is one of a wrapped module."""
        return any(is_below(name, path) for path in self.wrapped)


def trained_names(module: CapturedModule, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return all names under which each parameter trains in full, by its name in the plan."""
    tied = {name: names for names in module.aliases().values() for name in names}
    return {
        name: tuple(n for n in tied.get(name, (name,)) if n not in plan.untied.get(name, ()))
        for name in plan.trained
    }


def paths_of(module: nn.Module) -> Iterator[str]:
    """Yield the paths of the modules that hold tensors, at any depth."""
    held = {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}
    yield from dict.fromkeys(
        name[:end] for name in held for end, letter in enumerate(name) if letter == "."
    )


def is_below(name: str, path: str) -> bool:
    """Whether a name is a path, or begins with it before a dot."""
    return name == path or name.startswith(f"{path}.")


def _candidates(base: CapturedModule, plan: Plan) -> list[str]:
    """Return the modules to wrap: those of the plan, and those that hold other names of their ties.

    A module that is never called may be a list of modules, which PEFT refuses to wrap.
    """
    called = {place for graph in base.distinct_graphs() for n in graph.nodes for place in places(n)}
    chosen = [path for path in plan.modules_to_save if path in called]
    saved = {n: ns for n, ns in trained_names(base, plan).items() if _in_any(n, ns, chosen)}
    if any(not _in_any(alias, (), chosen) for names in saved.values() for alias in names):
        readers, _ = readers_and_writers(base)
        for alias in (alias for names in saved.values() for alias in names):
            owner = alias.rpartition(".")[0]
            if owner in {reader.call_site for reader in readers.get(alias, ())}:
                chosen.append(owner)
    return [p for p in dict.fromkeys(chosen) if not any(p != o and is_below(p, o) for o in chosen)]


def _in_any(name: str, others: tuple[str, ...], paths: list[str]) -> bool:
    return any(is_below(n, path) for n in (name, *others) for path in paths)


def _wraps(name: str, paths: tuple[str, ...], adapted: set[str]) -> bool:
    """Whether PEFT can wrap all modules of which the name is the end."""
    ends = [path for path in paths if path.endswith(name)]
    nested = any(a != b and is_below(a, b) for a in ends for b in ends)
    touched = any(is_below(a, path) or is_below(path, a) for a in adapted for path in ends)
    own = adapted and any(module.endswith(name) for module in _PEFTS)  # "out" of "lora_dropout"
    return not (nested or touched or own)


# The modules that PEFT puts into those that it adapts, before it looks for those to wrap.
_PEFTS = (
    *("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "token_adapter", "default"),
)
