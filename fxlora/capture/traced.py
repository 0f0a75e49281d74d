"""Capture through torch.fx's symbolic tracer: the road for a model without example inputs."""

from __future__ import annotations

from torch import fx, nn

from ..dialect import WEIGHT_MODULES, lower
from .exported import capture_error, mode_of


class WeightTracer(fx.Tracer):
    """torch.fx's tracer, which goes inside the modules that are one weight-reading op."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) not in WEIGHT_MODULES and super().is_leaf_module(m, module_qualified_name)


def trace_mode(model: nn.Module, training: bool) -> fx.Graph:
    """The lowered graph of one mode.

    Raises:
        CaptureError: the model's forward cannot be run on symbolic values.
    """
    try:
        with mode_of(model, training):
            graph = WeightTracer().trace(model)
    except Exception as error:
        raise capture_error(model, training, error) from error
    lower(graph)
    return graph
