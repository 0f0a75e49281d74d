"""Join a module with the graphs of another capture of the same model."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from ..errors import InputError
from ..module import CapturedModule
from ..module.constants import CONSTANTS
from ..module.copies import copy_hooks
from ..module.quantised import is_quantised, stored
from ..tables import some


def joined(base: CapturedModule, more: CapturedModule) -> CapturedModule:
    """Return a module with the graphs of both, over the tensors of the first.

    Args:
        base: a module without adapters, which is changed.
        more: another capture of the same model (see `check_same_model`), which is changed.
    """
    label = f"calls{len(base.programs)}"
    with base.editing():
        for graph in more.distinct_graphs():
            _adopt_constants(base, graph, more, label)
    result = CapturedModule(
        base.tree(),
        [*base.programs, *more.programs],
        class_name=type(base).__name__,
        training=base.training,
        state=base.known,
        own_modes=base._seal.own,
    )
    copy_hooks(base, result, copy.copy)
    return result


def check_same_model(module: CapturedModule, more: CapturedModule) -> None:
    """Raise InputError unless a new capture is of the model that a module was captured from.

    The module's adapters may be trained, its buffers updated and its parameters trained in full.
    """
    if left := module.changes ^ more.changes:
        raise InputError(
            f"some of the calls change {some(sorted(left))} of the model, which others may read. "
            "Capture all calls together: capture(model, calls=[…])."
        )
    if frozen := module.known.apart ^ more.known.apart:
        raise InputError(
            f"{some(sorted(frozen))} were in another mode, compared with the model's, when the "
            "module was captured: set them as they were then (train(), and eval() of these)."
        )
    if more.known.mirrors != module.known.mirrors or more.known.written - module.known.written:
        raise InputError(
            "the new calls read or write memory that several tensors share, and the captured ones "
            "do not. Capture all calls together: capture(model, calls=[…])."
        )
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (module, more))
    own = module.known.adapter_parameters
    ties = [
        {name: [n for n in names if n not in own] for name, names in m.aliases().items()}
        for m in (module, more)
    ]
    if {n: t for n, t in ties[0].items() if n not in own} != ties[1]:
        raise InputError(
            "the model does not have the module's parameters, with the same ties. Give the model "
            "that the module was captured from."
        )
    free = own | module.trained | module.known.written
    other = [name for name, tensor in theirs.items() if not _alike(tensor, ours[name])]
    changed = [n for n in other if n not in free or theirs[n].shape != ours[n].shape]
    changed += _other_buffers(module, more)
    if changed:
        raise InputError(
            f"the model's {some(changed)} differ from the module's in values, shape, dtype or "
            "device. Give the model that the module was captured from, with the same weights and "
            "moved in the same way."
        )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if is_quantised(one) or is_quantised(other):
        pairs = zip(stored(one), stored(other), strict=type(one) is type(other))
        return type(one) is type(other) and all(_alike(a, b) for a, b in pairs)
    same_memory = (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())
    return one.is_meta or same_memory or torch.equal(one, other)


def _other_buffers(module: CapturedModule, more: CapturedModule) -> list[str]:
    """Return the names of the model's buffers that the module does not have in the same form."""
    held = dict(module.named_buffers(remove_duplicate=False))
    found: list[str] = []
    for name, buffer in more.named_buffers(remove_duplicate=False):
        mine = held.get(name)
        own = not name.startswith(f"{CONSTANTS}.")
        form = None if mine is None else (mine.shape, mine.dtype, mine.device)
        if own and form != (buffer.shape, buffer.dtype, buffer.device):
            found.append(name)
    return found


def _adopt_constants(
    module: CapturedModule, graph: fx.Graph, more: CapturedModule, label: str
) -> None:
    """Move a graph's constants into the module, under new names."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if not name.startswith(f"{CONSTANTS}."):
            continue
        node.target = name.replace(".", f".{label}_", 1)
        container = module._modules.setdefault(CONSTANTS, nn.Module())
        assert container is not None
        own = node.target.partition(".")[2]
        if not hasattr(container, own):
            value = _attribute(more, name)
            if isinstance(value, nn.Module):
                container.add_module(own, value)
            else:
                container.register_buffer(own, value, persistent=False)


def _attribute(module: nn.Module, name: str) -> torch.Tensor | nn.Module:
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)
