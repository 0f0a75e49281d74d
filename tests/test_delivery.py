"""Files for other runtimes, each run by that runtime alone and compared with the module."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

import fxlora
from fxlora import CapturedModule, ConfigError, ExportError, LoraConfig
from fxlora.delivery import compared, onnx, pt2
from fxlora.delivery.files import whole_files
from fxlora.delivery.formats import FORMATS

from .typed import untyped

SITES = {"conv": 3, "up": 2}  # ranks
X = torch.randn(4, 3, 7, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([1, -1, 0, 1])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.up = nn.Linear(6 * 5 * 3, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.up(torch.relu(self.conv(x)).flatten(1))
        return {"logits": self.down(torch.tanh(hidden)), "hidden": hidden}


def adapted(gm: CapturedModule, seed: int, **config: Any) -> CapturedModule:
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=list(SITES), **config)
    lora = fxlora.inject(gm, fxlora.match(gm, settings)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(fxlora.lora_parameters(lora)):
            drawn = torch.Generator().manual_seed(100 * seed + number)
            parameter.add_(torch.randn(parameter.shape, generator=drawn).to(parameter) * 0.3)
    return lora


@pytest.fixture(scope="module")
def gm() -> CapturedModule:
    torch.manual_seed(0)
    return fxlora.capture(Net().eval(), X)


@pytest.fixture(scope="module")
def loras(gm: CapturedModule) -> list[CapturedModule]:
    found = [adapted(gm, seed) for seed in (1, 2)]
    with torch.no_grad():
        y, base = [lora(X)["logits"] for lora in found], gm.eval()(X)["logits"]
    assert min(float((one - two).abs().max()) for one, two in ((y[0], y[1]), (y[0], base))) > 0.1
    return found


def close(found: Any, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    difference = torch.as_tensor(found) - expected
    return bool(difference.abs().max() <= tolerance * expected.abs().max())


# ---- torch.export -------------------------------------------------------------------------------


def places(program: Any) -> list[tuple[Any, ...]]:
    """Return what matchers of patterns read of each node."""
    keys = ("nn_module_stack", "torch_fn", "source_fn_stack")
    return [(str(n.target), *map(n.meta.get, keys)) for n in program.graph.nodes]


def partitions(program: Any) -> dict[str, list[int]]:
    """Return the number of nodes of each convolution and linear layer that a matcher finds."""
    from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

    found = get_source_partitions(program.graph, [nn.Conv2d, nn.Linear])
    return {kind.__name__: [len(p.nodes) for p in found[kind]] for kind in found}


def test_a_file_says_of_its_nodes_what_torch_export_says(
    gm: CapturedModule, loras: list[CapturedModule], tmp_path: Path
) -> None:
    auto = torch.export.Dim.AUTO
    source = torch.export.export(Net().eval(), (X,), dynamic_shapes=({0: auto},))
    for module in (gm, fxlora.fold(loras[0])):
        program = torch.export.load(fxlora.export(module, tmp_path / "m.pt2", X))
        assert places(program) == places(source)
        assert partitions(program) == partitions(source) and partitions(source)["Linear"] == [1, 1]
    program = torch.export.load(fxlora.export(loras[0], tmp_path / "m.pt2", X))
    stacks = [list((n.meta.get("nn_module_stack") or {}).values()) for n in program.graph.nodes]
    inside = [stack[-1] for stack in stacks if stack and stack[-1][1] == "fxlora.Adapter"]
    assert {path for path, _ in inside} == {"conv.lora", "up.lora"}
    assert partitions(program) == partitions(source)  # the base's ops alone
    assert {"conv", "up", "down", "up.lora"} <= {
        path for path, _ in torch.export.unflatten(program).named_modules()
    }


@pytest.mark.slow
def test_a_quantizer_finds_the_places_that_it_finds_in_the_source(
    gm: CapturedModule, loras: list[CapturedModule], tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def quantised(program: Any) -> tuple[int, torch.Tensor]:
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program.module(), quantizer)
        prepared(X)
        made = convert_pt2e(prepared)
        found = sum("quantize" in str(node.target) for node in made.graph.nodes)
        return found, made(X)["logits"]

    for module in (gm.eval(), fxlora.fold(loras[0])):
        source = Net().eval()
        source.load_state_dict(module.state_dict())
        places, expected = quantised(torch.export.export(source, (X,)))
        path = fxlora.export(module, tmp_path / "m.pt2", X)
        found, logits = quantised(torch.export.load(path))
        assert found == places > 0 and torch.equal(logits, expected)
        assert not torch.equal(logits, module(X)["logits"])
    path = fxlora.export(loras[0], tmp_path / "m.pt2", X)
    assert quantised(torch.export.load(path))[0] >= places


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer: Any = untyped(kind)(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_one_of_a_recurrent_layer(rows: int, tmp_path: Path) -> None:
    x = torch.randn(3, 5, 4).double()
    config = LoraConfig(r=2, target_modules=["layer", "head"], init_lora_weights=False)
    lora = fxlora.adapt(Tagger(nn.LSTM).double(), x, rules=config)
    folded = fxlora.fold(lora).eval()
    program = torch.export.load(fxlora.export(folded, tmp_path / "m.pt2", x[:rows])).module()
    for size in (1, 2, 7):
        given = torch.randn(size, 5, 4).double()
        assert close(program(given), folded(given), 1e-12)


def test_a_program_takes_adapters_as_inputs(gm: CapturedModule, tmp_path: Path) -> None:
    base = fxlora.capture(Net().double().eval(), X.double()).eval()
    x = X[:1].double()
    drawn = {"use_dora": True, "init_lora_weights": False}
    for settings in (drawn, {"init_lora_weights": "pissa"}):
        loras = [adapted(base, seed, **settings) for seed in (1, 2)]
        path = fxlora.export(loras[0], tmp_path / "m.pt2", X.double(), adapters="inputs")
        program = torch.export.load(path).module()
        assert not any("lora" in name for name in program.state_dict())
        for lora in loras:
            values = load_file(
                fxlora.export_adapter(lora, tmp_path / "a.safetensors", like=loras[0])
            )
            expected = lora(x)["logits"]
            assert not close(expected, base(x)["logits"], 1e-3)
            assert close(program(x, adapters=values)["logits"], expected, 1e-10)


@dataclass
class Output:
    """A container of another library."""

    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Output, serialized_type_name="tests.test_delivery.Output")


class Wrapped(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return Output(**super().forward(x))


def test_other_libraries_containers_become_dicts(tmp_path: Path) -> None:
    gm = fxlora.capture(Wrapped().eval(), X).eval()
    for plain in (False, True):
        program = torch.export.load(fxlora.export(gm, tmp_path / "m.pt2", X, plain=plain))
        output: Any = program.module()(X)
        assert isinstance(output, dict) is plain and isinstance(output, Output) is not plain
        logits = output["logits"] if isinstance(output, dict) else output.logits
        assert torch.equal(logits, gm(X).logits)
        assert ("Output" in str(program.call_spec.out_spec)) is not plain


# ---- ONNX ---------------------------------------------------------------------------------------


def session(path: Path) -> Any:
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_names(path: Path) -> set[str]:
    model: Any = pytest.importorskip("onnx", reason="onnx is not installed").load(path)
    return {initializer.name for initializer in model.graph.initializer}


def test_onnx_folded_and_with_constants(loras: list[CapturedModule], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    adapter = {name for name in loras[0].state_dict() if "lora_" in name}
    for way in ("folded", "constants"):
        path = fxlora.export(loras[0], tmp_path / f"{way}.onnx", X, adapters=way)
        assert [p.name for p in tmp_path.glob(f"{way}*")] == [path.name]
        assert (onnx_names(path) & adapter) == (adapter if way == "constants" else set())
        run = session(path)
        assert [i.name for i in run.get_inputs()] == ["x"]
        assert [o.name for o in run.get_outputs()] == ["logits", "hidden"]
        for x in (X, X[:1], torch.cat([X, X])):
            logits, hidden = run.run(None, {"x": x.numpy()})
            expected = loras[0](x)
            assert close(logits, expected["logits"]) and close(hidden, expected["hidden"])


def test_onnx_adapters_are_inputs_that_may_be_left_out(
    gm: CapturedModule, loras: list[CapturedModule], tmp_path: Path
) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = fxlora.export(loras[0], tmp_path / "m.onnx", X, adapters="inputs")
    other = fxlora.export_adapter(loras[1], tmp_path / "other.onnx_adapter", like=loras[0])
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "m.onnx_adapter", other.name}
    run, given = session(path), {"x": X[:3].numpy()}
    assert close(run.run(None, given)[0], gm(X[:3])["logits"])
    for lora, file in ((loras[0], path.with_suffix(".onnx_adapter")), (loras[1], other)):
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
        assert close(run.run(None, given, options)[0], lora(X[:3])["logits"])


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def test_onnx_of_a_routed_module(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    x = torch.randn(4, 6)
    gm = fxlora.capture(Mlp().eval(), x)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    loras = [fxlora.inject(gm, fxlora.match(gm, config)).eval() for _ in range(2)]
    routed = fxlora.route(loras)
    path = fxlora.export(routed, tmp_path / "m.onnx", x, {"adapter_ids": IDS})
    assert "0.lora_A.routed.weight" in onnx_names(path)
    (found,) = session(path).run(None, {"input": x.numpy(), "adapter_ids": IDS.numpy()})
    for sample, slot in enumerate(IDS.tolist()):
        module = loras[slot] if slot >= 0 else gm.eval()
        assert close(found[sample], module(x)[sample])


# ---- AOTInductor, ExecuTorch, OpenVINO ----------------------------------------------------------


@pytest.fixture(scope="module")
def mlps() -> tuple[CapturedModule, list[CapturedModule]]:
    """A base, and three adapters: one of B = 0, and one of another scaling."""
    torch.manual_seed(0)
    gm = fxlora.capture(Mlp().eval(), X6).eval()
    configs = [{}, {"init_lora_weights": False}, {"init_lora_weights": False, "lora_alpha": 20}]
    made = [LoraConfig(r=2, target_modules="all-linear", **config) for config in configs]
    return gm, [fxlora.inject(gm, fxlora.match(gm, config)).eval() for config in made]


X6 = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("routed", [False, True])
def test_aoti_keeps_constants_that_a_swap_replaces(
    mlps: tuple[CapturedModule, list[CapturedModule]], routed: bool, tmp_path: Path
) -> None:
    """Also those of one value: B = 0, the scalings 1, and an empty slot of a routed module."""
    gm, (fresh, one, two) = mlps
    module = fxlora.route([fresh, one], slots=3).eval() if routed else fresh
    given = {"adapter_ids": torch.tensor([2, 2, 2, -1])} if routed else {}
    path = fxlora.export(module, tmp_path / "m.pt2", X6, given, format="aoti")
    package: Any = torch._inductor.aoti_load_package(str(path))
    assert set(load_file(path.with_suffix(".safetensors"))) <= set(package.get_constant_fqns())
    if routed:
        fxlora.swap_adapter(module, 2, two)
    file = fxlora.export_adapter(module if routed else two, tmp_path / "a.safetensors", like=module)
    package.load_constants(load_file(file), check_full_update=False)
    found, expected = package(X6, **given), two(X6)
    assert close(found[:3], expected[:3]) and not close(expected, gm(X6), 1e-3)
    assert close(found[3], (gm if routed else two)(X6)[3])
    assert close(package(X6[:1], **{k: v[:1] for k, v in given.items()}), expected[:1])


@pytest.mark.slow
def test_executorch_has_one_program_for_every_adapter(
    gm: CapturedModule, loras: list[CapturedModule], tmp_path: Path
) -> None:
    for package in FORMATS["executorch"].packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    load: Any = importlib.import_module(
        "executorch.extension.pybindings.portable_lib"
    )._load_for_executorch

    shapes = ({0: torch.export.Dim("batch", max=16)},)
    paths = [
        fxlora.export(lora, tmp_path / f"{number}.pte", X, dynamic_shapes=shapes)
        for number, lora in enumerate(loras)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for number, lora in enumerate(loras):
        alone = fxlora.export_adapter(lora, tmp_path / "alone.ptd", like=loras[0])
        assert alone.read_bytes() == paths[number].with_suffix(".ptd").read_bytes()
        for x in (X, X[:1], torch.cat([X, X, X])):
            found = load(str(paths[0]), str(alone)).forward([x])
            assert close(found[0], lora(x)["logits"])
    folded = fxlora.export(loras[0], tmp_path / "folded.pte", X, adapters="folded")
    assert not folded.with_suffix(".ptd").exists()
    assert b"XnnpackBackend" in folded.read_bytes()
    routed, given = fxlora.route(loras), {"adapter_ids": IDS}
    path = fxlora.export(routed, tmp_path / "routed.pte", X, given, adapters="inputs")
    held = routed.adapter_parameters()
    values = [p.detach() for name, p in routed.named_parameters() if name in held]
    found = load(str(path)).forward([X, IDS, *values])
    assert close(found[0][1], gm(X)["logits"][1]) and close(found[0][0], loras[1](X)["logits"][0])


@pytest.mark.slow
def test_openvino(mlps: tuple[CapturedModule, list[CapturedModule]], tmp_path: Path) -> None:
    openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed")
    gm, (_, one, two) = mlps

    def outputs(path: Path, *given: torch.Tensor) -> torch.Tensor:
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([tensor.numpy() for tensor in given])[0].copy())

    for way in ("folded", "constants"):
        path = fxlora.export(one, tmp_path / "m.xml", X6, adapters=way)
        assert close(outputs(path, X6[:3]), one(X6[:3]))
    path = fxlora.export(one, tmp_path / "m.xml", X6, adapters="inputs")
    file = fxlora.export_adapter(two, tmp_path / "two.safetensors", like=one)  # of another scaling
    values = load_file(file)
    ordered = [values[name] for name, _ in two.named_parameters() if name in values]
    assert close(outputs(path, X6[:3], *ordered), two(X6[:3]))
    ids = torch.tensor([0, -1, 1, 1])
    path = fxlora.export(fxlora.route([one, two]), tmp_path / "r.xml", X6, {"adapter_ids": ids})
    found = outputs(path, X6, ids)
    assert close(found[0], one(X6)[0]) and close(found[1], gm(X6)[1])
    assert close(found[2:], two(X6)[2:])


@pytest.mark.slow
def test_a_process_without_transformers_reads_a_plain_file(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 6}
    config = transformers.BertConfig(**sizes, num_attention_heads=2)
    gm = fxlora.capture(transformers.BertForTokenClassification(config).eval(), ids).eval()
    path = fxlora.export(gm, tmp_path / "m.pt2", ids, plain=True)
    script = f"""
import sys
sys.modules["fxlora"] = sys.modules["transformers"] = None  # importing them fails
import torch
print(torch.export.load({str(path)!r}).module()(torch.tensor({ids.tolist()}))["logits"].tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), gm(ids).logits)


# ---- what is refused ----------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_written(
    gm: CapturedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("before")

    def load(*given: Any) -> compared.Run:
        run = pt2.load(*given)
        return lambda *args: pytree.tree_map(lambda t: t * (1 + 1e-3), run(*args))

    wrong = untyped(type(pt2.FORMAT))(".pt2", pt2.write, load, flat=False)
    monkeypatch.setitem(untyped(FORMATS), "pt2", wrong)
    with pytest.raises(ExportError, match=r"something else than the module .* 1.0e-03 of its"):
        fxlora.export(gm, path, X)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    assert fxlora.export(gm, path, X, tolerance=0.01) == path
    assert path.read_bytes()[:2] == b"PK"


class Residual(nn.Module):
    """A module that is deep enough to add up rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x + torch.tanh(self.layer(x))
        return self.head(x)


def test_an_error_in_half_precision_is_measured_by_the_modules_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that computes in float32 is right, one that is wrong by more than rounding not."""
    torch.manual_seed(0)
    model, x = Residual().bfloat16().eval(), torch.randn(6, 32).bfloat16()
    gm, path = fxlora.capture(model, x).eval(), tmp_path / "m.pt2"
    wide, before = copy.deepcopy(model).float(), copy.deepcopy(gm.state_dict())

    def runtime(wrong: float) -> None:
        def load(*_: Any) -> compared.Run:
            return lambda x: (wide(x.float()) * wrong).bfloat16()

        made = untyped(type(pt2.FORMAT))(".pt2", pt2.write, load, flat=False)
        monkeypatch.setitem(untyped(FORMATS), "pt2", made)

    error = compared.distance(wide(x.float()).bfloat16(), gm(x))
    assert error > compared.TOLERANCES[torch.bfloat16]  # more than of one rounding
    runtime(1)
    assert fxlora.export(gm, path, x) == path
    assert all(torch.equal(gm.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ExportError, match="something else"):
        fxlora.export(gm, path, x, tolerance=1e-4)
    runtime(1.05)
    with pytest.raises(ExportError, match=r"something else .* times its own rounding error"):
        fxlora.export(gm, path, x)


def test_files_that_belong_together_are_replaced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]

    def write(text: str) -> None:
        with whole_files(targets[0]) as temporary:
            for target in targets:
                temporary.with_name(target.name).write_text(text)

    write("before")
    replace = Path.replace

    def fails_at_the_last(self: Path, target: Path) -> Path:
        if target == targets[0]:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails_at_the_last)
    with pytest.raises(ExportError, match="No space left"):
        write("after")
    assert [t.read_text() for t in targets] == ["before", "before"]
    assert sorted(tmp_path.iterdir()) == targets
    monkeypatch.undo()
    write("after")
    assert [t.read_text() for t in targets] == ["after", "after"]


@pytest.mark.parametrize("name", ["onnx", "executorch", "openvino"])
def test_a_missing_package_is_named(
    gm: CapturedModule, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    packages = FORMATS[name].packages
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda p, *a: None if p in packages else find(p, *a)
    )
    with pytest.raises(
        ExportError, match=rf"needs {packages[0]}.*pip install \"fxlora\[{name}\]\""
    ):
        fxlora.export(gm, tmp_path / f"m{FORMATS[name].suffix}", X, format=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("m", None, r"suffix of m is of no format: end it in one of \.pt2, \.onnx, \.pte, \.xml;"),
        ("m.onxx", None, r"suffix of m\.onxx is of no format"),
        ("m.onnx", "pt2", r"format pt2 must end in \.pt2"),
        ("m.pte", "onnx", r"format onnx must end in \.onnx"),
        ("m.bin", "aoti", r"format aoti must end in \.pt2"),
    ],
)
def test_a_suffix_of_another_format(
    gm: CapturedModule, tmp_path: Path, name: str, format: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fxlora.export(gm, tmp_path / name, X, format=format)
    assert not list(tmp_path.iterdir())
    assert fxlora.export(gm, tmp_path / "m.program", X, format="pt2").exists()


class Mixed(nn.Module):
    """An output in float32, and one of a layer in bfloat16; takes (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 4), nn.Linear(6, 3).bfloat16()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.wide(x), self.narrow(x.bfloat16()).float()


def test_a_layer_in_half_precision_loosens_its_own_outputs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 6)
    gm = fxlora.capture(Mixed().eval(), x)
    path, wrong = tmp_path / "m.pt2", 0

    def load(*given: Any) -> compared.Run:
        run = pt2.load(*given)

        def off(*args: Any) -> Any:
            outputs = list(run(*args))
            outputs[wrong] = outputs[wrong] * (1 + 1e-3)
            return tuple(outputs)

        return off

    made = untyped(type(pt2.FORMAT))(".pt2", pt2.write, load, flat=False)
    monkeypatch.setitem(untyped(FORMATS), "pt2", made)
    with pytest.raises(ExportError, match=r"output 0 differs by 1.0e-03 .*, of which 0.0001 is"):
        fxlora.export(gm, path, x)
    wrong = 1  # well within the error of the layer itself
    assert fxlora.export(gm, path, x) == path


def test_wrong_arguments(gm: CapturedModule, loras: list[CapturedModule], tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(ConfigError, match="adapters must be one of folded, constants, inputs"):
        fxlora.export(gm, path, X, adapters="merged")
    with pytest.raises(ConfigError, match="needs adapters, and the module has none"):
        fxlora.export(gm, path, X, adapters="inputs")
    with pytest.raises(ConfigError, match="tolerance must be a number"):
        fxlora.export(gm, path, X, tolerance=-1)
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, \.onnx_adapter"):
        fxlora.export_adapter(loras[0], tmp_path / "a.bin", like=loras[0])
    with pytest.raises(ConfigError, match="has no adapters"):
        fxlora.export_adapter(gm, tmp_path / "a.safetensors", like=loras[0])
    larger = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=3, target_modules=["up"])))
    with pytest.raises(ConfigError, match=r"differs from the program's in conv\.lora_A"):
        fxlora.export_adapter(larger, tmp_path / "a.safetensors", like=loras[0])
    routed = fxlora.route(loras)
    with pytest.raises(ConfigError, match="routed module has several adapters"):
        fxlora.export(routed, path, X, {"adapter_ids": IDS}, adapters="folded")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_graph_format_cannot_hold_is_a_typed_error(
    loras: list[CapturedModule], tmp_path: Path
) -> None:
    """A routed convolution has as many groups as the batch has samples; ONNX's number is fixed."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    routed = fxlora.route(loras)
    with pytest.raises(
        ExportError,
        match=r"the convolution .conv. has as many groups as the batch.*pt2.*take_adapter",
    ):
        fxlora.export(routed, tmp_path / "m.onnx", X, {"adapter_ids": IDS})
    assert not list(tmp_path.iterdir())


def test_a_host_is_exported_as_its_module(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    model = Mlp().eval()
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    host = fxlora.hosted(model, fxlora.adapt(model, x, rules=config).eval())
    program = torch.export.load(fxlora.export(host, tmp_path / "m.pt2", x)).module()
    assert torch.equal(program(x), host(x))


def test_the_distance_of_two_tensors() -> None:
    distance = compared.distance
    a = torch.tensor([1.0, -4.0, float("nan"), float("inf")])
    assert distance(a, a.clone()) == 0
    assert distance(a + 0.5, a) == pytest.approx(0.5)  # of the 1
    assert distance(torch.zeros(4), a) == float("inf")
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")


@pytest.mark.slow
def test_large_weights_are_in_a_file_of_their_own(
    gm: CapturedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    monkeypatch.setattr(onnx, "_INLINE", 100)
    path = fxlora.export(gm, tmp_path / "m.onnx", X)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    found = np.asarray(session(path).run(None, {"x": X.numpy()})[0])
    assert close(found, gm(X)["logits"])


# ---- what a file cannot hold --------------------------------------------------------------------

NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in FORMATS["onnx"].packages),
    reason="the packages of fxlora[onnx] are not installed",
)
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("masked", [1, 90])
@pytest.mark.parametrize("added", [True, False])
def test_a_masked_score_hides_no_error(masked: int, added: bool) -> None:
    distance = compared.distance
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    scores[:masked] = scores[:masked] - 1e4 if added else LOWEST
    wrong = scores.clone()
    wrong[-1] += 1
    assert distance(wrong, scores) > 0.1
    scaled = torch.where(scores == LOWEST, scores, scores * (1 + 1e-6))
    assert distance(scaled, scores) < 1e-5
    flags = torch.tensor([True, False])
    assert distance(flags.to(torch.uint8), flags) == 0
    assert distance(torch.tensor([2, 0]), flags) == float("inf")
    assert distance(torch.tensor([1.5, 2.0]), torch.tensor([1, 2])) == float("inf")


class Counting(nn.Module):
    """Writes to a buffer, to its input, or to running statistics."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.layer = where, nn.Linear(4, 3)
        self.register_buffer("calls", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls = self.get_buffer("calls")
        y = self.layer(x) * calls
        if self.where == "statistics":
            return F.batch_norm(y, calls, calls + 1, training=True)
        (x[0] if self.where == "x" else calls).add_(1)
        return y


@NEEDS_ONNX
@pytest.mark.parametrize("where", ["calls", "x", "statistics"])
def test_a_file_of_outputs_only_refuses_writes(where: str, tmp_path: Path) -> None:
    x, written = torch.randn(5, 4), "x" if where == "x" else "calls"
    gm = fxlora.capture(Counting(where).eval(), x.clone()).eval()
    with pytest.raises(ExportError, match=rf'write to {written}.*format="pt2"'):
        fxlora.export(gm, tmp_path / "m.onnx", x.clone())
    assert not list(tmp_path.iterdir())
    program = torch.export.load(fxlora.export(gm, tmp_path / "m.pt2", x.clone())).module()
    ours, theirs = x.clone(), x.clone()
    for _ in range(2):
        assert torch.equal(program(theirs), gm(ours)) and torch.equal(theirs, ours)
    assert (ours[0] != x[0]).all() if where == "x" else (gm.get_buffer("calls") != 1).all()


def test_a_second_call_shows_that_a_file_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> compared.Run:
        return lambda *args: pt2.load(*given)(*args)  # as new at each call

    forgets = untyped(type(pt2.FORMAT))(".pt2", pt2.write, load, flat=False, stateful=True)
    monkeypatch.setitem(untyped(FORMATS), "pt2", forgets)
    x = torch.randn(5, 4)
    gm = fxlora.capture(Counting("calls").eval(), x, dynamic_shapes={"x": {}}).eval()
    with pytest.raises(ExportError, match="something else than the module"):
        fxlora.export(gm, tmp_path / "m.pt2", x)


def test_a_file_must_leave_its_inputs_as_the_module_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any) -> compared.Run:
        return lambda x: pt2.load(*given)(x.clone())

    copies = untyped(type(pt2.FORMAT))(".pt2", pt2.write, load, flat=False, stateful=True)
    monkeypatch.setitem(untyped(FORMATS), "pt2", copies)
    x = torch.randn(5, 4)
    gm = fxlora.capture(Counting("x").eval(), x.clone(), dynamic_shapes={"x": {}}).eval()
    with pytest.raises(ExportError, match=r"input 0, as the call leaves it, differs by"):
        fxlora.export(gm, tmp_path / "m.pt2", x)


class Limited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, times: int) -> Any:
        y = self.layer(x) * times
        return y if x.shape[0] <= 8 else y * 100


@pytest.fixture
def tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format of files that take and return tensors only, and do not say what they assume."""
    made = untyped(type(pt2.FORMAT))(".flat", pt2.write, pt2.load)
    monkeypatch.setitem(untyped(FORMATS), "flat", made)


@pytest.mark.usefixtures("tensors_only")
def test_what_a_file_does_not_check_is_named(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    gm = fxlora.capture(Limited().eval(), (x, 3)).eval()
    message = r"dimension 0 of x is from [01] to 8,.* times is 3, a constant"
    with pytest.warns(fxlora.FxLoraWarning, match=message):
        path = fxlora.export(gm, tmp_path / "m.flat", (x, 3))
    assert torch.equal(torch.export.load(path).module()(x[:2])[0], gm(x[:2], 3))
    path = fxlora.export(gm, tmp_path / "m.pt2", (x, 3))  # no warning: it checks them
    with pytest.raises((RuntimeError, AssertionError)):
        torch.export.load(path).module()(torch.randn(9, 4), 3)


class Counted(nn.Module):
    def __init__(self, as_tensor: bool) -> None:
        super().__init__()
        self.layer, self.as_tensor = nn.Linear(4, 3), as_tensor

    def forward(self, x: torch.Tensor) -> Any:
        size = torch.tensor(x.shape[0]) if self.as_tensor else x.shape[0]
        return {"y": self.layer(x), "size": size, "none": None}


@pytest.mark.usefixtures("tensors_only")
def test_an_integer_output_is_refused_where_only_tensors_return(tmp_path: Path) -> None:
    x, path = torch.randn(5, 4), tmp_path / "m.flat"
    gm = fxlora.capture(Counted(False).eval(), x).eval()
    with pytest.raises(ExportError, match=r"size.*returns no tensor there.*torch\.tensor"):
        fxlora.export(gm, path, x)
    gm = fxlora.capture(Counted(True).eval(), x).eval()  # as the message says
    y, size = torch.export.load(fxlora.export(gm, path, x)).module()(x[:2])
    assert torch.equal(y, gm(x[:2])["y"]) and size == 2


def test_hooks_around_the_graph_are_refused(tmp_path: Path) -> None:
    x, model = torch.randn(5, 6), Mlp().eval()
    gm = fxlora.capture(model, x).eval()
    for add in (gm.register_forward_hook, gm.register_forward_pre_hook):
        handle = add(lambda *_: None)
        with pytest.raises(ExportError, match=r"has forward hooks.*on the source model before"):
            fxlora.export(gm, tmp_path / "m.pt2", x)
        handle.remove()
    assert not list(tmp_path.iterdir())
    y = gm(x)
    model.register_forward_hook(lambda *call: call[-1] * 2)
    gm = fxlora.capture(model, x).eval()  # as the message says
    program = torch.export.load(fxlora.export(gm, tmp_path / "m.pt2", x)).module()
    assert torch.equal(program(x), 2 * y)


def test_hooks_of_all_modules_are_refused(gm: CapturedModule, tmp_path: Path) -> None:
    register = (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    )
    for add in register:
        handle = add(lambda *_: None)
        try:
            with pytest.raises(ExportError, match=r"forward hooks for all modules.*handle\.remove"):
                fxlora.export(gm, tmp_path / "m.pt2", X)
        finally:
            handle.remove()
    assert not list(tmp_path.iterdir())
    fxlora.export(gm, tmp_path / "m.pt2", X)  # as the message says


class Passes(nn.Module):
    """Returns its inputs, one twice, beside an output and a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, given: dict[str, torch.Tensor]) -> Any:
        y = self.layer(given["x"])
        return {"x": given["x"], "ids": [given["ids"]], "y": (y, y), "top": y.topk(2)}


@NEEDS_ONNX
def test_inputs_may_be_outputs(tmp_path: Path) -> None:
    given = {"ids": torch.arange(5), "x": torch.randn(5, 4)}
    gm = fxlora.capture(Passes().eval(), (given,)).eval()
    run = session(fxlora.export(gm, tmp_path / "m.onnx", (given,)))
    feed = {i.name: given["x" if i.name.endswith("x") else "ids"].numpy() for i in run.get_inputs()}
    for found, expected in zip(run.run(None, feed), pytree.tree_leaves(gm(given)), strict=True):
        assert close(found, expected) and len(feed) == 2
    with pytest.raises(ExportError, match=r"topk.*plain=True"):
        fxlora.export(gm, tmp_path / "m.pt2", (given,))
    program = torch.export.load(fxlora.export(gm, tmp_path / "m.pt2", (given,), plain=True))
    assert torch.equal(program.module()(given)["top"][0], gm(given)["top"][0])


def test_an_adapter_file_has_what_is_active(
    mlps: tuple[CapturedModule, list[CapturedModule]], tmp_path: Path
) -> None:
    gm, path = mlps[0], tmp_path / "a.safetensors"
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    both = fxlora.inject(gm, fxlora.match(gm, config, adapter_name="a"))
    both = fxlora.inject(both, fxlora.match(both, config, adapter_name="b")).eval()
    a, b = (fxlora.activate(both, name).eval() for name in "ab")
    assert (a(X6) - b(X6)).abs().max() > 1e-3 and (a(X6) - both(X6)).abs().max() > 1e-3
    for module, like in ((b, a), (both, a), (a, both)):
        with pytest.raises(ConfigError, match="the same adapters must be active"):
            fxlora.export_adapter(module, path, like=like)
    written = load_file(fxlora.export_adapter(a, path, like=a))
    assert set(written) == {f"{site}.lora_{x}.a.weight" for site in "02" for x in "AB"}
    program = fxlora.export(a, tmp_path / "m.pt2", X6, adapters="inputs")
    found = torch.export.load(program).module()(X6, adapters=written)
    assert close(found, a(X6), 1e-6)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(13, 6, mode="sum")

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.bag(ids, offsets)


def test_values_that_are_wrong_at_other_sizes_are_not_tried_there(tmp_path: Path) -> None:
    given = torch.arange(9), torch.tensor([0, 2, 5])
    config = LoraConfig(r=2, target_modules=["bag"], init_lora_weights=False)
    lora = fxlora.adapt(Bags().double(), given, rules=config).eval()
    program = torch.export.load(fxlora.export(lora, tmp_path / "m.pt2", given)).module()
    assert close(program(*given), lora(*given), 1e-12)


def test_statistics_are_no_part_of_an_adapters_file(tmp_path: Path) -> None:
    x = torch.randn(8, 5)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    gm = fxlora.capture(net, x)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    one, two = (fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(2))
    fxlora.export_adapter(two, tmp_path / "two.safetensors", like=one)
    base = fxlora.capture(nn.Sequential(nn.Linear(5, 6), net[1], net[2]), x)
    other = fxlora.inject(base, fxlora.match(base, config))
    with pytest.raises(ConfigError, match=r"0\.bias, 0\.weight differ"):
        fxlora.export_adapter(other, tmp_path / "two.safetensors", like=one)
    two.train()(3 * x + 1)
    with pytest.raises(ConfigError, match=r"1\.running_mean.*no part of an adapter's file"):
        fxlora.export_adapter(two, tmp_path / "two.safetensors", like=one)


def test_an_adapter_of_another_dtype_is_refused(
    mlps: tuple[CapturedModule, list[CapturedModule]], tmp_path: Path
) -> None:
    gm, (_, like, _) = mlps
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    other = fxlora.inject(gm, fxlora.match(gm, config)).eval()
    for p in fxlora.lora_parameters(other):
        p.data = p.data.bfloat16()
    with pytest.raises(ConfigError, match=r"is torch\.bfloat16, and torch\.float32 there.*p\.data"):
        fxlora.export_adapter(other, tmp_path / "a.safetensors", like=like)
    for p in fxlora.lora_parameters(other):  # as the message says
        p.data = p.data.to(torch.float32)
    values = load_file(fxlora.export_adapter(other, tmp_path / "a.safetensors", like=like))
    assert {value.dtype for value in values.values()} == {torch.float32}
