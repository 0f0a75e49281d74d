"""fold_into: write folded weights into given tensors, as loops that push weights to a server do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, InjectError
from ..lora.dtypes import DTYPES, correctly_rounded
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.folded_weight import folded_weight
from ..module.memory import overlapping
from ..module.quantised import dequantised, is_quantised
from ..module.sharded import is_sharded, whole, write
from ..module.shared_parameter import own
from ..names import shown
from ..passes.fold_constants import check_finite, overflows
from ..plan import Entry, Plan
from ..tables import a, some


@no_ambient_modes()
def fold_into(
    module: CapturedModule, target: Mapping[str, torch.Tensor], *, allow_nonfinite: bool = False
) -> tuple[str, ...]:
    """Write the weights that `fold` would give into given tensors; the module stays as it is.

    An adapted weight is summed in float64, a block at a time, and rounded once, to the dtype of its
    target. It is computed from W0 each time, so that many calls do not drift. Other names get the
    module's values.

    Args:
        module: an adapted module.
        target: tensors by their names in the source's `state_dict()`, on any device, in any
            floating dtype for weights. It needs all weights that training changes (for a tie, one
            name), and may have others.
        allow_nonfinite: whether the values may be NaN or infinite.

    Returns:
        The names of the tensors that training changes. The next calls need only these.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: it has no adapters; or it, or a weight in its target's dtype, has NaN or
            infinities.
        ConfigError: the target lacks a weight, or has a tensor that is not the module's, of another
            shape, without values, or in memory of the module or of a tensor with other values.

    Example:
        >>> import torch, fxlora
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        >>> lora = fxlora.adapt(model, x, rules=config)
        >>> server = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> fxlora.fold_into(lora, server.state_dict())
        ('0.weight',)
        >>> torch.allclose(server(x), lora(x), atol=1e-6)
        True
    """
    check_captured(module, "fold_into")
    if module.plan is None:
        raise InjectError("nothing to fold: the module has no adapters.")
    if not allow_nonfinite:
        check_finite(module)
    entries = _entries_by_name(module.plan)
    values = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers()),
    }
    values = {n: v.detach() for n, v in values.items() if n not in module.adapter_parameters()}
    values = {n: v if n not in target else dequantised(v) for n, v in values.items()}
    _check_names(module, target, entries, values)
    _check_memory(target, entries, values)
    for name, tensor in target.items():
        own(tensor)  # it may be a captured weight, in the memory of the user's model
        with torch.inference_mode() if tensor.is_inference() else nullcontext():
            _write(
                module, name, tensor.detach(), values[name], entries.get(name, []), allow_nonfinite
            )
    changed = {*entries, *module.trained, *module.known.originals}
    return tuple(name for name in target if name in changed)


_DISPATCH = "__torch_dispatch__"  # of subclasses that hold values elsewhere
_TOO_NARROW = (
    "the dtype of its target, which has been written to. Train again with a smaller learning rate, "
    "or give a target in a wider dtype."
)


def _entries_by_name(plan: Plan) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in plan:
        for name in entry.names:
            found.setdefault(name, []).append(entry)
    return found


@torch.no_grad()
def _write(
    module: CapturedModule,
    name: str,
    tensor: torch.Tensor,
    value: torch.Tensor,
    entries: list[Entry],
    allow_nonfinite: bool,
) -> None:
    """Write one value, with the entries of it folded in."""
    if not entries:
        value = whole(value)
        if value.dtype == torch.float64 and tensor.dtype != value.dtype:
            folded = correctly_rounded(value, tensor.dtype)
        else:
            folded = value.to(tensor.dtype)
        if value.is_floating_point() and not allow_nonfinite and overflows(folded, value):
            raise InjectError(f"'{name}' is not finite in {tensor.dtype}, {_TOO_NARROW}")
        write(tensor, folded.to(tensor.device))
        return
    held = {n: module.get_parameter(n).detach() for e in entries for n in e.tensors}
    if is_sharded(value) or is_sharded(tensor):
        value = whole(value)
        folded = torch.empty(value.shape, dtype=tensor.dtype, device=value.device)
        folded_weight(entries, value, {n: whole(t) for n, t in held.items()}, folded)
        write(tensor, folded)
    else:
        folded = folded_weight(entries, value, held, tensor)
    if not allow_nonfinite and overflows(folded, value.to(folded.device)):
        raise InjectError(
            f"'{entries[0].site}': W0 + s·BA is not finite in {tensor.dtype}, {_TOO_NARROW}"
        )


# ---- checks -------------------------------------------------------------------------------------


def _check_names(
    module: CapturedModule,
    target: Any,
    entries: Mapping[str, list[Entry]],
    values: Mapping[str, torch.Tensor],
) -> None:
    """Raise ConfigError unless the target has all changed weights, and nothing unknown."""
    tensors = isinstance(target, Mapping) and all(
        isinstance(tensor, torch.Tensor) for tensor in target.values()
    )
    if not tensors:
        raise ConfigError(f"fold_into takes tensors by name (a state_dict), not {shown(target)}.")
    if unknown := [name for name in target if name not in values]:
        raise ConfigError(f"the target has {some(map(str, unknown))}, which the module has not.")
    groups = [entry.names for named in entries.values() for entry in named]
    groups += [module.aliases().get(name, (name,)) for name in module.trained]
    if missing := sorted({names[0] for names in groups if not target.keys() & set(names)}):
        raise ConfigError(
            f"the target has no {some(missing)}, which training changes: the rest would not be the "
            "trained model."
        )
    for name, tensor in target.items():
        if why := _unwritable(tensor) or _unlike(tensor, values[name], name in entries):
            raise ConfigError(f"the target's '{name}' {why}.")
    for name in entries:
        if len({id(module.get_parameter(n)) for n in entries[name][0].names}) > 1:
            raise InjectError(f"'{name}' was tied when its adapter was injected, and is not now.")


def _unwritable(tensor: torch.Tensor) -> str | None:
    """Say why values cannot be written into a tensor, whatever they are."""
    if is_lazy(tensor):
        return "has no shape yet (a lazy module)"
    if is_quantised(tensor):
        return 'is quantised: give a plain tensor, or use fold(…, quantised="requantise")'
    if is_sharded(tensor):
        return None
    if getattr(type(tensor), _DISPATCH) is not getattr(torch.Tensor, _DISPATCH):
        return f"is {a(type(tensor).__name__)}, of whose memory nothing is known"
    if tensor.layout is not torch.strided:
        return f"is {tensor.layout}, not strided"
    if tensor.is_meta:
        return "has no memory (device 'meta')"
    steps = sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    last = 0  # the largest offset so far
    for step, size in steps if tensor.numel() else ():
        if step <= last:
            return "has several entries in one place (expand); give a clone of it"
        last += step * (size - 1)
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    if tensor.untyped_storage().nbytes() < needed:
        return "has no memory (it was freed)"
    return None


def _unlike(tensor: torch.Tensor, value: torch.Tensor, adapted: bool) -> str | None:
    """Say why a tensor cannot hold a value of the module."""
    if tensor.shape != value.shape:
        return f"is {tuple(tensor.shape)}, and {tuple(value.shape)} in the module"
    if value.is_meta:
        return "has no values in the module (device 'meta')"
    rounded = tensor.dtype in DTYPES.values() and value.is_floating_point()
    if not rounded and (adapted or tensor.dtype != value.dtype):
        return f"is {tensor.dtype}, to which no {value.dtype} is rounded"
    return None


def _check_memory(
    target: Mapping[str, torch.Tensor],
    entries: Mapping[str, list[Entry]],
    values: Mapping[str, torch.Tensor],
) -> None:
    """Raise ConfigError if a tensor of the target is in memory where it would change others."""
    given = {id(tensor): name for name, tensor in target.items()}
    mine = {id(value): name for name, value in values.items()}
    for group in overlapping([*target.values(), *values.values()]):
        names = [given[id(tensor)] for tensor in group if id(tensor) in given]
        if names and any(id(tensor) in mine for tensor in group):
            raise ConfigError(
                f"the target's {some(names)} is in memory of the module or of its source, which "
                "would change. Give tensors of their own (copy.deepcopy(model).state_dict())."
            )
        sources = {(values[n].data_ptr(), *(e.name_a for e in entries.get(n, []))) for n in names}
        if len(sources) > 1:
            raise ConfigError(
                f"{some(names)} are in one memory of the target, and fold to different values: "
                'a tie that the adapter splits (adapt all names of it alike, tied="share"), or '
                "views that lie between each other's entries, as columns of one tensor do (give "
                "rows of it, or tensors of their own)."
            )
