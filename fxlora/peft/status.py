"""The status of a PeftModel and of its layers, with the fields of PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..disk.peft import LAYERS, is_bare
from ..module import CapturedModule
from ..plan import Entry

if TYPE_CHECKING:
    from .adapters import Adapters

Irregular = bool | Literal["irregular"]


@dataclass(frozen=True)
class LayerStatus:
    """The adapters of one weight.

    Attributes:
        name: the site of the weight, behind "model." as in PEFT.
        module_type: PEFT's name of its layer, "lora.Linear" or "lora.ParamWrapper"; the kind of its
            op behind "lora." where PEFT has no layer. "ModulesToSaveWrapper" for a module that
            trains in full.
        enabled: whether its active adapter is applied.
        active_adapters: the active adapters that the weight has.
        merged_adapters: those that are merged into the weight.
        requires_grad: whether A and B train, by adapter; "irregular" if only some do.
        available_adapters: the adapters that the weight has.
        devices: the kinds of device of A and B, by adapter.
        quantization_backend: None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass(frozen=True)
class ModelStatus:
    """The adapters of a model: what the statuses of its layers have in common.

    Attributes:
        base_model_type: the class of the source model.
        adapter_model_type: "LoraModel".
        peft_types: "LORA" for each adapter.
        trainable_params: the number of parameters that train.
        total_params: the number of parameters.
        num_adapter_layers: the number of weights that have adapters.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices,
            quantization_backend: as for a layer.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def layer_statuses(adapters: Adapters) -> list[LayerStatus]:
    """Return the status of every weight that has an adapter, then of modules trained in full."""
    tensors: dict[tuple[str, str], dict[str, list[torch.Tensor]]] = {}
    for name, module in adapters.modules.items():
        for place, held in _trained(module):
            tensors.setdefault(place, {}).setdefault(name, []).extend(held)
    return [
        LayerStatus(
            name=f"model.{site}",
            module_type=kind,
            enabled=adapters.enabled,
            active_adapters=[n for n in adapters.active if n in by_adapter],
            merged_adapters=[n for n in by_adapter if n in adapters.merged],
            requires_grad=_requires_grad(by_adapter),
            available_adapters=sorted(by_adapter),
            devices=_devices(by_adapter),
        )
        for (site, kind), by_adapter in sorted(tensors.items(), key=_saved_last)
    ]


def _trained(module: CapturedModule) -> Iterator[tuple[tuple[str, str], list[torch.Tensor]]]:
    """Yield the name and the type of each layer of PEFT's, with the tensors that train there."""
    plan = module.plan
    assert plan is not None
    for entry in plan:
        held: list[torch.Tensor] = [module.get_parameter(name) for name in entry.trainable]
        yield (entry.site, f"lora.{_kind(entry)}"), held
    for path in plan.modules_to_save:
        names = [name for name in plan.trained if name == path or name.startswith(f"{path}.")]
        yield (path, _SAVED), [module.get_parameter(name) for name in names]


def _saved_last(item: tuple[tuple[str, str], object]) -> bool:
    return item[0][1] == _SAVED


_SAVED = "ModulesToSaveWrapper"


def _kind(entry: Entry) -> str:
    """Return PEFT's name of the layer that adapts a weight, or the kind of its op."""
    if entry.op not in LAYERS:
        return entry.op
    if is_bare(entry):
        return "ParamWrapper"
    name = LAYERS[entry.op].rpartition(".")[2]
    return "Linear" if entry.op == "addmm" else name  # as PEFT wraps transformers' Conv1D


def model_status(adapters: Adapters, trainable: int, total: int) -> ModelStatus:
    """Return the status of the model.

    Args:
        adapters: its adapters.
        trainable: the number of parameters that train.
        total: the number of all parameters.
    """
    tensors = {
        name: [tensor for _, held in _trained(module) for tensor in held]
        for name, module in adapters.modules.items()
    }
    return ModelStatus(
        base_model_type=type(adapters.source).__name__,
        adapter_model_type="LoraModel",
        peft_types=dict.fromkeys(adapters.modules, "LORA"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layer_statuses(adapters)),
        enabled=adapters.enabled,
        active_adapters=list(adapters.active),
        merged_adapters=list(adapters.merged),
        requires_grad=_requires_grad(tensors),
        available_adapters=sorted(adapters.modules),
        devices=_devices(tensors),
    )


def _requires_grad(tensors: Mapping[str, Iterable[torch.Tensor]]) -> dict[str, Irregular]:
    found: dict[str, Irregular] = {}
    for name, held in tensors.items():
        flags = {tensor.requires_grad for tensor in held}
        found[name] = flags.pop() if len(flags) == 1 else "irregular"
    return found


def _devices(tensors: Mapping[str, Iterable[torch.Tensor]]) -> dict[str, list[str]]:
    return {name: sorted({t.device.type for t in held}) for name, held in tensors.items()}
