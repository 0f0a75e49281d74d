"""capture: any PyTorch model as a GraphModule in one dialect, one graph per mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..alike import alike
from ..dialect import written_attributes
from ..errors import CaptureError
from ..module import MODES, CapturedModule
from .autograd import watch_autograd
from .exported import examples_for, export_mode
from .pytrees import register_containers
from .traced import trace_mode
from .tree import attach, build_tree


def capture(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> CapturedModule:
    """Capture a model as a `torch.fx.GraphModule`; the model itself is left as it is.

    With example inputs, through torch.export, in train and in eval mode; `train()` and `eval()`
    of the result choose the graph. Without, through torch.fx's tracer (which sees less: give
    inputs where you can).

    Parameters share storage with the model, so that nothing large is copied: training them in
    place trains the model's too (`inject` freezes them). Buffers are copies.

    Args:
        model: any nn.Module. The mode that it is in is captured as it stands (batch norms
            frozen by `eval()` stay so), the other one as its `train()` or `eval()` makes it.
        args: example positional arguments (a lone tensor stands for a tuple of one).
        kwargs: example keyword arguments.
        dynamic_shapes: torch.export's specification of the dynamic dimensions. By default
            the batch (dimension 0 of the first tensor, and of those that share its size) is
            dynamic and the rest is as in the example.

    Raises:
        CaptureError: the model cannot be captured; says where in the model's code.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CaptureError(f"capture takes an nn.Module, not {type(model).__name__}.")
    if isinstance(model, CapturedModule):
        raise CaptureError(
            "the module is captured already: match, inject, fold, … take it as it is. To capture "
            "it for other inputs, capture the source model again."
        )
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError(
            f"{type(model).__name__} has forward hooks of its own, which are no part of its graph. "
            "Remove them, or wrap the model (nn.Sequential(model)): hooks inside are captured."
        )
    if isinstance(args, torch.Tensor):
        args = (args,)
    if args is None and kwargs is None:
        if dynamic_shapes is not None:
            raise CaptureError("dynamic_shapes needs example inputs: capture(model, args, ...).")
        return _capture_traced(model)
    if not isinstance(args, tuple | list | None):
        raise CaptureError(f"args is a tuple of example inputs, not {type(args).__name__}.")
    with watch_autograd(model):
        return _capture_exported(model, tuple(args or ()), dict(kwargs or {}), dynamic_shapes)


def _capture_exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> CapturedModule:
    register_containers(model)
    examples = examples_for(args, kwargs, dynamic_shapes)
    sources: dict[str, fx.GraphModule] = {}
    inputs: dict[str, Any] = {}
    for mode in MODES:
        source, inputs[mode], used = export_mode(model, examples, mode == "train")
        sources[mode] = source
        examples = examples[examples.index(used) :]
    if alike(sources["train"], sources["eval"]) and inputs["train"] == inputs["eval"]:
        sources["train"] = sources["eval"]
    return _assemble(model, sources, inputs)


def _capture_traced(model: nn.Module) -> CapturedModule:
    graphs = {mode: trace_mode(model, mode == "train") for mode in MODES}
    sources = {mode: fx.GraphModule(model, graph) for mode, graph in graphs.items()}
    if alike(sources["train"], sources["eval"]):
        sources["train"] = sources["eval"]
    return _assemble(model, sources, dict.fromkeys(MODES))


def _assemble(
    model: nn.Module, sources: dict[str, fx.GraphModule], inputs: dict[str, Any]
) -> CapturedModule:
    """One module over one tree from the graphs of both modes."""
    written: set[str] = set()
    called: set[str] = set()
    for source in sources.values():
        for node in source.graph.nodes:
            written |= set(written_attributes(node, source))
            called |= {str(node.target)} if node.op == "call_module" else set()
    tree = build_tree(model, called, written)
    known = _tensor_names(model)
    for mode, source in {id(s): (m, s) for m, s in sources.items()}.values():
        _adopt_constants(tree, mode, source, known)
    module = CapturedModule(
        tree,
        {mode: source.graph for mode, source in sources.items()},
        inputs,
        class_name=type(model).__name__,
        training=model.training,
    )
    module.grads = frozenset(n for n, p in module.named_parameters() if p.requires_grad)
    module.outputs = _output_embeddings(model)
    return module


def _adopt_constants(tree: nn.Module, mode: str, source: fx.GraphModule, known: set[str]) -> None:
    """Take constants and nested graphs along; their names collide between the modes."""
    taken: set[str] = set()
    for node in source.graph.nodes:
        if node.op != "get_attr" or node.target in known:
            continue
        path = f"_constants.{mode}_{str(node.target).replace('.', '_')}"
        if path not in taken:
            taken.add(path)
            attach(tree, path, _attribute(source, str(node.target)))
        node.target = path


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _tensor_names(model: nn.Module) -> set[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name for name, _ in [*parameters, *buffers]}


def _output_embeddings(model: nn.Module) -> frozenset[str]:
    """Parameters of what transformers calls the output embeddings; "all-linear" spares them."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        return frozenset()
    held = {id(p) for p in head.parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in names if id(p) in held)
