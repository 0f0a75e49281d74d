"""Remove: the module as it was before injection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import InjectError
from ..fx.alike import alike_graphs
from ..fx.nested import nested_graph
from ..module import CapturedModule
from .structure import insertions, take_out


@dataclass(frozen=True)
class Remove(PassBase):
    """Take the adapters out; with `restore`, put back what was trained in full, and buffers."""

    restore: bool = True

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not isinstance(graph_module, CapturedModule) or graph_module.plan is None:
            raise InjectError("nothing to remove: the module has no adapters.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule) and graph_module.plan is not None
        result = graph_module.derive()
        for graph in result.distinct_graphs():
            for insertion in reversed(insertions(result, graph)):
                take_out(insertion)
        if self.restore:
            _restore(result)
        drop_adapters(result)
        return PassResult(result, True)


def _restore(module: CapturedModule) -> None:
    aliases = module.aliases()
    for name, original in module.originals.items():
        if name in module.trained:
            restored = nn.Parameter(original)
            for alias in aliases[name]:
                module.set_parameter(alias, restored)
        else:
            with torch.no_grad():
                module.get_buffer(name).copy_(original)


def drop_adapters(module: CapturedModule) -> None:
    """Forget the plan and its parameters; gradients are required as in the source again."""
    for name in module.adapter_parameters():
        module.remove_parameter(name)
    module.plan, module.trained, module.originals = None, frozenset(), {}
    module.fingerprints = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in module.grads)
    _merge_modes(module)
    module.refresh()


def _merge_modes(module: CapturedModule) -> None:
    """One graph again where dropout on branches was all that told the modes apart."""
    for program in module.programs:
        train, evaluation = program.graphs["train"], program.graphs["eval"]
        if train is not evaluation and alike_graphs(train, evaluation):
            program.graphs["train"] = evaluation
            for path in _nested_paths(module, train) - _nested_paths(module, evaluation):
                module.delete_submodule(path)


def _nested_paths(module: CapturedModule, graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if nested_graph(node, module)}
