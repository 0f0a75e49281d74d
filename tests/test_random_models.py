"""Random models through both frontends: every law holds, or a typed error is raised."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from .random_laws import judge_all
from .random_models import draw

HEAVY = (3, 13, 29, 30, 33, 40, 45, 47)  # deep models of more than two seconds each
SEEDS = [seed for seed in range(48) if seed not in HEAVY]
QUICK, SLOW = 8, 25  # models per test


def check(seeds: Sequence[int]) -> None:
    tally = judge_all(seeds)
    assert not tally.failures, "\n\n".join(map(str, tally.failures))
    exported = tally.of("export")
    assert exported.adapted >= len(seeds), str(tally)
    assert exported.share > 0.75, str(tally)  # refusing every model would not be wrong
    assert tally.of("tracer").share > 0.3, str(tally)


@pytest.mark.parametrize(
    "batch", [pytest.param(n, marks=pytest.mark.slow if n > 1 else ()) for n in range(5)]
)
def test_forty_models(batch: int) -> None:
    check(SEEDS[batch * QUICK :][:QUICK])


@pytest.mark.slow
def test_heavy_models() -> None:
    check(HEAVY)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(20))
def test_five_hundred_models(batch: int) -> None:
    check(range(1000 + batch * SLOW, 1000 + (batch + 1) * SLOW))


def test_a_seed_is_a_model() -> None:
    one, again = draw(3), draw(3)
    assert one == again
    (model, args), (other, _) = one.build(), again.build(plain=True)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert model(*args).equal(other(*args))
