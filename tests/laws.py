"""The laws of the design as one check, against the source model with W0 + s·BA (`oracle.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxlora
from fxlora.fx.compare import difference
from fxlora.plan import Entry

from .oracle import called_with, floats, merged_weights
from .typed import grad_of

TOLERANCE = 1e-10


class Wrong(Exception):
    """A wrong result without an error from fxlora."""


def run(
    module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 1
) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return floats(module(*args, **kwargs))


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest entry expected in the same tensor.

    Infinite if a shape or a dtype differs.
    """
    assert len(found) == len(expected) > 0
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        scale = float(b.detach().abs().max())
        worst = max(worst, float((a - b).detach().abs().max()) / max(scale, 1e-30))
    return worst


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), float((a - b).abs().max())


def assert_close(
    found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        scale = max(float(b.detach().abs().max()), 1e-30)
        assert float((a - b).detach().abs().max()) <= tolerance * scale


def randomise(lora: fxlora.CapturedModule, std: float = 0.3) -> None:
    """Draw all trainable adapter tensors at random: with B = 0 an adapter has no effect."""
    with torch.no_grad():
        for entry in lora.plan or ():
            for name in entry.trainable:
                parameter = lora.get_parameter(name)
                size = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.normal_(std=std / size**0.5)
            if entry.padding_idx is not None:  # zero at the start, and training leaves it so
                lora.get_parameter(entry.name_a)[:, entry.padding_idx] = 0


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: p.requires_grad for k, p in model.named_parameters()},
        "no grad": {k: p.grad is None for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()
        },
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for key in ("grads", "no grad", "modes", "hooks"):
        assert after[key] == before[key]


def check_laws(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    rules: Any,
    capture: Callable[..., fxlora.CapturedModule] | None = None,
    reference: nn.Module | None = None,
) -> tuple[fxlora.CapturedModule, fxlora.CapturedModule]:
    """Check all laws on one model in float64.

    Args:
        model: the source model.
        args, kwargs: its inputs.
        rules: the rules to adapt it by.
        capture: captures the model; `fxlora.capture` with the inputs by default.
        reference: an equivalent model for the oracle, where torch.func gives no gradients of the
            source (a checkpoint recomputes after functional_call has restored the old weights).
            Its weights are set to the model's.

    Returns:
        The captured and the adapted module.
    """
    kwargs = kwargs or {}
    model = model.double()
    before = snapshot(model)
    gm = capture(model) if capture else fxlora.capture(model, args, kwargs)
    assert list(gm.state_dict()) == list(model.state_dict())
    _check_capture(model, gm, args, kwargs)
    lora = fxlora.inject(gm, fxlora.match(gm, rules))
    _check_identity(gm, lora, args, kwargs)
    randomise(lora)
    if reference:
        reference.double().load_state_dict(model.state_dict())
    _check_outputs_and_gradients(reference or model, gm, lora, args, kwargs)
    _check_fold(model, gm, lora, args, kwargs)
    _check_remove(gm, lora, args, kwargs)
    assert_untouched(model, before)
    return gm, lora


def _check_capture(model: nn.Module, gm: Any, args: Any, kwargs: Any) -> None:
    source, graph = copy.deepcopy(model), copy.deepcopy(gm)
    for training in (False, True):
        found = run(graph.train(training), args, kwargs)
        assert_same(found, run(source.train(training), args, kwargs))
        buffers = dict(source.named_buffers())
        for name, buffer in graph.named_buffers():
            assert name not in buffers or torch.equal(buffer, buffers[name]), name


def _check_identity(gm: Any, lora: Any, args: Any, kwargs: Any) -> None:
    # torch chooses attention kernels by requires_grad, even under no_grad.
    plain, adapted = (copy.deepcopy(m).requires_grad_(False) for m in (gm, lora))
    for training in (False, True):
        found = run(adapted.train(training), args, kwargs)
        expected = run(plain.train(training), args, kwargs)
        if all(_adds_nothing(entry) for entry in lora.plan):
            assert_same(found, expected)
        else:
            assert_close(found, expected, 1e-12)


def _adds_nothing(entry: Entry) -> bool:
    """Whether the initial delta is an exact zero, not a difference or product that rounds."""
    return "from_weight" not in entry.variants and entry.init != "orthogonal"


def _check_outputs_and_gradients(model: Any, gm: Any, lora: Any, args: Any, kwargs: Any) -> None:
    source = copy.deepcopy(model).eval()
    lora = copy.deepcopy(lora).eval()
    base = run(copy.deepcopy(gm).eval(), args, kwargs)
    pairs = zip(run(lora, args, kwargs), base, strict=True)
    assert any(a.shape != b.shape or float((a - b).abs().max()) > 0 for a, b in pairs)
    names = [name for entry in lora.plan for name in entry.trainable]
    held = [name for entry in lora.plan for name in entry.tensors if name not in names]
    factors = {n: lora.get_parameter(n).detach().clone().requires_grad_() for n in names}
    factors |= {n: lora.get_parameter(n).detach() for n in held}
    expected = called_with(source, merged_weights(source, lora, factors), args, kwargs)
    found = floats(lora(*args, **kwargs))
    assert_close(found, expected)
    wanted = torch.autograd.grad(
        [o.square().sum() for o in expected if o.requires_grad], [factors[n] for n in names]
    )
    sum((o.square().sum() for o in found), torch.zeros(())).backward()
    for name, gradient in zip(names, wanted, strict=True):
        assert float(gradient.abs().max()) > 0, name
        assert_close([grad_of(lora.get_parameter(name))], [gradient], 1e-8)
    trained = {n for n, p in lora.named_parameters() if p.grad is not None}
    assert trained == set(names) | {n for n in lora.trained if n in trained}
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == set(names) | lora.trained


def _check_fold(model: Any, gm: Any, lora: Any, args: Any, kwargs: Any) -> None:
    folded = fxlora.fold(lora)
    _check_graphs(folded, gm)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert_close(run(folded.eval(), args, kwargs), run(copy.deepcopy(lora).eval(), args, kwargs))
    assert_same(run(fxlora.fold(folded).eval(), args, kwargs), run(folded.eval(), args, kwargs))
    source = copy.deepcopy(model)
    for name in [name for name, _ in source.named_parameters(remove_duplicate=False)]:
        owner, _, last = name.rpartition(".")  # name by name: the fold may have split a tie
        weight = folded.get_parameter(name).detach().clone()
        setattr(source.get_submodule(owner), last, nn.Parameter(weight))
    source.load_state_dict(dict(folded.named_buffers()), strict=False)
    source.requires_grad_(False)  # as in the folded module: torch chooses kernels by it
    assert_same(run(source.eval(), args, kwargs), run(folded.eval(), args, kwargs))


def _check_graphs(found: fxlora.CapturedModule, expected: fxlora.CapturedModule) -> None:
    """Assert that the graphs are equal, node for node, in every region and mode."""
    for ours, theirs in zip(found.programs, expected.programs, strict=True):
        assert ours.path == theirs.path
        for mode in ("train", "eval"):
            assert difference(ours.graphs[mode], theirs.graphs[mode]) is None


def _check_remove(gm: Any, lora: Any, args: Any, kwargs: Any) -> None:
    removed = fxlora.remove(lora)
    _check_graphs(removed, gm)
    for mode in ("train", "eval"):
        assert removed.train(mode == "train").code == copy.deepcopy(gm).train(mode == "train").code
    assert list(removed.state_dict()) == list(gm.state_dict())
    grads = {n: p.requires_grad for n, p in gm.named_parameters()}
    assert {n: p.requires_grad for n, p in removed.named_parameters()} == grads
    assert_same(run(removed.eval(), args, kwargs), run(copy.deepcopy(gm).eval(), args, kwargs))
