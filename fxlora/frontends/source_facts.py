"""Facts about the source model that rules of PEFT's kind refer to, and graphs do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_CONV1D = "transformers.pytorch_utils.Conv1D"


def output_embeddings(model: nn.Module) -> frozenset[str]:
    """Return names of parameters in transformers' output embeddings, which "all-linear" skips."""
    head = _given_by(model, "get_output_embeddings")
    held = {id(p) for p in head.parameters()} if head else set[int]()
    names = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in names if id(p) in held)


def input_embedding(model: nn.Module) -> str:
    """Return the path of transformers' input embedding, whose rows are those of tokens, or ""."""
    table = _given_by(model, "get_input_embeddings")
    return next((path for path, module in model.named_modules() if module is table), "")


def _given_by(model: nn.Module, method: str) -> nn.Module | None:
    """Return the module that a method without arguments returns; None if there is no such one."""
    getter = getattr(model, method, None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # of a model that has no such embeddings
        return None
    return found if isinstance(found, nn.Module) else None


def linear_layers(model: nn.Module) -> frozenset[str]:
    """Return the paths of the layers that "all-linear" means: nn.Linear, transformers' Conv1D."""
    modules = model.named_modules(remove_duplicate=False)
    return frozenset(path for path, module in modules if _is_linear(module))


def _is_linear(module: nn.Module) -> bool:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return isinstance(module, nn.Linear) or _CONV1D in names


def model_type(model: nn.Module) -> str:
    """Return the architecture that the model's configuration names, as transformers' do, or ""."""
    config: Any = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else None
    found = found or getattr(config, "model_type", None)
    return found if isinstance(found, str) else ""
