"""Recurrent layers: any number of time steps in one graph, and packed sequences in regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import fxlora

CONFIG = fxlora.LoraConfig(
    r=2,
    target_modules=["head"],
    target_parameters=["layer.weight_ih_l0", "layer.weight_hh_l0"],
    init_lora_weights=False,
)
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {"batch_first": True}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 4}),
    "GRU": (nn.GRU, {"num_layers": 2, "dropout": 0.2, "bidirectional": True, "batch_first": True}),
    "RNN": (nn.RNN, {}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
}
layers = pytest.mark.parametrize("kind", LAYERS)


class Tagger(nn.Module):
    """Tags each step of sequences (N, T, 5), or (T, N, 5)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, options = LAYERS[kind]
        self.layer = make(5, 8, **options)
        wide = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(wide, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


class PackedTagger(Tagger):
    """Tags sequences that are padded to (N, T, 5), and returns the last states, too."""

    def __init__(self, kind: str, *, is_sorted: bool = True) -> None:
        super().__init__(kind)
        self.how = {"batch_first": True, "enforce_sorted": is_sorted}

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:  # type: ignore[override]
        outputs, states = self.layer(pack_padded_sequence(x, lengths, **self.how))
        padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])
        return self.head(padded), states


def sequences(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def outputs(module: nn.Module, args: tuple[Any, ...]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return pytree.tree_leaves(module(*args))


def check(model: nn.Module, gm: fxlora.CapturedModule, calls: list[tuple[Any, ...]]) -> None:
    """Check a capture, its adapters and their fold against the source in calls of other sizes."""
    lora = fxlora.inject(gm, fxlora.match(gm, CONFIG))
    merged = {n: p.detach().clone() for n, p in model.named_parameters()}
    for entry in lora.plan or ():
        a, b = (lora.get_parameter(name) for name in (entry.name_a, entry.name_b))
        merged[entry.parameter] += entry.scaling * (b @ a).detach()
    folded = fxlora.fold(lora)
    for mode in (True, False):
        for module in (model, gm, lora, folded):
            module.train(mode)
        for args in calls:
            bare = outputs(model, args)
            assert all(map(torch.equal, outputs(gm, args), bare))
            torch.manual_seed(1)
            wanted = pytree.tree_leaves(functional_call(model, merged, args))
            assert (wanted[0] - bare[0]).abs().max() > 1e-2
            for module in (lora, folded):
                for found, value in zip(outputs(module, args), wanted, strict=True):
                    assert (found - value).abs().max() <= 1e-10
    fxlora.verify(lora, calls[0], folded=folded)


@layers
def test_any_number_of_steps(kind: str) -> None:
    model = Tagger(kind).double()
    gm = fxlora.capture(model, calls=[((sequences(3, 7),), {}), ((sequences(4, 9),), {})])
    assert len(gm.programs) == 1
    check(model, gm, [(sequences(3, 7),), (sequences(4, 11),), (sequences(2, 2),)])


def test_dynamic_shapes_and_a_file_of_any_length(tmp_path: Path) -> None:
    model = Tagger("LSTM").double()
    gm = fxlora.capture(model, sequences(3, 7), dynamic_shapes=({0: Dim.AUTO, 1: Dim.DYNAMIC},))
    check(model, gm, [(sequences(2, 5),)])
    path = fxlora.export(gm, tmp_path / "m.pt2", sequences(3, 7))
    program = torch.export.load(path).module()
    for size in ((3, 7), (2, 12)):
        x = sequences(*size)
        assert (program(x) - gm.eval()(x)).abs().max() <= 1e-12


def test_one_example_fixes_the_steps() -> None:
    gm = fxlora.capture(Tagger("GRU").double(), sequences(3, 7))
    with pytest.raises(fxlora.InputError, match="captured as 7, called with 9"):
        gm(sequences(3, 9))


@pytest.mark.autocast
def test_under_autocast() -> None:
    model = Tagger("RNN").eval()
    examples = [((sequences(*size).float(),), {}) for size in ((3, 7), (4, 9))]
    gm = fxlora.capture(model, calls=examples)
    x = sequences(5, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = gm(x), model(x)
    assert found.dtype == wanted.dtype == torch.bfloat16 and torch.equal(found, wanted)


class TellsDtypes(Tagger):
    """Its layer runs in another dtype under autocast, and its Python asks for that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layer(x)[0]
        return found * 2 if found.dtype == torch.bfloat16 else found


@pytest.mark.autocast
def test_a_model_that_asks_for_the_dtype_under_autocast() -> None:
    model, x = TellsDtypes("RNN").eval(), sequences(7, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(fxlora.FxLoraWarning, match="captured with torch.autocast"):
            gm = fxlora.capture(model, x)  # the steps come first, so their number is dynamic
        for given in (x, sequences(4, 3).float()):
            found, wanted = gm(given), model(given)
            assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


class TakesGradients(Tagger):
    """Takes a gradient through its layer in the forward, which an opaque op cannot give."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.layer(x)[0].sum() + (x**2).sum()
            (gradient,) = torch.autograd.grad(energy, x)
        return gradient @ self.layer.weight_ih_l0.T


def test_a_gradient_in_the_forward() -> None:
    model = TakesGradients("RNN").double()
    with pytest.warns(fxlora.FxLoraWarning, match="submodules are captured instead"):
        gm = fxlora.capture(model, sequences(7, 3))
    assert torch.equal(gm(sequences(7, 3)), model(sequences(7, 3)))


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN, relu"])
def test_packed_sequences(kind: str, is_sorted: bool) -> None:
    model = PackedTagger(kind, is_sorted=is_sorted).double()
    examples = [(sequences(3, 7), [7, 5, 2]), (sequences(4, 9), [9, 4, 4, 1])]
    calls: Any = [((x, torch.tensor(lengths)), {}) for x, lengths in examples]
    with pytest.warns(fxlora.FxLoraWarning, match="submodules are captured instead"):
        gm = fxlora.capture(model, calls=calls)
    assert gm.regions == ("layer", "head")
    last = [3, 1] if is_sorted else [1, 3]
    others = [(sequences(2, 3), torch.tensor(last)), (sequences(1, 5), torch.tensor([4]))]
    check(model, gm, [calls[0][0], *others])
