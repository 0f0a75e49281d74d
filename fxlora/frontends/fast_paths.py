"""Whether the fast paths that torch.nn takes without gradients compute what the graph does.

torch's own modules ask for gradients to choose a fused kernel, which mostly differs in rounding
only. But nn.TransformerEncoder also sets the outputs of padded rows to 0 there. An export does not
see these paths: source and graph both run on the example, and their numbers are compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..module.autocasts import GradientMode
from .caller_modes import INFERENCE, NO_GRADIENTS, in_gradient_mode
from .examples import Example
from .kept.undisturbed import undisturbed

ADVICE = (
    "torch.nn takes a fast path there that computes other numbers than with gradients: "
    "nn.TransformerEncoder sets the outputs of padded rows to 0. Set enable_nested_tensor = False "
    "on it in the source, and capture that"
)


def other_numbers(
    model: nn.Module, module: fx.GraphModule, example: Example
) -> list[tuple[GradientMode, str]]:
    """Return the modes of gradients in which a graph has other numbers than its source, with why.

    Raises:
        CaptureError: it has other numbers with gradients enabled, too, because parameters of the
            source require none.
    """
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    if frozen and _differ(model, module, example, GradientMode(enabled=True, inference=False)):
        raise CaptureError(f"{type(model).__name__} differs from its graph: {ADVICE}.")
    differs = _differ(model, module, example, NO_GRADIENTS)
    return [(mode, ADVICE) for mode in (NO_GRADIENTS, INFERENCE) if differs]


def _differ(model: nn.Module, module: fx.GraphModule, example: Example, mode: GradientMode) -> bool:
    runs: list[list[torch.Tensor]] = []
    for call in (model, module):
        args, kwargs = copy.deepcopy((example.args, example.kwargs))
        with undisturbed(model), in_gradient_mode(mode):
            runs.append(_numbers(call(*args, **kwargs)))
    return any(not _alike(a, b) for a, b in zip(*runs, strict=True))


def _numbers(results: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results differ in rounding only."""
    scale = float(b.abs().max()) if b.numel() else 0.0
    within = 4 * torch.finfo(b.dtype).eps ** 0.5 * scale
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=within, equal_nan=True)
