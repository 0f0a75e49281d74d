"""Mutation testing of `verify`: a model is adapted, one thing is broken, and verify must notice.

Each kind of damage is a function that breaks the index-th place of its kind and returns whether
there is one. A mutant counts only if the damage changes something: the outputs or gradients of a
mode, the state, the plan, or whether the module runs. It is caught if fxlora raises one of its own
errors.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import CapturedModule, LoraConfig, Rule
from fxlora.fx.marks import ADAPTER
from fxlora.passes.structure import Insertion, insertions, remove_insertion
from fxlora.plan import Entry

from .laws import floats, randomise
from .models import Attention, Convolutions, Mlp, Normed, Readers, Tied
from .patterns import PATTERNS
from .typed import plan_of, untyped

aten = torch.ops.aten
MODES = ("train", "eval")
PLACES = 2  # mutants per kind of damage and model, each broken in another place


# ---- the models ---------------------------------------------------------------------------------


class Regions(nn.Module):
    """A model with an autocast region, a checkpoint, a cast, and a buffer that the graph reads."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)
        self.register_buffer("offset", torch.randn(4))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.down(torch.tanh(self.up(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.block(x)
        y = checkpoint(self.last, y.to(x.dtype), use_reentrant=False)
        return torch.tanh(y.to(torch.float64)) + self.offset


class Casts(nn.Module):
    """Casts activations to another precision and back, as language models do around a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x).to(torch.bfloat16)).to(torch.float64)
        return self.down(hidden)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how it is adapted."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    rules: Any
    dtype: torch.dtype = torch.float64
    match: dict[str, Any] = field(default_factory=dict[str, Any])


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, **options)


def every(**options: Any) -> Rule:
    return Rule(lora=lora(**options))


def pattern(name: str) -> Case:
    found = PATTERNS[name]
    model, args = found.built()
    return Case(lambda: copy.deepcopy(model), args, found.fxlora_rules(), match=dict(found.match))


_MAKERS: dict[str, Callable[[], Case]] = {
    "Mlp": lambda: Case(Mlp, (torch.randn(4, 5),), every(lora_dropout=0.2)),
    "Mlp, bfloat16": lambda: Case(Mlp, (torch.randn(4, 5),), every(), torch.bfloat16),
    "Mlp, DoRA": lambda: Case(Mlp, (torch.randn(4, 5),), every(use_dora=True)),
    "Mlp, PiSSA": lambda: Case(Mlp, (torch.randn(4, 5),), every(init_lora_weights="pissa")),
    "Convolutions": lambda: Case(Convolutions, (torch.randn(2, 6, 5, 18, 11),), every()),
    "Readers": lambda: Case(Readers, (torch.randn(3, 5), torch.randint(13, (3, 4))), every()),
    "Tied": lambda: Case(Tied, (torch.tensor([[1, 2, 5]]),), Rule(["emb", "head"], lora=lora())),
    "Tied, head alone": lambda: Case(
        Tied, (torch.tensor([[1, 2, 5]]),), Rule(["head", "mix"], lora=lora())
    ),
    "Attention": lambda: Case(Attention, (torch.randn(2, 5, 8),), every()),
    "Normed": lambda: Case(
        Normed,
        (torch.randn(3, 3, 9, 7),),
        [
            Rule("fc", train=True),
            Rule(["conv", "twice"], lora=lora(lora_dropout=0.1)),
        ],
    ),
    "nested graphs": lambda: Case(Regions, (torch.randn(4, 5),), Rule(["up", "last"], lora=lora())),
    "casts": lambda: Case(Casts, (torch.randn(4, 5),), every()),
    "torch.cond": lambda: pattern("torch.cond"),
    "packed QKV": lambda: pattern("packed QKV: q and v"),
    "LSTM": lambda: pattern("LSTM, projected, both ways"),
    "stacked experts": lambda: pattern("stacked experts, bmm"),
    "regions": lambda: pattern("experts chosen by Python"),
}
CASES = tuple(_MAKERS)


@dataclass
class Mutant:
    """The modules of one case, sound until one of them is damaged.

    Attributes:
        captured: the module without adapters.
        lora: the adapted module, with random A and B.
        folded: the fold of `lora`.
        folder: the folder in which the adapter of `lora` is saved.
        args: the model's inputs.
    """

    captured: CapturedModule
    lora: CapturedModule
    folded: CapturedModule
    folder: Path
    args: tuple[Any, ...]

    @functools.cached_property
    def look(self) -> list[Any]:
        """Everything that a damage may change; of a sound mutant, computed once."""
        return _look(self)

    def copied(self) -> Mutant:
        lora, folded = copy.deepcopy(self.lora), copy.deepcopy(self.folded)
        return dataclasses.replace(self, lora=lora, folded=folded)


def sound(name: str, folder: Path) -> Mutant:
    """Build a case without damage; raise if verify refuses it."""
    torch.manual_seed(0)
    case = _MAKERS[name]()

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(case.dtype) if floating else leaf

    args = pytree.tree_map(cast, case.args)
    captured = fxlora.capture(case.make().to(case.dtype), args)
    adapted = fxlora.inject(captured, fxlora.match(captured, case.rules, **case.match))
    randomise(adapted)
    folded = fxlora.fold(adapted)
    fxlora.save_adapter(adapted, folder)
    fxlora.verify(adapted, args, folded=folded)
    fxlora.verify(adapted, args)
    return Mutant(captured, adapted, folded, folder, args)


# ---- kinds of damage ----------------------------------------------------------------------------

Damage = Callable[[Mutant, int], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of damage.

    Attributes:
        of: the damaged object, and how it is verified. "adapted": the adapted module, by itself.
            "with its fold": the adapted module, against the fold that was made before. "folded":
            the fold. "saved": the adapter folder; the adapter loaded from it is verified against
            the fold that was made before.
        damage: breaks the index-th place, and returns whether there is one.
    """

    of: str
    damage: Damage


KINDS: dict[str, Kind] = {}


def kind(name: str, of: str) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        KINDS[name] = Kind(of, damage)
        return damage

    return add


def nth(found: Iterator[Any] | list[Any], index: int) -> Any:
    return next((item for number, item in enumerate(found) if number == index), None)


def graphs(module: CapturedModule) -> list[fx.Graph]:
    nested = [inner.graph for inner in module.nested_graphs()]
    return [*module.distinct_graphs(), *nested]


def graph_of(module: CapturedModule, mode: str) -> fx.Graph:
    return module.programs[-1].graphs[mode]


def standing(module: CapturedModule, modes: tuple[str, ...] = MODES) -> list[Insertion]:
    found = {id(g): g for p in module.programs for m in modes for g in [p.graphs[m]]}
    return [insertion for graph in found.values() for insertion in insertions(module, graph)]


def entries(module: CapturedModule) -> list[Entry]:
    return list(module.plan or ())


def fetched(module: CapturedModule, name: str) -> list[fx.Node]:
    return [n for g in graphs(module) for n in g.nodes if n.op == "get_attr" and n.target == name]


def pair_of(module: CapturedModule, names: list[str], index: int) -> tuple[str, str] | None:
    """Return the index-th pair of distinct parameters of equal shape."""
    shapes = {name: module.get_parameter(name).shape for name in names}
    tensors = {name: module.get_parameter(name) for name in names}
    pairs = (
        (a, b)
        for number, a in enumerate(names)
        for b in names[number + 1 :]
        if shapes[a] == shapes[b] and tensors[a] is not tensors[b]
    )
    return nth(pairs, index)


def inserted(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert op(node, …) between a node and all its users."""
    users = list(node.users)
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    with node.graph.inserting_before(behind):
        more = node.graph.call_function(target, (node, *args))
    for user in users:
        user.replace_input_with(node, more)
    return more


def added(weights: list[torch.Tensor], index: int, size: float = 1e-3) -> bool:
    weight = nth(weights, index)
    if weight is None:
        return False
    with torch.no_grad():
        flat = weight.view(-1)
        flat[len(flat) // 2] += max(size, 2 * torch.finfo(weight.dtype).eps) * flat.abs().max()
    return True


def owned(module: CapturedModule, name: str) -> torch.Tensor:
    """Return a parameter with cloned data, so that writing to it spares the sound modules."""
    parameter = module.get_parameter(name)
    parameter.data = parameter.data.clone()
    return parameter


def plain_names(module: CapturedModule) -> list[str]:
    """Return the first names of the parameters that the plan neither adapts, adds nor trains."""
    plan = {name for entry in entries(module) for name in entry.names}
    plan |= module.adapter_parameters() | module.trained
    return [first for first, names in module.aliases().items() if plan.isdisjoint(names)]


def replaced_number(graph: fx.Graph, old: float, new: float) -> bool:
    """Replace a float in the arguments of the first node that has it; return whether one does."""

    def other(value: Any) -> Any:
        return new if isinstance(value, float) and value == old else value

    for node in graph.nodes:
        args, kwargs = pytree.tree_map(other, (node.args, dict(node.kwargs)))
        if (args, kwargs) != (node.args, dict(node.kwargs)):
            node.args, node.kwargs = args, kwargs
            return True
    return False


# Damage to adapted modules: the graphs.


@kind("a branch deleted", "adapted")
def _(broken: Mutant, index: int) -> bool:
    entry = nth(entries(broken.lora), index)
    for insertion in reversed(standing(broken.lora)) if entry else ():
        if insertion.entry == entry:
            remove_insertion(insertion)
    broken.lora.refresh()
    return entry is not None


@kind("one read without its adapter", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(standing(broken.lora), 2 * index)
    if found:
        remove_insertion(found)
        broken.lora.refresh()
    return found is not None


def _missing_in(mode: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        entry = nth(entries(broken.lora), index)
        if entry is None or graph_of(broken.lora, "train") is graph_of(broken.lora, "eval"):
            return False
        for insertion in reversed(standing(broken.lora, (mode,))):
            if insertion.entry == entry:
                remove_insertion(insertion)
        broken.lora.refresh()
        return True

    return damage


kind("the train graph's branch missing", "adapted")(_missing_in("train"))
kind("the eval graph's branch missing", "adapted")(_missing_in("eval"))


@kind("a branch cut off from its sum", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(standing(broken.lora), index)
    if found:
        found.output.replace_all_uses_with(found.base)
        broken.lora.refresh()
    return found is not None


@kind("a use that goes past the adapter", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(standing(broken.lora), index)
    user = next(iter(found.output.users), None) if found else None
    if found is None or user is None:
        return False
    user.replace_input_with(found.output, found.base)
    broken.lora.refresh()
    return True


@kind("a bare read more", "adapted")
def _(broken: Mutant, index: int) -> bool:
    entry, graph = nth(entries(broken.lora), index), graph_of(broken.lora, "train")
    output = graph.output_node()
    first = next((n for n in output.all_input_nodes if _is_float(n)), None)
    known = {n.target for n in graph.nodes if n.op == "get_attr"}
    if entry is None or first is None or entry.names[0] not in known:
        return False
    with graph.inserting_before(output):
        weight = graph.create_node("get_attr", entry.names[0])
        more = graph.call_function(aten.sum.default, (weight,))
        output.replace_input_with(first, graph.call_function(aten.add.Tensor, (first, more)))
    broken.lora.refresh()
    return True


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _exchanged(which: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        names = [getattr(entry, which) for entry in entries(broken.lora)]
        pair = pair_of(broken.lora, names, index)
        if pair is None:
            return False
        first, second = (fetched(broken.lora, name) for name in pair)
        for node in first:
            node.target = pair[1]
        for node in second:
            node.target = pair[0]
        broken.lora.refresh()
        return True

    return damage


kind("two A exchanged", "adapted")(_exchanged("name_a"))
kind("two B exchanged", "adapted")(_exchanged("name_b"))


def _scaled_by(factor: float) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        scaling = entries(broken.lora)[0].scaling
        found = nth(graphs(broken.lora), index)
        return (
            found is not None
            and replaced_number(found, scaling, factor * scaling)
            and _refreshed(broken.lora)
        )

    return damage


def _refreshed(module: CapturedModule) -> bool:
    module.refresh()
    return True


kind("scale off by a factor", "adapted")(_scaled_by(1.01))
kind("scale with the other sign", "adapted")(_scaled_by(-1.0))
kind("scale of zero", "adapted")(_scaled_by(0.0))


def _factor_readers(module: CapturedModule, which: str = "name_a") -> list[fx.Node]:
    names = {getattr(entry, which) for entry in entries(module)}
    return [n for g in graphs(module) for n in g.nodes if n.op == "get_attr" and n.target in names]


@kind("the branch reads another x", "adapted")
def _(broken: Mutant, index: int) -> bool:
    branches = [i for i in standing(broken.lora) if i.form == "branch" and not i.path]
    found = nth(branches, index)
    if found is None:
        return False
    nodes = fetched(broken.lora, found.entry.name_a)
    a = [n for n in nodes if n.graph is found.base.graph and n < found.output][-1]
    reader = next(iter(a.users))
    while not [n for n in reader.all_input_nodes if _is_float(n)]:
        reader = next(iter(reader.users))  # an op on A only: nodes of the adapter have no "val"
    x = next(n for n in reader.all_input_nodes if _is_float(n))
    alike = [
        n
        for n in x.graph.nodes
        if n < reader and n is not x and _is_float(n) and n.meta["val"].shape == x.meta["val"].shape
    ]
    with reader.graph.inserting_before(reader):
        other = alike[0] if alike else x.graph.call_function(aten.neg.default, (x,))
        reader.replace_input_with(x, other)
    return _refreshed(broken.lora)


def _factor_through(which: str, target: Any, *args: Any) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        found = nth(_factor_readers(broken.lora, which), index)
        return (
            found is not None and bool(inserted(found, target, *args)) and _refreshed(broken.lora)
        )

    return damage


kind("A with its columns reversed", "adapted")(_factor_through("name_a", aten.flip.default, [1]))
kind("B with its rows reversed", "adapted")(_factor_through("name_b", aten.flip.default, [0]))
kind("A transposed", "adapted")(_factor_through("name_a", aten.transpose.int, 0, 1))
kind("A detached", "adapted")(_factor_through("name_a", aten.detach.default))


@kind("dropout left in the eval graph", "adapted")
def _(broken: Mutant, index: int) -> bool:
    graph = graph_of(broken.lora, "eval")
    if graph is graph_of(broken.lora, "train"):
        return False
    found = nth([n for n in _factor_readers(broken.lora) if n.graph is graph], index)
    return (
        found is not None
        and bool(inserted(found, aten.dropout.default, 0.5, True))
        and (_refreshed(broken.lora))
    )


def _dropouts(module: CapturedModule) -> list[fx.Node]:
    a = set(_factor_readers(module))
    found = [n for g in graphs(module) for n in g.nodes if n.target is aten.dropout.default]
    return [
        n for n in found if n.args[2] and all(not a.isdisjoint(u.all_input_nodes) for u in n.users)
    ]


@kind("dropout missing in the train graph", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(_dropouts(broken.lora), index)
    if found:
        found.replace_all_uses_with(found.args[0])
        found.graph.erase_node(found)
    return found is not None and _refreshed(broken.lora)


@kind("dropout of another probability", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(_dropouts(broken.lora), index)
    if found:
        found.args = (found.args[0], 0.5, True)
    return found is not None and _refreshed(broken.lora)


@kind("DoRA's gain dropped", "adapted")
def _(broken: Mutant, index: int) -> bool:
    names = {e.name_of("lora_magnitude_vector") for e in entries(broken.lora)}
    nodes = [n for g in graphs(broken.lora) for n in g.nodes if n.target in names]
    found = nth(nodes, index)
    return (
        found is not None
        and bool(inserted(found, aten.ones_like.default))
        and (_refreshed(broken.lora))
    )


@kind("a part's rows shifted", "adapted")
def _(broken: Mutant, index: int) -> bool:
    parts = [e for e in entries(broken.lora) if e.rows]
    entry = nth(parts, index)
    if entry is None:
        return False
    start, behind = entry.rows[0], entry.shape[entry.layout.part_dim] - entry.rows[1]
    for node in (n for g in graphs(broken.lora) for n in g.nodes):
        if node.target is aten.constant_pad_nd.default and list(node.args[1])[-2:] == [
            start,
            behind,
        ]:
            step = 1 if behind else -1
            pads = [*list(node.args[1])[:-2], start + step, behind - step]
            node.args = (node.args[0], pads)
            return _refreshed(broken.lora)
    return False


@kind("a nested graph's branch missing", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth([i for i in standing(broken.lora) if i.path], index)
    if found:
        found.output.replace_all_uses_with(found.base)
    return found is not None and _refreshed(broken.lora)


def _stale(module: CapturedModule, graph: fx.Graph, recompile: Callable[[], Any]) -> bool:
    """Recompile with one more op before the output, then remove the op from the graph only."""
    output = graph.output_node()
    first = next((n for n in output.all_input_nodes if _is_float(n)), None)
    if first is None:
        return False
    with graph.inserting_before(output):
        more = graph.call_function(aten.neg.default, (first,))
    output.replace_input_with(first, more)
    recompile()
    output.replace_input_with(more, first)
    graph.erase_node(more)
    return True


@kind("a nested graph's code stale", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(broken.lora.nested_graphs(), index)
    return found is not None and _stale(broken.lora, found.graph, found.recompile)


@kind("a graph's code stale", "adapted")
def _(broken: Mutant, index: int) -> bool:
    runner = nth([*broken.lora.runners] or [broken.lora], index)
    return runner is not None and _stale(broken.lora, runner.graph, runner.recompile)


@kind("an adapter's mark lost", "adapted")
def _(broken: Mutant, index: int) -> bool:
    found = nth(standing(broken.lora), index)
    if found:
        del found.output.meta[ADAPTER]
    return (
        found is not None
        and bool(inserted(found.output, aten.neg.default))
        and (_refreshed(broken.lora))
    )


# Damage to adapted modules: the plan, and requires_grad.


@kind("another scale in the plan", "adapted")
def _(broken: Mutant, index: int) -> bool:
    return _planned(broken, index, lambda e: [dataclasses.replace(e, scaling=2 * e.scaling)])


@kind("an entry lost from the plan", "adapted")
def _(broken: Mutant, index: int) -> bool:
    return len(entries(broken.lora)) > 1 and _planned(broken, index, lambda e: [])


@kind("a part's rows shifted in the plan", "adapted")
def _(broken: Mutant, index: int) -> bool:
    def shifted(entry: Entry) -> list[Entry]:
        start, stop = entry.rows or (0, 0)
        step = 1 if stop < entry.shape[entry.layout.part_dim] else -1
        return [dataclasses.replace(entry, rows=(start + step, stop + step))]

    entry = nth(entries(broken.lora), index)
    return entry is not None and entry.rows is not None and _planned(broken, index, shifted)


def _planned(broken: Mutant, index: int, change: Callable[[Entry], list[Entry]]) -> bool:
    before = entries(broken.lora)
    if index >= len(before):
        return False
    after = (*before[:index], *change(before[index]), *before[index + 1 :])
    plan = dataclasses.replace(plan_of(broken.lora), entries=after)
    broken.lora.known = broken.lora.known.with_plans(lambda _: plan)
    return True


def _frozen(names: Callable[[CapturedModule], list[str]], required: bool) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        name = nth(names(broken.lora), index)
        if name is not None:
            broken.lora.get_parameter(name).requires_grad_(required)
        return name is not None

    return damage


kind("A frozen", "adapted")(_frozen(lambda m: [e.name_a for e in entries(m)], False))
kind("B frozen", "adapted")(_frozen(lambda m: [e.name_b for e in entries(m)], False))
kind("what trains in full frozen", "adapted")(_frozen(lambda m: sorted(m.trained), False))
kind("a weight under an adapter unfrozen", "adapted")(
    _frozen(lambda m: [e.parameter for e in entries(m)], True)
)
kind("a weight without adapter unfrozen", "adapted")(_frozen(plain_names, True))


# Damage to adapted modules: the tensors.


def _written(
    names: Callable[[CapturedModule], list[str]], write: Callable[[torch.Tensor], Any]
) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        name = nth(names(broken.lora), index)
        if name is None:
            return False
        with torch.no_grad():
            weight = owned(broken.lora, name)
            weight.copy_(write(weight.clone()))
        return True

    return damage


def _under(module: CapturedModule) -> list[str]:
    return list(dict.fromkeys(entry.parameter for entry in entries(module)))


def _one_more(weight: torch.Tensor) -> torch.Tensor:
    added([weight], 0)
    return weight


def _one_much_more(factor: torch.Tensor) -> torch.Tensor:
    """Add to an entry so much that a fold that is rounded to bfloat16 is another one."""
    added([factor], 0, size=1.0)
    return factor


kind("an entry of W changed", "adapted")(_written(_under, _one_more))
kind("rows of W permuted", "adapted")(_written(_under, lambda w: w.flip(0)))
kind("W negated", "adapted")(_written(_under, torch.neg))
kind("a bias or weight without adapter changed", "adapted")(_written(plain_names, _one_more))
kind("a weight without adapter permuted", "adapted")(
    _written(
        lambda m: [n for n in plain_names(m) if len(m.get_parameter(n)) > 1], lambda w: w.flip(0)
    )
)
kind("A or B not finite", "adapted")(
    _written(lambda m: [e.name_b for e in entries(m)], lambda w: w * float("nan"))
)
kind("A or B changed since the fold", "with its fold")(
    _written(lambda m: [n for e in entries(m) for n in e.trainable], _one_much_more)
)


@kind("A missing", "adapted")
def _(broken: Mutant, index: int) -> bool:
    entry = nth(entries(broken.lora), index)
    if entry:
        broken.lora.remove_parameter(entry.name_a)
    return entry is not None


@kind("A of another rank", "adapted")
def _(broken: Mutant, index: int) -> bool:
    entry = nth(entries(broken.lora), index)
    if entry:
        a, b = (broken.lora.get_parameter(n) for n in (entry.name_a, entry.name_b))
        dim_a, dim_b = entry.layout.rank_dims
        for name, tensor, dim in ((entry.name_a, a, dim_a), (entry.name_b, b, dim_b)):
            short = tensor.detach().narrow(dim, 0, 1).clone()
            broken.lora.set_parameter(name, nn.Parameter(short))
    return entry is not None


@kind("a padding row trained", "adapted")
def _(broken: Mutant, index: int) -> bool:
    entry = nth([e for e in entries(broken.lora) if e.padding_idx is not None], index)
    if entry:
        with torch.no_grad():
            broken.lora.get_parameter(entry.name_a)[:, entry.padding_idx] = 0.5
    return entry is not None


def _ties(module: CapturedModule) -> list[list[str]]:
    return [names for names in module.aliases().values() if len(names) > 1]


@kind("a tie dropped", "adapted")
def _(broken: Mutant, index: int) -> bool:
    names = nth(_ties(broken.lora), index)
    if names:
        held = broken.lora.get_parameter(names[0])
        broken.lora.set_parameter(
            names[-1], nn.Parameter(held.detach().clone(), held.requires_grad)
        )
    return names is not None


@kind("a tie made", "adapted")
def _(broken: Mutant, index: int) -> bool:
    names = [*_under(broken.lora), *plain_names(broken.lora)]
    pair = pair_of(broken.lora, names, index)
    if pair:
        broken.lora.set_parameter(pair[1], broken.lora.get_parameter(pair[0]))
    return pair is not None


# Damage to adapted modules outside the adapters. verify cannot tell it from an edit by the user,
# except by comparison with a fold that was made before.


def _casts(module: CapturedModule) -> list[fx.Node]:
    kinds = {"to", "_to_copy", "type_as"}
    return [
        n
        for g in graphs(module)
        for n in g.nodes
        if str(getattr(getattr(n.target, "overloadpacket", None), "__name__", "")) in kinds
    ]


def _cast_removed(which: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        module = getattr(broken, which)
        found = nth(_casts(module), index)
        if found:
            found.replace_all_uses_with(found.args[0])
            found.graph.erase_node(found)
        return found is not None and _refreshed(module)

    return damage


def _op_more(which: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        module = getattr(broken, which)
        graph = nth(module.distinct_graphs(), index)
        output = graph.output_node() if graph else None
        first = next((n for n in output.all_input_nodes if _is_float(n)), None) if output else None
        return first is not None and bool(inserted(first, aten.neg.default)) and _refreshed(module)

    return damage


def _modes_exchanged(which: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        module = getattr(broken, which)
        program = nth(module.programs, index)
        if program is None or program.graphs["train"] is program.graphs["eval"]:
            return False
        first, second = program.graphs["train"], program.graphs["eval"]
        program.graphs.update(train=second, eval=first)
        return _refreshed(module)

    return damage


def _one_mode_for_both(which: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        module = getattr(broken, which)
        program = nth(module.programs, index)
        if program is None or program.graphs["train"] is program.graphs["eval"]:
            return False
        program.graphs["train"] = program.graphs["eval"]
        return _refreshed(module)

    return damage


def _buffer_changed(which: str) -> Damage:
    def damage(broken: Mutant, index: int) -> bool:
        module = getattr(broken, which)
        return added([b for b in module.buffers() if b.is_floating_point()], index)

    return damage


for _of, _which in (("with its fold", "lora"), ("folded", "folded")):
    _in = "" if _of == "folded" else " beside the adapters"
    kind(f"a cast removed{_in}", _of)(_cast_removed(_which))
    kind(f"an op more{_in}", _of)(_op_more(_which))
    kind(f"graphs of the modes exchanged{_in}", _of)(_modes_exchanged(_which))
    kind(f"the eval graph for both modes{_in}", _of)(_one_mode_for_both(_which))
    kind(f"a buffer changed{_in}", _of)(_buffer_changed(_which))


# Damage to folded modules.


@kind("an entry of a folded weight changed", "folded")
def _(broken: Mutant, index: int) -> bool:
    name = nth(_under(broken.lora), index)
    return name is not None and added([owned(broken.folded, name)], 0, 1e-6)


def _folded_as(value: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Damage:
    """Replace a folded weight by a function of W0, the folded weight and s."""

    def damage(broken: Mutant, index: int) -> bool:
        entry = nth(entries(broken.lora), index)
        if entry is None:
            return False
        weight = broken.lora.get_parameter(entry.parameter).detach()
        with torch.no_grad():
            folded = owned(broken.folded, entry.parameter)
            folded.copy_(value(weight, folded.clone(), entry.scaling))
        return True

    return damage


kind("a weight not folded", "folded")(_folded_as(lambda w, f, s: w))
kind("a weight folded twice", "folded")(_folded_as(lambda w, f, s: 2 * f - w))
kind("a weight folded with the other sign", "folded")(_folded_as(lambda w, f, s: 2 * w - f))
kind("a weight folded without the scale", "folded")(_folded_as(lambda w, f, s: w + (f - w) / s))
kind("rows of a folded weight permuted", "folded")(_folded_as(lambda w, f, s: f.flip(0)))


@kind("a folded weight rounded twice", "folded")
def _(broken: Mutant, index: int) -> bool:
    entry = nth(entries(broken.lora), index)
    if (
        entry is None
        or entry.shape != entry.adapted_shape
        or len(entry.shape) != 2
        or entry.variants
    ):
        return False
    weight = owned(broken.folded, entry.parameter)
    a, b = (broken.lora.get_parameter(n).detach() for n in (entry.name_a, entry.name_b))
    if entry.layout.in_first:
        a, b = b.mT, a.mT
    with torch.no_grad():
        delta = ((b @ a) * entry.scaling).to(weight.dtype)
        weight.copy_(broken.lora.get_parameter(entry.parameter) + delta)
    return weight.dtype == torch.bfloat16


@kind("DoRA's gain dropped in the fold", "folded")
def _(broken: Mutant, index: int) -> bool:
    entry = nth([e for e in entries(broken.lora) if "dora" in e.variants], index)
    if entry:
        a, b = (broken.lora.get_parameter(n).detach() for n in (entry.name_a, entry.name_b))
        weight = owned(broken.folded, entry.parameter)
        with torch.no_grad():
            weight.copy_(broken.lora.get_parameter(entry.parameter) + entry.scaling * (b @ a))
    return entry is not None


@kind("two folded weights exchanged", "folded")
def _(broken: Mutant, index: int) -> bool:
    pair = pair_of(broken.folded, _under(broken.lora), index)
    if pair:
        first, second = (broken.folded.get_parameter(name) for name in pair)
        first.data, second.data = second.data, first.data
    return pair is not None


@kind("a weight without adapter changed in the fold", "folded")
def _(broken: Mutant, index: int) -> bool:
    name = nth(plain_names(broken.lora), index)
    return name is not None and added([owned(broken.folded, name)], 0, 0)


@kind("a tie dropped in the fold", "folded")
def _(broken: Mutant, index: int) -> bool:
    names = nth(_ties(broken.folded), index)
    if names:
        held = broken.folded.get_parameter(names[0]).detach()
        broken.folded.set_parameter(names[-1], nn.Parameter(held.clone(), False))
    return names is not None


@kind("a tie made in the fold", "folded")
def _(broken: Mutant, index: int) -> bool:
    names = list(broken.folded.aliases())
    pair = pair_of(broken.folded, names, index)
    if pair:
        broken.folded.set_parameter(pair[1], broken.folded.get_parameter(pair[0]))
    return pair is not None


@kind("a folded weight of another dtype", "folded")
def _(broken: Mutant, index: int) -> bool:
    name = nth(_under(broken.lora), index)
    if name is not None:
        parameter = broken.folded.get_parameter(name)
        parameter.data = parameter.data.float()
    return name is not None


@kind("the source's memory unfrozen in the fold", "folded")
def _(broken: Mutant, index: int) -> bool:
    # `copied` made deep copies, which share no memory: only a new fold shares the source's.
    broken.folded = fxlora.fold(broken.lora)
    name = nth(plain_names(broken.lora), index)
    if name is not None:
        # as a function: the parameter's own method gives it memory of its own first
        torch.Tensor.requires_grad_(broken.folded.get_parameter(name), True)
    return name is not None


@kind("a number of an op changed in the fold", "folded")
def _(broken: Mutant, index: int) -> bool:
    for graph in broken.folded.distinct_graphs()[index : index + 1]:
        for node in graph.nodes:
            for at, value in enumerate(node.args):
                if isinstance(value, float):
                    node.args = (*node.args[:at], value / 2 + 0.01, *node.args[at + 1 :])
                    return _refreshed(broken.folded)
    return False


@kind("a folded graph's code stale", "folded")
def _(broken: Mutant, index: int) -> bool:
    runner = nth([*broken.folded.runners] or [broken.folded], index)
    return runner is not None and _stale(broken.folded, runner.graph, runner.recompile)


@kind("a nested folded graph's code stale", "folded")
def _(broken: Mutant, index: int) -> bool:
    found = nth(broken.folded.nested_graphs(), index)
    return found is not None and _stale(broken.folded, found.graph, found.recompile)


# Damage to saved adapters.


@dataclass
class Saved:
    """The contents of an adapter folder's two files."""

    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]
    config: dict[str, Any]


def _saved(damage: Callable[[Saved, int], bool]) -> Damage:
    def damaged(broken: Mutant, index: int) -> bool:
        folder = Path(tempfile.mkdtemp())
        with safe_open(broken.folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = json.loads(file.metadata()["fxlora"])
        config = json.loads((broken.folder / "adapter_config.json").read_text(encoding="utf-8"))
        saved = Saved(tensors, header, config)
        if not damage(saved, index):
            return False
        metadata = {"fxlora": json.dumps(saved.header)}
        save_file(saved.tensors, folder / "adapter_model.safetensors", metadata=metadata)
        (folder / "adapter_config.json").write_text(json.dumps(saved.config), encoding="utf-8")
        broken.folder = folder
        return True

    return damaged


def _factors(saved: Saved) -> list[str]:
    return [key for key in sorted(saved.tensors) if "lora_" in key]


@kind("an entry in the file changed", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    return added([saved.tensors[key] for key in _factors(saved)], index)


@kind("a tensor in the file negated", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    key = nth(_factors(saved), index)
    if key:
        saved.tensors[key] = -saved.tensors[key]
    return key is not None


@kind("a tensor in the file in half precision", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    key = nth(_factors(saved), index)
    if key:
        saved.tensors[key] = saved.tensors[key].half()
    return key is not None


@kind("two keys in the file exchanged", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    keys = _factors(saved)
    pairs = [
        (a, b)
        for number, a in enumerate(keys)
        for b in keys[number + 1 :]
        if saved.tensors[a].shape == saved.tensors[b].shape
    ]
    pair = nth(pairs, index)
    if pair:
        a, b = pair
        saved.tensors[a], saved.tensors[b] = saved.tensors[b], saved.tensors[a]
    return pair is not None


@kind("a key in the file lost", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    key = nth(_factors(saved), index)
    return key is not None and saved.tensors.pop(key, None) is not None


@kind("another scale in the file's header", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    entry = nth(saved.header["entries"], index)
    if entry:
        entry["scaling"] = 2 * entry["scaling"]
    return entry is not None


@kind("an entry of the file's header lost", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    return index < len(saved.header["entries"]) and bool(saved.header["entries"].pop(index))


@kind("a part's rows shifted in the file's header", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    entry = nth([e for e in saved.header["entries"] if e.get("rows")], index)
    if entry:
        stop = entry["rows"][1]
        step = 1 if stop < max(entry["shape"]) else -1
        entry["rows"] = [row + step for row in entry["rows"]]
    return entry is not None


@kind("another alpha in the file's configuration", "saved")
@_saved
def _(saved: Saved, index: int) -> bool:
    if index or "lora_alpha" not in saved.config:
        return False
    saved.config["lora_alpha"] = 2 * saved.config["lora_alpha"]
    return True


# ---- judging mutants ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The verdict on one mutant (caught, missed, crash or equivalent), and the error's text."""

    verdict: str
    said: str = ""


def judge(base: Mutant, name: str, index: int) -> Outcome | None:
    """Damage the index-th place of a kind and judge the mutant; None if there is no such place."""
    broken = base.copied()
    found = KINDS[name]
    if not found.damage(broken, index):
        return None
    try:
        if found.of == "saved":
            base = dataclasses.replace(base, lora=_loaded(base))
            broken.lora = _loaded(broken)
    except fxlora.FxLoraError as error:
        return Outcome("caught", f"{type(error).__name__}: {error}")
    if broken.look == base.look:
        return Outcome("equivalent")
    try:
        folded = None if found.of == "adapted" else broken.folded
        fxlora.verify(broken.lora, broken.args, folded=folded)
    except fxlora.FxLoraError as error:
        return Outcome("caught", f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - untyped errors are findings
        return Outcome("crash", f"{type(error).__name__}: {error}")
    return Outcome("missed")


def _loaded(mutant: Mutant) -> CapturedModule:
    return fxlora.load_adapter(mutant.captured, mutant.folder)


def judge_all(base: Mutant, names: list[str], places: int = PLACES) -> dict[str, list[Outcome]]:
    """Judge up to `places` mutants of each kind; return the outcomes by kind."""
    found: dict[str, list[Outcome]] = {}
    for name in names:
        outcomes = [judge(base, name, index) for index in range(places)]
        found[name] = [outcome for outcome in outcomes if outcome]
    return found


def _look(mutant: Mutant) -> list[Any]:
    """Everything that a damage may change, as bytes and plain data that compare with ==."""
    modules = (mutant.lora, mutant.folded)
    return [
        [repr(mutant.lora.plan)],
        *([_state(module), *(_run(module, mutant, mode) for mode in MODES)] for module in modules),
    ]


def _state(module: CapturedModule) -> list[Any]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shared = {p.untyped_storage().data_ptr() for p in module.parameters() if p.requires_grad}
    return [
        [(name, _bytes(t), t.requires_grad) for name, t in tensors],
        sorted(map(sorted, module.aliases().values())),
        len(shared),
    ]


def _run(module: CapturedModule, mutant: Mutant, mode: str) -> Any:
    """Return outputs and gradients of a mode, or the error's type; buffers are restored."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    before = module.training
    torch.manual_seed(1)
    try:
        module.train(mode == "train")
        outputs = floats(module(*pytree.tree_map(copy.copy, mutant.args)))
        trains = [p for p in module.parameters() if p.requires_grad]
        wanted = [o for o in outputs if o.requires_grad]
        gradients = untyped(  # torch declares that none is None
            torch.autograd.grad(
                wanted, trains, [torch.ones_like(o) for o in wanted], allow_unused=True
            )
            if wanted
            else ()
        )
        return [None if t is None else _bytes(t) for t in (*outputs, *gradients)]
    except Exception as error:  # noqa: BLE001 - a mutant that fails to run differs, too
        return type(error).__name__
    finally:
        module.train(before)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _bytes(tensor: torch.Tensor) -> Any:
    # the parameter's own method would give it memory of its own
    flat = torch.Tensor.detach(tensor).contiguous().flatten().view(torch.uint8)
    return tuple(tensor.shape), str(tensor.dtype), bytes(flat.tolist())
