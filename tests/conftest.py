from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# pytest attaches its handlers to loggers that do not propagate. With a handler, torch's trace
# writes a record for each symbol and each tensor of a capture.
logging.getLogger("torch.__trace").propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Collect garbage less often: a capture makes many objects, and few of them are cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    _search_no_caches_of_pytest()


def _search_no_caches_of_pytest() -> None:
    """Leave pytest out of the code that a capture searches for caches.

    An `assert` in a test's model reaches pytest, whose search takes longer than the capture itself.
    """
    from fxlora.frontends.kept import caches  # not in the process that only starts the workers

    caches._LIBRARIES.update(("_pytest", "pytest", "pluggy"))


@pytest.fixture(scope="module")
def small_heap() -> None:
    """Leave what earlier tests made out of collections: those of this module take little time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable attention's fused kernel (eval only): it rounds differently from the single ops."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)


@pytest.fixture(autouse=True)
def _no_proofs_of_autocast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove nothing of the caller's autocast, a fifth of a capture, unless the test is marked."""
    if not request.node.get_closest_marker("autocast"):
        monkeypatch.setattr("fxlora.frontends.caller_modes._HALF", ())


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME, which `--update-golden` writes first."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text + "\n"

    return compare
