"""Build the nn.Module that MODEL names on the command line."""

from __future__ import annotations

import importlib
import inspect
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..tables import a, did_you_mean, said
from .weights import load_checkpoint, read_checkpoint


def build_model(options: Namespace) -> nn.Module:
    """Build the model that MODEL names, and load the checkpoint into it if one is given."""
    checkpoint: Path | None = options.checkpoint
    state = read_checkpoint(checkpoint) if checkpoint else {}
    torch.manual_seed(options.seed)  # for a model that is built by its import
    build = _builder(options)
    torch.manual_seed(options.seed)  # whatever the import drew
    try:
        with device(options):
            model = build()
    except (Exception, SystemExit) as error:  # the model's code may raise anything
        raise ConfigError(
            f"building {options.model} failed: {said(error)} (--debug shows where). It is "
            "called without arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{options.model} returned {a(type(model).__name__)}, not an nn.Module.")
    if checkpoint:
        load_checkpoint(model, state, checkpoint)
    return model


def device(options: Namespace) -> torch.device:
    """Return the device for the model and its inputs: meta under `--meta`, else the CPU."""
    return torch.device("meta" if options.meta else "cpu")


def _builder(options: Namespace) -> Callable[[], Any]:
    """Return the function that builds the model; imports run here, outside the meta device."""
    source, _, name = options.model.partition(":")
    if not source or not name:
        raise ConfigError(
            f"MODEL '{options.model}' is neither module:callable nor torchvision:name."
        )
    if source == "torchvision":
        return _torchvision_builder(name, options.weights)
    if options.weights is not None:
        raise ConfigError(
            f"--weights is for torchvision models; pass the weights of {options.model} with "
            "--checkpoint, or load them in the callable."
        )
    found = _named(_imported(source), name)
    if isinstance(found, nn.Module) and options.meta:
        raise ConfigError(
            f"{options.model} is a model that has its weights already: --meta needs a callable "
            "that builds it. Or leave --meta out."
        )
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ConfigError(f"{options.model} is neither a callable nor an nn.Module: {found!r}.")
    return found


def _imported(name: str) -> ModuleType:
    """Import a module, from the current folder or Python's path."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the module's code may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no module '{name}' in {here} or on Python's path. Give MODEL as "
                "module:callable, with dots for folders."
            ) from error
        raise ConfigError(
            f"importing '{name}' failed: {said(error)} (--debug shows where)."
        ) from error


def _named(module: ModuleType, name: str) -> Any:
    """Return the attribute of a module with a dotted name."""
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = (n for n in dir(found) if not n.startswith("_"))
            raise ConfigError(
                f"module '{module.__name__}' has no '{name}'.{did_you_mean(part, public)}"
            )
        found = getattr(found, part)
    return found


def _torchvision_builder(name: str, weights: str | None) -> Callable[[], Any]:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ConfigError(
            f"torchvision:{name} needs torchvision, which cannot be imported ({error}): "
            "pip install torchvision."
        ) from error
    if name not in models.list_models():
        near = did_you_mean(name, models.list_models())
        raise ConfigError(
            f"torchvision has no model '{name}'.{near} torchvision.models.list_models() has all."
        )
    known = models.get_model_weights(name).__members__
    if weights is not None and weights not in known:
        raise ConfigError(
            f"torchvision:{name} has no weights '{weights}'."
            f"{did_you_mean(weights, known)} Known: {', '.join(known)}."
        )
    keywords: dict[str, Any] = {"weights": weights}
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if weights is None and "weights_backbone" in parameters:
        keywords["weights_backbone"] = None  # its default downloads weights
    return partial(models.get_model, name, **keywords)
