"""Sites: every weight of a captured module with every node that reads it, in every graph."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .dialect import written_attributes
from .module import CapturedModule
from .ops import FLATTENED, Op, is_product, is_transpose, kind_of, reads_no_values, row_of


@dataclass(frozen=True)
class Reader:
    """One node where a weight meets the data.

    Attributes:
        node: the reading node.
        op: its row in the table of ops, or None where it reads the weight in another way.
        kind: the op's name.
        through: what it reads is not the weight but a function of it, and this is the first op
            on the way (a cast, a weight norm); "" where it is the weight or its transpose.
        call_site: path of the module whose forward made the call, as far as capture knows.
        line: `file:line` of the call, or "".
    """

    node: fx.Node
    op: Op | None
    kind: str
    through: str
    call_site: str
    line: str

    @property
    def branch(self) -> Op | None:
        """The row by which a branch can stand beside this read."""
        return None if self.through else self.op

    def describe(self) -> str:
        """The op and where it is called, for messages."""
        return f"{self.kind} reads at {self.line}" if self.line else f"{self.kind} reads"


@dataclass(frozen=True)
class Site:
    """A weight of two or more dimensions, by tensor identity, and all its readers.

    Attributes:
        name: the owner: a module's path for its `weight`, else the parameter's name.
        parameter: the parameter's (first) name in `state_dict()`.
        names: all its names in `state_dict()`: a tied weight has several.
        aliases: every name that a rule may call it by: those, the modules that own them, and
            the module around them whose forward reads the weight instead (MultiheadAttention
            reads its out_proj's).
        op: kind of the op that reads it (of the first reader with a row in the table).
        shape: of the weight.
        in_features, out_features: of the layer (channels, for a convolution).
        kernel_size: of a convolution, else ().
        groups: of a convolution, else 1.
        in_first: whether the weight is stored (in, out).
        padding_idx: row of an embedding that never trains, or None.
        dtype: of the weight.
        readers: the nodes that read it, over all graphs.
        writer: a node that writes to it, or None.
        overlaps: other parameters in the same memory.
    """

    name: str
    parameter: str
    names: tuple[str, ...]
    aliases: tuple[str, ...]
    op: str
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    kernel_size: tuple[int, ...]
    groups: int
    in_first: bool
    padding_idx: int | None
    dtype: torch.dtype
    readers: tuple[Reader, ...] = field(repr=False)
    writer: Reader | None = field(repr=False)
    overlaps: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def convolution(self) -> bool:
        return self.op.startswith("conv") and "transpose" not in self.op

    @property
    def max_rank(self) -> int:
        """The rank beyond which a low-rank pair says nothing more: min(d0, d1)."""
        return min(self.shape[0], math.prod(self.shape[1:]))


def find_sites(module: CapturedModule) -> list[Site]:
    """The sites of a module that no adapter has been injected into, in the model's order."""
    readers, writers = _by_parameter(module)
    overlaps = _overlaps(module)
    sites: list[Site] = []
    for first, names in module.aliases().items():
        weight = module.get_parameter(first)
        found = tuple(reader for name in names for reader in readers.get(name, ()))
        if found and weight.ndim >= 2 and weight.is_floating_point():
            writer = next((writers[name] for name in names if name in writers), None)
            site = _site(first, names, weight, found, writer)
            sites.append(dataclasses.replace(site, overlaps=tuple(overlaps.get(first, ()))))
    return sites


def _overlaps(module: CapturedModule) -> dict[str, list[str]]:
    """Parameters that are different tensors over the same memory, by name."""
    spans: list[tuple[int, int, str]] = []
    for name, parameter in module.named_parameters():
        start = 0 if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
        if start:
            last = sum(
                (n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
            )
            spans.append((start, start + (last + 1) * parameter.element_size(), name))
    found: dict[str, list[str]] = {}
    spans.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            found.setdefault(name, []).append(other)
            found.setdefault(other, []).append(name)
    return found


def _by_parameter(
    module: CapturedModule,
) -> tuple[dict[str, list[Reader]], dict[str, Reader]]:
    """Every reader, and a writer, of every attribute by the name it has in the graphs."""
    readers: dict[str, list[Reader]] = {}
    writers: dict[str, Reader] = {}
    for graph in module.distinct_graphs():
        constants = _constants(graph)
        for node in graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), []).extend(_readers(node, constants))
            if node.op == "call_module":
                for name in _inside(module, str(node.target)):
                    readers.setdefault(name, []).append(_reader(node, None))
            for name in written_attributes(node, module):
                writers.setdefault(name, _reader(node, None))
    return readers, writers


def _inside(module: CapturedModule, path: str) -> list[str]:
    """Names of the parameters of a module that the tracer kept whole."""
    return [f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters()]


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters and buffers alone."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and constants.issuperset(node.all_input_nodes)
        if computed or node.op == "get_attr":
            constants.add(node)
    return constants


def _readers(weight: fx.Node, constants: set[fx.Node]) -> Iterator[Reader]:
    """Where a weight, or what weights alone make, takes part in a product or meets data.

    In the graph's order: that of `users` is not a copy's.
    """
    seen: set[fx.Node] = set()

    def follow(value: fx.Node, transposed: bool, through: str) -> Iterator[Reader]:
        for user in sorted(value.users):
            if reads_no_values(user) or user in seen:
                continue
            row = _row(user, value, transposed)
            if row or is_product(user) or user not in constants or not user.users:
                yield _reader(user, row, through)
                continue
            seen.add(user)
            if is_transpose(user):
                yield from follow(user, not transposed, through)
            else:
                yield from follow(user, transposed, through or kind_of(user))

    return follow(weight, False, "")


def _row(user: fx.Node, value: fx.Node, transposed: bool) -> Op | None:
    positions = [i for i, arg in enumerate(user.args) if arg is value]
    uses = sum(n is value for n in _flat_inputs(user))
    return row_of(user, positions[0], transposed) if positions and uses == 1 else None


def _flat_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they stand there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _reader(node: fx.Node, op: Op | None, through: str = "") -> Reader:
    kind = op.kind if op else f"operand of {kind_of(node)}" if is_product(node) else kind_of(node)
    if node.op == "call_module":
        kind = f"module {node.target}"
    return Reader(node, op, kind, through, _call_site(node), _source_line(node))


def _site(
    first: str,
    names: list[str],
    weight: torch.Tensor,
    readers: tuple[Reader, ...],
    writer: Reader | None,
) -> Site:
    main = next((reader for reader in readers if reader.op), readers[0])
    shape = tuple(weight.shape)
    in_first = main.op.in_first if main.op else False
    flattened = FLATTENED.get(main.kind) == len(shape)
    groups = _groups(main.node) if flattened else 1
    inputs, outputs = (shape[0], shape[1]) if in_first else (shape[1], shape[0])
    if "transpose" in main.kind:
        inputs, outputs = shape[0], shape[1] * groups
    elif flattened:
        inputs = shape[1] * groups
    return Site(
        name=_owner(first),
        parameter=first,
        names=tuple(names),
        aliases=_aliases(names, readers),
        op=main.kind,
        shape=shape,
        in_features=inputs,
        out_features=outputs,
        kernel_size=shape[2:] if flattened else (),
        groups=groups,
        in_first=in_first,
        padding_idx=_padding_idx(main.node) if main.kind == "embedding" else None,
        dtype=weight.dtype,
        readers=readers,
        writer=writer,
    )


def _owner(parameter: str) -> str:
    module, _, name = parameter.rpartition(".")
    return module if module and name == "weight" else parameter


def _aliases(names: list[str], readers: tuple[Reader, ...]) -> tuple[str, ...]:
    modules = [name.rpartition(".")[0] for name in names]
    around = [
        reader.call_site
        for reader in readers
        if any(module.startswith(f"{reader.call_site}.") for module in modules)
    ]
    return tuple(dict.fromkeys([*map(_owner, names), *names, *filter(None, modules), *around]))


def _groups(node: fx.Node) -> int:
    # the seventh argument of every convolution, transposed or not
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return int(groups)


def _padding_idx(node: fx.Node) -> int | None:
    index: Any = node.args[2] if len(node.args) > 2 else -1
    return index if index >= 0 else None


def _call_site(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def _source_line(node: fx.Node) -> str:
    """The last `file:line` of the call's stack trace, or ""."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return ":".join(places[-1]) if places else ""
