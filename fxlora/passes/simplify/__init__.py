"""Passes for inference only: each makes a graph smaller, and computes the same."""

from .affine import FoldAffine
from .constants import EvaluateConstants
from .dead import RemoveDead
from .identities import DropIdentities
from .inference import ForInference

# The passes of `fxlora.simplify`, by their names there, in their order.
PASSES = {
    "dropout": DropIdentities(),
    "constants": EvaluateConstants(),
    "affine": FoldAffine(),
    "dead": RemoveDead(),
}

__all__ = ["PASSES", "ForInference"]
