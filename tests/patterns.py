"""Patterns of reading weights, as data; a hook on a module's `forward` does not see most of them.

Each pattern is a tiny model in which, where the architecture allows it, no two dimensions are
equal. By default fxlora's rule names the weights, and PEFT is given the modules that own them and,
as a second way, the parameters; the better outcome counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import LoraConfig, Rule

from .oracle import declare
from .typed import Function, OpenModule, doubled

Built = tuple[nn.Module, tuple[Any, ...]]
R = LoraConfig(r=2, lora_alpha=3)


@dataclass(frozen=True)
class Pattern:
    """One pattern of reading weights.

    Attributes:
        name: the pattern's name in the table.
        build: makes the model and its inputs.
        weights: the weights to adapt, by the names that the user writes (for a tied weight: the
            reads through those names).
        expects: the error that fxlora must raise, where no adapter can be right; else None.
        rules: makes fxlora's rules; by default one rule that names the weights.
        peft: further ways for PEFT to write the target, besides the owning modules and the
            parameters; None if PEFT cannot express the target.
        config: arguments of PEFT's configuration, for every way.
        match: further arguments of `fxlora.match`.
        parts: the output rows of each part.
        reference: builds an equivalent model that torch.func can call.
        modes: the model's modes (True is training) in which it reads the weights.
        tolerance: relative to the largest entry.
        dtype: of the model and its inputs.
        plain: whether the adapter adds s·BA and nothing else (DoRA scales, PiSSA subtracts).
        exportable: whether there is a whole graph to export; if not, export must raise a typed
            error.
        subscripts: the subscripts of weights (see `oracle.py`), where those of their modules do not
            apply to A and B: for a read that fxlora cannot follow, or by another op.
        hidden: whether torch.func does not reach some reads (those through a list); the oracle
            then only writes into the source's own memory.
        since: the first torch that can run and save it, where some supported ones cannot.
        measured: PEFT's verdict with target_modules, where the claim about PEFT rests on it.
    """

    name: str
    build: Callable[[], Built]
    weights: tuple[str, ...]
    expects: type[Exception] | None = None
    rules: Callable[[], Any] | None = None
    peft: tuple[Mapping[str, Any], ...] | None = ()
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    match: Mapping[str, Any] = field(default_factory=dict[str, Any])
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    reference: Callable[[], Built] | None = None
    modes: tuple[bool, ...] = (True, False)
    tolerance: float = 1e-10
    dtype: torch.dtype = torch.float64
    plain: bool = True
    exportable: bool = True
    subscripts: Mapping[str, str] = field(default_factory=dict[str, str])
    hidden: bool = False
    since: tuple[int, int] = (2, 11)
    measured: str = ""

    def built(self) -> Built:
        """Return the model and its inputs, the same at every call."""
        torch.manual_seed(0)
        model, args = self.build()
        if self.subscripts:
            declare(model, self.subscripts)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # a gate or head of zeros would hide other weights
                    parameter.normal_()

        def cast(leaf: Any) -> Any:
            return leaf.to(self.dtype) if _floating(leaf) else leaf

        for module in model.modules():  # deepcopy fails on non-leaf tensors left by pre-hooks
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    module.__dict__[name] = value.detach()
        return model._apply(cast), pytree.tree_map(cast, args)

    def fxlora_rules(self) -> Any:
        return self.rules() if self.rules else Rule(list(self.weights), lora=R)

    def ways_of_peft(self) -> list[dict[str, Any]]:
        """Return the arguments of PEFT's configuration by which a user can name the target."""
        if self.peft is None:
            return []
        modules = [name.rpartition(".")[0] for name in self.weights]
        ways: list[dict[str, Any]] = [{"target_parameters": list(self.weights)}]
        if all(modules):
            ways.insert(0, {"target_modules": list(dict.fromkeys(modules))})
        return [*ways, *map(dict, self.peft)]


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


class Net(OpenModule):
    """A module of named parts (modules, parameters, tensors as buffers) with a given forward."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        weights = {n: part for n, part in parts.items() if isinstance(part, nn.Parameter)}
        self.subscripts = {n: getattr(weight, "subscripts", "") for n, weight in weights.items()}
        self.subscripts |= {"ws.*": "io"}  # lists of weights
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = forward

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


class Around(nn.Module):
    """A model around one layer, so that PEFT has a module to wrap."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        out = self.layer(*args)
        return torch.tanh(out[0] if isinstance(out, tuple) else out)


def net(forward: Callable[..., Any], *args: Any, **parts: Any) -> Callable[[], Built]:
    """Return a builder of a `Net`; parts and callable inputs are made anew for each model."""
    return lambda: (Net(forward, **_made(parts)), _inputs(args))


def layer(forward: Callable[..., Any], *args: Any, **parts: Any) -> Callable[[], Built]:
    """Return a builder of a model with a `Net` as its submodule `layer`."""
    return lambda: (Around(Net(forward, **_made(parts))), _inputs(args))


def wrapped(make: Callable[[], nn.Module], *args: Any) -> Callable[[], Built]:
    """Return a builder of a model with this module as its submodule `layer`."""
    return lambda: (Around(make()), _inputs(args))


def _made(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: make() for name, make in parts.items()}


def _inputs(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(make() if callable(make) else make for make in args)


def w(*shape: int, dims: str = "eeoi") -> Callable[[], nn.Parameter]:
    """Return a maker of a weight (…, out, in), or of one without inputs and outputs.

    The last letters of `dims` are its subscripts (see `oracle.py`).
    """

    def made() -> nn.Parameter:
        weight = nn.Parameter(torch.randn(shape))
        weight.subscripts = dims[-len(shape) :]  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    return made


def wt(*shape: int) -> Callable[[], nn.Parameter]:
    """Return a maker of a weight (…, in, out)."""
    return w(*shape, dims="eeio")


def x(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def ids(high: int, *shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, high, shape)


def linear(n: int = 5, m: int = 7, bias: bool = True) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(n, m, bias)


def rule(*names: str, **keys: Any) -> Callable[[], Any]:
    """Return a maker of one rule; `keys` are fields of the rule or of its configuration."""
    fields = {key: keys.pop(key) for key in list(keys) if key in ("parts", "enable")}
    return lambda: Rule(list(names), lora=LoraConfig(r=2, lora_alpha=3, **keys), **fields)


X = x(4, 5)
LIN, CONV, EMB, W = ("lin.weight",), ("conv.weight",), ("emb.weight",), ("layer.w",)


# ---- modules whose forward is not called --------------------------------------------------------


def swin() -> Built:
    from torchvision.models.swin_transformer import SwinTransformerBlock

    return SwinTransformerBlock(6, 2, [2, 3], [1, 0]), (torch.randn(2, 4, 9, 6),)


def vit() -> Built:
    from torchvision.models.vision_transformer import EncoderBlock

    return EncoderBlock(2, 6, 11, 0.1, 0.0), (torch.randn(3, 4, 6),)


def mha(**keys: Any) -> Callable[[], nn.MultiheadAttention]:
    return lambda: nn.MultiheadAttention(6, 2, batch_first=True, **keys)


def attends(m: Any, q: torch.Tensor) -> torch.Tensor:
    return m.mha(q, q, q)[0]


def encoder() -> Built:
    one = nn.TransformerEncoderLayer(6, 2, 11, batch_first=True)
    return nn.TransformerEncoder(one, 1), (torch.randn(3, 4, 6),)


def decoder() -> Built:
    one = nn.TransformerDecoderLayer(6, 2, 11, batch_first=True)
    return nn.TransformerDecoder(one, 1), (torch.randn(3, 4, 6), torch.randn(3, 5, 6))


class Stale(nn.Module):
    """Calls its layer through a reference that still holds the old layer after a swap."""

    held: Any

    def __init__(self, held: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.__dict__["held"] = held(self.lin)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.held(a))


def stale(held: Callable[[nn.Linear], Any]) -> Callable[[], Built]:
    return lambda: (Stale(held), (torch.randn(4, 5),))


class OneOf(list[Any]):
    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        return self[0](a)


def two_names() -> Built:
    """One module under two names, called by the second."""
    inner = nn.Linear(5, 7)
    return Net(lambda m, a: torch.tanh(m.called(a)), first=inner, called=inner), (
        torch.randn(4, 5),
    )


def two_names_called() -> Built:
    inner = nn.Linear(5, 5, bias=False)
    return Net(lambda m, a: m.second(torch.tanh(m.first(a))), first=inner, second=inner), (
        torch.randn(4, 5),
    )


class Aliased(nn.Module):
    """Calls its Linear, and also reads the Linear's weight through an object that it keeps."""

    kept: Any

    def __init__(self, keep: Callable[[torch.Tensor], Any], buffer: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7).double()  # a later cast would end the sharing of memory
        kept = keep(self.lin.weight)
        if buffer:
            self.register_buffer("kept", kept)
        else:
            self.__dict__["kept"] = kept

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        kept = self.kept[0] if isinstance(self.kept, list) else self.kept.T
        return torch.tanh(F.linear(a, kept)) * self.lin(a)


def aliased(keep: Callable[[torch.Tensor], Any], buffer: bool = False) -> Callable[[], Built]:
    return lambda: (Aliased(keep, buffer), (torch.randn(4, 5),))


class Absorbed(nn.Module):
    """DeepSeek's attention in decoding: the query is multiplied by the weight, not by keys."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_b = nn.Linear(5, 18, bias=False)

    def forward(self, cache: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        keys, values = self.kv_b.weight.view(2, 9, 5).split([4, 5], 1)
        scores = torch.einsum("bhd,hdc,btc->bht", query, keys, cache)
        return torch.einsum("bht,btc,hdc->bhd", scores.softmax(-1), cache, values)


class Fused(nn.Module):
    """Mamba: functions read the weights of the layers, which are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, groups=6)
        self.x_proj = nn.Linear(6, 5)
        self.out_proj = nn.Linear(5, 7)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        taps = self.conv.weight.squeeze(1)
        hidden = F.conv1d(a, taps.unsqueeze(1), self.conv.bias, groups=6).transpose(1, 2)
        hidden = torch.tanh(F.linear(F.silu(hidden), self.x_proj.weight, self.x_proj.bias))
        return F.linear(hidden, self.out_proj.weight, self.out_proj.bias)


class Reparametrised(nn.Module):
    """RepVGG: two branches in training, their sum as one convolution in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.point = nn.Conv2d(3, 6, 1, bias=False)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.wide(a) + self.point(a)
        kernel = self.wide.weight + F.pad(self.point.weight, [1, 1, 1, 1])
        return F.conv2d(a, kernel, padding=1)


class Auxiliary(nn.Module):
    """A head that is called in training only (GoogLeNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.aux = nn.Linear(7, 3)

    def forward(self, a: torch.Tensor) -> Any:
        hidden = torch.tanh(self.lin(a))
        return (hidden, self.aux(hidden)) if self.training else hidden


def repeated() -> Built:
    """ALBERT: one layer, three times in a list."""
    one = nn.Linear(5, 5, bias=False)
    model = Net(_in_turn, layers=nn.ModuleList([one] * 3))
    return model, (torch.randn(4, 5),)


def _in_turn(m: Any, a: torch.Tensor) -> torch.Tensor:
    for one in m.layers:
        a = torch.tanh(one(a))
    return a


FUNCTIONAL = [
    Pattern("Swin: functional attention", swin,
            ("attn.qkv.weight", "attn.proj.weight"), measured="silent"),
    Pattern("ViT: out_proj of nn.MultiheadAttention", vit,
            ("self_attention.out_proj.weight",), measured="silent"),
    Pattern("MultiheadAttention: in_proj and out_proj", net(attends, x(3, 4, 6), mha=mha()),
            ("mha.in_proj_weight", "mha.out_proj.weight"), peft=({"target_modules": ["mha"]},)),
    Pattern("MultiheadAttention with kdim and vdim",
            net(lambda m, q, k, v: m.mha(q, k, v)[0], x(3, 4, 6), x(3, 5, 7), x(3, 5, 9),
                mha=mha(kdim=7, vdim=9)),
            ("mha.q_proj_weight", "mha.k_proj_weight", "mha.v_proj_weight"),
            peft=({"target_modules": ["mha"]},), measured="refused"),
    Pattern("MultiheadAttention with bias_k, bias_v",
            net(attends, x(3, 4, 6), mha=mha(add_bias_kv=True)), ("mha.out_proj.weight",)),
    Pattern("TransformerEncoder, fused in eval", encoder,
            ("layers.0.linear1.weight", "layers.0.linear2.weight"), measured="silent"),
    Pattern("TransformerDecoder: attention to memory", decoder,
            ("layers.0.multihead_attn.out_proj.weight", "layers.0.linear1.weight")),
    Pattern("F.linear(x, self.lin.weight)",
            net(lambda m, a: torch.tanh(F.linear(a, m.lin.weight, m.lin.bias)), x(4, 5),
                lin=linear()),
            ("lin.weight",), measured="silent"),
    Pattern("nn.Linear.forward(self.lin, x)",
            net(lambda m, a: torch.tanh(nn.Linear.forward(m.lin, a)), x(4, 5), lin=linear()),
            ("lin.weight",)),
    Pattern("self.lin.forward(x)",
            net(lambda m, a: torch.tanh(m.lin.forward(a)), x(4, 5), lin=linear()), ("lin.weight",)),
    Pattern("functools.partial(self.lin), kept", stale(functools.partial), ("lin.weight",)),
    Pattern("bound self.lin.forward, kept", stale(lambda lin: lin.forward), ("lin.weight",)),
    Pattern("a Python list holds the layer", stale(lambda lin: OneOf([lin])), ("lin.weight",)),
    Pattern("one module under two names", two_names, ("first.weight", "called.weight"),
            rules=rule("first", tied="share")),
    Pattern("one module under two names, both called", two_names_called,
            ("first.weight", "second.weight")),
    Pattern("1x1 convolution by a Linear's weight",
            net(lambda m, a: F.conv2d(a, m.lin.weight[:, :, None, None]), x(2, 5, 3, 4),
                lin=linear()),
            ("lin.weight",)),
    Pattern("patches by a convolution's flattened weight",
            net(lambda m, a: torch.tanh(F.linear(a, m.conv.weight.flatten(1))), x(4, 18),
                conv=lambda: nn.Conv2d(3, 7, (2, 3))),
            ("conv.weight",)),
    Pattern("Linears fused by cat at run time",
            net(lambda m, a: torch.tanh(F.linear(a, torch.cat([m.q.weight, m.v.weight]))), x(4, 5),
                q=linear(5, 7), v=linear(5, 6)),
            ("q.weight", "v.weight")),
    Pattern("experts stacked at run time, bmm",
            net(lambda m, a: torch.bmm(a, torch.stack([e.weight for e in m.experts]).mT),
                x(3, 4, 5), experts=lambda: nn.ModuleList(nn.Linear(5, 7) for _ in range(3))),
            ("experts.0.weight", "experts.1.weight", "experts.2.weight")),
    Pattern("F.multi_head_attention_forward",
            net(lambda m, q: F.multi_head_attention_forward(
                    q, q, q, 6, 2, m.mha.in_proj_weight, m.mha.in_proj_bias, None, None, False,
                    0.0, m.mha.out_proj.weight, m.mha.out_proj.bias)[0],
                x(4, 3, 6), mha=mha()),
            ("mha.in_proj_weight", "mha.out_proj.weight")),
    Pattern("Mamba: one function for many layers' weights",
            lambda: (Fused(), (torch.randn(2, 6, 9),)),
            ("conv.weight", "x_proj.weight", "out_proj.weight")),
    Pattern("DeepSeek: absorbed kv_b_proj",
            lambda: (Absorbed(), (torch.randn(3, 4, 5), torch.randn(3, 2, 4))),
            ("kv_b.weight",)),
    Pattern("RepVGG: another read in eval",
            lambda: (Reparametrised(), (torch.randn(2, 3, 5, 7),)),
            ("wide.weight", "point.weight")),
    Pattern("a head in training only", lambda: (Auxiliary(), (torch.randn(4, 5),)),
            ("aux.weight",), modes=(True,)),
    Pattern("ModuleList([layer] * 3) (ALBERT)", repeated,
            ("layers.0.weight", "layers.1.weight", "layers.2.weight")),
    Pattern("a Python list holds the weight", aliased(lambda weight: [weight]), ("lin.weight",),
            hidden=True),
    Pattern("a buffer that shares the weight's memory",
            aliased(lambda weight: weight.detach().T, True), ("lin.weight",),
            expects=fxlora.UnsupportedOpError),
    Pattern("an attribute that shares the weight's memory",
            aliased(lambda weight: weight.detach().T), ("lin.weight",),
            expects=fxlora.UnsupportedOpError),
    Pattern("functional_call inside the model",
            net(lambda m, a: torch.func.functional_call(
                    m.lin, dict(m.lin.named_parameters()), (a,)), x(4, 5), lin=linear()),
            ("lin.weight",)),
    Pattern("a masked weight: torch.tril(self.lin.weight)",
            net(lambda m, a: F.linear(a, torch.tril(m.lin.weight), m.lin.bias), x(4, 5),
                lin=linear()),
            ("lin.weight",)),
    Pattern("unfold and the kernel as a matrix",
            net(lambda m, a: m.conv.weight.view(6, -1) @ F.unfold(a, (2, 4)), x(2, 3, 7, 8),
                conv=lambda: nn.Conv2d(3, 6, (2, 4), bias=False)),
            ("conv.weight",)),
    Pattern("a kernel there and, transposed, back",
            net(lambda m, a: F.conv_transpose2d(F.conv2d(a, m.conv.weight), m.conv.weight),
                x(2, 3, 7, 8), conv=lambda: nn.Conv2d(3, 6, (2, 4), bias=False)),
            ("conv.weight",)),
    Pattern("sampled softmax: rows of the head by index",
            net(lambda m, a, i: F.linear(a, m.head.weight[i]), x(4, 5), ids(11, 6),
                head=linear(5, 11)),
            ("head.weight",)),
]  # fmt: skip


# ---- layers that do more than their type says ---------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class Cosine(nn.Linear):
    """A classifier by cosine similarity (ArcFace, DINO's head)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight))


class Equalised(nn.Linear):
    """StyleGAN's layer: the weight is scaled at run time."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight * (2 / self.in_features) ** 0.5, self.bias)


class DropConnect(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, F.dropout(self.weight, 0.4, self.training), self.bias)


class FakeQuantised(nn.Linear):
    """Quantisation-aware training with a straight-through gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rounded = torch.round(self.weight * 8) / 8
        return F.linear(input, self.weight + (rounded - self.weight).detach(), self.bias)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised at run time (BiT, NFNet)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Separable(nn.Conv3d):
    """A subclass that only changes the defaults."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0))


def hooked(post: bool) -> Callable[[], nn.Linear]:
    def make() -> nn.Linear:
        made = nn.Linear(5, 7)
        if post:
            made.register_forward_hook(doubled)
        else:
            made.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        return made

    return make


class Patched(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 7)
        self.forward = self.other  # pyright: ignore[reportAttributeAccessIssue]

    def other(self, a: torch.Tensor) -> torch.Tensor:
        return 2 * F.linear(a, self.weight, self.bias)


def pruned() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(5, 7), "weight", 0.4)


class Bounded(nn.Module):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a) / 2


def parametrized(wrap: Callable[[nn.Module], nn.Module], make: Any = None) -> Callable[[], Built]:
    make = make or linear()
    args = (x(4, 5),) if make() and isinstance(make(), nn.Linear) else (x(2, 3, 9),)
    return net(lambda m, a: torch.tanh(m.lin(a)), *args, lin=lambda: wrap(make()))


def bounded(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Bounded())


def original(name: str = "original") -> tuple[dict[str, Any]]:
    return ({"target_parameters": [f"lin.parametrizations.weight.{name}"]},)


def lin(make: Callable[[], nn.Module]) -> Callable[[], Built]:
    return net(lambda m, a: torch.tanh(m.lin(a)), x(4, 5), lin=make)


DERIVED = [
    Pattern("subclass of Linear that scales its output", lin(lambda: Scaled(5, 7)), LIN,
            measured="silent"),
    Pattern("Linear with a forward hook", lin(hooked(True)), LIN, measured="silent"),
    Pattern("Linear with a forward pre-hook", lin(hooked(False)), LIN),
    Pattern("Linear with its forward replaced", lin(Patched), LIN),
    Pattern("cosine classifier (normalised weight)", lin(lambda: Cosine(5, 7)), LIN),
    Pattern("equalised learning rate (scaled weight)", lin(lambda: Equalised(5, 7)), LIN),
    Pattern("DropConnect (dropout of the weight)", lin(lambda: DropConnect(5, 7)), LIN),
    Pattern("fake quantisation, straight-through", lin(lambda: FakeQuantised(5, 7)), LIN),
    Pattern("weight-standardised convolution",
            net(lambda m, a: m.conv(a), x(2, 3, 8, 7), conv=lambda: Standardised(3, 6, (2, 4))),
            CONV),
    Pattern("subclass of Conv3d",
            net(lambda m, a: m.conv(a), x(2, 3, 4, 7, 5), conv=lambda: Separable(3, 8)), CONV),
    Pattern("pruned Linear (torch.nn.utils.prune)", lin(pruned), ("lin.weight_orig",),
            rules=rule("lin"), peft=({"target_modules": ["lin"]},)),
    Pattern("weight_norm", parametrized(parametrizations.weight_norm), LIN, measured="silent",
            peft=original("original1")),
    Pattern("weight_norm, the old one",
            parametrized(lambda m: nn.utils.weight_norm(m)), LIN, rules=rule("lin.weight_v"),
            peft=({"target_parameters": ["lin.weight_v"]},)),
    Pattern("weight_norm of a convolution",
            parametrized(parametrizations.weight_norm, lambda: nn.Conv1d(3, 7, 4)), LIN,
            peft=original("original1")),
    Pattern("weight_norm over taps, groups (wav2vec 2)",
            net(lambda m, a: torch.tanh(m.conv(a)), x(2, 6, 11),
                conv=lambda: parametrizations.weight_norm(nn.Conv1d(6, 8, 4, groups=2), dim=2)),
            CONV, peft=({"target_parameters": ["conv.parametrizations.weight.original1"]},)),
    Pattern("spectral_norm", parametrized(parametrizations.spectral_norm), LIN, peft=original()),
    Pattern("spectral_norm, the old one",
            parametrized(lambda m: nn.utils.spectral_norm(m)), ("lin.weight_orig",),
            rules=rule("lin")),
    Pattern("orthogonal parametrization", parametrized(parametrizations.orthogonal), LIN,
            peft=original()),
    Pattern("a parametrization of one's own", parametrized(bounded), LIN, peft=original()),
    Pattern("LazyLinear after its first call",
            lambda: _materialised(Net(lambda m, a: torch.tanh(m.lin(a)), lin=nn.LazyLinear(7))),
            LIN),
]  # fmt: skip


def _materialised(model: nn.Module) -> Built:
    inputs = torch.randn(4, 5)
    model(inputs)
    return model, (inputs,)


# ---- convolutions -------------------------------------------------------------------------------


def conv(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Built]:
    return net(lambda m, a: torch.tanh(m.conv(a)), x(*shape), conv=make)


def padded(mode: Literal["reflect", "replicate", "circular"]) -> Callable[[], Built]:
    return conv(lambda: nn.Conv2d(3, 6, (3, 2), padding=(2, 1), padding_mode=mode), 2, 3, 8, 7)


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.offset = nn.Conv2d(4, 18, 3, padding=1)
        self.conv = DeformConv2d(4, 6, 3, padding=1)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.conv(a, self.offset(a))


def batch_normed() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 6, (3, 2)), nn.BatchNorm2d(6), nn.ReLU())
    return model, (torch.randn(4, 3, 8, 7),)


CONVOLUTIONS = [
    Pattern("convolution, reflect padding", padded("reflect"), CONV, measured="silent"),
    Pattern("convolution, replicate padding", padded("replicate"), CONV),
    Pattern("convolution, circular padding", padded("circular"), CONV),
    Pattern('convolution, padding="same"',
            conv(lambda: nn.Conv1d(3, 6, 4, padding="same"), 2, 3, 8), CONV),
    Pattern("convolution, dilation", conv(lambda: nn.Conv2d(3, 6, (3, 2), dilation=2), 2, 3, 8, 7),
            CONV, measured="crash"),
    Pattern("depthwise convolution", conv(lambda: nn.Conv2d(5, 5, (3, 2), groups=5), 2, 5, 8, 7),
            CONV, rules=lambda: Rule("conv", lora=R), measured="refused"),
    Pattern("grouped convolution", conv(lambda: nn.Conv2d(6, 8, (3, 5), groups=2), 2, 6, 9, 7),
            CONV, measured="crash"),
    Pattern("grouped convolution, r not a multiple of groups",
            conv(lambda: nn.Conv1d(6, 9, 4, groups=3), 2, 6, 11), CONV),
    Pattern("convolution before a batch norm", batch_normed, ("0.weight",)),
    Pattern("transposed convolution 1d",
            conv(lambda: nn.ConvTranspose1d(3, 6, 4, stride=2, padding=1), 2, 3, 8), CONV),
    Pattern("transposed convolution 2d",
            conv(lambda: nn.ConvTranspose2d(3, 6, (4, 2), stride=2, dilation=2), 2, 3, 5, 7),
            CONV),
    Pattern("transposed convolution 3d",
            conv(lambda: nn.ConvTranspose3d(3, 6, (4, 2, 1), output_padding=0), 2, 3, 5, 7, 4),
            CONV),
    Pattern("transposed convolution, groups",
            conv(lambda: nn.ConvTranspose2d(6, 8, (3, 5), groups=2), 2, 6, 4, 7), CONV),
    Pattern("deformable convolution", lambda: (Deformed(), (torch.randn(2, 4, 7, 9),)), CONV),
]  # fmt: skip


# ---- embeddings, ties and shares ----------------------------------------------------------------


def embedded(**keys: Any) -> Callable[[], Built]:
    return net(
        lambda m, i: torch.tanh(m.emb(i)),
        lambda: torch.tensor([[1, 2, 3, 1], [12, 0, 7, 7], [2, 2, 5, 9]]),
        emb=lambda: nn.Embedding(13, 6, **keys),
    )


def bag(mode: str) -> Callable[[], Built]:
    return net(
        lambda m, i, o: torch.tanh(m.emb(i, o)),
        ids(13, 9),
        lambda: torch.tensor([0, 2, 5]),
        emb=lambda: nn.EmbeddingBag(13, 6, mode=mode),
    )


def tied(ways: int) -> tuple[Net, tuple[torch.Tensor]]:
    """A language model with its embedding as head: by assignment (1) or by F.linear (2)."""
    model = Net(_language_model, emb=nn.Embedding(13, 6), mix=nn.Linear(6, 6))
    model.head = nn.Linear(6, 13, bias=False)
    model.head.weight = model.emb.weight
    if ways == 2:
        del model.head
    return model, (torch.randint(0, 13, (3, 4)),)


def _language_model(m: Any, i: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(m.mix(m.emb(i)))
    return m.head(hidden) if hasattr(m, "head") else F.linear(hidden, m.emb.weight)


def shared_parameter() -> Built:
    model = Net(
        lambda m, a, b: m.second(torch.tanh(m.first(a))) * torch.tanh(m.second(b)),
        first=nn.Linear(5, 5),
        second=nn.Linear(5, 5),
    )
    model.second.weight = model.first.weight
    return model, (torch.randn(4, 5), torch.randn(4, 5))


def functional_tie() -> Built:
    """Both reads are in one forward, so that no call site tells which name is meant."""
    model, args = tied(1)
    model.function = lambda m, i: F.linear(
        torch.tanh(m.mix(F.embedding(i, m.emb.weight))), m.head.weight
    )
    return model, args


def three_tied() -> Built:
    parts = {name: nn.Linear(5, 5) for name in "abc"}
    parts["b"].weight = parts["c"].weight = parts["a"].weight
    model = Net(lambda m, v: m.c(torch.tanh(m.b(torch.tanh(m.a(v))))), **parts)
    return model, (torch.randn(4, 5),)


def overlapping() -> Built:
    """Two parameters over one memory: the decoder's weight is the encoder's, transposed."""
    model = Net(lambda m, a: m.dec(torch.tanh(m.enc(a))), enc=nn.Linear(5, 7), dec=nn.Linear(7, 5))
    model.dec.weight = nn.Parameter(model.enc.weight.detach().double().T)
    model.enc.weight = nn.Parameter(model.dec.weight.detach().T)
    return model, (torch.randn(4, 5),)


TIED = ("emb.weight", "head.weight")
LM = functools.partial(tied, 1)
BOTH = ({"target_modules": ["emb", "head"], "ensure_weight_tying": True},)

SHARED = [
    Pattern("head is F.linear(h, emb.weight)", functools.partial(tied, 2), EMB, measured="silent"),
    Pattern("head.weight = emb.weight, rule on emb", LM, TIED[:1], rules=rule("emb"),
            measured="silent"),
    Pattern("head.weight = emb.weight, rule on head", LM, TIED[1:], rules=rule("head")),
    Pattern("head.weight = emb.weight, rule on both", LM, TIED, peft=BOTH),
    Pattern("head.weight = emb.weight, tied=share", LM, TIED, peft=BOTH,
            rules=rule("head", tied="share")),
    Pattern("head.weight = emb.weight, a rule for each", LM, TIED,
            rules=lambda: [Rule("emb", lora=R), Rule("head", lora=LoraConfig(r=3, lora_alpha=5))]),
    # No module's forward reads the weight, so no name tells its reads apart: all are adapted.
    Pattern("tied, read by functions: a rule on emb", functional_tie, TIED, peft=BOTH,
            rules=rule("emb")),
    Pattern("tied, read by functions: a rule on both", functional_tie, TIED, peft=BOTH),
    Pattern("one of three tied Linears", three_tied, ("b.weight",), rules=rule("b")),
    Pattern("one name of a module that has two", two_names_called, ("second.weight",),
            rules=rule("second")),
    Pattern("one Parameter in two Linears, rule on one", shared_parameter, ("first.weight",),
            rules=rule("first"), measured="silent"),
    Pattern("one Parameter in two Linears, rule on both", shared_parameter,
            ("first.weight", "second.weight")),
    Pattern("two Parameters in one memory", overlapping, ("enc.weight",),
            expects=fxlora.UnsupportedOpError),
    Pattern("autoencoder: F.linear(h, enc.weight.T)",
            net(lambda m, a: F.linear(torch.tanh(m.enc(a)), m.enc.weight.T), x(4, 5), enc=linear()),
            ("enc.weight",)),
    Pattern("a penalty on the weight beside its product",
            net(lambda m, a: (torch.tanh(m.lin(a)), m.lin.weight.square().sum()), x(4, 5),
                lin=linear()),
            LIN),
    Pattern("embedding by a Linear's weight",
            net(lambda m, i: m.lin(F.embedding(i, m.lin.weight)), ids(7, 3, 4), lin=linear()),
            LIN, subscripts={"lin.weight": "io"}),
    Pattern("emb.weight[ids]",
            net(lambda m, i: torch.tanh(m.emb.weight[i]), ids(13, 3, 4),
                emb=lambda: nn.Embedding(13, 6)),
            EMB, subscripts={"emb.weight": "oi"}),
    Pattern("embedding extended by new tokens, cat",
            net(lambda m, i: torch.tanh(F.embedding(i, torch.cat([m.emb.weight, m.new]))),
                ids(15, 3, 4), emb=lambda: nn.Embedding(13, 6), new=w(2, 6)),
            EMB, subscripts={"emb.weight": "oi"}),
    Pattern("head is the embedding times a projection",
            net(lambda m, i: F.linear(m.p(m.emb(i)), m.emb.weight @ m.p.weight.T), ids(13, 3, 4),
                emb=lambda: nn.Embedding(13, 6), p=linear(6, 5)),
            ("emb.weight", "p.weight")),
    Pattern("embeddings less their mean",
            net(lambda m, i: m.emb(i) - m.emb.weight.mean(0), ids(13, 3, 4),
                emb=lambda: nn.Embedding(13, 6)),
            EMB),
    Pattern("weight.detach() beside the layer",
            net(lambda m, a: torch.tanh(m.lin(a)) * F.linear(a, m.lin.weight.detach()), X,
                lin=linear()),
            LIN),
    Pattern("weight.detach() alone",
            net(lambda m, a: torch.tanh(F.linear(m.pre(a), m.lin.weight.detach())), X,
                pre=linear(5, 5), lin=linear()),
            LIN, expects=fxlora.UnsupportedOpError),
    Pattern("a module called twice",
            net(lambda m, a, b: torch.tanh(m.lin(a)) * m.lin(b), x(4, 5), x(4, 5), lin=linear()),
            LIN),
    Pattern("Embedding, max_norm", embedded(max_norm=1.0), EMB,
            expects=fxlora.UnsupportedOpError, measured="silent"),
    Pattern("Embedding, padding_idx", embedded(padding_idx=2), EMB),
    Pattern("Embedding, sparse gradient", embedded(sparse=True), EMB, reference=embedded()),
    Pattern("Embedding, scale_grad_by_freq", embedded(scale_grad_by_freq=True), EMB),
    Pattern("EmbeddingBag, sum", bag("sum"), EMB),
    Pattern("EmbeddingBag, mean", bag("mean"), EMB),
    Pattern("F.embedding_bag, per_sample_weights",
            layer(lambda m, i, s: F.embedding_bag(i, m.w, mode="sum", per_sample_weights=s),
                  ids(13, 4, 3), x(4, 3), w=wt(13, 6)),
            ("layer.w",)),
    Pattern("a table of biases by index (Swin, T5)",
            layer(lambda m, i: m.w[i].permute(2, 0, 1), ids(13, 4, 5), w=w(13, 3)), ("layer.w",)),
]  # fmt: skip


# ---- raw parameters -----------------------------------------------------------------------------


class MatMul(Function):
    """x @ W.T with a custom backward."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, weight)
        return a @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ a


class Dense(nn.Module):
    """A linear layer that is not an nn.Linear."""

    subscripts: ClassVar = {"weight": "io"}

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, a, self.weight)


def conv1d(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(outputs, inputs)

    return make


def attention(m: Any, q: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[:, None], m.keys[None, None], m.values[None, None])


def vmapped(m: Any, a: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda v: F.linear(a, v))(m.w)


def changed(m: Any, a: torch.Tensor) -> torch.Tensor:
    weight = m.w.clone()
    weight[0] = 0
    weight[:, 1] *= 2
    return a @ weight


RAW = [
    Pattern("x @ W", layer(lambda m, a: a @ m.w, X, w=wt(5, 7)), W),
    Pattern("W @ x", layer(lambda m, a: m.w @ a, X, w=w(7, 4)), W),
    Pattern("x @ W.t()", layer(lambda m, a: a @ m.w.t(), X, w=w(7, 5)), W),
    Pattern("x @ W.mT", layer(lambda m, a: a @ m.w.mT, x(3, 4, 5), w=w(7, 5)), W),
    Pattern("a parameter of the model itself (CLIP)",
            net(lambda m, a: torch.tanh(a @ m.projection), X, projection=wt(5, 7)),
            ("projection",)),
    Pattern("W.to(dtype)",
            layer(lambda m, a: F.linear(a.float(), m.w.float()).double(), X, w=w(7, 5)), W,
            tolerance=1e-5),
    Pattern("W.view", layer(lambda m, a: a @ m.w.view(5, 7), X, w=wt(35, 1)), W,
            peft=(), rules=rule("layer.w")),
    Pattern("a slice of W", layer(lambda m, a: a @ m.w[1:6], X, w=wt(8, 7)), W),
    Pattern("W.chunk", layer(lambda m, a: (a @ m.w.chunk(2)[0]) * (a @ m.w.chunk(2)[1]), X,
                             w=wt(10, 7)), W),
    Pattern("W.unbind", layer(lambda m, a: (a @ m.w.unbind(0)[0]) * (a @ m.w.unbind(0)[2]), X,
                              w=wt(3, 5, 7)), W),
    Pattern("einsum, a matrix",
            layer(lambda m, a: torch.einsum("bi,io->bo", a, m.w), X, w=wt(5, 7)), W),
    Pattern("einsum ibh,hnd->ibnd (XLNet)",
            layer(lambda m, a: torch.einsum("ibh,hnd->ibnd", a, m.w), x(3, 4, 5),
                  w=w(5, 2, 7, dims="ioo")), W),
    Pattern("einsum ebi,eio->ebo (experts)",
            layer(lambda m, a: torch.einsum("ebi,eio->ebo", a, m.w), x(3, 4, 5), w=wt(3, 5, 7)), W),
    Pattern("tensordot", layer(lambda m, a: torch.tensordot(a, m.w, dims=2), x(4, 5, 3),
                               w=w(5, 3, 7)), W),
    Pattern("stacked experts, bmm", layer(lambda m, a: torch.bmm(a, m.w), x(3, 4, 5),
                                          w=wt(3, 5, 7)), W),
    Pattern("stacked experts (E, out, in), bmm",
            layer(lambda m, a: torch.bmm(a, m.w.mT), x(3, 4, 5), w=w(3, 7, 5)), W),
    Pattern("stacked experts, baddbmm",
            layer(lambda m, a: torch.baddbmm(m.bias, a, m.w), x(3, 4, 5), w=wt(3, 5, 7),
                  bias=w(3, 1, 7)), W),
    Pattern("stacked experts, matmul",
            layer(lambda m, a: torch.matmul(a[:, None], m.w), x(2, 4, 5), w=wt(3, 5, 7)), W),
    Pattern("stacked experts, gate_up and down",
            layer(lambda m, a: torch.bmm(
                      torch.prod(torch.stack(torch.bmm(a, m.up).chunk(2, -1)), 0), m.w),
                  x(3, 4, 5), up=wt(3, 5, 12), w=wt(3, 6, 7)),
            ("layer.up", "layer.w")),
    Pattern("experts by index, W[idx]",
            layer(lambda m, a, i: torch.bmm(a[:, None], m.w[i])[:, 0], X, ids(3, 4), w=w(3, 5, 7)),
            W),
    Pattern("experts under vmap", layer(vmapped, X, w=w(3, 7, 5)), W, since=(2, 12)),
    Pattern("experts under vmap, functional_call",
            layer(lambda m, a: torch.vmap(
                      lambda v: torch.func.functional_call(m.skeleton, {"weight": v}, (a,)))(m.w),
                  X, w=w(3, 7, 5), skeleton=linear(5, 7, False)), W, since=(2, 12)),
    Pattern("experts by torch._grouped_mm",
            layer(lambda m, a, ends: torch._grouped_mm(a, m.w, offs=ends), x(6, 16),
                  lambda: torch.tensor([2, 4, 6], dtype=torch.int32), w=wt(3, 16, 24)), W,
            dtype=torch.float32, tolerance=1e-4, since=(2, 15)),
    Pattern("a clone of W, changed in place", layer(changed, X, w=wt(5, 7)), W),
    Pattern("linalg.multi_dot", layer(lambda m, a: torch.linalg.multi_dot([a, m.u, m.v]), X,
                                      u=w(5, 3), v=w(3, 7)), ("layer.u", "layer.v")),
    Pattern("W.index_select", layer(lambda m, a, i: a @ m.w.index_select(0, i), x(4, 3),
                                    lambda: torch.tensor([1, 0, 5]), w=w(6, 7)), W),
    Pattern("W.gather", layer(lambda m, i: m.w.gather(0, i), ids(6, 3, 7), w=w(6, 7)), W),
    Pattern("one_hot @ W", layer(lambda m, i: F.one_hot(i, 6).to(m.w.dtype) @ m.w, ids(6, 4),
                                 w=wt(6, 7)), W),
    Pattern("prompt tokens, cat",
            layer(lambda m, a: torch.cat([m.w.expand(3, -1, -1), a], 1), x(3, 4, 5), w=w(1, 6, 5)),
            W),
    Pattern("positions, sliced and added", layer(lambda m, a: a + m.w[: a.shape[1]], x(2, 4, 5),
                                                 w=w(9, 5)), W),
    Pattern("positions, interpolated (ViT)",
            layer(lambda m, a: a + F.interpolate(m.w, (4, 6), mode="bilinear"), x(2, 3, 4, 6),
                  w=w(1, 3, 2, 5)), W),
    Pattern("a spectral weight, view_as_complex (FNO)",
            layer(lambda m, a: torch.fft.irfft(torch.einsum(
                      "bim,iom->bom", torch.fft.rfft(a), torch.view_as_complex(m.w)), n=6),
                  x(2, 3, 6), w=w(3, 5, 4, 2)), W),
    Pattern("a long convolution, rfft(W) (Hyena)",
            layer(lambda m, a: torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(m.w), n=8),
                  x(2, 3, 8), w=w(3, 8)), W),
    Pattern("prototypes, cdist", layer(lambda m, a: torch.cdist(a, m.w), X, w=w(7, 5)), W),
    Pattern("a codebook (VQ)",
            layer(lambda m, a: m.w[torch.cdist(a, m.w).argmin(1)], X, w=w(7, 5)), W),
    Pattern("LSTM, projected, both ways",
            wrapped(lambda: nn.LSTM(5, 6, 2, proj_size=3, bidirectional=True), x(4, 3, 5)),
            ("layer.weight_hr_l0", "layer.weight_ih_l1_reverse")),
    Pattern("LSTM", wrapped(lambda: nn.LSTM(5, 6), x(4, 3, 5)),
            ("layer.weight_ih_l0", "layer.weight_hh_l0")),
    Pattern("GRU, two layers, both ways",
            wrapped(lambda: nn.GRU(5, 6, num_layers=2, bidirectional=True), x(4, 3, 5)),
            ("layer.weight_ih_l0", "layer.weight_hh_l1_reverse")),
    Pattern("RNN", wrapped(lambda: nn.RNN(5, 6, batch_first=True), x(4, 3, 5)),
            ("layer.weight_ih_l0",)),
    Pattern("LSTMCell",
            wrapped(lambda: nn.LSTMCell(5, 6), x(4, 5), lambda: (torch.randn(4, 6),) * 2),
            ("layer.weight_ih", "layer.weight_hh")),
    Pattern("Bilinear", layer(lambda m, a, b: m.inner(a, b), x(4, 5), x(4, 3),
                              inner=lambda: nn.Bilinear(5, 3, 7)),
            ("layer.inner.weight",)),
    Pattern("a linear layer that is no nn.Linear", wrapped(lambda: Dense(5, 7), X),
            ("layer.weight",)),
    Pattern("autograd.Function with the weight", layer(lambda m, a: MatMul.apply(a, m.w), X,
                                                       w=w(7, 5)), W),
    Pattern("autograd.Function with a Linear's weight",
            net(lambda m, a: torch.tanh(MatMul.apply(a, m.lin.weight)), X, lin=linear()), LIN),
    Pattern("GPT-2's Conv1D", net(lambda m, a: torch.tanh(m.c_attn(a)), x(3, 4, 5),
                                  c_attn=conv1d(5, 7)),
            ("c_attn.weight",), config={"fan_in_fan_out": True}),
    Pattern("ParameterList",
            layer(lambda m, a: torch.tanh(a @ m.ws[0]) @ m.ws[1], X,
                  ws=lambda: nn.ParameterList([torch.randn(5, 7), torch.randn(7, 6)])),
            ("layer.ws.0", "layer.ws.1")),
    Pattern("ParameterDict",
            layer(lambda m, a: a @ m.ws["q"] + a @ m.ws["v"], X,
                  ws=lambda: nn.ParameterDict({"q": torch.randn(5, 7), "v": torch.randn(5, 7)})),
            ("layer.ws.q",)),
    Pattern("a mask times the weight",
            layer(lambda m, a: a @ (m.w * m.mask), X, w=wt(5, 7),
                  mask=lambda: (torch.rand(5, 7) > 0.4).double()), W),
    Pattern("a weight times a weight",
            layer(lambda m, a: a @ (m.u @ m.v), X, u=w(5, 3), v=wt(3, 7)), ("layer.u", "layer.v")),
    Pattern("a factorised layer, x @ U @ V",
            layer(lambda m, a: a @ m.u @ m.v, X, u=wt(5, 3), v=wt(3, 7)), ("layer.u", "layer.v")),
    Pattern("a gate: two reads of one weight",
            layer(lambda m, a: (a @ m.w) * torch.sigmoid((a + 1) @ m.w), X, w=wt(5, 7)), W),
    Pattern("a weight to a power", layer(lambda m, a: a @ torch.matrix_exp(m.w), X, w=wt(5, 5)), W),
    Pattern("learned keys and values of attention",
            layer(attention, x(2, 4, 5), keys=w(6, 5), values=w(6, 7)),
            ("layer.keys", "layer.values")),
]  # fmt: skip


# ---- packed projections -------------------------------------------------------------------------


def split(*sizes: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return a forward that uses a packed projection as attention does: each part differently."""

    def forward(m: Any, a: torch.Tensor) -> torch.Tensor:
        q, k, v = m.in_proj(a).split(sizes, -1)
        width = min(sizes)
        return torch.tanh(q[..., :width] * torch.sigmoid(k[..., :width]) + v[..., :width])

    return forward


Q_V = {"q": (0, 6), "v": (12, 18)}
PROJ = ("in_proj.weight",)

PACKED = [
    Pattern("packed QKV, all of it", net(split(6, 6, 6), X, in_proj=linear(5, 18)), PROJ),
    Pattern("packed QKV: q and v", net(split(6, 6, 6), X, in_proj=linear(5, 18)), PROJ,
            rules=rule("*in_proj", parts=Q_V), parts=Q_V, peft=None),
    Pattern("packed QKV by number",
            net(split(6, 6, 6), X, in_proj=linear(5, 18)), PROJ, peft=None,
            rules=rule("*in_proj", parts=3, enable=[True, False, True]),
            parts={"0": (0, 6), "2": (12, 18)}),
    Pattern("grouped queries: q and v of unequal sizes",
            net(split(6, 2, 2), X, in_proj=linear(5, 10)), PROJ, peft=None,
            rules=rule("*in_proj", parts={"q": 6, "k": 2, "v": 2}, enable=["q", "v"]),
            parts={"q": (0, 6), "v": (8, 10)}),
    Pattern("MultiheadAttention: q and v", net(attends, x(3, 4, 6), mha=mha()),
            ("mha.in_proj_weight",), peft=None,
            rules=rule("mha.in_proj_weight", parts=Q_V), parts=Q_V),
    Pattern("GPT-2's c_attn: q and v",
            net(split(6, 6, 6), X, in_proj=conv1d(5, 18)), PROJ, peft=None,
            rules=rule("in_proj", parts=3, enable=[True, False, True]),
            parts={"0": (0, 6), "2": (12, 18)}),
    Pattern("1x1 convolution as packed QKV: q and v",
            net(lambda m, a: torch.prod(torch.stack(torch.tanh(m.in_proj(a)).chunk(3, 1)), 0),
                x(2, 5, 3, 4), in_proj=lambda: nn.Conv2d(5, 18, 1)),
            PROJ, peft=None, rules=rule("in_proj", parts=Q_V), parts=Q_V),
    Pattern("experts' gate_up: the gate alone",
            layer(lambda m, a: torch.prod(torch.stack(torch.bmm(a, m.w).chunk(2, -1)), 0),
                  x(3, 4, 5), w=wt(3, 5, 14)),
            W, peft=None, rules=rule("layer.w", parts={"gate": (0, 7)}), parts={"gate": (0, 7)}),
    Pattern("LSTM: two of its gates", wrapped(lambda: nn.LSTM(5, 6), x(4, 3, 5)),
            ("layer.weight_ih_l0",), peft=None, parts={"1": (6, 12), "3": (18, 24)},
            rules=rule("layer.weight_ih_l0", parts=4, enable=[False, True, False, True])),
    Pattern("head tied to the embedding: some of its rows", LM, TIED[1:], peft=None,
            rules=rule("head", parts={"new": (6, 13)}), parts={"new": (6, 13)}),
    Pattern("a part that nothing reads",
            net(lambda m, a: torch.tanh(F.linear(a, m.in_proj.weight[6:])), X,
                in_proj=linear(5, 18)),
            PROJ, peft=None, rules=rule("in_proj", parts=Q_V), parts=Q_V,
            expects=fxlora.FxLoraError),
    Pattern("fused gate and up, chunk",
            net(lambda m, a: F.silu(m.in_proj(a).chunk(2, -1)[0]) * m.in_proj(a).chunk(2, -1)[1],
                X, in_proj=linear(5, 14)),
            PROJ),
    Pattern("fused gate and up: the gate alone",
            net(lambda m, a: F.silu(m.in_proj(a).chunk(2, -1)[0]) * m.in_proj(a).chunk(2, -1)[1],
                X, in_proj=linear(5, 14)),
            PROJ, peft=None, rules=rule("in_proj", parts={"gate": (0, 7)}),
            parts={"gate": (0, 7)}),
]  # fmt: skip


# ---- control flow -------------------------------------------------------------------------------


def _checkpointed(reentrant: bool) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(m: Any, a: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda b: torch.tanh(m.lin(b)), a, use_reentrant=reentrant)

    return forward


def momentum(m: Any, a: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = m.lin(a.flip(0))
    return torch.tanh(m.lin(a)) * target


def frozen(m: Any, a: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features = m.lin(a)
    return m.head(features)


def inferred(m: Any, a: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        features = m.lin(a)
    return m.head(features.clone())


def by_hand(m: Any, a: torch.Tensor) -> torch.Tensor:
    """The weight is an argument of the checkpointed function."""
    return checkpoint(lambda b, v: torch.tanh(F.linear(b, v)), a, m.lin.weight, use_reentrant=False)


def sparse(m: Any, a: torch.Tensor) -> torch.Tensor:
    return torch.sparse.mm(m.adjacency.to_sparse(), m.lin(a))


def doubled_gradient() -> nn.Linear:
    made = nn.Linear(5, 7)
    made.register_full_backward_hook(lambda m, given, out: (given[0] * 2,))
    return made


def conditional(m: Any, a: torch.Tensor) -> torch.Tensor:
    def near(b: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(b, m.lin.weight))

    return torch.cond(a.sum() > -1e9, near, lambda b: F.linear(b, m.lin.weight) * 2, (a,))


def routed(m: Any, a: torch.Tensor) -> torch.Tensor:
    """A mixture of experts whose Python branches on data."""
    chosen = (a.sum(1) > 0).long()
    out = a.new_zeros(a.shape[0], 7)
    for number, expert in enumerate(m.experts):
        rows = torch.nonzero(chosen == number).flatten()
        if len(rows):
            out = out.index_add(0, rows, torch.tanh(expert(a[rows])))
    return out


def packed_sequence(m: Any, a: torch.Tensor) -> torch.Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(a, torch.tensor([4, 3, 1]), batch_first=True)
    return m.lstm(packed)[0].data


def clipped(m: Any, a: torch.Tensor) -> torch.Tensor:
    """A critic that clips its weights in every call (WGAN)."""
    with torch.no_grad():
        m.w.clamp_(-0.5, 0.5)
    return a @ m.w


FLOW = [
    Pattern("checkpoint", net(_checkpointed(False), X, lin=linear()), LIN,
            reference=net(lambda m, a: torch.tanh(m.lin(a)), X, lin=linear())),
    Pattern("checkpoint, reentrant", net(_checkpointed(True), X, lin=linear()), LIN,
            reference=net(lambda m, a: torch.tanh(m.lin(a)), X, lin=linear())),
    Pattern("also read under no_grad", net(momentum, X, lin=linear()), LIN),
    Pattern("read under no_grad alone",
            net(frozen, X, lin=linear(), head=linear(7, 6)), LIN,
            expects=fxlora.UnsupportedOpError),
    Pattern("read in inference_mode alone",
            net(inferred, X, lin=linear(), head=linear(7, 6)), LIN, expects=fxlora.FxLoraError),
    Pattern("checkpoint, the weight as argument", net(by_hand, X, lin=linear()), LIN,
            reference=net(lambda m, a: torch.tanh(F.linear(a, m.lin.weight)), X, lin=linear())),
    Pattern("a product with a sparse matrix (GNN)",
            net(sparse, X, lin=linear(), adjacency=lambda: torch.randn(4, 4).relu()), LIN,
            exportable=False),
    Pattern("a backward hook on the layer",
            net(lambda m, a: m.lin(torch.tanh(m.pre(a))), X, pre=linear(5, 5),
                lin=doubled_gradient),
            ("pre.weight", "lin.weight"), expects=fxlora.CaptureError),
    Pattern("a packed sequence",
            net(packed_sequence, x(3, 4, 5), lstm=lambda: nn.LSTM(5, 6, batch_first=True)),
            ("lstm.weight_ih_l0",), exportable=False),
    Pattern("adaptive softmax: clusters by data",
            net(lambda m, a, t: m.s(a, t).output, x(9, 5), ids(20, 9),
                s=lambda: nn.AdaptiveLogSoftmaxWithLoss(5, 20, [4, 9], 1.5)),
            ("s.head.weight", "s.tail.0.0.weight"), exportable=False),
    Pattern("torch.cond", net(conditional, X, lin=linear()), LIN,
            reference=net(lambda m, a: torch.tanh(F.linear(a, m.lin.weight)), X, lin=linear())),
    Pattern("experts chosen by Python", net(routed, x(8, 5),
            experts=lambda: nn.ModuleList(nn.Linear(5, 7) for _ in range(2))),
            ("experts.0.weight", "experts.1.weight"), exportable=False),
    Pattern("a weight clipped in place by every call", layer(clipped, X, w=w(5, 7)), W,
            expects=fxlora.UnsupportedOpError),
    Pattern("hypernetwork: the generator",
            net(lambda m, a, z: torch.bmm(a[:, None], m.gen(z).view(4, 5, 7)), X, x(4, 3),
                gen=linear(3, 35)),
            ("gen.weight",)),
]  # fmt: skip


# ---- nothing to adapt ---------------------------------------------------------------------------

NONE = [
    Pattern("a typo in a list of targets",
            net(lambda m, a: m.q_proj(a) * m.v_proj(a), X, q_proj=linear(), v_proj=linear()),
            ("q_proj.weight", "v_porj.weight"), expects=fxlora.NoMatchError, measured="silent",
            rules=lambda: LoraConfig(r=2, target_modules=["q_proj", "v_porj"])),
    Pattern("a weight that data compute",
            net(lambda m, a, v: a @ v, X, x(5, 7), unused=linear()), ("generated.weight",),
            expects=fxlora.NoMatchError),
    Pattern("a buffer as weight",
            layer(lambda m, a: a @ m.w, X, w=lambda: torch.randn(5, 7), lin=linear()), W,
            expects=fxlora.NoMatchError),
    Pattern("an integer weight",
            layer(lambda m, a: a @ m.w.to(a.dtype), X,
                  w=lambda: nn.Parameter(torch.randint(-9, 9, (5, 7)), requires_grad=False)),
            W, expects=fxlora.FxLoraError),
    Pattern("a complex weight",
            layer(lambda m, a: (a.to(m.w.dtype) @ m.w).abs(), X,
                  w=lambda: nn.Parameter(torch.randn(5, 7, dtype=torch.complex128))),
            W, expects=fxlora.FxLoraError),
    Pattern("integers times a learned scale",
            layer(lambda m, a: F.linear(a, m.w.to(a.dtype) * m.scale), X,
                  w=lambda: torch.randint(-9, 9, (7, 5), dtype=torch.int8), scale=w(7, 1)), W,
            expects=fxlora.NoMatchError),
    Pattern("a vector", net(lambda m, a: m.norm(a), X, norm=lambda: nn.LayerNorm(5)),
            ("norm.weight",), expects=fxlora.FxLoraError),
    Pattern("a layer that nothing calls",
            net(lambda m, a: torch.tanh(m.lin(a)), X, lin=linear(), unused=linear(3, 4)),
            ("unused.weight",), expects=fxlora.FxLoraError),
]  # fmt: skip


# ---- variants -----------------------------------------------------------------------------------


def variant(
    name: str, build: Callable[[], Built], weights: tuple[str, ...], **keys: Any
) -> Pattern:
    single = keys.get("init_lora_weights") in ("pissa", "olora")  # PEFT refuses float64 for them
    return Pattern(
        name,
        build,
        weights,
        rules=rule(*(n.removesuffix(".weight") for n in weights), **keys),
        config=keys,
        plain=False,
        dtype=torch.float32 if single else torch.float64,
        tolerance=1e-4 if single else 1e-10,
    )


FUNCTIONAL_LINEAR = net(
    lambda m, a: torch.tanh(F.linear(a, m.lin.weight, m.lin.bias)), X, lin=linear()
)

VARIANTS = [
    variant("DoRA", lin(linear()), LIN, use_dora=True),
    variant("DoRA: F.linear(x, self.lin.weight)", FUNCTIONAL_LINEAR, LIN, use_dora=True),
    variant("DoRA: convolution, reflect padding", padded("reflect"), CONV, use_dora=True),
    variant("DoRA: embedding", embedded(), EMB, use_dora=True),
    variant("DoRA: grouped convolution",
            conv(lambda: nn.Conv1d(6, 9, 4, groups=3), 2, 6, 11), CONV, use_dora=True),
    variant("DoRA: transposed convolution",
            conv(lambda: nn.ConvTranspose2d(3, 6, (4, 2)), 2, 3, 5, 7), CONV, use_dora=True),
    variant("DoRA: stacked experts", layer(lambda m, a: torch.bmm(a, m.w), x(3, 4, 5),
                                           w=wt(3, 5, 7)), W, use_dora=True),
    variant("DoRA: LSTM", wrapped(lambda: nn.LSTM(5, 6), x(4, 3, 5)), ("layer.weight_ih_l0",),
            use_dora=True),
    variant("PiSSA: embedding", embedded(padding_idx=2), EMB, init_lora_weights="pissa"),
    variant("PiSSA: F.linear(x, self.lin.weight)", FUNCTIONAL_LINEAR, LIN,
            init_lora_weights="pissa"),
    variant("OLoRA: F.linear(x, self.lin.weight)", FUNCTIONAL_LINEAR, LIN,
            init_lora_weights="olora"),
    variant("orthogonal init, scaled Linear", lin(lambda: Scaled(5, 7)), LIN,
            init_lora_weights="orthogonal"),
    Pattern("ranks by a budget: F.linear and Linear",
            net(lambda m, a: m.head(torch.tanh(F.linear(a, m.lin.weight))), X, lin=linear(5, 17),
                head=linear(17, 11)),
            ("lin.weight", "head.weight"), match={"budget": 80}),
]  # fmt: skip

GROUPS = {
    "modules whose forward is not called": FUNCTIONAL,
    "layers that do more than their type says": DERIVED,
    "convolutions": CONVOLUTIONS,
    "embeddings, ties and shares": SHARED,
    "raw parameters": RAW,
    "packed projections": PACKED,
    "control flow": FLOW,
    "nothing to adapt": NONE,
    "variants": VARIANTS,
}
PATTERNS = {pattern.name: pattern for group in GROUPS.values() for pattern in group}
assert len(PATTERNS) == sum(map(len, GROUPS.values())), "two patterns have one name"
