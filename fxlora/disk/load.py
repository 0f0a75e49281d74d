"""load_adapter: load an adapter folder, fxlora's or PEFT's, onto a captured module."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ..api import inject
from ..data import as_path
from ..errors import AdapterError, ConfigError, InjectError, MisfitError, UnsupportedOpError, warn
from ..lora.dtypes import dtype_rule
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.sharded import whole, write
from ..names import ADAPTER_RULE, is_adapter, shown
from ..passes.inject import with_dtypes
from ..plan import Plan
from ..tables import some
from .folder import (
    Folder,
    check_config,
    descriptions_in,
    plan_from_header,
    plan_from_peft,
    read_folder,
)
from .foreign.format import check_no_effect, checked_options
from .foreign.plans import Foreign, read_foreign
from .foreign.tensors import foreign_file
from .keys import FileLayout, layout_of
from .peft import ROOT, why_not
from .values import same, tensor_of, values_of


@no_ambient_modes()
def load_adapter(
    module: CapturedModule,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    adapter_dtype: bool | str | torch.dtype | None = None,
    lora_alpha: float | None = None,
    use_rslora: bool | None = None,
    enable_lora: Sequence[bool] | None = None,
    component: str | None = None,
    allow_nonfinite: bool = False,
) -> CapturedModule:
    """Return a new module: the captured one with a saved adapter, from fxlora, PEFT or another.

    Files of kohya and LyCORIS, diffusers, loralib and torchtune are recognised by their keys: the
    guide "Adapters of other libraries" says what is read.

    With the same base weights, it equals the saved module bit for bit. The adapter has the dtype
    that it was saved for: by default float32, or the weight's dtype if that is wider.

    Args:
        module: a captured module without adapters; it is not changed.
        folder: the adapter folder, or the file of another library.
        adapter_name: the adapter's name in the new module.
        adapter_dtype: the dtype of all adapters and of the parameters trained in full, instead of
            the folder's: True, False or a dtype, as in `LoraConfig.autocast_adapter_dtype`.
        lora_alpha, use_rslora: the alpha of a file that does not hold it (loralib, torchtune), and
            whether s is alpha / √r.
        enable_lora: which parts of loralib's MergedLinear layers have adapters.
        component: the model that the module is, in a file for several: the beginning of its
            layers' names, such as "unet" or "lora_te1". The others' layers are left out.
        allow_nonfinite: whether the file may have NaN or infinities.

    Returns:
        The adapted module, with the values of the file.

    Warns:
        FxLoraWarning: the folder is PEFT's, and PEFT computes another result from it; says why. Or
            values of the file are rounded to the module's dtypes; says which.

    Raises:
        NotCapturedError: the module is not a captured one.
        AdapterError: the folder or file is missing, damaged, not for LoRA, of no known format, does
            not hold what it should, or does not fit the module; names the keys.
        ConfigError: adapter_name cannot be the name of an adapter, or adapter_dtype is no dtype in
            which an adapter can be trained; or another argument has no effect on this adapter.

    Example:
        >>> import tempfile, torch, fxlora
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> gm = fxlora.capture(model, x)
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> folder = tempfile.mkdtemp()
        >>> fxlora.save_adapter(fxlora.inject(gm, fxlora.match(gm, config)), folder)
        >>> [name for name in fxlora.load_adapter(gm, folder).state_dict() if "lora" in name]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    check_captured(module, "load_adapter")
    if module.plan is not None:
        raise AdapterError("the module has adapters already: fold or remove them first.")
    if not is_adapter(adapter_name):
        raise ConfigError(f"adapter_name must be {ADAPTER_RULE}, not {shown(adapter_name)}.")
    rule = None if adapter_dtype is None else dtype_rule(adapter_dtype, "adapter_dtype")
    path = as_path(folder, AdapterError)
    options = checked_options(lora_alpha, use_rslora, enable_lora, component)
    if (file := foreign_file(path)) is not None:
        foreign = read_foreign(module, file, adapter_name, options)
        for note in foreign.notes:
            warn(f"{file}: {note}")
        plan = held = foreign.plan
        content = _as_ours(foreign, file)
        pefts = False
    else:
        check_no_effect(options)
        content = read_folder(path.parent if path.is_file() else path)
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
        plan = dataclasses.replace(_counted(module, plan), descriptions=descriptions_in(content))
        check_config(module, plan, content)
    plan = with_dtypes(module, plan if rule is None else plan.with_adapter_dtype(rule))
    starts, stored = values_of(module, plan, layout, content, allow_nonfinite)
    try:
        result = inject(module, plan, starts=starts)
    except MisfitError as error:
        raise AdapterError(
            f"{content.path} does not fit the module: {error.reason} Load it onto one captured "
            "from the model that it was trained on, with its ties."
        ) from error
    except (ConfigError, InjectError, UnsupportedOpError) as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error
    with torch.no_grad():
        for name, value in stored.items():
            write(tensor_of(result, name), value)
    if pefts and content.header is None and (why := why_not(result, plan)):
        warn(
            f"PEFT computes another result from {content.path}: {why}. Here every read of the "
            "weight is adapted."
        )
    return result


def _as_ours(foreign: Foreign, path: Path) -> Folder:
    """Return the content of another library's file as that of a folder in fxlora's own layout."""
    layout = FileLayout(foreign.plan, None)
    tensors = layout.adapters(foreign.starts)
    tensors |= {layout.key(name): value for name, value in foreign.stored.items()}
    return Folder(path, {}, None, tensors)


def _counted(module: CapturedModule, plan: Plan) -> Plan:
    """Return the plan with this module's numbers of parameters: those in a file may be wrong."""
    sizes = {name: p.numel() for name, p in module.named_parameters(remove_duplicate=False)}
    return dataclasses.replace(
        plan,
        model_parameters=sum(p.numel() for p in module.parameters()),
        trained_parameters=sum(sizes[name] for name in plan.trained),
    )


def _as_peft_has(plan: Plan) -> Plan:
    """Return the plan in the form of PEFT's file, which omits the initial pair of PiSSA and OLoRA.

    PEFT computes that pair again from the base weight.
    """
    entries = tuple(
        dataclasses.replace(e, variants=tuple(v for v in e.variants if v != "from_weight"))
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)


def _check_weights(module: CapturedModule, plan: Plan, content: Folder) -> None:
    """Raise unless the module has all that the plan names, with the weight shapes of the plan."""
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
    """Raise unless the file's keys and shapes are those that the plan and the module call for."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    plan = layout.plan
    expected = layout.shapes()
    expected |= {layout.key(name): tuple(parameters[name].shape) for name in plan.trained}
    buffers = {layout.key(n): tuple(b.shape) for n, b in module.named_buffers()}
    allowed = {**buffers, **expected}
    # PEFT may save the weights of embeddings with the adapter, frozen or not.
    same = {layout.key(n) for n, p in parameters.items() if _same_there(content, layout.key(n), p)}
    extra = [key for key in content.tensors if key not in allowed and key not in same]
    problems = [
        ("missing in the file:", [key for key in expected if key not in content.tensors]),
        ("unexpected in the file:", extra),
        ("of another shape:", _misshapen(content.tensors, allowed)),
    ]
    said = [f"{what} {some(names)}" for what, names in problems if names]
    if tied := _of_other_names(plan, extra):
        said.append(
            f"it has a pair for each name of the tied weight '{tied}', but fxlora has one for all"
        )
    if said:
        raise AdapterError(f"{content.path} does not fit the module; {'; '.join(said)}.")


def _same_there(content: Folder, key: str, parameter: torch.Tensor) -> bool:
    """Whether the file holds, under this key, the present values of a parameter."""
    found = content.tensors.get(key)
    return found is not None and same(whole(parameter.detach()).cpu(), found.to(parameter.dtype))


def _of_other_names(plan: Plan, keys: list[str]) -> str | None:
    """Return the tied weight that has a pair under another of its names in the file, or None."""
    for entry in plan:
        owners = [ROOT + name.rpartition(".")[0] for name in entry.names[1:]]
        if any(key.startswith(f"{owner}.lora_") for key in keys for owner in owners):
            return entry.parameter
    return None


def _misshapen(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Describe the tensors of the file that do not have the expected shapes."""
    return [
        f"{key} ({tuple(tensor.shape)} in the file, {shapes[key]} here)"
        for key, tensor in tensors.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
