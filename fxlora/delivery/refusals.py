"""What a file cannot hold: refused where it would be lost, warned of where nothing checks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from ..errors import ExportError, warn
from ..frontends.kept.containers import counts
from ..fx.calls import call_site, named_argument
from ..fx.effects import statistics_written, written_nodes
from ..module import CapturedModule
from ..module.contract import ConstantInput, Dimension, IntegerInput, TensorInput
from ..module.fsdp import mesh_of
from ..module.program import ProgramModule
from ..tables import some
from .call import Call
from .delivery import Format
from .program import Exported

# ---- before the export --------------------------------------------------------------------------


def refuse_sharded(module: CapturedModule) -> None:
    """Raise ExportError for a module that has no whole weights or no whole graph."""
    if mesh_of(module) is not None:
        raise ExportError(
            "the module is sharded over processes, and a file holds whole weights. Load its "
            "adapter (save_adapter, load_adapter) into a module that is not sharded, and export "
            "the fold of that."
        )
    if module.parent_module:
        raise ExportError(
            f"there is no whole graph to export: the model was captured by regions "
            f"({some(module.regions)}), between which its Python runs ({module.parent_module.why}) "
            "Change the source's branch to torch.where or torch.cond; or run the source with the "
            "folded weights: fxlora.merged(model, folded)."
        )


def refuse_hooks(module: nn.Module, method: str) -> None:
    """Raise ExportError for hooks around the call, which no graph has."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if method == "forward" and any(hooks):
        raise ExportError(
            f"{type(module).__name__} has forward hooks, which run around its graph: the file "
            "would not have them. Take them off (handle.remove()), and register them on the source "
            "model before the capture: then the graph has what they compute."
        )
    if any(getattr(nn.modules.module, name) for name in _OF_ALL_MODULES):
        raise ExportError(
            "this process has forward hooks for all modules "
            "(torch.nn.modules.module.register_module_forward_hook), which run around each call of "
            f"{type(module).__name__} here, and where the file runs do not. Take them off "
            "(handle.remove()) before the export; they may be registered again afterwards."
        )


_OF_ALL_MODULES = ("_global_forward_hooks", "_global_forward_pre_hooks")


def refuse_counts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ExportError for a cache of which only this process knows that it has integers."""
    if counts((args, kwargs)):
        raise ExportError(
            "the cache among the inputs counts tokens in integers, which are inputs of the graph: "
            "a file could be called by fxlora only. Export without a cache (use_cache=False), or "
            "capture this one call, in a process of its own."
        )


def refuse_lost_outputs(call: Call) -> None:
    """Raise ExportError for outputs that are no tensors, of a program that returns tensors only."""
    if not call.form.flat:
        return
    lost = [place for place, leaf in _outputs(call.module) if _is_no_tensor(leaf)]
    if lost:
        raise ExportError(
            f"{some(lost)}: the module returns no tensor there, and a file of this format returns "
            "tensors only. Return torch.tensor(…) in the source, leave the value out, or export "
            'with format="pt2".'
        )


def _outputs(module: ProgramModule) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of a graph's output with its place."""
    graph = module.program.graphs["eval"]
    given: Any = next(iter(graph.find_nodes(op="output"))).args[0]
    if isinstance(graph._codegen, _PyTreeCodeGen):
        spec: Any = graph._codegen.pytree_info.out_spec
        given = pytree.tree_unflatten(given, spec)
    for path, leaf in pytree.tree_flatten_with_path(given)[0]:
        yield f"output{pytree.keystr(path)}", leaf


def _is_no_tensor(leaf: Any) -> bool:
    if isinstance(leaf, fx.Node):
        return not isinstance(leaf.meta.get("val", torch.Tensor()), torch.Tensor)
    return leaf is not None


def warn_of_state(call: ProgramModule) -> None:
    """Warn of tensors that must lie in memory as the example's do."""
    groups = call.contract.leaves if call.contract else ()
    tensors = [leaf for group in groups for leaf in group if isinstance(leaf, TensorInput)]
    if names := [leaf.name for leaf in tensors if leaf.order or leaf.gradient]:
        warn(
            f"the source reads how its tensors lie in memory, or their gradients: the file holds "
            f"for {some(names)} like the example's only (strides, requires_grad), and does not "
            "check it."
        )


# ---- after the export ---------------------------------------------------------------------------


def refuse_writes(made: Exported, form: Format) -> None:
    """Raise ExportError for a graph that changes buffers or inputs, if a file computes only."""
    if form.stateful:
        return
    signature = made.program.graph_signature
    own = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own |= signature.inputs_to_lifted_tensor_constants
    owner = made.program.graph_module
    found = ((written_nodes(n, owner), statistics_written(n, owner)) for n in owner.graph.nodes)
    roots = (root for both in found for roots in both for root in roots)
    held = [own.get(r.name, str(r.target)) for r in roots if r.op in ("placeholder", "get_attr")]
    names = [*held, *signature.buffers_to_mutate.values()]
    names += signature.user_inputs_to_mutate.values()
    if names:
        raise ExportError(
            f"calls write to {some(dict.fromkeys(names))}, and a file of this format computes "
            'outputs only: the next call would not see it. Export with format="pt2"; or return the '
            "new value in the source, and give it as an input of the next call."
        )


def refuse_groups(made: Exported, form: Format) -> None:
    """Raise ExportError for a convolution whose number of groups is no constant."""
    for node in made.program.graph.nodes if form.fixed_groups else ():
        if node.op == "call_function" and isinstance(named_argument(node, "groups"), fx.Node):
            site = call_site(node).removesuffix(".lora")
            raise ExportError(
                f"the convolution '{site}' has as many groups as the "
                "batch has samples, since each has an adapter of its own, and a file of this "
                'format has a fixed number. Export with format="pt2" or "executorch"; or each '
                "adapter in a file of its own: export(take_adapter(module, slot), …)."
            )


def warn_of_unchecked(made: Exported, form: Format) -> None:
    """Warn of what the graph assumes about its inputs, and the file's runtime does not check."""
    if form.checks:
        return
    call, contract = made.call, made.call.module.contract
    found = [text for group in made.spec.leaves for leaf in group for text in _limited(leaf, form)]
    if contract is not None:
        found += [t for pair in contract.pairs(call.args, call.kwargs) for t in _baked(*pair, form)]
    found += [guard.text for guard in made.spec.guards]
    if found:
        warn(
            "the graph holds for some inputs only, and the file does not check them: it may "
            f"compute something else than the source for others. Check before each call: "
            f'{some(dict.fromkeys(found))}. (format="pt2" checks them.)'
        )


def _baked(leaf: Any, value: Any, form: Format) -> Iterator[str]:
    """Yield what a file holds as a constant in place of an input."""
    constant = isinstance(leaf, ConstantInput) or (form.flat and isinstance(leaf, IntegerInput))
    if constant and value is not None:
        yield f"{leaf.name} is {value!r}, a constant in the file"


def _limited(leaf: Any, form: Format) -> Iterator[str]:
    """Yield the limits of a tensor's dynamic sizes."""
    for axis, dim in enumerate(leaf.dims if isinstance(leaf, TensorInput) else ()):
        if isinstance(dim, Dimension) and _limits(dim, form):
            yield f"dimension {axis} of {leaf.name} is {dim.describe()}"


def _limits(dim: Dimension, form: Format) -> bool:
    """Whether other sizes than 0 and 1 are excluded; a bounded format checks the maximum."""
    low = dim.at(dim.min) > 1
    return low or abs(dim.scale) != 1 or (dim.max is not None and not form.bounded)
