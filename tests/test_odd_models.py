"""Models that use weights in unusual ways: captured exactly and adapted correctly, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxlora
from fxlora import CaptureError, FxLoraWarning, LoraConfig, NoMatchError, Rule, UnsupportedOpError

from .laws import check_laws
from .models import Several
from .typed import OpenModule, grad_of, plan_of, untyped

EVERY = Rule(lora=LoraConfig(r=2))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape))


class Odd(OpenModule):
    """A layer 5 → 3, a case's other parts, and the case's forward."""

    subscripts: ClassVar = {"[qw]": "oi", "v": "io", "p.*": "io", "projection": "io"}

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


class First(nn.Module):
    """Returns a module's first output; the module gets `rest`, or the states, after the input."""

    def __init__(self, inner: nn.Module, *rest: Any) -> None:
        super().__init__()
        self.inner, self.rest = inner, rest

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        found = self.inner(x, *(self.rest or states))
        return found[0] if isinstance(found, tuple) else found


# ---- recurrent layers ---------------------------------------------------------------------------

RECURRENT = {
    "lstm": lambda: nn.LSTM(5, 6),
    "lstm deep": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, dropout=0.3),
    "lstm projected": lambda: nn.LSTM(5, 6, proj_size=3, batch_first=True),
    "gru": lambda: nn.GRU(5, 6, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(5, 6, num_layers=2, bias=False, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*dropout.*", UserWarning)
        gm, lora = check_laws(First(RECURRENT[name]()), (normal(2, 3, 5),), rules=EVERY)
    inner = [n for n, p in lora.named_parameters() if n.startswith("inner.w") and p.ndim == 2]
    assert {e.parameter for e in plan_of(lora)} == {n for n in inner if "lora" not in n}
    assert {entry.form for entry in plan_of(lora)} == {"weight"}
    assert len(fxlora.match(gm, LoraConfig(r=2, target_modules=["inner"]))) == len(plan_of(lora))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(cell: type[nn.Module]) -> None:
    x, h = normal(4, 5), normal(4, 6)
    if cell is nn.LSTMCell:
        model = Odd(lambda m, x, h: m.cell(x, (h, h + 1)), cell=cell(5, 6))
    else:
        model = Odd(lambda m, x, h: m.cell(x, h), cell=cell(5, 6))
    _, lora = check_laws(model, (x, h), rules=Rule("cell", lora=LoraConfig(r=2)))
    assert len(plan_of(lora)) == 2


def test_sequences_that_the_forward_packs_are_a_region() -> None:
    def packs(model: Any, x: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5]), batch_first=True)
        return model.lstm(packed)[0].data

    model, x = Odd(packs, lstm=nn.LSTM(5, 6, batch_first=True).double()), normal(2, 7, 5)
    with pytest.warns(fxlora.FxLoraWarning, match="submodules are captured instead"):
        gm = fxlora.capture(model, x)
    assert gm.regions == ("lstm",) and torch.equal(gm(x), model(x))


# ---- parametrized weights -----------------------------------------------------------------------

PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm whole": lambda m: parametrizations.weight_norm(m, dim=untyped(None)),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "cayley": lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"),
    "old spectral_norm": nn.utils.spectral_norm,
}


def test_parametrized_layers_are_called_by_their_own_name() -> None:
    model = Several(
        nn.Sequential(made(nn.Linear(5, 3)), nn.Tanh(), nn.Linear(3, 4))
        for made in PARAMETRIZED.values()
    )
    gm, lora = check_laws(model, (normal(4, 5),), rules=Rule("parts.*.0", lora=LoraConfig(r=2)))
    assert len(plan_of(lora)) == len(PARAMETRIZED)
    entries = [*plan_of(lora)]
    for number, name in enumerate(PARAMETRIZED):
        targets = [f"parts.{number}.0"]
        if not name.startswith("old"):  # the old norms have 0.weight_orig instead
            targets.append(f"parts.{number}.0.weight")
        for target in targets:
            (entry,) = fxlora.match(gm, LoraConfig(r=2, target_modules=[target]))
            entries.append(entry)
    for entry in entries:
        assert entry.shape == (3, 5) and entry.form == "weight" and entry.op == "linear"


@pytest.mark.parametrize(
    ("name", "layer", "op", "shape"),
    [
        ("weight_norm", lambda: nn.Conv1d(6, 9, 3, groups=3), "conv1d", (4, 6, 7)),
        ("spectral_norm", lambda: nn.Conv2d(3, 4, (2, 3)), "conv2d", (2, 3, 6, 8)),
        ("weight_norm", lambda: nn.Embedding(11, 4), "embedding", None),
    ],
)
def test_parametrized_layers_of_other_kinds(
    name: str, layer: Callable[[], nn.Module], op: str, shape: Any
) -> None:
    x = normal(*shape) if shape else torch.tensor([[1, 2, 5], [7, 5, 3]])
    model = nn.Sequential(PARAMETRIZED[name](layer()), nn.Tanh())
    _, lora = check_laws(model, (x,), rules=Rule("0", op=op, lora=LoraConfig(r=2)))
    assert [entry.op for entry in plan_of(lora)] == [op]


def test_old_weight_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 3)), nn.Tanh()).double()
    with torch.no_grad():  # else its `weight`, which is no leaf, cannot be deep-copied
        model(normal(4, 5))
    _, lora = check_laws(model, (normal(4, 5),), rules=Rule("0.weight_v", lora=LoraConfig(r=2)))
    assert [entry.parameter for entry in plan_of(lora)] == ["0.weight_v"]


def test_all_linear_takes_parametrized_layers_and_no_factors() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 3)),
        Odd(lambda m, x: F.linear(x, m.mix * m.gate), mix=weight(4, 3), gate=weight(4, 3)),
    )
    gm = fxlora.capture(model.double(), normal(4, 5))
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules="all-linear"))
    assert [entry.parameter for entry in plan] == ["0.parametrizations.weight.original1"]
    assert "1.gate" in dict(plan.skipped) and "1.mix" in dict(plan.skipped)


COMPUTED = {
    "masked": (lambda m, x: F.linear(x, m.layer.weight * m.mask), {"mask": weight(3, 5)}, "layer"),
    "transposed": (lambda m, x: x @ m.layer.weight.t(), {}, "layer"),
    "concatenated": (
        lambda m, x: F.linear(x, torch.cat([m.layer.weight, m.q])),
        {"q": weight(4, 5)},
        None,
    ),
    "chunked": (lambda m, x: sum(F.linear(x, c) for c in m.q.chunk(3)), {"q": weight(12, 5)}, "q"),
    "multiplied": (lambda m, x: x @ (m.q @ m.v), {"q": weight(5, 4), "v": weight(4, 6)}, None),
    "scaled": (
        lambda m, x: m.layer(x) * m.a + m.b,
        {"a": nn.Parameter(torch.tensor(2.0)), "b": weight(3)},
        None,
    ),
    "listed": (
        lambda m, x: m.layer(x) @ m.p[0] @ m.p[1],
        {"p": nn.ParameterList([weight(3, 4), weight(4, 6)])},
        None,
    ),
    "named": (
        lambda m, x: m.layer(x) @ m.p["a"],
        {"p": nn.ParameterDict({"a": weight(3, 4)})},
        "p.a",
    ),
    "functional_call": (
        lambda m, x: torch.func.functional_call(m.layer, {"weight": m.layer.weight * 2}, (x,)),
        {},
        "layer",
    ),
    "bilinear product": (
        lambda m, x: torch.einsum("ni,oi,no->no", x, m.layer.weight, x[:, :3]),
        {},
        "layer",
    ),
}


@pytest.mark.parametrize("every", [True, False])
def test_computed_weights(every: bool) -> None:
    cases = [case for case in COMPUTED.values() if (case[2] is None) is every]
    model = Several(Odd(forward, **copy.deepcopy(parts)) for forward, parts, _ in cases)
    named = [f"parts.{number}.{target}" for number, (*_, target) in enumerate(cases)]
    rules = EVERY if every else Rule(named, lora=LoraConfig(r=2))
    gm, lora = check_laws(model, (normal(4, 5),), rules=rules)
    assert every or len(plan_of(lora)) == len(cases)
    read = {n.target for n in gm.graph.nodes if n.op == "get_attr" and n.users}
    matrices = {n for n, p in gm.named_parameters() if p.ndim == 2 and n in read}
    assert {entry.parameter for entry in fxlora.match(gm, EVERY)} == matrices


def test_a_module_under_two_names_called_thrice() -> None:
    shared = nn.Linear(5, 5)
    model = Odd(lambda m, x: m.layer(m.a(torch.tanh(m.b(m.a(x))))), a=shared, b=shared)
    gm, lora = check_laws(model, (normal(4, 5),), rules=Rule("a", lora=LoraConfig(r=2)))
    (entry,), (other,) = plan_of(lora), fxlora.match(gm, Rule("b", lora=LoraConfig(r=2)))
    assert entry.parameter == other.parameter and set(entry.names) == {"a.weight", "b.weight"}


# ---- buffers, complex and bilinear weights ------------------------------------------------------


def test_a_buffer_is_named_as_such() -> None:
    model = Odd(lambda m, x: m.layer(x) @ m.projection)
    model.register_buffer("projection", torch.randn(3, 4))
    gm = fxlora.capture(model, torch.randn(4, 5))
    with pytest.raises(NoMatchError, match=r"'projection' is a buffer.*nn\.Parameter"):
        fxlora.match(gm, Rule("projection", lora=LoraConfig(r=2)))
    projection = model.projection
    del model.projection
    model.projection = nn.Parameter(projection, requires_grad=False)
    _, lora = check_laws(model, (normal(4, 5),), rules=Rule("projection", lora=LoraConfig(r=2)))
    assert len(plan_of(lora)) == 1


def test_complex_weights_are_named_as_such() -> None:
    phases = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    model = Odd(lambda m, x: (m.layer(x).to(torch.complex64) @ m.phases).real, phases=phases)
    x = torch.randn(4, 5)
    gm = fxlora.capture(model, x)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(NoMatchError, match=r"complex64; adapters are for real numbers"):
        fxlora.match(gm, LoraConfig(r=2, target_modules=["phases"]))


def test_bilinear() -> None:
    model = Odd(lambda m, x: m.bilinear(x, torch.tanh(m.layer(x))), bilinear=nn.Bilinear(5, 3, 4))
    _, lora = check_laws(
        model, (normal(6, 5),), rules=Rule(["layer", "bilinear"], lora=LoraConfig(r=2))
    )
    assert {e.site: (e.form, e.layout.roles) for e in plan_of(lora)}["bilinear"] == (
        "weight",
        "eoi",
    )


def test_lazy_layers_after_their_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(4))
    model(torch.randn(2, 5))
    check_laws(model, (normal(4, 5),), rules=EVERY)


# ---- hooks --------------------------------------------------------------------------------------


def hooked(on_root: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4))
    at = model if on_root else model[2]
    at.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    at.register_forward_hook(lambda m, args, output: output + args[0].sum(-1, keepdim=True))
    at.register_forward_hook(
        lambda m, args, kwargs, output: {"y": output}["y"] * 2, with_kwargs=True, always_call=True
    )
    return model


@pytest.mark.parametrize("on_root", [False, True])
def test_forward_hooks_are_captured(on_root: bool) -> None:
    model, x = hooked(on_root), normal(4, 5)
    bare = copy.deepcopy(model).double()
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    assert not torch.equal(bare(x), model.double()(x))
    gm, _ = check_laws(model, (x,), rules=EVERY)
    assert "forward" not in model.__dict__
    spec = gm.inputs["eval"]
    assert spec and list(spec.names) == ["input"]


def test_hooks_of_the_root_need_inputs() -> None:
    with pytest.raises(CaptureError, match="Give example inputs"):
        fxlora.capture(hooked(True))


def test_backward_hooks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))
    model[1].register_full_backward_hook(lambda m, given, out: (given[0] * 2,))
    with pytest.raises(CaptureError, match="'1' has backward hooks"):
        fxlora.capture(model, torch.randn(4, 5))


def test_hooks_on_tensors_stay_in_python() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        y = model.layer(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 2)
        return torch.tanh(y)

    line = forward.__code__.co_firstlineno + 3
    with pytest.warns(FxLoraWarning, match=rf"register_hook on a tensor at {__file__}:{line}"):
        gm = fxlora.capture(Odd(forward), torch.randn(4, 5))  # the hook stays in Python
    assert gm.regions == ("layer",)
    y = torch.randn(3, requires_grad=True)
    y.register_hook(lambda grad: grad * 2)  # the capture has removed its patch
    y.sum().backward()
    assert float(grad_of(y)[0]) == 2


# ---- custom ops ---------------------------------------------------------------------------------


@torch.library.custom_op("fxlora_tests::scaled_linear", mutates_args=())
def scaled_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t() * 2


@scaled_linear.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, w = ctx.saved_tensors
    return grad @ w * 7, grad.t() @ x * 5  # other factors than autograd's


scaled_linear.register_autograd(_backward, setup_context=_save)


def test_custom_ops_keep_their_backward() -> None:
    model = Odd(lambda m, x: scaled_linear(torch.tanh(m.layer(x)), m.w), w=weight(4, 3))
    _, lora = check_laws(model, (normal(6, 5),), rules=EVERY)
    assert {entry.site: entry.form for entry in plan_of(lora)} == {"layer": "branch", "w": "weight"}


def test_torchvision_ops() -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.tensor([[0.0, 0, 4, 5], [1, 1, 6, 7]]).double()
    align = Odd(lambda m, x, b: ops.roi_align(m.conv(x), [b], 2), conv=nn.Conv2d(3, 4, 3))
    check_laws(align, (normal(1, 3, 9, 11), boxes), rules=Rule("conv", lora=LoraConfig(r=2)))
    deform = Odd(lambda m, x, o: m.conv(x, o), conv=ops.DeformConv2d(6, 4, 3, groups=2))
    _, lora = check_laws(
        deform,
        (normal(1, 6, 9, 11), normal(1, 18, 7, 9)),
        rules=Rule("conv", lora=LoraConfig(r=2)),
    )
    assert [(entry.op, entry.form) for entry in plan_of(lora)] == [("deform_conv2d", "weight")]


# ---- inputs and outputs -------------------------------------------------------------------------


class Pair(NamedTuple):
    a: torch.Tensor
    b: Any


@dataclass
class Registered:
    a: torch.Tensor
    b: torch.Tensor | None = None


torch.export.register_dataclass(Registered)


@dataclass(eq=False)
class Unregistered:
    a: torch.Tensor


GRAPH = torch.eye(4).double().to_sparse()

FORMS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "namedtuple": (lambda m, p: Pair(m.layer(p.a), p.b), (Pair(normal(4, 5), normal(2)),), {}),
    "dataclass": (lambda m, p: Registered(m.layer(p.a)), (Registered(normal(4, 5)),), {}),
    "dict": (lambda m, p: {"y": m.layer(p["x"][0]), "n": None}, ({"x": [normal(4, 5)]},), {}),
    "plain": (lambda m, x: (m.layer(x), 3, "word", 2.5, None, True), (normal(4, 5),), {}),
    "starred": (lambda m, *xs: sum(m.layer(x) for x in xs), (normal(4, 5), normal(4, 5)), {}),
    "keywords": (
        lambda m, *, x, s=2.0, **more: m.layer(x) * s + more["b"],
        (),
        {"b": normal(3), "x": normal(4, 5)},
    ),
    "default": (
        lambda m, x, y=None, flag=False: m.layer(x if y is None else y),
        (normal(4, 5),),
        {},
    ),
    "sparse": (lambda m, x: torch.sparse.mm(GRAPH, m.layer(x[0]))[None], (normal(1, 4, 5),), {}),
    "integers": (
        lambda m, i: m.layer(m.emb(i)),
        (torch.tensor([[1, 7, 3]], dtype=torch.int32),),
        {},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_inputs_and_outputs(name: str) -> None:
    forward, args, kwargs = FORMS[name]
    model = Odd(forward, emb=nn.Embedding(9, 5))
    gm, _ = check_laws(model, args, kwargs, rules=Rule("layer", lora=LoraConfig(r=2)))
    found, expected = gm(*args, **kwargs), model(*args, **kwargs)
    assert type(found) is type(expected)
    if name == "plain":
        assert found[1:] == expected[1:]


def test_a_dataclass_that_pytree_does_not_know() -> None:
    for forward, args in (
        (lambda m, x: Unregistered(m.layer(x)), (normal(4, 5),)),
        (lambda m, p: m.layer(p.a), (Unregistered(normal(4, 5)),)),
    ):
        with pytest.warns(FxLoraWarning, match="register_dataclass"):
            gm = fxlora.capture(Odd(forward).double(), args)
        assert gm.regions == ("layer",)


def test_a_sparse_buffer_is_refused() -> None:
    model = Odd(lambda m, x: torch.sparse.mm(m.graph, m.layer(x)))
    model.register_buffer("graph", torch.eye(4).to_sparse())
    with pytest.raises(CaptureError):
        fxlora.capture(model, torch.randn(4, 5))


def test_a_parameter_written_in_place() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model.state.add_(1.0)
        return model.layer(x) @ model.state

    model, x = Odd(forward, state=weight(3, 4)).double(), normal(4, 5)
    before = model.state.detach().clone()
    gm = fxlora.capture(model, x)
    first, second = gm(x), gm(x)
    assert torch.equal(model.state, before)
    assert torch.equal(first, model(x)) and torch.equal(second, model(x))
    with pytest.raises(UnsupportedOpError, match="weight is written to"):
        fxlora.match(gm, Rule("state", lora=LoraConfig(r=2)))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: torch.jit.script(nn.Linear(5, 3)), id="script"),
        pytest.param(
            lambda: Odd(lambda m, x: m.layer(x) + m.s(x), s=torch.jit.script(nn.Linear(5, 3))),
            id="script inside",
        ),
        pytest.param(
            lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 3))),
            id="quantized",
        ),
        pytest.param(
            lambda: Odd(lambda m, x: torch.func.grad(lambda y: m.layer(y).sum())(x)), id="func.grad"
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_no_graph_can_hold_is_refused_or_stays_python(model: Callable[[], nn.Module]) -> None:
    source, x = model(), torch.randn(4, 5)
    if not isinstance(source, Odd):
        with pytest.raises(CaptureError):
            fxlora.capture(source, x)
        return
    with pytest.warns(FxLoraWarning, match="captured instead"):
        gm = fxlora.capture(source, x)
    assert gm.regions == ("layer",)
    assert torch.equal(gm(x), source(x))


# ---- state outside buffers ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_state_in_attributes_stays_python(how: str) -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        if how == "in place":
            model.state.add_(1)
        else:
            model.state = model.state + 1
        return model.layer(x) * model.state

    model, x = Odd(forward).double(), normal(4, 5)
    model.state = torch.zeros(3).double()
    gm = fxlora.capture(model, x)
    assert gm.regions == ("layer",) and not model.state.any()
    for _ in range(3):
        assert torch.equal(gm(x), model(x))


def test_what_a_forward_only_leaves_behind_is_no_state() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        model.last = model.layer(x)
        return model.last * 2

    assert fxlora.capture(Odd(forward).double(), normal(4, 5)).regions == ("",)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.layer(x).sum(0) / (x.shape[0] - 1 if x.shape[0] > 1 else 1),
        lambda m, x: m.layer(x).squeeze(0).mean(0),
        lambda m, x: torch.cat([m.layer(x), x.new_ones(x.shape[0] if x.shape[0] > 1 else 3, 3)]),
    ],
)
def test_a_batch_of_one_is_right_or_refused(forward: Any) -> None:
    model = Odd(forward).double()
    gm = fxlora.capture(model, normal(4, 5))
    for batch in (1, 2, 5):
        x = normal(batch, 5)
        try:
            found = gm(x)
        except fxlora.InputError:
            assert batch == 1
            continue
        assert torch.equal(found, model(x))


class NoTokens(nn.Module):
    """A model with a parameter that has no entries, such as its 0 register tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 0, 5))
        self.lin = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.cat([self.tokens.expand(len(x), -1, -1), x], 1))


def test_a_parameter_without_entries() -> None:
    rule = Rule("lin", lora=LoraConfig(r=2))
    gm, lora = check_laws(NoTokens(), (torch.randn(3, 4, 5).double(),), rules=rule)
    assert lora.plan and [entry.site for entry in lora.plan] == ["lin"]
    with pytest.raises(fxlora.FxLoraError, match="tokens"):
        fxlora.match(gm, Rule("tokens"))


class Counts(nn.Module):
    def __init__(self, used: bool) -> None:
        super().__init__()
        self.fc, self.calls, self.used = nn.Linear(5, 3), 0, used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x) * (self.calls if self.used else 2)


class Average(nn.Module):
    """Assigns another tensor to its buffer in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


@pytest.mark.parametrize(
    ("model", "whole"),
    [
        (Counts(used=False), True),
        (Counts(used=True), False),
        (nn.Sequential(Average(), nn.Linear(5, 3)), False),
    ],
    ids=["a count that nothing reads", "a count", "a buffer of a submodule"],
)
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_state_in_python_is_not_lost(model: nn.Module, whole: bool) -> None:
    source, x = copy.deepcopy(model), torch.randn(4, 5)
    gm = fxlora.capture(source, x)
    assert (gm.regions == ("",)) is whole
    for _ in range(3):
        assert torch.equal(gm(x), source(x))
