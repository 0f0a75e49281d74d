"""load_adapter: an adapter folder, fxlora's or PEFT's, onto a captured module."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..api import inject
from ..data import as_path
from ..errors import AdapterError, ConfigError, InjectError, MisfitError
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..names import ADAPTER_RULE, is_adapter, shown
from ..plan import Plan
from ..tables import some
from .folder import Folder, check_config, plan_from_header, plan_from_peft, read_folder
from .keys import FileLayout, layout_of
from .peft import ROOT
from .values import same, tensor_of, values_of


@no_ambient_modes()
def load_adapter(
    module: CapturedModule, folder: str | Path, *, adapter_name: str = "default"
) -> CapturedModule:
    """A new module: the captured one with a saved adapter, fxlora's or PEFT's.

    With the same base it is bit for bit the module that was saved.

    Raises:
        AdapterError: the folder is missing, damaged or foreign, or does not fit the module;
            names the keys.
    """
    if not isinstance(module, CapturedModule):
        raise AdapterError("load_adapter takes a captured module: fxlora.capture(model, args).")
    if module.plan is not None:
        raise AdapterError("the module has adapters already: fold or remove them first.")
    if not is_adapter(adapter_name):
        raise ConfigError(f"adapter_name must be {ADAPTER_RULE}, not {shown(adapter_name)}.")
    content = read_folder(as_path(folder, AdapterError))
    if content.header is not None:
        plan, pefts = plan_from_header(content.header, content.path, adapter_name)
        held = plan
    else:
        plan, pefts = plan_from_peft(module, content, adapter_name), True
        held = _as_peft_has(plan)
    _check_weights(module, plan, content)
    layout = layout_of(module, held, pefts)
    _check_tensors(module, layout, content)
    if content.header is not None:
        plan = _counted(module, plan)
        check_config(module, plan, content)
    starts, stored = values_of(module, layout, content)
    try:
        result = inject(module, plan, starts=starts)
    except MisfitError as error:
        raise AdapterError(
            f"{content.path} does not fit the module: {error.reason} Load it onto one captured "
            "from the model that it was trained on, with its ties."
        ) from error
    except (ConfigError, InjectError) as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error
    with torch.no_grad():
        for name, value in stored.items():
            tensor_of(result, name).copy_(value)
    return result


def _counted(module: CapturedModule, plan: Plan) -> Plan:
    """The plan with the counts of this module: a file's are no matter of faith."""
    sizes = {name: p.numel() for name, p in module.named_parameters(remove_duplicate=False)}
    return dataclasses.replace(
        plan,
        model_parameters=sum(p.numel() for p in module.parameters()),
        trained_parameters=sum(sizes[name] for name in plan.trained),
    )


def _as_peft_has(plan: Plan) -> Plan:
    """The plan of the pairs in PEFT's file: what they start from it leaves to the weight."""
    entries = tuple(
        dataclasses.replace(e, variants=tuple(v for v in e.variants if v != "from_weight"))
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)


def _check_weights(module: CapturedModule, plan: Plan, content: Folder) -> None:
    """Raise unless all that the plan names is the module's, and what the plan says of it holds."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    needed = [name for e in plan for name in (*e.names, *e.tied)] + list(plan.trained)
    missing = [name for name in dict.fromkeys(needed) if name not in parameters]
    held = {*parameters, *(path for path, _ in module.named_modules(remove_duplicate=False))}
    missing += [name for name in plan.modules_to_save if name not in held]
    if missing:
        raise AdapterError(
            f"{content.path} does not fit the module; the module has no {some(missing)}."
        )
    shapes = {e.parameter: e.shape for e in plan if e.shape != tuple(parameters[e.parameter].shape)}
    if shapes:
        raise AdapterError(
            f"{content.path} does not fit the module; it was made for "
            f"{some(f'{name} {shape}' for name, shape in shapes.items())}."
        )


def _check_tensors(module: CapturedModule, layout: FileLayout, content: Folder) -> None:
    """Raise unless the file's keys and shapes are the plan's and the module's."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    plan = layout.plan
    expected = layout.shapes()
    expected |= {layout.key(name): tuple(parameters[name].shape) for name in plan.trained}
    buffers = {layout.key(n): tuple(b.shape) for n, b in module.named_buffers()}
    allowed = {**buffers, **expected}
    # (PEFT saves the weights of embeddings with it, frozen or not)
    same = {layout.key(n) for n, p in parameters.items() if _same_there(content, layout.key(n), p)}
    extra = [key for key in content.tensors if key not in allowed and key not in same]
    problems = [
        ("missing in the file:", [key for key in expected if key not in content.tensors]),
        ("not what it trains:", extra),
        ("of another shape:", _misshapen(content.tensors, allowed)),
    ]
    said = [f"{what} {some(names)}" for what, names in problems if names]
    if tied := _of_other_names(plan, extra):
        said.append(
            f"it has a pair for each name of the tied weight '{tied}', and fxlora one for all"
        )
    if said:
        raise AdapterError(f"{content.path} does not fit the module; {'; '.join(said)}.")


def _same_there(content: Folder, key: str, parameter: torch.Tensor) -> bool:
    found = content.tensors.get(key)
    return found is not None and same(parameter.detach().cpu(), found.to(parameter.dtype))


def _of_other_names(plan: Plan, keys: list[str]) -> str | None:
    """The tied weight that pairs in the file belong to, under a name that its entry has too."""
    for entry in plan:
        owners = [ROOT + name.rpartition(".")[0] for name in entry.names[1:]]
        if any(key.startswith(f"{owner}.lora_") for key in keys for owner in owners):
            return entry.parameter
    return None


def _misshapen(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{key} ({tuple(tensor.shape)} in the file, {shapes[key]} here)"
        for key, tensor in tensors.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
