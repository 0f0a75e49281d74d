"""Whether the fast paths that torch.nn takes without gradients compute what the graph does.

torch's own modules ask for gradients to choose a fused kernel, which mostly differs in rounding
only. But nn.TransformerEncoder also sets the outputs of padded rows to 0 there. An export does not
see these paths: source and graph both run on the example, and their numbers are compared.
"""

from __future__ import annotations

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
    """Whether the two have other numbers on the example, in a mode; False if one does not run."""
    held = (*model.parameters(), *model.buffers(), *pytree.tree_leaves(example.args))
    if any(tensor.is_meta for tensor in held if isinstance(tensor, torch.Tensor)):
        return False

    def run(call: nn.Module) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_map_only(torch.Tensor, _copied, (example.args, example.kwargs))
        with undisturbed(model), torch.random.fork_rng(), in_gradient_mode(mode):
            return _numbers(call(*args, **kwargs))

    try:
        expected = run(model)
        return not _all_alike(expected, run(module)) and _all_alike(expected, run(model))
    except Exception:  # noqa: BLE001 - the source may raise anything; a call of it will
        return False


def _all_alike(found: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(found) == len(others) and all(map(_alike, found, others))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _numbers(results: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results differ in rounding only, compared with most of their entries."""
    finite = b[b.isfinite()].abs().double()
    scale = float(finite.median()) if finite.numel() else 0.0
    within = 4 * torch.finfo(b.dtype).eps ** 0.5
    return a.shape == b.shape and torch.allclose(a, b, within, within * scale, equal_nan=True)
