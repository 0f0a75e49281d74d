"""Random small models, drawn from a seed, that read their weights in many different ways.

`draw(seed)` writes the source of one model, which is all that it takes to reproduce a failure:

    python -m tests.random_laws 17              print the model of seed 17, and judge it
    python -m tests.random_laws 0 500           judge the models of the seeds 0 to 499

A model is a few steps. Each step derives weights from parameters by random ops (slices,
transposes, casts, …) and reads them by a random op. No two sizes are equal.
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Shape = tuple[int, ...]

BATCH, TOKENS, IDS, RANK = 3, 4, 5, 2
SIZES = (*range(5, 14), 15, 17, 19, 21, 22, 23, 25, 26, 29, 31)

SIGNS = (" @ ", " * ", " + ", " - ", " / ")

PRELUDE = '''\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize


class Damped(nn.Module):
    """A parametrization."""

    def forward(self, w):
        return torch.tanh(w) * 0.9


class Halved(torch.autograd.Function):
    """w / 2, with a backward of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


'''


def _branch(pred: torch.Tensor, yes: Callable[..., Any], no: Callable[..., Any], args: Any) -> Any:
    return yes(*args) if pred else no(*args)


def _called(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


@dataclass(frozen=True)
class Drawn:
    """A random model as source code.

    Attributes:
        seed: the seed of the source, and of the parameters and inputs.
        source: the source of a Python module with a class `Model` and a function `inputs`.
        tolerance: allowed error relative to the largest entry (the model may cast to float32).
    """

    seed: int
    source: str
    tolerance: float

    def build(self, plain: bool = False) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """Return the model in float64 and its inputs, the same at every call.

        Args:
            plain: call the functions of checkpoints and conds directly, so that functional_call
                can replace the weights (a checkpoint recomputes after they are restored).
        """
        name = f"<random model {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        space: dict[str, Any] = {"__name__": "random_model"}
        space["checkpoint"] = _called if plain else checkpoint
        space["cond"] = _branch if plain else torch.cond
        exec(compile(self.source, name, "exec"), space)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(self.seed)
            return space["Model"](), space["inputs"]()
        finally:
            torch.set_default_dtype(default)


def draw(seed: int) -> Drawn:
    """Return the model of a seed."""
    writer = Writer(random.Random(seed))
    features = writer.size()
    width = features
    for _ in range(writer.rng.choice((1, 1, 1, 2, 2, 3, 4))):
        width = writer.step(width)
    source = writer.text(features)
    return Drawn(seed, source, 1e-5 if writer.lossy else 1e-10)


# ---- writing ------------------------------------------------------------------------------------


class Writer:
    """Collects a model's source: the lines of its __init__ and of its forward."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.inits: list[str] = []
        self.lines: list[str] = []
        self.parameters: dict[str, Shape] = {}
        self.lossy = False
        self.named = 0
        self.sizes = rng.sample(SIZES, len(SIZES))

    def size(self) -> int:
        """Return an unused size, as long as there are any."""
        return self.sizes.pop() if self.sizes else self.rng.choice(range(32, 48))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def choice(self, items: Sequence[Any]) -> Any:
        return self.rng.choice(items)

    def name(self, prefix: str) -> str:
        self.named += 1
        return f"{prefix}{self.named}"

    # ---- lines of __init__ ----------------------------------------------------------------------

    def module(self, text: str, prefix: str = "m") -> str:
        name = f"self.{self.name(prefix)}"
        self.inits.append(f"{name} = {text}")
        return name

    def parameter(self, shape: Shape) -> str:
        scale = max(shape[-1], 1) ** -0.5
        dtype = ", dtype=torch.float32" if self.chance(0.02) else ""
        name = self.module(f"nn.Parameter(torch.randn({_sizes(shape)}{dtype}) * {scale:.3f})", "w")
        if dtype:
            self.lossy = True
            return f"{name}.double()"
        self.parameters[name] = shape
        return name

    def buffer(self, text: str) -> str:
        name = f"self.{self.name('c')}"
        self.inits.append(f'self.register_buffer("{name[5:]}", {text})')
        return name

    # ---- expressions of weights -----------------------------------------------------------------

    def weight(self, shape: Shape, depth: int | None = None) -> str:
        """Return an expression of this shape: up to `depth` random ops on parameters."""
        left: int = self.choice((0, 0, 1, 1, 1, 2, 3)) if depth is None else depth
        if left == 0:
            return self.stored(shape)
        while True:
            found = self.choice(WAYS)(self, shape, left - 1)
            if found is not None:
                return found

    def stored(self, shape: Shape) -> str:
        """Return a new parameter, or an existing one, whole or cut to its first rows, columns."""
        fits = [
            (name, whole)
            for name, whole in self.parameters.items()
            if len(whole) == len(shape) and all(a >= b for a, b in zip(whole, shape, strict=True))
        ]
        if fits and self.chance(0.3):
            name, whole = self.choice(fits)
            if whole == shape:
                return name
            return f"{name}[{', '.join(f':{n}' for n in shape)}]"
        return self.parameter(shape)

    # ---- the forward ----------------------------------------------------------------------------

    def step(self, width: int) -> int:
        """Write a step on `x` (batch, width); return the new width."""
        while True:
            found = self.choice(STEPS)(self, width)
            if found is not None:
                lines, width = found
                self.lines += lines
                return width

    def read(self, width: int, out: int, way: int | None = None) -> str:
        """Return an expression that maps `x` from one width to another by reading a weight."""
        if self.chance(0.5):
            weight = self.weight((out, width), way)
            reader = self.choice(OUT_IN)
        else:
            weight = self.weight((width, out), way)
            reader = self.choice(IN_OUT)
        bias = self.buffer(f"torch.randn({out})") if "{b}" in reader else ""
        return reader.format(w=_grouped(weight), b=bias)

    def text(self, features: int) -> str:
        """Return the model's source; `build` runs it with float64 as the default dtype."""
        forward = "\n".join([*self.lines, "return x"])
        inits = "\n".join(self.inits)
        return (
            f"{PRELUDE}class Model(nn.Module):\n    def __init__(self):\n"
            f"        super().__init__()\n{indent(inits, ' ' * 8)}\n\n"
            f"    def forward(self, x, ids):\n{indent(forward, ' ' * 8)}\n\n\n"
            f"def inputs():\n    return torch.randn({BATCH}, {features}), "
            f"torch.randint(0, {IDS}, ({BATCH}, {TOKENS}))\n"
        )


def _sizes(shape: Shape) -> str:
    return ", ".join(map(str, shape))


def _grouped(text: str) -> str:
    """Add parentheses, unless a method can be called on the expression as it is."""
    return f"({text})" if text[0] == "-" or any(sign in text for sign in SIGNS) else text


# ---- weights from parameters: (writer, shape, depth left) -> expression, or None -----------------

Way = Callable[[Writer, Shape, int], str | None]
WAYS: list[Way] = []


def way(function: Way) -> Way:
    WAYS.append(function)
    return function


@way
def _transposed(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2:
        return None
    inner = _grouped(w.weight(shape[::-1], depth))
    return w.choice(
        (
            "{}.t()",
            "{}.T",
            "{}.mT",
            "{}.transpose(0, 1)",
            "{}.permute(1, 0)",
            "torch.swapaxes({}, 0, -1)",
            "torch.movedim({}, 0, 1)",
            'torch.einsum("ij->ji", {})',
            "{}.t().contiguous()",
            "{}.adjoint()",
        )
    ).format(inner)


@way
def _permuted(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) < 3:
        return None
    order = w.rng.sample(range(len(shape)), len(shape))
    inner = tuple(shape[order.index(d)] for d in range(len(shape)))
    return f"{_grouped(w.weight(inner, depth))}.permute({_sizes(tuple(order))})"


@way
def _viewed(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) == 3 and w.chance(0.7):
        inner = w.weight((shape[0] * shape[1], shape[2]), depth)
    elif len(shape) == 2 and shape[0] % 2 == 0:
        inner = w.weight((2, shape[0] // 2, shape[1]), depth)
    elif len(shape) == 2 and shape[1] % 3 == 0:
        inner = w.weight((shape[0], 3, shape[1] // 3), depth)
    else:
        return None
    call = w.choice(("{}.reshape({})", "torch.reshape({}, ({}))", "{}.contiguous().view({})"))
    return call.format(_grouped(inner), _sizes(shape))


@way
def _flat(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2 or not w.chance(0.3):
        return None
    extra = w.choice((0, 3))
    inner = w.parameter((shape[0] * shape[1] + extra,))
    cut = f"[{extra}:]" if extra else ""
    return f"{inner}{cut}.view({_sizes(shape)})"


@way
def _unsqueezed(w: Writer, shape: Shape, depth: int) -> str | None:
    dim = w.choice(range(len(shape) + 1))
    if len(shape) > 3:
        return None
    inner = w.weight((*shape[:dim], 1, *shape[dim:]), depth)
    return f"{_grouped(inner)}.squeeze({dim})"


@way
def _sliced(w: Writer, shape: Shape, depth: int) -> str:
    dim = w.choice(range(len(shape)))
    n, before, behind = shape[dim], w.choice((0, 1, 3)), w.choice((0, 2, 4))
    inner = w.weight((*shape[:dim], n + before + behind, *shape[dim + 1 :]), depth)
    colons = ":, " * dim
    call = w.choice(
        (
            "{}[" + colons + f"{before}:{before + n}]",
            "{}" + f".narrow({dim}, {before}, {n})",
            "torch.split({}" + f", [{before}, {n}, {behind}], {dim})[1]",
            "{}" + f".tensor_split([{before}, {before + n}], dim={dim})[1]",
        )
    )
    return call.format(_grouped(inner))


@way
def _strided(w: Writer, shape: Shape, depth: int) -> str:
    inner = w.weight((shape[0] * 2, *shape[1:]), depth)
    return f"{_grouped(inner)}[{w.choice((0, 1))}::2]"


@way
def _chunked(w: Writer, shape: Shape, depth: int) -> str:
    dim = w.choice(range(len(shape)))
    inner = w.weight((*shape[:dim], shape[dim] * 3, *shape[dim + 1 :]), depth)
    return f"{_grouped(inner)}.chunk(3, dim={dim})[{w.choice((0, 1, 2))}]"


@way
def _selected(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) > 3:
        return None
    inner = _grouped(w.weight((4, *shape), depth))
    return inner + w.choice(("[1]", ".select(0, 2)", ".unbind(0)[3]", "[-1]"))


@way
def _moved(w: Writer, shape: Shape, depth: int) -> str:
    inner = _grouped(w.weight(shape, depth))
    return w.choice(
        ("{}.flip(0)", "{}.flip(-1)", "torch.roll({}, 1, 0)", "torch.roll({}, 2, -1)")
    ).format(inner)


@way
def _turned(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2:
        return None
    if w.chance(0.5):
        return f"torch.rot90({w.weight(shape, depth)}, 2)"
    return f"torch.rot90({w.weight(shape[::-1], depth)})"


@way
def _indexed(w: Writer, shape: Shape, depth: int) -> str:
    inner = _grouped(w.weight((shape[0] + 2, *shape[1:]), depth))
    order = f"torch.randperm({shape[0] + 2})[:{shape[0]}]"
    if w.chance(0.5):
        return inner + w.choice(("[{}]", ".index_select(0, {})")).format(w.buffer(order))
    behind = ", None" * (len(shape) - 1)
    index = w.buffer(f"{order}[:{behind}].repeat({_sizes((1, *shape[1:]))})")
    return w.choice(("torch.gather({}, 0, {})", "torch.take_along_dim({}, {}, 0)")).format(
        inner, index
    )


@way
def _concatenated(w: Writer, shape: Shape, depth: int) -> str | None:
    dim = w.choice(range(len(shape)))
    if shape[dim] < 4:
        return None
    half = shape[dim] // 2 - 1
    parts = [
        w.weight((*shape[:dim], n, *shape[dim + 1 :]), depth) for n in (half, shape[dim] - half)
    ]
    return f"torch.cat([{', '.join(parts)}], {dim})"


@way
def _stacked(w: Writer, shape: Shape, depth: int) -> str:
    parts = [w.weight(shape, depth) for _ in range(2)]
    use = w.choice(("[0]", ".sum(0)", ".unbind(0)[1]", ".mean(0)", ".max(0).values"))
    return f"torch.stack([{', '.join(parts)}]){use}"


@way
def _scaled(w: Writer, shape: Shape, depth: int) -> str:
    inner = _grouped(w.weight(shape, depth))
    mask = w.buffer(f"torch.rand({_sizes(shape)}) > 0.3")
    return w.choice(
        (
            f"{inner} * 0.7",
            f"{inner} * {mask}",
            f"{inner} / {shape[-1]}",
            f"{inner} + {mask}",
            f"-{inner}",
            f"torch.where({mask}, {inner}, 0.1)",
            f"{inner}.masked_fill({mask}, 0.0)",
            f"{inner} * x.mean()",
        )
    )


@way
def _functioned(w: Writer, shape: Shape, depth: int) -> str:
    inner = _grouped(w.weight(shape, depth))
    return w.choice(
        (
            "torch.tanh({})",
            "F.normalize({}, dim=-1)",
            "{}.softmax(-1)",
            "{}.cumsum(0)",
            "F.dropout({}, 0.3, self.training)",
            "F.layer_norm({}, ({}.shape[-1],))",
            "{}.clone().mul_(0.5)",
            "Halved.apply({})",
            "{}.sort(0).values",
            "{}.exp()",
        )
    ).replace("{}", inner)


@way
def _cast(w: Writer, shape: Shape, depth: int) -> str:
    inner = _grouped(w.weight(shape, depth))
    call = w.choice(("{}.to(x.dtype)", "{}.type_as(x)", "{}.double()", "{}.float().to(x.dtype)"))
    w.lossy |= ".float()" in call
    return call.format(inner)


@way
def _with_another(w: Writer, shape: Shape, depth: int) -> str:
    one, two = (_grouped(w.weight(shape, depth)) for _ in range(2))
    return w.choice(
        (
            f"{one} + {two}",
            f"{one} * {two}",
            f"{one} - {two}.detach()",
            f"torch.lerp({one}, {two}, 0.3)",
            f"torch.maximum({one}, {two})",
        )
    )


@way
def _product(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2:
        return None
    middle = w.size()
    one, two = (_grouped(w.weight(s, depth)) for s in ((shape[0], middle), (middle, shape[1])))
    return w.choice(
        (
            f"{one} @ {two}",
            f"torch.mm({one}, {two})",
            f'torch.einsum("ij,jk->ik", {one}, {two})',
            f"F.linear({one}, {two}.t())",
            f"torch.tensordot({one}, {two}, 1)",
        )
    )


@way
def _mixed(w: Writer, shape: Shape, depth: int) -> str | None:
    """Rows or columns mixed by a constant matrix."""
    if len(shape) != 2:
        return None
    inner = _grouped(w.weight(shape, depth))
    square = w.buffer(f"torch.eye({shape[0]}) + 0.1 * torch.randn({shape[0]}, {shape[0]})")
    return w.choice(
        (
            f"{square} @ {inner}",
            f"torch.linalg.solve({square}, {inner})",
            f"torch.linalg.inv({square} + 0.1 * {inner} @ {inner}.t()) @ {inner}",
            f"F.linear({square}, {inner}.t())",
        )
    )


@way
def _repeated(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2 or shape[0] % 3:
        return None
    inner = _grouped(w.weight((shape[0] // 3, shape[1]), depth))
    return w.choice(
        ("{}.repeat_interleave(3, 0)", "{}.repeat(3, 1)", "torch.tile({}, (3, 1))")
    ).format(inner)


@way
def _expanded(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2:
        return None
    one = w.choice(((1, shape[1]), (shape[0], 1)))
    return f"{_grouped(w.weight(one, depth))}.expand({_sizes(shape)})"


@way
def _padded(w: Writer, shape: Shape, depth: int) -> str:
    inner = w.weight((*shape[:-1], shape[-1] - 1), depth) if shape[-1] > 3 else None
    return (
        f"F.pad({inner}, (1, 0))" if inner else f"{_grouped(w.weight(shape, depth))}.contiguous()"
    )


# ---- readers of a matrix -------------------------------------------------------------------------

OUT_IN = (
    "F.linear(x, {w})",
    "F.linear(x, {w}, {b})",
    "x @ {w}.t()",
    "x.matmul({w}.mT)",
    'torch.einsum("ni,oi->no", x, {w})',
    'torch.einsum("oi,ni->no", {w}, x)',
    "torch.inner(x, {w})",
    "({w} @ x.t()).t()",
    "torch.tensordot(x, {w}, ([1], [1]))",
    "torch.addmm({b}, x, {w}.t())",
    "torch.bmm(x.unsqueeze(0), {w}.t().unsqueeze(0)).squeeze(0)",
    "(x.unsqueeze(1) * {w}).sum(-1)",
    "torch.vmap(lambda row: {w} @ row)(x)",
    "F.conv1d(x.unsqueeze(-1), {w}.unsqueeze(-1)).squeeze(-1)",
    "torch.cdist(x, {w})",
    "({w} @ x.unsqueeze(-1)).squeeze(-1)",
    "torch.linalg.multi_dot([x, {w}.t()])",
)
IN_OUT = (
    "x @ {w}",
    "torch.mm(x, {w})",
    "torch.addmm({b}, x, {w})",
    "torch.addmm({b}, x, {w}, beta=0.5, alpha=2)",
    'torch.einsum("ni,io->no", x, {w})',
    "F.linear(x, {w}.t())",
    "torch.matmul(x.unsqueeze(1), {w}).squeeze(1)",
    "torch.tensordot(x, {w}, 1)",
    "torch.baddbmm({b}, x.unsqueeze(0), {w}.unsqueeze(0))[0]",
    "torch.einsum(x, [0, 1], {w}, [1, 2], [0, 2])",
    "torch.vmap(lambda row: row @ {w})(x)",
    "F.conv_transpose1d(x.unsqueeze(-1), {w}.unsqueeze(-1)).squeeze(-1)",
    "x.softmax(-1) @ {w}",
)

# ---- steps: (writer, width) -> (lines, new width), or None ---------------------------------------

Step = Callable[[Writer, int], "tuple[list[str], int] | None"]
STEPS: list[Step] = []


def step(times: int = 1) -> Callable[[Step], Step]:
    """Register a kind of step, drawn `times` as often as one that is registered once."""

    def listed(function: Step) -> Step:
        STEPS.extend([function] * times)
        return function

    return listed


@step(12)
def _read(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    return [f"x = torch.tanh({w.read(width, out)})"], out


@step(2)
def _layer(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    layer = w.module(f"nn.Linear({width}, {out}, bias={w.chance(0.5)})")
    w.parameters[f"{layer}.weight"] = (out, width)
    return [f"x = torch.tanh({layer}(x))"], out


@step(2)
def _layer_and_its_weight(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    layer = w.module(f"nn.Linear({width}, {out})")
    again = w.choice(
        (
            f"F.linear(torch.sin(x), {layer}.weight, {layer}.bias)",
            f"x @ {layer}.weight.t()",
            f"torch.func.functional_call({layer}, {{'weight': {layer}.weight * 2}}, (x,))",
            f"{layer}(torch.sin(x))",
            f"(x @ dict({layer}.named_parameters())['weight'].T)",
        )
    )
    own = w.choice((f"{layer}(x) + ", ""))
    return [f"x = torch.tanh({own}{again})"], out


@step(2)
def _two_roles(w: Writer, width: int) -> tuple[list[str], int]:
    """Multiply by a weight, and back by its transpose."""
    out = w.size()
    weight = _grouped(w.weight((out, width)))
    k = w.name("k")
    back = w.choice((f"torch.tanh(y) @ {k}", f"F.linear(torch.tanh(y), {k}.t())"))
    return [f"{k} = {weight}", f"y = F.linear(x, {k})", f"x = x + {back}"], width


@step(2)
def _loop(w: Writer, width: int) -> tuple[list[str], int]:
    there, back = w.size(), w.choice((True, False))
    up, down = w.read(width, there, 0), w.read(there, width, None if back else 0)
    body = [f"    y = torch.tanh({up})", f"    x = x + 0.5 * {_on('y', down)}"]
    return [f"for _ in range({w.choice((2, 3))}):", *body], width


@step()
def _layers_in_a_list(w: Writer, width: int) -> tuple[list[str], int]:
    inner, out = w.size(), w.size()
    layers = w.module(f"nn.ModuleList([nn.Linear({width}, {inner}), nn.Linear({inner}, {out})])")
    return [f"for layer in {layers}:", "    x = torch.tanh(layer(x))"], out


@step()
def _sequential(w: Writer, width: int) -> tuple[list[str], int]:
    inner, out = w.size(), w.size()
    text = (
        f"nn.Sequential(nn.Linear({width}, {inner}), nn.Dropout(0.2), nn.GELU(), "
        f"nn.Linear({inner}, {out}))"
    )
    return [f"x = {w.module(text)}(x)"], out


@step()
def _parameters_in_a_container(w: Writer, width: int) -> tuple[list[str], int]:
    inner, out = w.size(), w.size()
    texts = [
        f"nn.Parameter(torch.randn({a}, {b}) * 0.3)" for a, b in ((width, inner), (inner, out))
    ]
    if w.chance(0.5):
        held = w.module(f"nn.ParameterList([{', '.join(texts)}])")
        return [f"for w in {held}:", "    x = torch.tanh(x @ w)"], out
    held = w.module(f'nn.ParameterDict({{"up": {texts[0]}, "down": {texts[1]}}})')
    return [f'x = torch.tanh(x @ {held}["up"]) @ {held}["down"]'], out


@step(2)
def _tied_layers(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    one, two = (w.module(f"nn.Linear({width}, {out})") for _ in range(2))
    w.inits.append(f"{two}.weight = {one}.weight")
    return [f"x = torch.tanh({one}(x)) * {two}(torch.sin(x))"], out


@step(2)
def _tied_embedding(w: Writer, width: int) -> tuple[list[str], int]:
    vocabulary = w.size()
    table = w.module(f"nn.Embedding({vocabulary}, {width})")
    head = w.module(f"nn.Linear({width}, {vocabulary}, bias=False)")
    w.inits.append(f"{head}.weight = {table}.weight")
    return [f"x = x + {table}(ids).mean(1)", f"x = torch.tanh({head}(x))"], vocabulary


@step(2)
def _embedding(w: Writer, width: int) -> tuple[list[str], int]:
    vocabulary, size = w.size(), w.size()
    padding = w.choice(("", ", padding_idx=2"))
    if w.chance(0.5):
        layer = w.module(f"nn.Embedding({vocabulary}, {size}{padding})")
        read = f"{layer}(ids)"
    else:
        weight = w.weight((vocabulary, size))
        read = w.choice(
            (
                f"F.embedding(ids, {weight}{padding})",
                f"{_grouped(weight)}[ids]",
                f"{_grouped(weight)}.index_select(0, ids.flatten()).view(*ids.shape, -1)",
                f"F.one_hot(ids, {vocabulary}).to(x.dtype) @ {_grouped(weight)}",
            )
        )
    return [f"x = torch.cat([x, ({read}).mean(1)], 1)"], width + size


@step()
def _embedding_bag(w: Writer, width: int) -> tuple[list[str], int]:
    vocabulary, size = w.size(), w.size()
    mode = w.choice(("sum", "mean"))
    if w.chance(0.5):
        padding = w.choice(("", ", padding_idx=2"))
        read = w.module(f"nn.EmbeddingBag({vocabulary}, {size}, mode='{mode}'{padding})") + "(ids)"
    else:
        read = f"F.embedding_bag(ids, {w.weight((vocabulary, size))}, mode='{mode}')"
    return [f"x = torch.cat([x, {read}], 1)"], width + size


@step(4)
def _convolution(w: Writer, width: int) -> tuple[list[str], int]:
    """Convolve x as an image (N, C, …, width), and take the mean over positions."""
    dims = w.choice((1, 1, 2, 3))
    channels, out, groups = w.size(), w.size(), 1
    if w.chance(0.25):
        channels, groups, out = 6, 3, 15
    sizes = {1: (), 2: (7,), 3: (6, 5)}[dims]
    grid = w.buffer(f"torch.randn({_sizes((channels, *sizes, 1))})")
    image = f"x{'[:, None' + ', None' * (dims - 1) + ']'} * {grid}"
    kernel = tuple(w.rng.sample((1, 2, 3), dims))
    transposed = w.chance(0.3)
    options = w.choice(("", ", padding=1", ", stride=2", ", stride=2, padding=1"))
    if not transposed and w.chance(0.2):
        options = w.choice((", padding='same'", ", dilation=2, padding=2"))
    options += f", groups={groups}" if groups > 1 else ""
    kind = f"{'conv_transpose' if transposed else 'conv'}{dims}d"
    if w.chance(0.5):
        name = f"nn.{'ConvTranspose' if transposed else 'Conv'}{dims}d"
        layer = w.module(f"{name}({channels}, {out}, ({_sizes(kernel)},){options})")
        read = f"{layer}(y)"
    else:
        io = (channels, out // groups) if transposed else (out, channels // groups)
        read = f"F.{kind}(y, {w.weight((*io, *kernel))}{options})"
    over = tuple(range(2, 2 + dims))
    return [f"y = {image}", f"x = torch.tanh({read}).mean(({_sizes(over)},))"], out


@step(2)
def _experts(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    if w.chance(0.5):
        weight = _grouped(w.weight((4, width, out)))
        read = w.choice(
            (
                "torch.bmm(x.expand(4, -1, -1), {w})",
                "(x @ {w})",
                'torch.einsum("ni,eio->eno", x, {w})',
                "torch.matmul(x.unsqueeze(0), {w})",
                "torch.stack([x @ e for e in {w}.unbind(0)])",
                "torch.vmap(lambda e: x @ e)({w})",
            )
        ).format(w=weight)
        return [f"x = torch.tanh({read}).mean(0)"], out
    weight = w.weight((width, 4, out))
    read = w.choice(
        (
            f'torch.einsum("ni,iho->nho", x, {weight})',
            f"torch.tensordot(x, {weight}, ([1], [0]))",
            f"(x @ {_grouped(weight)}.flatten(1)).unflatten(-1, (4, {out}))",
        )
    )
    return [f"x = torch.tanh({read}).sum(1)"], out


@step(3)
def _region(w: Writer, width: int) -> tuple[list[str], int]:
    """Read a weight under a context manager, or in a called function."""
    out = w.size()
    read = f"torch.tanh({w.read(width, out)})"
    f = w.name("f")
    function = [f"def {f}(x):", f"    return {read}"]
    grouped = ["with {}:", f"    x = {read}"]
    kind = w.choice(("call", "checkpoint", "autocast", "off", "enable_grad", "lambda"))
    if kind == "call":
        return [*function, f"x = {f}(x) + {f}(torch.sin(x))"], out
    if kind == "checkpoint":
        return [*function, f"x = checkpoint({f}, x, use_reentrant=False)"], out
    if kind == "lambda":
        return [f"{f} = lambda x: {read}", f"x = {f}(x)"], out
    context = {
        "autocast": 'torch.autocast("cpu", dtype=torch.bfloat16)',
        "off": 'torch.autocast("cpu", enabled=False)',
        "enable_grad": "torch.enable_grad()",
    }[kind]
    return [grouped[0].format(context), grouped[1]], out


@step(2)
def _cond(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    yes, no = w.name("f"), w.name("f")
    lines: list[str] = []
    for function in (yes, no):
        lines += [f"def {function}(x):", f"    return torch.tanh({w.read(width, out)})"]
    return [*lines, f"x = cond(x.sum() {w.choice('<>')} 0, {yes}, {no}, (x,))"], out


@step(3)
def _read_without_gradient(w: Writer, width: int) -> tuple[list[str], int]:
    """Read weights twice, once where no gradient passes."""
    out = w.size()
    k = w.name("k")
    weight = w.weight((out, width))
    lines = [f"{k} = {weight}", f"y = F.linear(x, {k})"]
    kind = w.choice(("no_grad", "detach", "detach_result", "both"))
    if kind == "no_grad":
        lines += ["with torch.no_grad():", f"    z = F.linear(torch.sin(x), {k})"]
    elif kind == "detach":
        lines += [f"z = F.linear(torch.sin(x), {k}.detach())"]
    elif kind == "detach_result":
        lines += [f"z = F.linear(torch.sin(x), {k}).detach()"]
    else:
        other = w.weight((out, width))
        lines += ["with torch.no_grad():", f"    z = F.linear(torch.sin(x), {other})"]
    return [*lines, "x = torch.tanh(y) + 0.5 * z"], out


@step(2)
def _parametrized(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    layer = w.module(f"nn.Linear({width}, {out})")
    w.inits.append(
        w.choice(
            (
                f"parametrizations.weight_norm({layer})",
                f'parametrize.register_parametrization({layer}, "weight", Damped())',
                f"parametrizations.spectral_norm({layer})",
                f"nn.utils.weight_norm({layer})",
            )
        )
    )
    return [f"x = torch.tanh({layer}(x))"], out


@step(2)
def _unread(w: Writer, width: int) -> tuple[list[str], int]:
    """A layer, and a weight of which only the shape matters, or nothing."""
    out, other = w.size(), w.size()
    layer = w.module(f"nn.Linear({width}, {out})")
    weight = w.weight((other, width))
    k = w.name("k")
    use = w.choice(
        (
            f"F.linear(x, {k})",
            f"y = y / {k}.shape[0]",
            f"y = y + torch.zeros_like({k}).sum()",
            f"y = y + x.new_ones({k}.shape).mean()",
            f"y = y * {k}.size(1)",
        )
    )
    return [f"{k} = {weight}", f"y = {layer}(x)", use, "x = torch.tanh(y)"], out


@step(2)
def _by_mode(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    read = w.read(width, out)
    kind = w.choice(("dropout", "module", "norm", "branch"))
    if kind == "dropout":
        return [f"x = F.dropout(torch.tanh({read}), 0.3, self.training)"], out
    if kind == "module":
        return [f"x = {w.module('nn.Dropout(0.4)')}({read})"], out
    if kind == "norm":
        return [f"x = {w.module(f'nn.BatchNorm1d({out})')}({read})"], out
    lines = [f"y = {read}", "if self.training:", f"    y = y + {w.read(width, out)}"]
    return [*lines, "x = torch.tanh(y)"], out


@step(2)
def _compound(w: Writer, width: int) -> tuple[list[str], int]:
    """A recurrent, attention or bilinear module of torch."""
    out = w.size()
    kind = w.choice(("lstm", "gru", "cell", "attention", "bilinear"))
    if kind in ("lstm", "gru"):
        layer = w.module(f"nn.{kind.upper()}({width}, {out}, batch_first=True)")
        return [f"x = {layer}(torch.stack([x, torch.sin(x)], 1))[0].mean(1)"], out
    if kind == "cell":
        layer = w.module(f"nn.GRUCell({width}, {out})")
        return [f"x = {layer}(x, {layer}(x))"], out
    if kind == "bilinear":
        return [f"x = torch.tanh({w.module(f'nn.Bilinear({width}, {width}, {out})')}(x, x))"], out
    layer = w.module("nn.MultiheadAttention(8, 2, batch_first=True)")
    into = w.read(width, 8)
    return [
        f"y = {into}",
        "y = torch.stack([y, torch.sin(y), torch.cos(y)], 1)",
        f"x = {layer}(y, y, y)[0].mean(1)",
    ], 8


@step()
def _bilinear_form(w: Writer, width: int) -> tuple[list[str], int]:
    out = w.size()
    weight = w.weight((out, width, width))
    read = w.choice(
        (
            f"F.bilinear(x, torch.sin(x), {weight})",
            f'torch.einsum("ni,oij,nj->no", x, {weight}, torch.sin(x))',
        )
    )
    return [f"x = torch.tanh({read})"], out


@step()
def _attends_to_weights(w: Writer, width: int) -> tuple[list[str], int]:
    """Attention whose keys and values are weights."""
    slots, out = w.size(), w.size()
    keys, values = w.weight((slots, width)), w.weight((slots, out))
    lines = [f"k, v = {keys}, {values}"]
    if w.chance(0.5):
        read = "F.scaled_dot_product_attention(x, k, v)"
    else:
        read = "torch.softmax(x @ k.t(), -1) @ v"
    return [*lines, f"x = {read}"], out


def _on(name: str, read: str) -> str:
    """Return the read applied to another variable than x."""
    return f"(lambda x: {read})({name})"
