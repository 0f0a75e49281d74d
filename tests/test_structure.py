"""The structure of the code: which part may import which, and which files edit graphs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent.parent / "fxlora"

# From the bottom up: a part imports only from rows above its own in this list, or its own folder.
LAYERS = [
    {"names"},
    {"errors", "tables"},
    {"data", "fx"},
    {"lora"},
    {"fast"},
    {"config"},
    {"plan"},
    {"module"},
    {"reads", "frontends"},
    {"matching"},
    {"passes"},
    {"api"},
    {"arithmetic", "costs", "disk", "proof"},
    {"pictures", "hosts", "routed"},
    {"peft", "delivery"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the parts of fxlora that a file imports."""
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
        if path.stem not in ("ops", "convolutions", "spellings", "facts"):
            for name in ("aten.linear", "aten.conv", "aten.embedding", "aten.matmul"):
                assert name not in text, f"{path.name} names {name}"


# ---- files that write to graphs -----------------------------------------------------------------

# Files outside passes/ that write to a graph, and to which graph or part of one.
GRAPH_WRITERS = {
    "delivery/metadata.py": "places in the source, in a copy of the graph that is exported",
    "fast/frozen.py": "calls with one gradient, in a copy of the explicit graph",
    "fast/graph.py": "joint ops, in a copy of the explicit graph, which stays",
    "fast/losses.py": "the head and loss of some rows as one call, in that copy",
    "fast/merged.py": "layers with one weight as one call, in that copy",
    "fast/nested.py": "fast nested graphs, in that copy",
    "fast/norms.py": "the norms of DoRA as one call, in that copy",
    "fast/recompute.py": "chains as one call, in that copy",
    "frontends/__init__.py": "names of tensors and modules, in graphs that the capture is making",
    "frontends/arguments.py": "no graph: an empty one, to ask what every captured module has",
    "frontends/autocast_choices.py": "constants and assertions, in a graph just exported",
    "frontends/decoded.py": "parameters for constants, in a graph that the capture is making",
    "frontends/rounded.py": "round trips as one node, in a graph that the capture is making",
    "frontends/subgraphs.py": "a graph of its own for a part of another",
    "frontends/exported.py": "calls recorded during an export, in the meta of its module",
    "frontends/joined.py": "names of constants, in a capture that is being joined to another",
    "frontends/kept/module_calls.py": "marks of the calls to outline, in a graph just exported",
    "frontends/kept/checkpoints.py": "checkpoints become nested graphs while a capture is made",
    "frontends/kept/functions.py": "calls of autograd.Functions, in a graph just exported",
    "frontends/kept/tensor_state.py": "aliases recorded in an export, in a graph just exported",
    "frontends/kept/subclasses.py": "calls on quantised weights, in a graph just exported",
    "frontends/kept/recurrent.py": "torch's ops for opaque ones, in a graph just exported",
    "frontends/spellings.py": "aten overloads for Python's spellings, in a graph just traced",
    "frontends/tree.py": "tied weights under each module's name, in a capture that is being made",
    "fx/nested.py": "operands of calls of nested graphs: the helper that passes write with",
    "module/blocks/around.py": "calls of submodules, in a copy of the flat graph, which stays",
    "module/blocks/inside.py": "a graph of its own for each outlined call",
    "module/blocks/prepared.py": "a copy of the flat graph, to be split at calls",
    "module/merge_aware.py": "reads of quantised weights, in a copy of the explicit graph",
    "module/casts.py": "casts of A and B, after the user's .to(); passes mark their places",
    "module/captured.py": "the meta of a module's copy, no node's",
    "module/retarget.py": "devices and dtypes that constants name, after the user's .to()",
    "module/parent.py": "the one call that a module of regions consists of",
    "module/size_guards.py": "a graph of its own for each guard",
    "module/several_calls.py": "the one call that chooses among the calls of a module",
}

_EDITS = {
    *("create_node", "erase_node", "node_copy", "graph_copy", "eliminate_dead_code"),
    *("inserting_before", "inserting_after"),
    *("replace_all_uses_with", "replace_input_with", "update_arg", "update_kwarg", "insert_arg"),
    *("call_function", "call_method", "call_module", "placeholder", "output", "get_attr"),
    *("_replace_input_with", "_update_args_kwargs", "process_inputs"),
}
_PARTS = {"op", "target", "args", "kwargs", "meta", "graph", "_args", "_kwargs"}  # node attributes
_DICT_EDITS = {"update", "pop", "setdefault", "clear", "popitem"}


def _graph_edits(path: Path) -> list[str]:
    """Return the lines of a file that write to a torch.fx graph."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_meta = isinstance(node.func.value, ast.Attribute) and node.func.value.attr == "meta"
            if node.func.attr in _EDITS or (of_meta and node.func.attr in _DICT_EDITS):
                found.append(node)
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        found += [target for target in targets if _is_part_of_node(target)]
    return [f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}" for node in found]


def _is_part_of_node(target: ast.AST) -> bool:
    """Whether an assignment is to `node.target`, `node.meta[...]`, …, of an object but `self`."""
    if isinstance(target, ast.Tuple | ast.List):
        return any(map(_is_part_of_node, target.elts))
    if isinstance(target, ast.Subscript):
        target = target.value
        if isinstance(target, ast.Attribute) and target.attr not in ("meta", "_args", "_kwargs"):
            return False
    if not isinstance(target, ast.Attribute) or target.attr not in _PARTS:
        return False
    return not (isinstance(target.value, ast.Name) and target.value.id == "self")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_passes_rewrite_captured_graphs(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    edits = _graph_edits(path)
    if name not in GRAPH_WRITERS and not name.startswith("passes/"):
        assert not edits, f"passes/ rewrite captured graphs: {', '.join(edits)}"


def test_graph_writers_exist() -> None:
    assert set(GRAPH_WRITERS) <= {path.relative_to(PACKAGE).as_posix() for path in FILES}


def test_every_way_of_writing_to_a_graph_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    writes = [
        "graph.erase_node(n)",
        "n.replace_all_uses_with(m)",
        "n.args = (m,)",
        "n.meta['val'] = m",
        "n.meta.update(m)",
        "a, n.target = 1, 'x'",
        "del n.meta['val']",
        "with graph.inserting_after(n): pass",
        "module.graph = graph",
    ]
    for number, line in enumerate(writes):
        path = tmp_path / f"writes_{number}.py"
        path.write_text(line)
        assert _graph_edits(path), line
    reads = tmp_path / "reads.py"
    reads.write_text("self.args = n.args\nx = n.meta['val']\nn.users\nd['args'] = 1")
    assert not _graph_edits(reads)
