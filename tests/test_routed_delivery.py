"""A routed graph in other runtimes: its ids are checked, and its adapters swapped in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxlora
from fxlora import CapturedModule

from .models import Mlp
from .routing import X, adapted, captured, config

IDS = torch.tensor([0, 1, -1, 1, 0, -1])
KINDS: dict[str, tuple[Any, Any]] = {
    "gathered": (config(2, lora_alpha=8), config(1, lora_alpha=3)),
    "once per slot": (
        config(2, ["up"], use_dora=True, modules_to_save=["down"]),
        config(1, ["up"], use_dora=True),
    ),
}


WAYS = ("constants", "inputs")


def modules(kind: str) -> tuple[CapturedModule, CapturedModule]:
    """Return a routed module, and an adapter to swap in."""
    rules = KINDS[kind]
    gm = captured(Mlp(), X)
    loras = [adapted(gm, rule) for rule in rules]
    return fxlora.route(loras), adapted(gm, rules[0])


def stacks(routed: CapturedModule) -> dict[str, Tensor]:
    """Return the tensors that a swap writes."""
    return {name: routed.get_parameter(name).detach() for name in routed.adapter_parameters()}


def swapped(routed: CapturedModule, other: CapturedModule) -> Tensor:
    """Swap an adapter in, and return the new outputs."""
    before = routed(X, adapter_ids=IDS)
    fxlora.swap_adapter(routed, 1, other)
    after = routed(X, adapter_ids=IDS)
    assert (before - after)[IDS == 1].abs().min() > 1e-4
    return after


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime(kind: str, tmp_path: Path) -> None:
    """Adapters are swapped in a session: as inputs of a run, as a LoraAdapter, and in the file."""
    onnx: Any = pytest.importorskip("onnx", reason="onnx is optional")
    pytest.importorskip("onnxscript", reason="onnxscript is optional")
    runtime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is optional")
    routed, other = modules(kind)
    ids = {"adapter_ids": IDS}
    before = copy.deepcopy(routed)
    files = {w: fxlora.export(routed, tmp_path / f"{w}.onnx", X, ids, adapters=w) for w in WAYS}
    session = runtime.InferenceSession(str(files["inputs"]))
    feed = {"x": X.numpy(), "adapter_ids": IDS.numpy()}

    def close(expected: Tensor, found: list[Any]) -> bool:
        return torch.allclose(torch.from_numpy(found[0]), expected, rtol=0, atol=1e-10)

    base = routed(X, adapter_ids=torch.full_like(IDS, -1))
    assert close(base, session.run(None, feed))  # no values: the base
    loaded = {}
    for name in ("first", "swapped"):
        if name == "swapped":
            swapped(routed, other)
        file = fxlora.export_adapter(routed, tmp_path / f"{name}.onnx_adapter", like=before)
        loaded[name] = runtime.LoraAdapter()
        loaded[name].Load(str(file))
        options = runtime.RunOptions()
        options.add_active_adapter(loaded[name])
        expected = routed(X, adapter_ids=IDS)
        assert close(expected, session.run(None, feed, options))
        values = {n: stack.numpy() for n, stack in stacks(routed).items()}
        assert close(expected, session.run(None, feed | values))
        assert not close(base, session.run(None, feed | values))
        for out_of_range in (-2, 2):
            wrong = torch.full_like(IDS, out_of_range).numpy()
            with pytest.raises(Exception, match="index"):
                session.run(None, feed | {"adapter_ids": wrong}, options)
    # The file with constants gets the swapped values under their names.
    model = onnx.load(files["constants"])
    session = runtime.InferenceSession(model.SerializeToString())
    assert close(before(X, adapter_ids=IDS), session.run(None, feed))
    held = stacks(routed)
    assert {tensor.name for tensor in model.graph.initializer} >= held.keys()
    for tensor in model.graph.initializer:
        if tensor.name in held:
            value = onnx.numpy_helper.from_array(held[tensor.name].numpy(), tensor.name)
            tensor.CopyFrom(value)
    session = runtime.InferenceSession(model.SerializeToString())
    assert close(routed(X, adapter_ids=IDS), session.run(None, feed))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_aotinductor(kind: str, tmp_path: Path) -> None:
    routed, other = modules(kind)
    file = fxlora.export(routed, tmp_path / "routed.pt2", X, {"adapter_ids": IDS})
    program = torch.export.load(file)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "a.pt2")
    )
    loaded: Any = torch._inductor.aoti_load_package(package)

    def close(expected: Tensor) -> bool:
        return torch.allclose(loaded(X, adapter_ids=IDS), expected, rtol=0, atol=1e-10)

    assert close(routed(X, adapter_ids=IDS))
    with pytest.raises(RuntimeError, match="adapter_ids must be from -1"):
        loaded(X, adapter_ids=torch.full_like(IDS, 2))
    expected = swapped(routed, other)
    assert not close(expected)
    held = stacks(routed)
    assert held.keys() <= set(loaded.get_constant_fqns())
    loaded.load_constants(held, check_full_update=False)
    assert close(expected)
