"""Read a folder that fxlora wrote: its header holds the plan, which its tensors must fit."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import AdapterError, ConfigError
from ..module import CapturedModule
from ..module.sharded import whole
from ..plan import Plan
from ..tables import some
from .folder import Folder, Names, check_config, descriptions_in, plan_from_header
from .keys import FileLayout, layout_of
from .peft import ROOT
from .reading import Reading
from .renaming import advice
from .saved import trained_names
from .values import same


def read_own(module: CapturedModule, content: Folder, adapter_name: str) -> Reading:
    """Return what a folder with a header says about a module.

    Raises:
        AdapterError: the header is damaged, contradicts the configuration, or does not fit.
    """
    assert content.header is not None
    plan, pefts = plan_from_header(content.header, content.path, adapter_name)
    if content.names:
        content = _with_keys(content)
        plan = renamed(plan, content.names)
    _check_weights(module, plan, content)
    layout = layout_of(module, plan, pefts)
    _check_tensors(module, layout, content)
    plan = dataclasses.replace(counted(module, plan), descriptions=descriptions_in(content))
    if not content.names:
        check_config(module, plan, content)
    own = [name for name, _ in module.named_buffers()] + list(plan.trained)
    keys = {name: layout.key(name) for name in own}
    stored = {n: content.tensors[key] for n, key in keys.items() if key in content.tensors}
    return Reading(plan, layout.values(content.tensors), stored)


def misfits(module: CapturedModule, plan: Plan, names: Names) -> list[str]:
    """Return the names in a plan that find no parameter in a module, or one of another shape."""
    held = dict(module.named_parameters(remove_duplicate=False))
    wanted = {name: entry.shape for entry in plan for name in (*entry.names, *entry.tied)}
    found = {name: held.get(names(name)) for name in (*wanted, *plan.trained)}
    return [
        name
        for name, weight in found.items()
        if weight is None or wanted.get(name, weight.shape) != weight.shape
    ]


def renamed(plan: Plan, names: Names) -> Plan:
    """Return a plan with other names for what it adapts and trains.

    Raises:
        AdapterError: these are no valid names.
    """

    def several(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(names, given))

    try:
        entries = tuple(
            dataclasses.replace(
                e,
                site=names(e.site),
                parameter=names(e.parameter),
                names=several(e.names),
                tied=several(e.tied),
            )
            for e in plan
        )
        return dataclasses.replace(
            plan,
            entries=entries,
            trained=several(plan.trained),
            modules_to_save=several(plan.modules_to_save),
            trained_dtypes={names(n): rule for n, rule in plan.trained_dtypes.items()},
            untied={names(n): several(others) for n, others in plan.untied.items()},
        )
    except ConfigError as error:
        raise AdapterError(f"key_mapping: {error}") from error


def _with_keys(content: Folder) -> Folder:
    """Return a folder with its tensors under the module's names."""
    keys = {key: ROOT + content.names(key.removeprefix(ROOT)) for key in content.tensors}
    if len(set(keys.values())) < len(keys):
        raise AdapterError(
            f"{content.path}: key_mapping gives several tensors one name. Layers become parts of a "
            "fused weight in folders from PEFT only."
        )
    return dataclasses.replace(
        content, tensors={keys[key]: tensor for key, tensor in content.tensors.items()}
    )


def counted(module: CapturedModule, plan: Plan) -> Plan:
    """Return the plan with this module's numbers of parameters: those in a file may be wrong."""
    sizes = {name: p.numel() for name, p in module.named_parameters(remove_duplicate=False)}
    return dataclasses.replace(
        plan,
        model_parameters=sum(p.numel() for p in module.parameters()),
        trained_parameters=sum(sizes[name] for name in plan.trained),
    )


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
            + advice(module, missing)
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
    # For PEFT, the file also has frozen tensors of modules that train, and other names of ties.
    same = {layout.key(n) for n, p in parameters.items() if _same_there(content, layout.key(n), p)}
    same |= _other_names(module, layout, content)
    extra = [key for key in content.tensors if key not in allowed and key not in same]
    problems = [
        ("missing in the file:", [key for key in expected if key not in content.tensors]),
        ("unexpected in the file:", extra),
        ("of another shape:", misshapen(content.tensors, allowed)),
    ]
    if said := [f"{what} {some(names)}" for what, names in problems if names]:
        raise AdapterError(f"{content.path} does not fit the module; {'; '.join(said)}.")


def _same_there(content: Folder, key: str, parameter: torch.Tensor) -> bool:
    """Whether the file holds, under this key, the present values of a parameter."""
    found = content.tensors.get(key)
    return found is not None and same(whole(parameter.detach()).cpu(), found.to(parameter.dtype))


def _other_names(module: CapturedModule, layout: FileLayout, content: Folder) -> set[str]:
    """Return the keys under which the file repeats a trained parameter: its other names."""
    found: set[str] = set()
    for name, names in trained_names(module, layout.plan).items():
        value = content.tensors.get(layout.key(name))
        keys = [layout.key(alias) for alias in names if alias != name]
        found |= {key for key in keys if value is not None and _equal(content, key, value)}
    return found


def _equal(content: Folder, key: str, value: torch.Tensor) -> bool:
    other = content.tensors.get(key)
    return other is not None and same(other, value)


def misshapen(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Describe the tensors of a file that do not have the expected shapes."""
    return [
        f"{key} ({tuple(tensor.shape)} in the file, {shapes[key]} here)"
        for key, tensor in tensors.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
