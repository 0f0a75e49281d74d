"""Read the rows that train alone (`trainable_token_indices`) from PEFT's folder."""

from __future__ import annotations

import re

import torch

from ..config import LoraConfig, Rule
from ..errors import AdapterError, ConfigError
from ..module import CapturedModule
from ..plan import Plan
from .folder import Folder
from .keys import CONFIG
from .peft_tensors import PeftTensors
from .peft_tokens import END, decoded, indices_in, rows_of


def token_rules(module: CapturedModule, content: Folder, tensors: PeftTensors) -> list[Rule]:
    """Return a rule for each module of which rows train alone.

    As in PEFT, the modules that transformers ties to the input embedding have its rows.

    Raises:
        AdapterError: the configuration does not say which rows.
    """
    found: list[Rule] = []
    source = module.known.embedding if module.known.model_type else ""
    tie = next((t for t in module.aliases().values() if f"{source}.weight" in t), [])
    apart = sum(f"{path}.weight" in tie for path in tensors.tokens) > 1
    for path, (there, _) in tensors.tokens.items():
        follows = path == source and not apart
        config = LoraConfig(tied="share" if follows else "rule")
        try:
            rows = indices_in(content.config, there)
            found.append(Rule(f"re:{re.escape(path)}", tokens=rows or (), lora=config))
        except ConfigError as error:
            raise AdapterError(
                f"{content.path / CONFIG}: trainable_token_indices of '{there}': {error}"
            ) from error
    return found


def token_starts(
    module: CapturedModule, plan: Plan, tensors: PeftTensors, misshapen: list[str]
) -> dict[str, torch.Tensor]:
    """Return the initial values of what trains in the rows, by name.

    Args:
        module: the captured module.
        plan: the plan with the rows.
        tensors: the tensors of the file.
        misshapen: takes what has another shape.
    """
    rows = rows_of(module, plan)
    found: dict[str, torch.Tensor] = {}
    for entry in plan:
        if not entry.tokens:
            continue
        paths = (name.rpartition(".")[0] for name in entry.names)
        there, stored = next(tensors.tokens[path] for path in paths if path in tensors.tokens)
        if tuple(stored.shape) != (shape := (entry.r, entry.shape[1])):
            misshapen.append(f"{there}.{END} ({tuple(stored.shape)} in the file, {shape} here)")
            continue
        found |= decoded(entry, stored, rows[entry.name_a])
    return found
