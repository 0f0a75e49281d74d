"""Copies of a captured module behave like it: an operation is refused on both or on neither."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxlora
from fxlora import CapturedModule, InjectError, InputError, LoraConfig, Rule, UnsupportedOpError
from fxlora.fast import Fast
from fxlora.module.routing import Routing
from fxlora.module.simplified import Simplification, Step
from fxlora.module.state import State

from .laws import randomise
from .typed import untyped

R = LoraConfig(r=2)
X = torch.randn(4, 5, dtype=torch.float64)


class Shared(nn.Module):
    """A buffer or a parameter shares the memory of `lin.weight`; `other` can be adapted."""

    def __init__(self, mirrored: bool) -> None:
        super().__init__()
        self.lin, self.twin, self.other = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
        self.double()
        if mirrored:
            self.register_buffer("kept", self.lin.weight.detach())
        else:
            self.twin.weight = nn.Parameter(self.lin.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = getattr(self, "kept", self.twin.weight)
        return self.other(torch.tanh(nn.functional.linear(x, kept)) * self.lin(x) + self.twin(x))


@functools.cache
def captured(mirrored: bool) -> CapturedModule:
    """Capture once, for tests that do not change the captured module."""
    return fxlora.capture(Shared(mirrored), X)


def adapted(module: CapturedModule) -> CapturedModule:
    lora = fxlora.inject(module, fxlora.match(module, Rule("other", lora=R)))
    randomise(lora)
    return lora


def loaded(module: CapturedModule) -> CapturedModule:
    copied = copy.deepcopy(module)
    copied.load_state_dict(module.state_dict())
    return copied


COPIES: dict[str, Callable[[CapturedModule], CapturedModule]] = {
    "itself": lambda module: module,
    "deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,
    "derive": CapturedModule.derive,
    "remove": lambda module: fxlora.remove(adapted(module)),
    "fold": lambda module: fxlora.fold(adapted(module)),
    "fold of a deepcopy": lambda module: fxlora.fold(copy.deepcopy(adapted(module))),
    "to": lambda module: copy.deepcopy(module).to("cpu", torch.float64),
    "load_state_dict": loaded,
}
every_copy = pytest.mark.parametrize("how", COPIES)


@pytest.mark.parametrize("mirrored", [True, False])
@every_copy
def test_shared_memory_is_refused_on_every_copy(how: str, mirrored: bool) -> None:
    module = COPIES[how](captured(mirrored))
    with pytest.raises(UnsupportedOpError, match=r"'lin' .* shares memory"):
        fxlora.match(module, Rule("lin", lora=R))


@every_copy
def test_the_contract_holds_on_every_copy_and_in_its_forward(how: str) -> None:
    module = COPIES[how](captured(False))
    assert module(X).shape == (4, 3)
    for call in (module, module.forward):
        with pytest.raises(InputError, match="captured as 5, called with 6"):
            call(torch.randn(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("how", ["itself", "deepcopy", "copy.copy", "derive", "to"])
def test_unplanned_gradients_are_refused_on_every_copy(how: str) -> None:
    lora = adapted(copy.deepcopy(captured(False)))
    lora.get_parameter("lin.bias").requires_grad_(True)
    with pytest.raises(InjectError, match=r"'lin\.bias' requires gradients but is not"):
        fxlora.lora_parameters(COPIES[how](lora))


@pytest.mark.parametrize("how", ["deepcopy", "copy.copy", "derive", "to", "load_state_dict"])
def test_no_copy_forgets_a_field(how: str) -> None:
    once = fxlora.fold(adapted(fxlora.capture(Shared(True), X, modules="other")))
    config = LoraConfig(r=2, target_modules=["other"], modules_to_save=["twin"])
    lora = fxlora.inject(once, fxlora.match(once, config))
    lora.update_state(
        buffers={"another": {}},
        grads=frozenset(["lin.bias"]),
        outputs=frozenset(["other.weight"]),
        embedding="other",
        model_type="llama",
        written=frozenset(["a name"]),
        apart=frozenset(["other"]),
        read_values={"lin.scale": 0.5},
        optimized=Fast(recompute=True),
        unfolded=once,
        merge_aware={"lin.weight": torch.clone},
        retention={"lin": 0.5},
        simplified=Simplification((Step("dead", 1, 0, 0.0, True),)),
        routing=Routing((None,), ()),
    )
    for program in lora.programs:
        program.changes, program.reads = frozenset(["an attribute"]), frozenset(["another"])
    copied = COPIES[how](lora)
    assert (copied.changes, copied.reads) == ({"an attribute"}, {"another"})
    found = copied.known
    for field in dataclasses.fields(State):
        before, after = getattr(lora.known, field.name), getattr(found, field.name)
        assert before, f"the test says nothing of {field.name}"
        if field.name == "originals":
            assert {n: t.tolist() for n, t in before.items()} == {
                n: t.tolist() for n, t in after.items()
            }
        else:
            assert before == after, field.name


def test_what_a_removal_keeps_and_drops() -> None:
    module = captured(True)
    assert fxlora.remove(adapted(module)).known == module.known
    folded = fxlora.fold(adapted(module)).known
    assert len(folded.folded) == 1
    assert dataclasses.replace(folded, folded=()) == module.known


def test_a_plain_copy_has_graphs_of_its_own_over_the_same_tensors() -> None:
    lora = adapted(captured(False)).eval()
    copied = copy.copy(lora)
    assert torch.equal(copied(X), lora(X))
    assert copied.get_parameter("lin.weight") is lora.get_parameter("lin.weight")
    assert not {id(g) for g in copied.distinct_graphs()} & {id(g) for g in lora.distinct_graphs()}


def test_a_state_cannot_be_changed_in_place() -> None:
    module = captured(False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        untyped(module.known).plan = None
    with pytest.raises(AttributeError):
        untyped(module).plan = None


def test_a_plan_without_adapters_trains_too() -> None:
    """A plan without entries is false as a bool, but must not be taken for no plan."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    gm = fxlora.capture(model, torch.randn(4, 5))
    head = fxlora.inject(gm, fxlora.match(gm, Rule("2", train=True)))
    assert head.trained == {"2.weight", "2.bias"}
    assert len(fxlora.lora_parameters(head)) == 2
    assert copy.deepcopy(head).trained == head.trained
