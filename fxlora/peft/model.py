"""PeftModel: the user's model with adapters, with the methods that PEFT's has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..arithmetic.combine import combine
from ..config import LoraConfig
from ..data import as_path
from ..disk.save import save_adapter
from ..errors import AdapterError, ConfigError, warn
from ..module import CapturedModule
from ..module.blocks.chosen import Modules
from ..module.example_calls import Call, MethodCalls
from ..names import shown
from ..tables import some
from .adapters import Adapters, set_trained
from .making import add, as_config, captured, check_left_out, load
from .running import RunningModule, host_of, listed
from .status import LayerStatus, ModelStatus, layer_statuses, model_status


class PeftModel(RunningModule):
    """The methods that `get_peft_model` and `from_pretrained` add to a host of the user's model.

    A model may hold several adapters over the same weights, of which one is active.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "PeftModel(…) makes no model: call get_peft_model(model, config, *example), or "
            "PeftModel.from_pretrained(model, folder, *example)."
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        *args: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        torch_device: str | None = None,
        calls: Sequence[Call] | None = None,
        methods: Mapping[str, MethodCalls] | None = None,
        dynamic_shapes: Any = None,
        modules: Modules | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a copy of a model with an adapter from a folder, of fxlora or PEFT.

        Args:
            model: the base model, which stays as it is.
            model_id: the adapter folder.
            args: example inputs, as the model is called with.
            adapter_name: the adapter's name.
            is_trainable: whether it trains; if not, the model is in eval mode.
            config, ephemeral_gpu_offload, torch_device: only the defaults: the configuration is the
                folder's, the device that of the weights.
            autocast_adapter_dtype: False holds A and B in the dtype of their weight.
            low_cpu_mem_usage: without effect: nothing large is copied.
            key_mapping: names in the folder for other ones, as for `fxlora.load_adapter`.
            calls, methods, dynamic_shapes, modules: further examples, as for `fxlora.capture`.
            kwargs: example inputs by name.

        Raises:
            CaptureError: the model has no graph.
            AdapterError, ConfigError: as for `fxlora.load_adapter`; or an option that fxlora does
                not have.
        """
        refused = {"config": config, "torch_device": torch_device}
        check_left_out("from_pretrained", ephemeral_gpu_offload=ephemeral_gpu_offload, **refused)
        options: dict[str, Any] = {"calls": calls, "methods": methods, "modules": modules}
        call = f"{cls.__name__}.from_pretrained(model, folder"
        options |= {"dynamic_shapes": dynamic_shapes, "call": call}
        base = captured(model, args, kwargs, **options)
        adapters = Adapters(model, base)
        load(adapters, model_id, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping)
        result = host_of(adapters, PeftModel)
        return result if is_trainable else result.eval()

    # ---- adapters --------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configurations of the adapters, by name."""
        return dict(self._peft.configs)

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the first active adapter."""
        return self._peft.configs[self._peft.active[0]]

    @property
    def peft_type(self) -> str:
        """The kind of all adapters."""
        return "LORA"

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, which `set_adapter` can make active."""
        if low_cpu_mem_usage:
            raise ConfigError("low_cpu_mem_usage is not supported here: leave it out.")
        add(self._peft, adapter_name, as_config(peft_config), autocast_adapter_dtype)
        set_trained(self._peft.modules[adapter_name], False)
        self._run()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Add an adapter from a folder, which `set_adapter` can make active.

        Unless it is trainable, the model is set to eval mode, as in PEFT. `torch_device`,
        `ephemeral_gpu_offload` and other options of PEFT's are refused by name.
        """
        refused = {"torch_device": torch_device, "ephemeral_gpu_offload": ephemeral_gpu_offload}
        check_left_out("load_adapter", **refused, **options)
        load(self._peft, model_id, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping)
        self._run()
        if not is_trainable:
            self.eval()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, whose sum runs.

        They train unless `inference_mode`; others do not.

        Raises:
            ConfigError: there is none of such a name.
            InjectError: the adapters have no sum, as two heads that are trained in full.
        """
        names = list(dict.fromkeys(listed("set_adapter", adapter_name)))
        self._peft.with_active(names)
        self._peft.merged = ()
        self._peft.active = tuple(names)
        self._peft.train_only(names, not inference_mode)
        self._run()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if only it was active, the first of the others is then.

        Raises:
            ConfigError: there is none of this name, or no other, or it is merged.
        """
        self._peft.check_known(adapter_name)
        if adapter_name in self._peft.merged:
            raise ConfigError(f"{shown(adapter_name)} is merged: call unmerge_adapter() first.")
        if len(self._peft.modules) == 1:
            raise ConfigError(
                f"{shown(adapter_name)} is the only adapter: unload() gives the base."
            )
        left = [name for name in self.active_adapters if name != adapter_name]
        was_active = left != self.active_adapters
        self._peft.remove(adapter_name)
        if not left:
            left = [next(iter(self._peft.modules))]
            warn(f"{shown(adapter_name)} was active; now {shown(left[0])} is.")
        if was_active:
            self.set_adapter(left)
        else:
            self._run()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Set whether adapters train."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._peft.check_known(name)
            set_trained(self._peft.modules[name], requires_grad)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter made of others, which does not train; see `fxlora.combine`.

        `svd_full_matrices` does not change the result.

        Warns:
            FxLoraWarning: it has a module with the values that trained in full; PEFT's has the
                base's.
        """
        self._peft.check_new(adapter_name)
        for name in adapters:
            self._peft.check_known(name)
        if svd_driver is not None:
            raise ConfigError(f"svd_driver={shown(svd_driver)} is not supported: leave it out.")
        combined = combine(
            [self._peft.modules[name] for name in adapters],
            weights,
            combination_type,
            adapter_name=adapter_name,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            density=density,
            majority_sign_method=majority_sign_method,
        )
        configs = [self._peft.configs[name] for name in adapters]
        assert combined.plan is not None
        if saved := combined.plan.modules_to_save:
            warn(
                f"{shown(adapter_name)} has the trained values of {some(saved)}, which trains in "
                "full in one of the adapters; PEFT's new adapter has the base's."
            )
        r = max((entry.r for entry in combined.plan), default=configs[0].r)
        config = dataclasses.replace(
            configs[0],
            r=r,
            lora_alpha=r,
            rank_pattern={},
            alpha_pattern={},
            target_modules=[entry.site for entry in combined.plan],
        )
        set_trained(combined, False)
        self._peft.add(adapter_name, combined, config)
        self._run()

    # ---- files and numbers -----------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Save the adapters: "default" to the folder, the others to subfolders of their names.

        A training loop of transformers, which gives a `state_dict`, gets a checkpoint of the active
        adapter to resume from, as from a host.

        Args:
            save_directory: the folder.
            safe_serialization: only True: fxlora writes no pickles.
            selected_adapters: the adapters to save; None saves all.
            save_embedding_layers: "auto" or False: embeddings are saved if they train.
            is_main_process: whether to write.
            options: only `state_dict`.

        Raises:
            ConfigError: an option that fxlora does not have, or an adapter that there is not.
            AdapterError: as for `fxlora.save_adapter`.
        """
        if "state_dict" in options:
            options["safe_serialization"] = safe_serialization
            return super().save_pretrained(
                save_directory, is_main_process=is_main_process, **options
            )
        options |= {"safe_serialization=False": not safe_serialization}
        options |= {"save_embedding_layers=True": save_embedding_layers is True}
        if given := [name for name, value in options.items() if value]:
            raise ConfigError(f"save_pretrained does not support {some(given)}: leave it out.")
        for name in self._peft.modules if selected_adapters is None else selected_adapters:
            self._peft.check_known(name)
            folder = as_path(save_directory, AdapterError)
            if is_main_process:
                module = self._peft.modules[name]
                save_adapter(module, folder if name == "default" else folder / name)
        return None

    @property
    def captured_module(self) -> CapturedModule:
        """The captured module that runs, which fxlora's functions take: `fxlora.verify(…)`, …"""
        return self._captured

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of parameters that train, and of all with those of all adapters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of parameters, as PEFT does."""
        trainable, every = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || "
            f"trainable%: {100 * trainable / every:.4f}"
        )

    def get_layer_status(self) -> list[LayerStatus]:
        """Return the status of every weight that has an adapter."""
        return layer_statuses(self._peft)

    def get_model_status(self) -> ModelStatus:
        """Return the status of the model's adapters."""
        return model_status(self._peft, *self.get_nb_trainable_parameters())
