"""Weights that a graph decodes from constants, as PT2E's graphs do, as one quantised parameter.

Such a graph holds codes of 8 bits, scales and zero points, and computes a weight from them in every
call. As one tensor, whose parts they are, it is a weight like those of other quantised models.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import QuantisedError

aten = torch.ops.aten


class DecodedTensor(torch.Tensor):
    """A tensor that is computed from its parts by a graph, whenever an op needs its values.

    Attributes:
        parts: the constants by name, in the order of the graph's placeholders; codes first.
        decoder: the graph.
    """

    parts: dict[str, torch.Tensor]
    decoder: Decoder

    @staticmethod
    def __new__(cls: Any, parts: Mapping[str, torch.Tensor], decoder: Decoder) -> DecodedTensor:
        codes = next(iter(parts.values()))
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, decoder.shape, dtype=decoder.dtype, device=codes.device
        )
        return made

    def __init__(self, parts: Mapping[str, torch.Tensor], decoder: Decoder) -> None:
        for name, part in parts.items():
            setattr(self, name, part)
        self.names, self.decoder = tuple(parts), decoder

    def dequantize(self) -> torch.Tensor:
        """Return the values."""
        return self.decoder.module(*(getattr(self, name) for name in self.names))

    def encoded(self, values: torch.Tensor) -> DecodedTensor:
        """Return values in this tensor's form, with fresh scales: each code is the nearest one.

        The decoder must be affine in the codes, values = a·codes + b, and proportional to the part
        with the scales. That part, and the entries of each scale, are found by runs.

        Raises:
            QuantisedError: it is not, or the scales are no part.
        """
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        codes = getattr(self, self.names[0])
        low, high = (torch.full_like(codes, int(bound)) for bound in codes.aminmax())
        name, of_entry = self._scales()
        scales = getattr(self, name)
        ends = self._decoded({}, low), self._decoded({}, high)
        # How much larger a scale must be for an entry: its value over the end of its range.
        needed = torch.where(values < 0, values / ends[0], values / ends[1]).nan_to_num(0, 0, 0)
        larger = torch.zeros_like(scales.flatten(), dtype=values.dtype).scatter_reduce_(
            0, of_entry.flatten(), needed.flatten(), "amax"
        )
        larger = torch.where(larger > 0, larger, 1).reshape(scales.shape)
        fresh = {name: (scales * larger).to(scales.dtype)}
        start = self._decoded(fresh, torch.zeros_like(codes))
        step = self._decoded(fresh, torch.ones_like(codes)) - start
        near = ((values - start) / step).round().clamp(low.to(values.dtype), high.to(values.dtype))
        parts = {n: getattr(self, n) for n in self.names} | fresh
        return DecodedTensor(parts | {self.names[0]: near.to(codes.dtype)}, self.decoder)

    def _decoded(self, changed: Mapping[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
        """Return the values of other codes, with some parts changed."""
        given = [changed.get(name, getattr(self, name)) for name in self.names[1:]]
        return self.decoder.module(codes, *given)

    def _scales(self) -> tuple[str, torch.Tensor]:
        """Return the name of the part with the scales, and the index of each entry's scale."""
        codes = getattr(self, self.names[0])
        zeros, ones = torch.zeros_like(codes), torch.ones_like(codes)
        before = self._decoded({}, codes)
        for name in self.names[1:]:
            part = getattr(self, name)
            if not part.is_floating_point():
                continue
            if not torch.equal(self._decoded({name: part * 2}, codes), before * 2):
                continue
            numbers = torch.arange(part.numel(), device=part.device).reshape(part.shape)
            of_entry = torch.zeros(codes.shape, dtype=torch.int64, device=part.device)
            # Bit by bit, as scales of 1 and 2: few dtypes of scales have all numbers.
            for bit in range(part.numel().bit_length()):
                marked = (1 + (numbers >> bit & 1)).to(part)
                steps = [
                    (self._decoded({name: scale}, ones) - self._decoded({name: scale}, zeros)).abs()
                    for scale in (marked, torch.ones_like(part))
                ]
                of_entry |= (steps[0] > 1.5 * steps[1]).long() << bit
            return name, of_entry
        raise QuantisedError("a weight has no part of scales that could be made anew.")

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.names), self.decoder

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, torch.Tensor], decoder: Decoder, size: Any, stride: Any
    ) -> DecodedTensor:
        return DecodedTensor(parts, decoder)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DecodedTensor({tuple(self.shape)}, {self.dtype}, from {', '.join(self.names)})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(first := args[0] if args else None, DecodedTensor):
            if func in _OF_PARTS:
                return first._changed(functools.partial(_call, func, args[1:], kwargs))
            if func is aten._to_copy.default and kwargs.get("dtype") in (None, first.dtype):
                others = {k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format")}
                return first._changed(functools.partial(_call, func, (), others))
            if func is aten.copy_.default:
                return first._overwritten(args[1])
        plain, plain_kwargs = pytree.tree_map_only(
            DecodedTensor, lambda t: t.dequantize(), (args, kwargs)
        )
        return func(*plain, **plain_kwargs)

    def _changed(self, change: Any) -> DecodedTensor:
        parts = {name: change(getattr(self, name)) for name in self.names}
        return DecodedTensor(parts, self.decoder)

    def _overwritten(self, source: torch.Tensor) -> DecodedTensor:
        if not isinstance(source, DecodedTensor) or source.decoder != self.decoder:
            raise QuantisedError(
                f"a weight decoded from {', '.join(self.names)} takes only values that are stored "
                "like it, from the state_dict of a capture of the same model."
            )
        for name in self.names:
            getattr(self, name).copy_(getattr(source, name))
        return self


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], part: torch.Tensor) -> Any:
    return func(part, *args, **kwargs)


_OF_PARTS = (aten.detach.default, aten.clone.default, aten.alias.default)


class Decoder:
    """The graph that computes a tensor from its parts; two of equal code are equal.

    Attributes:
        module: the graph.
        shape, dtype: those of its result.
    """

    def __init__(self, module: fx.GraphModule, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.module, self.shape, self.dtype = module, shape, dtype

    def __repr__(self) -> str:
        return f"Decoder({self.module.code.strip()!r}, {self.shape}, {self.dtype})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decoder) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        return self
