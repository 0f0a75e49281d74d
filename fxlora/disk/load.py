"""load_adapter: load an adapter folder, fxlora's or PEFT's, onto a captured module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..api import inject
from ..data import as_path
from ..errors import AdapterError, ConfigError, InjectError, MisfitError, UnsupportedOpError, warn
from ..lora.dtypes import dtype_rule
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.sharded import write
from ..names import ADAPTER_RULE, is_adapter, shown
from ..passes import Remove, chosen
from ..passes.inject import with_dtypes
from ..tables import some
from .as_lora import as_lora, check_method
from .folder import Folder, plan_from_header, read_folder
from .foreign.format import check_no_effect, checked_options
from .foreign.plans import read_foreign
from .foreign.tensors import foreign_file
from .limits import why_not
from .own_folder import counted, misfits, read_own
from .peft import ROOT
from .peft_checks import check_config
from .peft_folder import read_peft
from .peft_tensors import PeftTensors
from .reading import Reading
from .renaming import with_names
from .saved import Saved
from .tied_pairs import by_layer
from .trained_over import check_base
from .values import fitted, tensor_of


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
    key_mapping: Mapping[str, str] | None = None,
    as_formula: bool = False,
    strict_base: bool = False,
) -> CapturedModule:
    """Return a new module: the captured one with a saved adapter, from fxlora, PEFT or another.

    Files of kohya and LyCORIS, diffusers, loralib and torchtune are recognised by their keys: the
    guide "Adapters of other libraries" says what is read.

    With the same base weights, it equals the saved module bit for bit. The adapter has the dtype
    that it was saved for: by default float32, or the weight's dtype if that is wider. A folder from
    PEFT computes what PEFT trained, or is refused with the reason.

    Args:
        module: a captured module; it is not changed. Adapters that it has stay as they are.
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
        key_mapping: regular expressions and their replacements for names in the file (keys without
            `base_model.model.`), as in PEFT and transformers: the first that is found in a name
            counts. Layers that get the name of one fused weight become its parts, in the order of
            the expressions. Without it, names with other beginnings than the module's are
            recognised if exactly one way fits all tensors.
        as_formula: read a folder from PEFT as W0 + s·BA at every read of a weight, also where PEFT
            computes something else from it.
        strict_base: whether to raise if the module's weights are not known to be those that the
            adapter was trained over, by fingerprints that fxlora saves. PEFT saves none.

    Returns:
        The adapted module, with the values of the file.

    Warns:
        FxLoraWarning: the adapter was trained over another base; names of the file are read as
            others; tensors of the file have no effect, or change more than adapters do; values of
            the file are rounded to the module's dtypes; or, with `as_formula`, PEFT computes
            another result.

    Raises:
        NotCapturedError: the module is not a captured one.
        AdapterError: the folder or file is missing, damaged, not for LoRA, of no known format, does
            not hold what it should, or does not fit the module (names the keys); PEFT computes
            another result from it (says why); or, with `strict_base`, it was trained over another
            base.
        ConfigError: adapter_name cannot be the name of an adapter, adapter_dtype is no dtype in
            which an adapter can be trained, key_mapping is no mapping of regular expressions, or
            an argument has no effect on this adapter.

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
    if not is_adapter(adapter_name):
        raise ConfigError(f"adapter_name must be {ADAPTER_RULE}, not {shown(adapter_name)}.")
    if adapter_name in module.known.adapters:
        raise AdapterError(
            f"the module has an adapter {shown(adapter_name)} already: give another adapter_name, "
            "or fold or remove that one first."
        )
    beside, module = module, Remove()(module) if module.known.adapters else module
    rule = None if adapter_dtype is None else dtype_rule(adapter_dtype, "adapter_dtype")
    path = as_path(folder, AdapterError)
    options = checked_options(lora_alpha, use_rslora, enable_lora, component)
    if (file := foreign_file(path)) is not None:
        if key_mapping is not None:
            raise ConfigError(f"key_mapping has no effect on {file}: it is for PEFT's keys.")
        content = Folder(file, {}, None, {})
        foreign = read_foreign(module, file, adapter_name, options)
        plan = counted(module, foreign.plan)
        reading = Reading(plan, foreign.starts, foreign.stored, tuple(foreign.notes))
    else:
        check_no_effect(options)
        content = read_folder(path.parent if path.is_file() else path)
        fits, names = _misfits(module, content), _names_in(content)
        content = with_names(module, content, key_mapping, fits, names)
        if content.header is not None:
            reading = read_own(module, content, adapter_name)
        else:
            reading = read_peft(module, as_lora(module, content), adapter_name)
            _check_as_peft(module, reading, content, as_formula)
    plan = reading.plan if rule is None else reading.plan.with_adapter_dtype(rule)
    reading = reading.with_plan(with_dtypes(module, plan))
    result = _applied(module, beside, reading, content.path, allow_nonfinite)
    check_base(chosen(result, adapter_name) if beside.plan else result, content, strict_base)
    return result


def _misfits(module: CapturedModule, content: Folder) -> Callable[[Folder], Sequence[str]]:
    """Return a function that gives the names in a folder that do not fit the module."""
    if content.header is None:
        check_method(content)
        check_config(as_lora(module, content))
        return lambda folder: PeftTensors.of(module, as_lora(module, folder)).misfits(module)
    plan, _ = plan_from_header(content.header, content.path, "default")
    return lambda folder: misfits(module, plan, folder.names)


def _names_in(content: Folder) -> set[str]:
    """Return all names in a folder: those of its tensors, and those that its plan adapts."""
    names = {key.removeprefix(ROOT) for key in content.tensors}
    if content.header is not None:
        plan, _ = plan_from_header(content.header, content.path, "default")
        names |= {name for entry in plan for name in (*entry.names, *entry.tied)} | {*plan.trained}
    return names


def _check_as_peft(
    module: CapturedModule, reading: Reading, content: Folder, as_formula: bool
) -> None:
    """Raise if PEFT computes another result from its own folder, or warn if the user knows."""
    plan = by_layer(module, reading)
    why = why_not(module, plan, Saved.of(module, plan), from_peft=content.config["peft_type"])
    if why is None:
        return
    said = f"PEFT computes another result from {content.path} than W0 + s·BA: {why}."
    if not as_formula:
        raise AdapterError(
            f"{said} To read it by the formula anyway, at every read of the weight: "
            "load_adapter(…, as_formula=True)."
        )
    warn(f"{said} Here every read of the weight is adapted.")


def _applied(
    base: CapturedModule,
    module: CapturedModule,
    reading: Reading,
    path: Path,
    allow_nonfinite: bool,
) -> CapturedModule:
    """Return a module over a base with the plan and the values of a file."""
    for note in reading.notes:
        warn(f"{path}: {note}")
    changed = [name for name in reading.stored if name not in reading.plan.trained]
    if changed and module.known.active:
        raise AdapterError(
            f"{path} has values of {some(changed)} with which its adapter was trained, and a graph "
            "has only one for all active adapters: load it onto activate(module, [])."
        )
    starts, stored = fitted(base, reading, path, allow_nonfinite)
    try:
        result = inject(module, reading.plan, starts=starts)
    except MisfitError as error:
        raise AdapterError(
            f"{path} does not fit the module: {error.reason} Load it onto one captured "
            "from the model that it was trained on, with its ties."
        ) from error
    except (ConfigError, InjectError, UnsupportedOpError) as error:
        raise AdapterError(f"{path} does not fit the module: {error}") from error
    with torch.no_grad():
        for name, value in stored.items():
            write(tensor_of(result, name), value)
    return result
