"""Find parameters of a module that are different tensors over the same memory."""

from __future__ import annotations

from torch import nn


def overlaps_of(module: nn.Module) -> dict[str, list[str]]:
    """Return, by parameter name, the other parameters that are tensors over the same memory."""
    spans: list[tuple[int, int, str]] = []
    for name, parameter in module.named_parameters():
        start = 0 if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
        if start:
            last = sum(
                (n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
            )
            spans.append((start, start + (last + 1) * parameter.element_size(), name))
    found: dict[str, list[str]] = {}
    open_: list[tuple[int, str]] = []  # (end, name) of the spans that reach the current start
    for start, end, name in sorted(spans):
        open_ = [(last, other) for last, other in open_ if start < last]
        for _, other in open_:
            found.setdefault(name, []).append(other)
            found.setdefault(other, []).append(name)
        open_.append((end, name))
    return found
