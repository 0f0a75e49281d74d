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
from .ops import FLATTENED, OPS, TRANSPOSES, Op, kind_of


@dataclass(frozen=True)
class Reader:
    """One node that reads a weight.

    Attributes:
        node: the reading node.
        op: its row in the table of ops, or None where it reads the weight in another way.
        kind: the op's name.
        call_site: path of the module whose forward made the call, as far as capture knows.
        line: `file:line` of the call, or "".
    """

    node: fx.Node
    op: Op | None
    kind: str
    call_site: str
    line: str

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
        op: kind of the op that reads it, or that reads what is computed from it and other
            weights alone (W * mask, a parametrization); of the first with a row in the table.
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
            aliases = (*site.aliases, *_parametrized(module, names))
            over = tuple(overlaps.get(first, ()))
            sites.append(dataclasses.replace(site, aliases=aliases, overlaps=over))
    return sites


def _parametrized(module: CapturedModule, names: list[str]) -> list[str]:
    """The names that weights behind torch's parametrizations have for the user: the module's.

    Of several originals (weight_norm has a magnitude and a direction) the largest has them.
    """
    found: list[str] = []
    for name in names:
        owner, _, path = name.rpartition(".parametrizations.")
        tensor, _, original = path.partition(".")
        if original.startswith("original"):
            container = module.get_submodule(name.rpartition(".")[0])
            sizes = {n: p.numel() for n, p in container.named_parameters(recurse=False)}
            if sizes[original] == max(sizes.values()):
                found += [owner, f"{owner}.{tensor}"]
    return found


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
        for node in graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), []).extend(_readers(node))
            if node.op == "call_module":
                for name in _inside(module, str(node.target)):
                    readers.setdefault(name, []).append(_reader(node, None))
            for name in written_attributes(node, module):
                writers.setdefault(name, _reader(node, None))
    return readers, writers


def _inside(module: CapturedModule, path: str) -> list[str]:
    """Names of the parameters of a module that the tracer kept whole."""
    return [f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters()]


def _readers(weight: fx.Node) -> Iterator[Reader]:
    for user in weight.users:
        positions = [i for i, arg in enumerate(user.args) if arg is weight]
        uses = sum(n is weight for n in _flat_inputs(user))
        yield _reader(
            user, OPS.get((user.target, positions[0])) if positions and uses == 1 else None
        )


def _flat_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they stand there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _reader(node: fx.Node, op: Op | None) -> Reader:
    kind = op.kind if op else kind_of(node)
    if node.op == "call_module":
        kind = f"module {node.target}"
    return Reader(node, op, kind, _call_site(node), _source_line(node))


def _site(
    first: str,
    names: list[str],
    weight: torch.Tensor,
    readers: tuple[Reader, ...],
    writer: Reader | None,
) -> Site:
    direct = next((reader for reader in readers if reader.op), None)
    main, flipped = (direct, False) if direct else _through_weights(readers[0])
    shape = tuple(weight.shape)
    in_first = main.op.in_first if main.op else False
    if main.kind == "matmul":  # the other ops' names fix which factor is A
        in_first ^= flipped
    flattened = main.kind in FLATTENED
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


def _through_weights(reader: Reader) -> tuple[Reader, bool]:
    """The read of what is computed from this weight and other weights alone, or the read itself;

    and whether the weight is transposed on the way.
    """
    queue = [(reader.node, False)]
    seen: set[fx.Node] = set()
    while queue:
        node, flipped = queue.pop(0)
        if node in seen or not _depends_on_weights_alone(node):
            continue
        seen.add(node)
        flipped ^= kind_of(node) in TRANSPOSES
        for read in _readers(node):
            if read.op and not _depends_on_weights_alone(read.node):
                return read, flipped
        queue += [(user, flipped) for user in node.users]
    return reader, False


def _depends_on_weights_alone(node: fx.Node) -> bool:
    sources, seen = [node], {node}
    while sources:
        source = sources.pop()
        if source.op == "placeholder":
            return False
        new = set(source.all_input_nodes) - seen
        seen |= new
        sources += new
    return True


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
    names = [argument.name for argument in _schema(node)]
    position = next(i for i, name in enumerate(names) if name in ("groups", "n_weight_grps"))
    given = position < len(node.args)
    groups: Any = node.args[position] if given else node.kwargs.get(names[position], 1)
    return int(groups)


def _schema(node: fx.Node) -> Any:
    schema: Any = getattr(node.target, "_schema", None)
    return schema.arguments


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
