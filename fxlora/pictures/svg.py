"""SVG of a few nodes of a graph, in layers from their inputs down."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from ..fx.calls import kind_of
from ..names import printable
from .neighborhood import Neighborhood

_HEIGHT, _GAP_X, _GAP_Y, _CHARACTER, _MARGIN = 40, 18, 34, 6.9, 14

# Colours of boxes (fill, edge), readable on white and on black.
_COLOURS = {
    "op": ("#ffffff", "#5b6472"),
    "weight": ("#dbe7ff", "#3b6fd4"),
    "adapter": ("#ffe3c2", "#d9730d"),
    "border": ("#f3f4f6", "#b6bcc6"),
}


class Svg(str):
    """A picture as SVG text, which notebooks show."""

    def _repr_svg_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class _Box:
    """A node's box: its two lines of text, its colour, and its top left corner."""

    label: str
    shape: str
    kind: str
    x: float
    y: float

    @property
    def width(self) -> float:
        return _width(self.label, self.shape)


def drawn(parts: Sequence[Neighborhood]) -> Svg:
    """Draw neighborhoods next to each other."""
    pictures: list[str] = []
    left, height = 0.0, 0.0
    for part in parts:
        content, width, depth = _picture(part)
        pictures.append(f'<g transform="translate({left:.0f} 0)">{content}</g>')
        left, height = left + width, max(height, depth)
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left:.0f} {height:.0f}" '
        f'width="{left:.0f}" height="{height:.0f}" font-family="ui-monospace, monospace" '
        f'font-size="11.5" role="img">{_ARROW}{"".join(pictures)}</svg>'
    )


_ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#5b6472"/></marker></defs>'
)


def _picture(part: Neighborhood) -> tuple[str, float, float]:
    """Return the drawing of one neighborhood, its width and its height."""
    layers = _layers(part)
    rows = [sum(_width(*_text(part, n)) + _GAP_X for n in layer) - _GAP_X for layer in layers]
    widest = max(rows)
    boxes: dict[fx.Node, _Box] = {}
    for level, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        x = _MARGIN + (widest - row) / 2
        y = _MARGIN + level * (_HEIGHT + _GAP_Y)
        for node in layer:
            boxes[node] = _Box(*_text(part, node), _kind(part, node), x, y)
            x += boxes[node].width + _GAP_X
    lines = [
        _line(boxes[source], boxes[node])
        for node in part.nodes
        for source in node.all_input_nodes
        if source in boxes
    ]
    drawing = "".join([*lines, *map(_box, boxes.values())])
    height = 2 * _MARGIN + len(layers) * _HEIGHT + (len(layers) - 1) * _GAP_Y
    return drawing, widest + 2 * _MARGIN, height


def _layers(part: Neighborhood) -> list[list[fx.Node]]:
    """Sort the nodes into layers so that edges point down, and order each to cross few edges."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    graph.add_nodes_from(part.nodes)
    graph.add_edges_from(
        (source, node)
        for node in part.nodes
        for source in node.all_input_nodes
        if source in graph and not (source in part.border and node in part.border)
    )
    level: dict[fx.Node, int] = {}
    for node in reversed(list(nx.topological_sort(graph))):  # next to the nodes that take it
        level[node] = min((level[user] for user in graph.successors(node)), default=0) - 1
    layers: list[list[fx.Node]] = []
    place: dict[fx.Node, float] = {}
    for depth in sorted(set(level.values())):
        centers = {
            node: _mean([place[source] for source in graph.predecessors(node)])
            for node in part.nodes
            if level[node] == depth
        }
        layer = sorted(centers, key=centers.__getitem__)
        place |= {node: (i + 1) / (len(layer) + 1) for i, node in enumerate(layer)}
        layers.append(layer)
    return layers


def _mean(numbers: list[float]) -> float:
    """Return the mean, or infinity for a node without inputs: it goes to the right."""
    return sum(numbers) / len(numbers) if numbers else float("inf")


def _text(part: Neighborhood, node: fx.Node) -> tuple[str, str]:
    """Return the two lines of a node's box: its op or name, and the shape of its value."""
    named = node.op in ("get_attr", "placeholder", "output")
    return printable(str(node.target) if named else kind_of(node)), part.shapes[node]


def _kind(part: Neighborhood, node: fx.Node) -> str:
    if node in part.adapter:
        return "adapter"
    if node in part.weights:
        return "weight"
    return "border" if node in part.border else "op"


def _width(label: str, shape: str) -> float:
    return max(len(label), len(shape), 4) * _CHARACTER + 16


def _line(source: _Box, target: _Box) -> str:
    x1, y1 = source.x + source.width / 2, source.y + _HEIGHT
    x2, y2 = target.x + target.width / 2, target.y
    bend = max(14.0, (y2 - y1) / 2)
    path = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="#5b6472" marker-end="url(#arrow)"/>'


def _box(box: _Box) -> str:
    fill, edge = _COLOURS[box.kind]
    dash = ' stroke-dasharray="4 3"' if box.kind == "border" else ""
    middle = box.x + box.width / 2
    lines = [(box.label, 17 if box.shape else 24, "#14181f"), (box.shape, 32, "#5b6472")]
    text = "".join(
        f'<text x="{middle:.0f}" y="{box.y + dy:.0f}" text-anchor="middle" fill="{colour}">'
        f"{html.escape(line)}</text>"
        for line, dy, colour in lines
        if line
    )
    return (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{_HEIGHT}" rx="7" '
        f'fill="{fill}" stroke="{edge}"{dash}/>{text}'
    )
