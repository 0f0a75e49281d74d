"""Training checkpoints: the parameters that train, resumed by `load_state_dict`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ..data import as_path
from ..disk.files import whole_file
from ..disk.save import save_adapter
from ..disk.values import same
from ..errors import AdapterError
from ..module import CapturedModule

STATE = "model.safetensors"  # where transformers' Trainer looks for a model's state


def save_checkpoint(module: CapturedModule, folder: str | Path) -> None:
    """Write the adapter to a folder, and all that training changed under its names in `state_dict`.

    The second file is a part of a state dict: `load_state_dict(…, strict=False)` resumes from it.

    Args:
        module: an adapted module.
        folder: the folder to write to; it is made if missing.

    Raises:
        AdapterError: as for `save_adapter`.
    """
    save_adapter(module, folder)
    originals = module.known.originals
    names = [*sorted(module.adapter_parameters()), *module.trained]
    names += [n for n, buffer in module.named_buffers() if not same(buffer, originals.get(n))]
    held = module.state_dict()
    names = [name for name in names if name in held]  # not the buffers that no state dict has
    tensors = {name: held[name].detach().cpu().contiguous().clone() for name in names}
    with whole_file(as_path(folder, AdapterError) / STATE, AdapterError) as file:
        save_file(tensors, file, metadata={"format": "pt"})
