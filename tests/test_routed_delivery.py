"""A routed graph in other runtimes: its ids are checked, and its adapters swapped in place."""

from __future__ import annotations

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


def exported(kind: str, path: Path) -> tuple[Any, CapturedModule, CapturedModule]:
    """Return an exported program, the routed module, and an adapter to swap in."""
    rules = KINDS[kind]
    gm = captured(Mlp(), X)
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras)
    file = fxlora.export(routed, path / "routed.pt2", X, {"adapter_ids": IDS})
    return torch.export.load(file), routed, adapted(gm, rules[0])


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
    onnx = pytest.importorskip("onnx", reason="onnx is optional")
    pytest.importorskip("onnxscript", reason="onnxscript is optional")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is optional")
    program, routed, other = exported(kind, tmp_path)
    # The adapters become inputs with defaults, which each run may override.
    made: Any = torch.onnx.export(
        program, (X,), kwargs={"adapter_ids": IDS}, dynamo=True, optimize=False, verbose=False
    )
    model = made.model_proto
    held = stacks(routed)
    for tensor in model.graph.initializer:
        if tensor.name in held:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(value)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options)
    x, ids = (given.name for given in session.get_inputs())
    given = {x: X.numpy(), ids: IDS.numpy()}

    def close(more: dict[str, Any], expected: Tensor) -> bool:
        (found,) = session.run(None, {**given, **more})
        return torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-10)

    assert close({}, routed(X, adapter_ids=IDS))
    wrong = (torch.full_like(IDS, -2), torch.full_like(IDS, 2))
    for out_of_range in wrong:
        with pytest.raises(Exception, match="index"):
            session.run(None, {**given, ids: out_of_range.numpy()})
    expected = swapped(routed, other)
    assert not close({}, expected)
    assert {value.name for value in session.get_overridable_initializers()} == held.keys()
    assert close({name: stack.numpy() for name, stack in stacks(routed).items()}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_aotinductor(kind: str, tmp_path: Path) -> None:
    program, routed, other = exported(kind, tmp_path)
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
