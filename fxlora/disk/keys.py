"""Keys of an adapter file, and the tensors of a module that they are for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..module import CapturedModule
from ..plan import Entry, Plan
from . import peft_tokens
from .peft import ROOT, Wrappers, groups_of, owner_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VERSION = 2
OURS = "FXLORA"  # the peft_type of a folder that PEFT cannot read
WHY = "why_not_peft"

# Keys of PEFT's configuration that do not affect the adapter's result.
INFORMATION = frozenset(
    {
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "fan_in_fan_out",
        "runtime_config",
        "eva_config",  # how A was started
        "ephemeral_gpu_offload",
        "megatron_core",
        "qalora_group_size",  # only used with use_qalora, which is refused
    }
)


# ---- the layout of a file -----------------------------------------------------------------------


@dataclass(frozen=True)
class FileLayout:
    """The layout of an adapter file: which key holds which tensor of a module.

    Attributes:
        plan: the plan whose adapters the file holds, in the file's form.
        wrappers: the wrapper modules in PEFT's keys, or None for fxlora's own layout.
        rows: the base's values of the rows that train alone, as which PEFT's layout holds them.
    """

    plan: Plan
    wrappers: Wrappers | None
    rows: peft_tokens.Rows = field(default_factory=dict[str, torch.Tensor])

    def adapters(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the file's adapter tensors by key, from the module's by name."""
        if not self.wrappers:
            return {_own_key(e, name): values[name] for e, name in self._own()}
        pairs = {
            f"{ROOT}{self.wrappers.site(group[0])}.{end}": tensor
            for group in groups_of(self._pairs)
            for end, tensor in self.wrappers.encoded(group, values).items()
        }
        tokens = {
            self._tokens_key(e): peft_tokens.encoded(e, values, self.rows.get(e.name_a))
            for e in self._tokens
        }
        return {**pairs, **tokens}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the file's adapter tensors, by key."""
        if not self.wrappers:
            return {_own_key(e, name): e.tensors[name] for e, name in self._own()}
        pairs = {
            f"{ROOT}{self.wrappers.site(group[0])}.{end}": shape
            for group in groups_of(self._pairs)
            for end, shape in self.wrappers.shapes(group).items()
        }
        return pairs | {self._tokens_key(e): (e.r, e.shape[1]) for e in self._tokens}

    def values(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the module's adapter tensors by name, from the file's by key."""
        if not self.wrappers:
            return {name: tensors[_own_key(e, name)] for e, name in self._own()}
        found: dict[str, torch.Tensor] = {}
        for entry in self._tokens:
            stored = tensors[self._tokens_key(entry)]
            found |= peft_tokens.decoded(entry, stored, self.rows[entry.name_a])
        for group in groups_of(self._pairs):
            site = f"{ROOT}{self.wrappers.site(group[0])}."
            ends = self.wrappers.shapes(group)
            found |= self.wrappers.decoded(group, {end: tensors[site + end] for end in ends})
        return found

    @property
    def _pairs(self) -> list[Entry]:
        return [entry for entry in self.plan if not entry.tokens]

    @property
    def _tokens(self) -> list[Entry]:
        return [entry for entry in self.plan if entry.tokens]

    def _own(self) -> Iterator[tuple[Entry, str]]:
        """Yield the tensors of a file in fxlora's layout; what selects rows follows from these."""
        for entry in self.plan:
            yield from ((entry, name) for name in entry.tensors if name != entry.selection)

    def _tokens_key(self, entry: Entry) -> str:
        assert self.wrappers is not None
        return ROOT + self.wrappers.inside(f"{owner_of(entry)}.{peft_tokens.END}")

    def key(self, name: str) -> str:
        """Return the key of a parameter that is trained in full, or of a buffer."""
        return ROOT + (self.wrappers.inside(name) if self.wrappers else name)


def layout_of(module: CapturedModule, plan: Plan, pefts: bool) -> FileLayout:
    """Return the layout of a file with a plan's adapters: PEFT's (`pefts`) or fxlora's own."""
    if not pefts:
        return FileLayout(plan, None)
    pairs = [entry for entry in plan if not entry.tokens]
    return FileLayout(plan, Wrappers.of(module, pairs), peft_tokens.rows_of(module, plan))


def _own_key(entry: Entry, name: str) -> str:
    """Return a tensor's key in fxlora's own layout: its name, without the name of the adapter."""
    return f"{ROOT}{name.removesuffix(f'.{entry.adapter}.weight')}.weight"
