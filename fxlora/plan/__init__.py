"""Plan: the decisions of `match`, as data to print, count, write to a file and inject."""

from .entry import Entry, overlap, scales_outputs
from .plan import IN_FULL, Plan, joined, separated

__all__ = ["IN_FULL", "Entry", "Plan", "joined", "overlap", "scales_outputs", "separated"]
