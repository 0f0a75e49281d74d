"""Keys of an adapter file, and the tensors of a module that they are for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..module import CapturedModule
from ..plan import Entry, Plan
from .peft import ROOT, Wrappers, groups_of

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
    """

    plan: Plan
    wrappers: Wrappers | None

    def adapters(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the file's adapter tensors by key, from the module's by name."""
        if not self.wrappers:
            return {_own_key(e, name): values[name] for e in self.plan for name in e.tensors}
        return {
            f"{ROOT}{self.wrappers.site(group[0])}.{end}": tensor
            for group in groups_of(self.plan)
            for end, tensor in self.wrappers.encoded(group, values).items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the file's adapter tensors, by key."""
        if not self.wrappers:
            return {_own_key(e, n): shape for e in self.plan for n, shape in e.tensors.items()}
        return {
            f"{ROOT}{self.wrappers.site(group[0])}.{end}": shape
            for group in groups_of(self.plan)
            for end, shape in self.wrappers.shapes(group).items()
        }

    def values(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the module's adapter tensors by name, from the file's by key."""
        if not self.wrappers:
            return {name: tensors[_own_key(e, name)] for e in self.plan for name in e.tensors}
        found: dict[str, torch.Tensor] = {}
        for group in groups_of(self.plan):
            site = f"{ROOT}{self.wrappers.site(group[0])}."
            ends = self.wrappers.shapes(group)
            found |= self.wrappers.decoded(group, {end: tensors[site + end] for end in ends})
        return found

    def key(self, name: str) -> str:
        """Return the key of a parameter that is trained in full, or of a buffer."""
        return ROOT + (self.wrappers.inside(name) if self.wrappers else name)


def layout_of(module: CapturedModule, plan: Plan, pefts: bool) -> FileLayout:
    """Return the layout of a file with a plan's adapters: PEFT's (`pefts`) or fxlora's own."""
    return FileLayout(plan, Wrappers.of(module, plan) if pefts else None)


def _own_key(entry: Entry, name: str) -> str:
    """Return a tensor's key in fxlora's own layout: its name, without the name of the adapter."""
    return f"{ROOT}{name.removesuffix(f'.{entry.adapter}.weight')}.weight"
