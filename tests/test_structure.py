"""The shape of the code: which part may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fxlora"

# From the bottom up; a part imports only parts of lower rows, or of its own folder.
LAYERS = [
    {"names"},
    {"errors", "tables"},
    {"data", "fx"},
    {"lora"},
    {"config"},
    {"plan"},
    {"module"},
    {"reads", "frontends"},
    {"matching", "passes"},
    {"api"},
    {"costs", "disk", "proof"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of fxlora that a file imports."""
    found: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names if name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxlora"):
            found.add((node.module or "").partition(".")[2].split(".")[0] or "__init__")
    return {name if name in LEVEL else "__init__" for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    mine = part(path)
    for other in imported(path) - {mine}:
        assert LEVEL[other] < LEVEL[mine], f"{mine} imports {other}"


def test_only_frontends_know_the_sources_of_graphs() -> None:
    for path in (PACKAGE / "frontends").rglob("*.py"):
        assert imported(path) <= {"errors", "names", "tables", "fx", "module", "frontends"}, path


def test_only_ops_and_spellings_name_kinds_of_op() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if path.stem not in ("ops", "spellings", "facts"):
            for name in ("aten.linear", "aten.conv", "aten.embedding", "aten.matmul"):
                assert name not in text, f"{path.name} names {name}"
