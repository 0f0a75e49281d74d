"""merged: the source's own model with folded weights, for tools that want the model itself."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from ..errors import InjectError, warn
from ..module import CapturedModule, check_captured
from ..module.compiled import uncompiled
from ..module.quantised import is_quantised, with_parts
from ..module.sharded import whole
from ..tables import some
from .host import Host

Model = TypeVar("Model", bound=nn.Module)


def merged(model: Model, folded: CapturedModule) -> Model:
    """Return a copy of the user's own model (its class, its Python) with the folded weights.

    Quantizers, servers, `save_pretrained` and every other tool take it like the model itself. A
    tied weight whose names have different values after the fold is split, with a warning: one
    tensor cannot have both.

    Args:
        model: the source model, which stays as it is.
        folded: the folded module, captured from it.

    Returns:
        The copy, in the folded module's mode.

    Raises:
        NotCapturedError: `folded` is not a captured module.
        InjectError: it has adapters that are not folded, or was not captured from a model like
            this one.

    Example:
        >>> import torch, fxlora
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        >>> folded = fxlora.fold(fxlora.adapt(model, x, rules=config))
        >>> plain = fxlora.merged(model, folded)
        >>> type(plain).__name__, torch.allclose(plain(x), folded(x))
        ('Sequential', True)
    """
    check_captured(folded, "merged")
    model = uncompiled(model, InjectError)
    if folded.plan is not None:
        raise InjectError("merged takes a folded module: fold the adapters first (fxlora.fold).")
    if isinstance(model, Host | CapturedModule):
        raise InjectError("merged takes the source model itself, not a captured or hosted one.")
    tensors = _tensors(model)
    held = _tensors(folded)
    for name, tensor in tensors.items():
        if name not in held or held[name].shape != tensor.shape:
            raise InjectError(
                f"the folded module has no '{name}' of shape {tuple(tensor.shape)}: give the model "
                "that it was captured from."
            )
    quantised = {id(p): _own(p, p.requires_grad) for p in filter(is_quantised, model.parameters())}
    result = copy.deepcopy(model, dict(quantised))
    split = _write(result, held)
    if split:
        warn(f"merged splits a tie: {some(split)} were one tensor, and the fold gave them two.")
    if result.training is not folded.training:  # else frozen batch norms would train again
        result.train(folded.training)
    return result


def _write(model: nn.Module, held: dict[str, torch.Tensor]) -> list[str]:
    """Write values into a model; return names that were tied and are no longer."""
    first: dict[int, str] = {}
    split: list[str] = []
    made: dict[int, nn.Parameter] = {}
    for name, tensor in _tensors(model).items():
        before = first.setdefault(id(tensor), name)
        value = whole(held[name].detach())
        if is_quantised(tensor) or is_quantised(value):
            _replace(model, name, held, made)
        elif before == name:
            _copied(tensor, value)
        elif held[before] is not held[name] and not torch.equal(whole(held[before]), value):
            owner, _, attribute = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(tensor), tensor.requires_grad)
            _copied(own, value)
            model.get_submodule(owner)._parameters[attribute] = own
            split += [before, name]
    return split


def _own(value: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """Return a parameter with a value in memory of its own."""
    return nn.Parameter(with_parts(value, lambda part: part.detach().clone()), requires_grad)


def _replace(
    model: nn.Module,
    name: str,
    held: dict[str, torch.Tensor],
    made: dict[int, nn.Parameter],
) -> None:
    """Replace a parameter that is, or becomes, a quantised one: its class is another then."""
    owner, _, attribute = name.rpartition(".")
    before = model.get_submodule(owner)._parameters
    tensor = before[attribute]
    assert tensor is not None
    device = tensor.device
    value = with_parts(held[name], lambda part: part.detach().to(device))
    before[attribute] = made.setdefault(id(held[name]), _own(value, tensor.requires_grad))


def _copied(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.data = value.clone().to(tensor.device)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}
