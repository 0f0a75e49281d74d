"""A fingerprint changes with every change of a tensor's bits, including their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlora.module.fingerprints import fingerprint

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int8, torch.complex64),
]
CHANGES: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "rows permuted": lambda t, g: t[torch.randperm(len(t), generator=g)],
    "columns permuted": lambda t, g: t[:, torch.randperm(t.shape[1], generator=g)],
    "entries permuted": lambda t, g: t.flatten()[torch.randperm(t.numel(), generator=g)].view(
        t.shape
    ),
    "transposed": lambda t, g: t.mT.contiguous().view(t.shape),
    "negated": lambda t, g: -t,
    "two signs": lambda t, g: _at_random(t, g, 2, torch.neg),
    "one entry": lambda t, g: _at_random(t, g, 1, lambda v: v + 1),
    "reversed": lambda t, g: t.flip(0, 1),
    "two swapped": lambda t, g: _at_random(t, g, 2, lambda v: v.flip(0)),
    "all shifted": lambda t, g: t.flatten().roll(1).view(t.shape),
}


def _at_random(
    tensor: torch.Tensor,
    generator: torch.Generator,
    count: int,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    places = torch.randperm(tensor.numel(), generator=generator)[:count]
    flat = tensor.flatten().clone()
    flat[places] = change(flat[places])
    return flat.view(tensor.shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(CHANGES)),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(2, 200), st.integers(2, 150)),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_a_change_is_seen(
    name: str, dtype: torch.dtype, shape: tuple[int, int], seed: int, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = (4 * torch.randn(shape, generator=generator)).to(dtype)
    wide = before.to(torch.complex64 if dtype.is_complex else torch.float64)
    after = CHANGES[name](wide, generator).to(dtype)
    if strided:  # a view with other strides over the same values
        after = after.t().contiguous().t()
        assert not after.is_contiguous()
    same = torch.equal(bits(before), bits(after))
    assert (fingerprint(before) == fingerprint(after)) == same


@pytest.mark.parametrize("size", [1, 7, 8191, 8192, 8193, 40_000, 300_000])
def test_a_single_bit_is_seen_wherever_it_is(size: int) -> None:
    tensor = torch.randn(size, dtype=torch.float64)
    marks = {fingerprint(tensor)}
    places = {0, size // 2, size - 1}
    for place in places:
        for bit in (0, 31, 32, 63):
            changed = tensor.clone()
            changed.view(torch.int64)[place] ^= -(2**63) if bit == 63 else 1 << bit
            marks.add(fingerprint(changed))
    assert len(marks) == 1 + 4 * len(places)


def test_signs_of_zero_shapes_and_dtypes_are_seen() -> None:
    zero = torch.zeros(6)
    alike = [zero, -zero, zero.view(2, 3), zero.view(3, 2), zero.view(torch.int32), zero[:5]]
    assert len({fingerprint(tensor) for tensor in alike}) == len(alike)


def test_what_makes_no_difference() -> None:
    tensor = torch.randn(300, 70)
    apart = torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(300, 70)  # unaligned memory
    assert fingerprint(tensor) == fingerprint(apart) == fingerprint(tensor.t().clone().t())
    assert fingerprint(torch.nn.Parameter(tensor)) == fingerprint(tensor)
    assert fingerprint(torch.empty(3, device="meta")) == 0


@pytest.mark.gpu
def test_a_device_has_the_same_fingerprints() -> None:
    for tensor in (torch.randn(3000, 1111), torch.randn(5).bfloat16(), torch.randn(9_000_000)):
        assert fingerprint(tensor.cuda()) == fingerprint(tensor)
