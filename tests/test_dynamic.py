"""Dynamic dimensions: a requested one is dynamic, or the error names the line that fixes it."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ShapesCollection

import fxlora
from fxlora import CaptureError, InputError, LoraConfig, Rule

from .laws import assert_close, check_laws, run

SOURCE = """
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.register_buffer("positions", torch.randn(7, 3))


class Adds(Base):
    def forward(self, x):
        y = self.fc(x)
        return y + self.positions  # fixes


class Branches(Base):
    def forward(self, x):
        y = self.fc(x)
        if x.shape[1] == 7:  # fixes
            return y
        return -y


class Numbers(Base):
    def forward(self, x):
        return self.fc(x) * torch.full((3,), float(int(x.shape[1])))  # fixes


class Through(Base):
    def forward(self, x):
        return self.helper([self.fc(x)])

    def helper(self, items):
        return torch.cat(items + [self.positions.repeat(2, 1, 1)], -1)  # fixes


class InTrain(Base):
    def forward(self, x):
        y = self.fc(x)
        return y + self.positions if self.training else y  # fixes


class Nested(Base):
    def forward(self, x, *, extra):
        return self.fc(x) + extra["bias"][0] + self.positions[:, :1]  # fixes
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A user's module of models, in a separate file."""
    path = tmp_path_factory.mktemp("user") / "user_models.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("user_models", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def place_of(module: ModuleType, name: str) -> str:
    """Return file and line of the class's line that is marked with "# fixes"."""
    lines = SOURCE.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"class {name}("))
    marked = next(i for i in range(first, len(lines)) if lines[i].endswith("# fixes"))
    return f"{module.__file__}:{marked + 1}"


def collection(x: torch.Tensor, dim: Any) -> ShapesCollection:
    shapes = ShapesCollection()
    shapes[x] = {0: Dim.AUTO, 1: dim}
    return shapes


FORMS = {
    "dict": lambda x, dim: {"x": {0: Dim.AUTO, 1: dim}},
    "tuple": lambda x, dim: ((Dim.AUTO, dim, None),),
    "list": lambda x, dim: {"x": [Dim.AUTO, dim, Dim.STATIC]},
    "collection": collection,
}


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("Adds", Dim.AUTO),
        ("Adds", Dim.DYNAMIC),
        ("Adds", Dim("seq")),
        ("Adds", Dim("seq", min=3, max=9)),
        ("Branches", Dim.AUTO),
        ("Branches", Dim("seq")),
        ("Numbers", Dim.AUTO),
        ("Numbers", Dim("seq", min=3, max=9)),
        ("Through", Dim.DYNAMIC),
        ("Through", Dim("seq")),
        ("InTrain", Dim.DYNAMIC),
        ("InTrain", Dim("seq")),
    ],
    ids=str,
)
def test_a_dimension_that_the_model_fixes_is_named_with_its_line(
    source: ModuleType, name: str, dim: Any
) -> None:
    x = torch.randn(2, 7, 5)
    with pytest.raises(CaptureError) as error:
        fxlora.capture(getattr(source, name)(), x, dynamic_shapes=FORMS["dict"](x, dim))
    assert f"x, dimension 1 is 7, by {place_of(source, name)}" in str(error.value)
    assert ("train mode" if name == "InTrain" else "mode") in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_in_every_form_of_dynamic_shapes(source: ModuleType, form: str) -> None:
    x = torch.randn(2, 7, 5)
    with pytest.raises(CaptureError, match="x, dimension 1 is 7"):
        fxlora.capture(source.Adds(), x, dynamic_shapes=FORMS[form](x, Dim.AUTO))


def test_a_nested_keyword_is_named(source: ModuleType) -> None:
    x, extra = torch.randn(2, 7, 5), {"bias": [torch.randn(2, 7, 3)]}
    auto = {0: Dim.AUTO, 1: Dim.AUTO}
    with pytest.raises(CaptureError) as error:
        fxlora.capture(
            source.Nested(),
            (x,),
            {"extra": extra},
            dynamic_shapes={"x": auto, "extra": {"bias": [auto]}},
        )
    for name in ("x", "extra['bias'][0]"):
        assert f"{name}, dimension 1 is 7, by {place_of(source, 'Nested')}" in str(error.value)


def test_an_integer_that_the_model_fixes_is_named() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
            for _ in range(n):
                x = torch.tanh(x)
            return self.fc(x)

    line = Repeats.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"n is 3, by {__file__}:{line}"):
        fxlora.capture(
            Repeats(), (torch.randn(2, 5), 3), dynamic_shapes={"x": None, "n": Dim.DYNAMIC}
        )


def test_what_fxlora_asks_for_itself_falls_back_silently() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)
            self.weights = nn.Parameter(torch.randn(4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.weights

    model, x = Fixed(), torch.randn(4, 5)
    gm = fxlora.capture(model, x)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(InputError):
        gm(torch.randn(3, 5))


def test_dimensions_that_are_related_are_fine() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + y

    model, auto = Sums(), {0: Dim.AUTO, 1: Dim.AUTO}
    gm = fxlora.capture(
        model, (torch.randn(2, 7, 5), torch.randn(2, 7, 3)), dynamic_shapes=(auto, auto)
    )
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 3)
    assert torch.equal(gm(x, y), model(x, y))
    with pytest.raises(InputError, match="y, dimension 1"):
        gm(x, torch.randn(3, 1, 3))


class Related(nn.Module):
    """A second input that has twice the first one's size, less one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return torch.cat([x, x[1:]]) + y


SEQ = Dim("seq", min=3, max=9)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 23), "x, dimension 0: captured for sizes from 3 to 9, called with 12."),
        ((4, 19), "y, dimension 0: captured for sizes from 5 to 17 in steps of 2, called with 19."),
        ((4, 6), "y, dimension 0: captured for sizes from 5 to 17 in steps of 2, called with 6."),
        ((4, 9), "y, dimension 0: is 9, but must be 7 where x, dimension 0 is 4: "),
    ],
    ids=str,
)
def test_a_dimension_is_named_in_the_users_terms(sizes: tuple[int, int], message: str) -> None:
    def inputs(first: int, second: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(first, 5), torch.randn(second, 3)

    shapes = {"x": {0: SEQ}, "y": {0: 2 * SEQ - 1}}
    gm = fxlora.capture(Related(), inputs(7, 13), dynamic_shapes=shapes)
    gm(*inputs(4, 7))
    with pytest.raises(InputError) as error:
        gm(*inputs(*sizes))
    assert str(error.value).startswith(message)


def test_the_advice_on_a_size_out_of_bounds_works() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    for bounds, size in (({"max": 9}, 12), ({"min": 3}, 2)):
        dim, x = Dim("seq", **bounds), torch.randn(2, size, 5)
        gm = fxlora.capture(model, torch.randn(2, 7, 5), dynamic_shapes={"input": {1: dim}})
        with pytest.raises(InputError, match="with an example of this size, and without bounds"):
            gm(x)
        gm = fxlora.capture(model, x, dynamic_shapes={"input": {1: Dim("seq")}})
        assert torch.equal(gm(x), model(x))


def test_an_integer_out_of_bounds_is_named() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
            return self.fc(x) * n

    model, x = Takes(), torch.randn(2, 5)
    gm = fxlora.capture(model, (x, 3), dynamic_shapes={"x": None, "n": Dim.DYNAMIC})
    assert torch.equal(gm(x, 5), model(x, 5))
    with pytest.raises(
        InputError, match=r"^n: captured for integers \d or more, called with 2\.5\."
    ):
        gm(x, 2.5)


def test_names_that_must_be_equal_are_refused_with_torchs_reason() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + y

    with pytest.raises(CaptureError, match="must always be equal"):
        fxlora.capture(
            Sums(),
            (torch.randn(2, 7, 5), torch.randn(2, 7, 3)),
            dynamic_shapes=({1: Dim("a")}, {1: Dim("b")}),
        )


@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC, Dim("seq")], ids=str)
def test_a_dimension_of_one_stays_dynamic(dim: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.LayerNorm(3))
    gm = fxlora.capture(
        model, torch.randn(2, 1, 5), dynamic_shapes={"input": {0: Dim.AUTO, 1: dim}}
    )
    for shape in ((2, 1, 5), (3, 4, 5), (1, 1, 5)):
        x = torch.randn(shape)
        assert torch.equal(gm(x), model(x))


def test_keywords_in_another_order_than_the_signatures() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(
            self, x: torch.Tensor, *, scale: torch.Tensor, extra: torch.Tensor
        ) -> torch.Tensor:
            return self.fc(x) * scale * (2 if extra.shape[0] % 2 == 0 else 1)

    model = Guarded()
    kwargs = {"extra": torch.ones(6), "scale": torch.ones(4, 1)}
    gm = fxlora.capture(
        model,
        (torch.randn(4, 5),),
        kwargs,
        dynamic_shapes={"x": None, "scale": None, "extra": {0: Dim.AUTO}},
    )
    x = torch.randn(4, 5)
    even = {"extra": torch.ones(8), "scale": torch.ones(4, 1)}
    assert torch.equal(gm(x, **even), model(x, **even))
    with pytest.raises(InputError):  # the source would take its other branch
        gm(x, extra=torch.ones(5), scale=torch.ones(4, 1))


# ---- sequences and images -----------------------------------------------------------------------


def adapted_at(
    model: nn.Module, gm: Any, lora: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    """Check at other sizes that the capture equals the source, and the fold the adapted module.

    Capture and source must agree bit for bit; the adapter must have an effect.
    """
    folded = fxlora.fold(lora).eval()
    for args, kwargs in calls:
        for training in (False, True):
            gm.train(training)
            model.train(training)
            for a, b in zip(run(gm, args, kwargs), run(model, args, kwargs), strict=True):
                assert torch.equal(a, b)
        assert_close(run(folded, args, kwargs), run(lora.eval(), args, kwargs))
        assert not torch.equal(run(lora.eval(), args, kwargs)[0], run(gm.eval(), args, kwargs)[0])


def test_sequence_lengths_of_a_transformer() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=37,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    model = BertForMaskedLM(config).double()
    batch, seq = Dim.AUTO, Dim("seq", min=2, max=16)

    def inputs(n: int, t: int) -> dict[str, Any]:
        mask = torch.ones(n, t, dtype=torch.long)
        mask[0, -1] = 0
        ids = torch.randint(37, (n, t))
        return {"input_ids": ids, "attention_mask": mask}

    shapes = {"input_ids": {0: batch, 1: seq}, "attention_mask": {0: batch, 1: seq}}
    gm, lora = check_laws(
        model,
        (),
        inputs(2, 7),
        rules=LoraConfig(r=3, target_modules=["query", "value"]),
        capture=lambda m: fxlora.capture(m, (), inputs(2, 7), dynamic_shapes=shapes),
    )
    adapted_at(model, gm, lora, [((), inputs(n, t)) for n, t in ((3, 5), (4, 16), (2, 2))])
    with pytest.raises(InputError, match="dimension 1"):
        gm(**inputs(2, 17))


class Residual(nn.Module):
    """A small ResNet with strides, padding, a batch norm, and pooling over any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 9, 1, stride=2)
        self.head = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.inner(x) + x)
        x = nn.functional.adaptive_avg_pool2d(self.down(x), 1).flatten(1)
        return self.head(x)


@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC], ids=str)
def test_image_sizes_of_a_convolutional_net(dim: Any) -> None:
    model, x = Residual(), torch.randn(2, 3, 33, 29).double()
    gm, lora = check_laws(
        model,
        (x,),
        rules=Rule(lora=LoraConfig(r=3)),
        capture=lambda m: fxlora.capture(m, x, dynamic_shapes={"x": {0: dim, 2: dim, 3: dim}}),
    )
    # torch 2.11 requires that the pool's input size equals the example's modulo the stride.
    sizes = ((2, 33, 41), (3, 65, 29), (4, 17, 21))
    adapted_at(model, gm, lora, [((torch.randn(n, 3, h, w).double(),), {}) for n, h, w in sizes])


class Labelled(nn.Module):
    """Splits its batch by the size of the ids, and makes its output contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.table(ids) * mask[..., None]
        return self.fc(h.view(ids.shape[0], -1, 5)).contiguous().flatten(0, 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_of_one_in_all_inputs(batch: int) -> None:
    torch.manual_seed(0)
    model = Labelled().double()
    ids, mask = torch.randint(7, (4, 6)), torch.rand(4, 6, dtype=torch.double)
    gm = fxlora.capture(model, (ids[:batch], mask[:batch]))
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["fc"])))
    for module in (gm, fxlora.fold(lora)):
        for size in (1, 2, 4):
            assert torch.equal(module(ids[:size], mask[:size]), model(ids[:size], mask[:size]))
    for other in ((ids, mask[:1]), (ids[:1], mask)):
        with pytest.raises(InputError, match="mask, dimension 0: is"):
            gm(*other)
