"""get_peft_model: a model and a configuration become a PeftModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import LoraConfig
from ..errors import ConfigError
from ..module.blocks.chosen import Modules
from ..module.example_calls import Call, MethodCalls
from .adapters import Adapters
from .making import add, as_config, captured, name_of
from .model import PeftModel
from .running import host_of


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    *args: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    calls: Sequence[Call] | None = None,
    methods: Mapping[str, MethodCalls] | None = None,
    dynamic_shapes: Any = None,
    modules: Modules | None = None,
    **kwargs: Any,
) -> Any:
    """Return a copy of a model with adapters: an instance of its class, with PeftModel's methods.

    The model itself stays as it is. The copy shares its frozen weights, and runs the graph captured
    on the example (see `fxlora.hosted`): `generate`, `config` and training loops work as on it.

    Args:
        model: any nn.Module.
        peft_config: a LoraConfig, or PEFT's.
        args: example inputs, as the model is called with.
        adapter_name: the adapter's name.
        mixed: only False.
        autocast_adapter_dtype: False holds A and B in the dtype of their weight.
        revision: `LoraConfig.revision`.
        low_cpu_mem_usage: only False.
        calls, methods, dynamic_shapes, modules: further examples, as for `fxlora.capture`.
        kwargs: example inputs by name.

    Returns:
        The model with one adapter, which is active and trains.

    Raises:
        CaptureError: the model has no graph.
        NoMatchError, UnsupportedOpError, ConfigError: as for `fxlora.match`; or an option that
            fxlora does not have.
        InjectError: the model cannot be hosted.

    Example:
        >>> import torch
        >>> from fxlora.peft import LoraConfig, get_peft_model
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]), x)
        >>> model.print_trainable_parameters()
        trainable params: 20 || all params: 48 || trainable%: 41.6667
        >>> type(model).__name__, model.merge_and_unload()(x).shape
        ('Sequential', torch.Size([3, 4]))
    """
    if mixed or low_cpu_mem_usage:
        raise ConfigError("mixed and low_cpu_mem_usage are not supported: leave them out.")
    options: dict[str, Any] = {"calls": calls, "methods": methods, "modules": modules}
    options |= {"dynamic_shapes": dynamic_shapes, "call": "get_peft_model(model, config"}
    base = captured(model, args, kwargs, **options)
    adapters = Adapters(model, base)
    config = as_config(peft_config)
    described = {"revision": revision, "base_model_name_or_path": name_of(model)}
    config = dataclasses.replace(config, **{k: v for k, v in described.items() if v is not None})
    add(adapters, adapter_name, config, autocast_adapter_dtype)
    return host_of(adapters, PeftModel)
