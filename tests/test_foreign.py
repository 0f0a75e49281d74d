"""Adapter files of other libraries, each against its own formula, written out here."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import fxlora
from fxlora import AdapterError, ConfigError, FxLoraWarning

from .typed import plan_of

Tensors = dict[str, torch.Tensor]
R = 2  # of the files


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 10)
        self.to_out = nn.ModuleList([nn.Linear(10, 6), nn.Dropout(0.1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[1](self.to_out[0](torch.tanh(self.to_q(x))))


class Unet(nn.Module):
    """Linears and convolutions of a diffusion model; takes (N, 4, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1)
        self.proj_in = nn.Conv2d(6, 6, 1)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])
        self.conv_out = nn.Conv2d(6, 9, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(torch.tanh(self.conv_in(x)))
        flat = x.flatten(2).mT
        flat = flat + self.blocks[0]["attn1"](flat)  # pyright: ignore[reportIndexIssue]
        return self.conv_out(flat.mT.unflatten(2, x.shape[2:]))


class Encoder(nn.Module):
    """A packed projection, an embedding and linears of a language model; takes indices (N, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.c_attn = nn.Linear(8, 12)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "out_proj": nn.Linear(6, 5)})

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        q, k, v = self.c_attn(self.wte(index)).chunk(3, -1)
        return self.self_attn["out_proj"](torch.tanh(self.self_attn["q_proj"](q * k + v)))


ATTENTION = "blocks.0.attn1"


@functools.cache  # no function changes what it is given
def unet() -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    model, x = Unet().double().eval(), torch.randn(2, 4, 7, 7).double()
    return model, x, fxlora.capture(model, x)


@functools.cache
def encoder() -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    model, x = Encoder().double().eval(), torch.randint(0, 11, (3, 5))
    return model, x, fxlora.capture(model, x)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def written(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: Any) -> Path:
    """Write a file of a library's, by safetensors or by torch.save, as its name says."""
    if path.suffix == ".safetensors":
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, texts)
    else:
        torch.save(dict(tensors), path)
    return path


def check(
    model: nn.Module,
    x: torch.Tensor,
    gm: fxlora.CapturedModule,
    loaded: fxlora.CapturedModule,
    weights: Tensors,
    folder: Path,
) -> None:
    """Compare a loaded module with the source under the reference's weights, and every step on."""
    state = dict(model.state_dict())
    for name, weight in weights.items():
        assert not torch.allclose(state[name], weight), f"{name}: the file has no effect"
    expected = functional_call(model, weights, (x,))
    assert not torch.allclose(expected, model(x))
    loaded.eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-10, atol=1e-10)
    folded = fxlora.fold(loaded)
    for name, value in state.items():
        wanted = weights.get(name, value)
        torch.testing.assert_close(folded.get_parameter(name), wanted, rtol=1e-10, atol=1e-10)
    fxlora.verify(loaded, x)
    fxlora.save_adapter(loaded, folder / "again")
    again = fxlora.load_adapter(gm, folder / "again").eval()
    assert torch.equal(again(x), loaded(x))
    assert torch.equal(fxlora.remove(loaded)(x), gm.eval()(x))


# ---- kohya and LyCORIS --------------------------------------------------------------------------


def locon(out: int, size: int, kernel: tuple[int, ...], alpha: float | None) -> tuple[Tensors, Any]:
    """LoRA of a linear layer, and of a convolution: down with the kernel, up 1x1."""
    ones = (1,) * len(kernel)
    file = {"lora_down.weight": random(R, size, *kernel), "lora_up.weight": random(out, R, *ones)}
    up, down = file["lora_up.weight"].flatten(1), file["lora_down.weight"]
    delta = torch.einsum("or,ri...->oi...", up, down) * (alpha / R if alpha else 1)
    return file | ({} if alpha is None else {"alpha": number(alpha)}), delta


def cp(out: int, size: int, kernel: tuple[int, ...], alpha: float) -> tuple[Tensors, Any]:
    """LoCon with a core: down 1x1, mid with the kernel, up 1x1, as three convolutions."""
    file = {
        "lora_down.weight": random(R, size, 1, 1),
        "lora_mid.weight": random(R, R, *kernel),
        "lora_up.weight": random(out, R, 1, 1),
        "alpha": number(alpha),
    }
    impulse = torch.eye(size).double()[:, :, None, None]
    impulse = nn.functional.pad(impulse, (kernel[1] - 1,) * 2 + (kernel[0] - 1,) * 2)
    low = nn.functional.conv2d(impulse, file["lora_down.weight"])
    low = nn.functional.conv2d(low, file["lora_mid.weight"])
    response = nn.functional.conv2d(low, file["lora_up.weight"])  # (in, out, *kernel), flipped
    return file, response.flip(2, 3).transpose(0, 1) * alpha / R


def loha(out: int, size: int, kernel: tuple[int, ...], alpha: float) -> tuple[Tensors, Any]:
    flat = size * int(torch.tensor(kernel).prod()) if kernel else size
    file = {
        "hada_w1_a": random(out, R),
        "hada_w1_b": random(R, flat),
        "hada_w2_a": random(out, R),
        "hada_w2_b": random(R, flat),
    }
    delta = (file["hada_w1_a"] @ file["hada_w1_b"]) * (file["hada_w2_a"] @ file["hada_w2_b"])
    return file | {"alpha": number(alpha)}, delta.reshape(out, size, *kernel) * alpha / R


def loha_tucker(out: int, size: int, kernel: tuple[int, ...], alpha: float) -> tuple[Tensors, Any]:
    file = {"alpha": number(alpha)}
    delta = number(1.0)
    for n in "12":
        file[f"hada_t{n}"] = random(R, R, *kernel)
        file[f"hada_w{n}_a"], file[f"hada_w{n}_b"] = random(R, out), random(R, size)
        sides = (file[f"hada_t{n}"], file[f"hada_w{n}_a"], file[f"hada_w{n}_b"])
        delta = delta * torch.einsum("ijkl,io,jn->onkl", *sides)
    return file, delta * alpha / R


def lokr(w1: tuple[int, int], w2: tuple[int, ...], low: str, alpha: float) -> tuple[Tensors, Any]:
    """LoKr with factors of these shapes, of which those in `low` are products of rank R."""
    file, factors = {"alpha": number(alpha)}, []
    for name, shape in (("w1", w1), ("w2", w2)):
        out, size, *kernel = shape
        if name not in low:
            file[f"lokr_{name}"] = random(*shape)
            factors.append(file[f"lokr_{name}"])
            continue
        flat = size * int(torch.tensor(kernel).prod()) if kernel else size
        file[f"lokr_{name}_a"], file[f"lokr_{name}_b"] = random(out, R), random(R, flat)
        factors.append((file[f"lokr_{name}_a"] @ file[f"lokr_{name}_b"]).reshape(shape))
    first, second = factors
    first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
    return file, torch.kron(first, second) * (alpha / R if low else 1)


def lokr_tucker(alpha: float) -> tuple[Tensors, Any]:
    file = {"lokr_w1": random(3, 2), "lokr_t2": random(R, R, 3, 3), "alpha": number(alpha)}
    file |= {"lokr_w2_a": random(R, 3), "lokr_w2_b": random(R, 3)}
    second = torch.einsum("ijkl,io,jn->onkl", file["lokr_t2"], file["lokr_w2_a"], file["lokr_w2_b"])
    first = file["lokr_w1"][:, :, None, None]
    return file, torch.kron(first, second.contiguous()) * alpha / R


KOHYA = {
    "lora": lambda: {
        f"{ATTENTION}.to_q": locon(10, 6, (), 3.0),
        f"{ATTENTION}.to_out.0": locon(6, 10, (), None),
        "proj_in": locon(6, 6, (1, 1), 1.0),
        "conv_out": locon(9, 6, (3, 3), 0.0),  # LyCORIS: no scaling
    },
    "cp": lambda: {"conv_in": cp(6, 4, (3, 3), 3.0)},
    "loha": lambda: {
        f"{ATTENTION}.to_q": loha(10, 6, (), 3.0),
        "conv_out": loha(9, 6, (3, 3), 1.0),
    },
    "loha tucker": lambda: {"conv_out": loha_tucker(9, 6, (3, 3), 3.0)},
    "lokr": lambda: {
        f"{ATTENTION}.to_q": lokr((2, 3), (5, 2), "", 7.0),
        f"{ATTENTION}.to_out.0": lokr((2, 2), (3, 5), "w2", 3.0),
        "proj_in": lokr((3, 3), (2, 2), "w1 w2", 3.0),
        "conv_in": lokr((2, 2), (3, 2, 3, 3), "w2", 3.0),
        "conv_out": lokr((3, 2), (3, 3, 3, 3), "w1", 3.0),
    },
    "lokr tucker": lambda: {"conv_out": lokr_tucker(3.0)},
}


@pytest.mark.parametrize("kind", KOHYA)
def test_kohya_and_lycoris(kind: str, tmp_path: Path) -> None:
    model, x, gm = unet()
    layers = KOHYA[kind]()
    file: Tensors = {}
    weights: Tensors = {}
    for path, (tensors, delta) in layers.items():
        flat = f"lora_unet_{path.replace('.', '_')}"
        file |= {f"{flat}.{end}": tensor for end, tensor in tensors.items()}
        base = model.get_parameter(f"{path}.weight")
        weights[f"{path}.weight"] = base.detach() + delta.reshape(base.shape)
    loaded = fxlora.load_adapter(gm, written(tmp_path / "a.safetensors", file))
    check(model, x, gm, loaded, weights, tmp_path)
    assert not plan_of(loaded).rules
    if kind == "loha":
        ranks = {entry.site: entry.r for entry in plan_of(loaded)}
        assert ranks == {f"{ATTENTION}.to_q": R * R, "conv_out": R * R}, "not as low as it could be"
        assert "rank 4" in str(loaded.plan)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_dora_of_lycoris(axis: str, tmp_path: Path) -> None:
    model, x, gm = unet()
    file: Tensors = {}
    weights: Tensors = {}
    layers = {f"{ATTENTION}.to_q": loha(10, 6, (), 3.0), "conv_out": cp(9, 6, (3, 3), 3.0)}
    for path, (tensors, delta) in layers.items():
        moved = model.get_parameter(f"{path}.weight").detach() + delta
        dim = 0 if axis == "outputs" else 1
        others = [d for d in range(moved.dim()) if d != dim]
        shape = [1] * moved.dim()
        shape[dim] = moved.shape[dim]
        scale = torch.rand(shape).double() + 0.5
        weights[f"{path}.weight"] = (
            scale * moved / torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        )
        flat = f"lora_unet_{path.replace('.', '_')}"
        file |= {f"{flat}.{end}": value for end, value in (tensors | {"dora_scale": scale}).items()}
    loaded = fxlora.load_adapter(gm, written(tmp_path / "a.safetensors", file))
    check(model, x, gm, loaded, weights, tmp_path)
    assert all(("dora" in entry.variants) == (axis == "outputs") for entry in plan_of(loaded))


def test_files_for_several_models(tmp_path: Path) -> None:
    model, x, gm = unet()
    text, y, tm = encoder()
    of_unet, delta = locon(10, 6, (), 3.0)
    of_text, other = locon(6, 4, (), 1.0)
    file = {f"lora_unet_blocks_0_attn1_to_q.{end}": t for end, t in of_unet.items()}
    file |= {f"lora_te_self_attn_q_proj.{end}": t for end, t in of_text.items()}
    path = written(tmp_path / "a.safetensors", file)
    with pytest.raises(AdapterError, match=r"several models \(lora_unet, lora_te\)"):
        fxlora.load_adapter(gm, path)
    name = f"{ATTENTION}.to_q.weight"
    loaded = fxlora.load_adapter(gm, path, component="lora_unet")
    check(model, x, gm, loaded, {name: model.get_parameter(name).detach() + delta}, tmp_path)
    loaded = fxlora.load_adapter(tm, path, component="lora_te")
    name = "self_attn.q_proj.weight"
    check(text, y, tm, loaded, {name: text.get_parameter(name).detach() + other}, tmp_path)
    with pytest.raises(AdapterError, match="'te'; it has lora_unet, lora_te"):
        fxlora.load_adapter(gm, path, component="te")


def test_underscores_that_fit_two_layers(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(6, 5)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(5, 6)})
            self.x = nn.ModuleDict({"y_z": nn.Linear(6, 5)})
            self.x_y = nn.ModuleDict({"z": nn.Linear(5, 5)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a["b_c"](torch.tanh(self.a_b["c"](x)))
            return self.x_y["z"](torch.tanh(self.x["y_z"](x)))

    model, x = Twins().double().eval(), torch.randn(3, 6).double()
    gm = fxlora.capture(model, x)
    tensors, delta = locon(5, 6, (), 3.0)  # only one has this shape
    file = {f"lora_unet_a_b_c.{end}": tensor for end, tensor in tensors.items()}
    loaded = fxlora.load_adapter(gm, written(tmp_path / "a.safetensors", file))
    weights = {"a_b.c.weight": model.get_parameter("a_b.c.weight").detach() + delta}
    check(model, x, gm, loaded, weights, tmp_path)

    class Same(Twins):
        def __init__(self) -> None:
            super().__init__()
            self.x_y = nn.ModuleDict({"z": nn.Linear(6, 5)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.x_y["z"](x) + self.x["y_z"](x)

    file = {f"lora_unet_x_y_z.{end}": tensor for end, tensor in tensors.items()}
    with pytest.raises(AdapterError, match=r"may be any of x\.y_z, x_y\.z"):
        fxlora.load_adapter(
            fxlora.capture(Same().double(), x), written(tmp_path / "b.safetensors", file)
        )


# ---- diffusers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", ["processor", "layer", "prefixed", "peft", "alphas", "metadata"]
)
def test_diffusers(version: str, tmp_path: Path) -> None:
    model, x, gm = unet()
    file: Tensors = {}
    weights: Tensors = {}
    metadata: dict[str, Any] = {}
    prefix = {"processor": "", "layer": ""}.get(version, "unet.")
    for path, (out, size) in {"to_q": (10, 6), "to_out.0": (6, 10)}.items():
        down, up = random(R, size), random(out, R)
        s = 1.0
        name = f"{prefix}{ATTENTION}.{path}"
        if version == "processor":
            name = f"{ATTENTION}.processor.{path.removesuffix('.0')}_lora"
            file |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        elif version in ("peft", "metadata"):
            file |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            file |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
        if version == "alphas":
            file[f"{name}.alpha"], s = number(3.0), 3.0 / R
        if version == "metadata":
            config = {"r": R, "lora_alpha": 5, "alpha_pattern": {"attn1.to_q": 3}}
            metadata["lora_adapter_metadata"] = {f"unet.{k}": v for k, v in config.items()}
            s = (3 if path == "to_q" else 5) / R
        weight = f"{ATTENTION}.{path}.weight"
        weights[weight] = model.get_parameter(weight).detach() + s * up @ down
    folder = tmp_path / "file"  # diffusers' folders hold one file, and no configuration
    folder.mkdir()
    written(folder / "pytorch_lora_weights.safetensors", file, **metadata)
    check(model, x, gm, fxlora.load_adapter(gm, folder), weights, tmp_path)


@pytest.mark.parametrize("version", ["to_q_lora", "q_proj.lora_linear_layer"])
def test_text_encoders_of_diffusers(version: str, tmp_path: Path) -> None:
    model, x, gm = encoder()
    file: Tensors = {}
    weights: Tensors = {}
    for kind, out, size in (("q", 6, 4), ("out", 5, 6)):
        down, up = random(R, size), random(out, R)
        name = f"text_encoder.self_attn.{version.replace('q', kind, 1)}"
        file |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        weight = f"self_attn.{kind}_proj.weight"
        weights[weight] = model.get_parameter(weight).detach() + up @ down
    loaded = fxlora.load_adapter(gm, written(tmp_path / "a.safetensors", file))
    check(model, x, gm, loaded, weights, tmp_path)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_keys_of_hugging_face(end: str, tmp_path: Path) -> None:
    model, x, gm = unet()
    file: Tensors = {}
    weights: Tensors = {}
    for path, kernel in ((f"{ATTENTION}.to_q", ()), ("conv_out", (3, 3))):
        base = model.get_parameter(f"{path}.weight").detach()
        out, size = base.shape[:2]
        tensors, delta = locon(out, size, kernel, None)
        moved = base + 1.5 * delta
        magnitude = torch.rand(out).double() + 0.5
        shaped = magnitude.reshape(-1, *[1] * (base.dim() - 1))
        norms = moved.flatten(1).norm(dim=1).reshape(shaped.shape)
        weights[f"{path}.weight"] = shaped * moved / norms
        name = f"base_model.model.{path}"
        file[f"{name}.lora_A.weight"] = tensors["lora_down.weight"]
        file[f"{name}.lora_B.weight"] = tensors["lora_up.weight"]
        file[f"{name}.{end}"] = shaped.transpose(0, 1) if kernel else magnitude
    path = written(tmp_path / "a.safetensors", file)
    with pytest.raises(AdapterError, match=r"no alpha.*adapter_config\.json.*lora_alpha="):
        fxlora.load_adapter(gm, path)
    loaded = fxlora.load_adapter(gm, path, lora_alpha=1.5 * R)
    check(model, x, gm, loaded, weights, tmp_path)
    same = fxlora.load_adapter(gm, path, lora_alpha=1.5 * R**0.5, use_rslora=True).eval()
    torch.testing.assert_close(same(x), loaded(x), rtol=1e-10, atol=1e-10)


def test_peft_folders_with_the_keys_of_peft_modules(tmp_path: Path) -> None:
    """PEFT also loads `lora_magnitude_vector.weight`, which its modules have and its files not."""
    peft = pytest.importorskip("peft", reason="peft is optional")
    model, x, gm = unet()
    config = peft.LoraConfig(
        r=R, target_modules=["to_q", "conv_out"], use_dora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    end = "lora_magnitude_vector"
    assert any(key.endswith(end) for key in held)
    save_file({f"{k}.weight" if k.endswith(end) else k: 2 * v for k, v in held.items()}, path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert not torch.allclose(theirs(x), model(x))
    loaded = fxlora.load_adapter(gm, tmp_path).eval()
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-6, atol=1e-6)  # float32 magnitudes


# ---- loralib and torchtune ----------------------------------------------------------------------


def test_loralib(tmp_path: Path) -> None:
    model, x, gm = encoder()
    file = {
        "wte.lora_A": random(R, 11),
        "wte.lora_B": random(8, R),
        "self_attn.q_proj.lora_A": random(R, 4),
        "self_attn.q_proj.lora_B": random(6, R),
        "self_attn.out_proj.bias": random(5),  # bias="all"
    }
    weights: Tensors = {}
    for path, transposed in (("wte", True), ("self_attn.q_proj", False)):
        change = (3 / R) * file[f"{path}.lora_B"] @ file[f"{path}.lora_A"]
        base = model.get_parameter(f"{path}.weight").detach()
        weights[f"{path}.weight"] = base + (change.T if transposed else change)
    weights["self_attn.out_proj.bias"] = file["self_attn.out_proj.bias"]
    path = written(tmp_path / "lora.pt", file)
    with pytest.raises(AdapterError, match="do not hold lora_alpha"):
        fxlora.load_adapter(gm, path)
    loaded = fxlora.load_adapter(gm, path, lora_alpha=3)
    check(model, x, gm, loaded, weights, tmp_path)


@pytest.mark.parametrize("enable", [(True, True, True), (True, False, True), (False, False, True)])
def test_merged_linear_of_loralib(enable: tuple[bool, ...], tmp_path: Path) -> None:
    model, x, gm = encoder()
    n = sum(enable)
    a, b = random(R * n, 8), random(4 * n, R)
    path = written(tmp_path / "lora.pt", {"c_attn.lora_A": a, "c_attn.lora_B": b})
    # Its forward: a convolution with n groups over the ranks, whose outputs go to enabled parts.
    delta = nn.functional.conv1d(a[None], b[:, :, None], groups=n)[0]
    padded = torch.zeros(3, 4, 8).double()
    padded[torch.tensor(enable)] = delta.view(n, 4, 8)
    weights = {"c_attn.weight": model.get_parameter("c_attn.weight").detach()}
    weights["c_attn.weight"] = weights["c_attn.weight"] + (3 / R) * padded.view(12, 8)
    if n < 3:
        with pytest.raises(AdapterError, match=f"adapters for {n} of 3 parts.*enable_lora="):
            fxlora.load_adapter(gm, path, lora_alpha=3)
    with pytest.raises(AdapterError, match=f"for {n} of 3 parts"):
        fxlora.load_adapter(gm, path, lora_alpha=3, enable_lora=[True] * (n % 3 + 1))
    loaded = fxlora.load_adapter(gm, path, lora_alpha=3, enable_lora=enable)
    check(model, x, gm, loaded, weights, tmp_path)
    assert len(plan_of(loaded)) == n, "one adapter for each part"


def test_convolution_of_loralib(tmp_path: Path) -> None:
    model, x, gm = unet()
    a, b = random(R * 3, 6 * 3), random(9 * 3, R * 3)
    base = model.get_parameter("conv_out.weight").detach()
    weights = {"conv_out.weight": base + (3 / R) * (b @ a).view(base.shape)}
    path = written(tmp_path / "lora.pt", {"conv_out.lora_A": a, "conv_out.lora_B": b})
    loaded = fxlora.load_adapter(gm, path, lora_alpha=3)
    check(model, x, gm, loaded, weights, tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune(dora: bool, tmp_path: Path) -> None:
    model, x, gm = encoder()
    file: Tensors = {}
    weights: Tensors = {}
    for path, out, size in (("self_attn.q_proj", 6, 4), ("c_attn", 12, 8)):
        a, b = random(R, size), random(out, R)
        file |= {f"{path}.lora_a.weight": a, f"{path}.lora_b.weight": b}
        weight = model.get_parameter(f"{path}.weight").detach() + (3 / R) * b @ a
        if dora:
            magnitude = file[f"{path}.magnitude"] = torch.rand(out).double() + 0.5
            weight = (magnitude / torch.linalg.norm(weight, dim=1))[:, None] * weight
        weights[f"{path}.weight"] = weight
    path = written(tmp_path / "adapter_0.pt", file)
    with pytest.raises(AdapterError, match="recipe"):
        fxlora.load_adapter(gm, path)
    check(model, x, gm, fxlora.load_adapter(gm, path, lora_alpha=3), weights, tmp_path)


# ---- what is refused ----------------------------------------------------------------------------


def test_files_that_are_refused(tmp_path: Path) -> None:
    _, _, gm = unet()
    tensors, _ = locon(10, 6, (), 3.0)
    good = {f"lora_unet_blocks_0_attn1_to_q.{end}": tensor for end, tensor in tensors.items()}
    name = "lora_unet_blocks_0_attn1_to_q"
    cases: list[tuple[Tensors, str]] = [
        ({"a.weight": random(3, 2)}, r"no known adapter, such as a\.weight"),
        (good | {f"{name}.oft_blocks": random(2, 2)}, "do not have.*oft_blocks"),
        (good | {"x.lora_A.weight": random(2, 2)}, "several libraries"),
        (good | {"lora_unet_other.alpha": number(1.0)}, r"lora_unet_other \(alpha alone\)"),
        (good | {f"{name}.hada_w1_b": random(2, 6)}, "not one of LoRA, LoCon"),
        (good | {f"{name}.hada_w2_b": random(2, 6)}, "hada_w2_b, which has no meaning"),
        ({k: v for k, v in good.items() if "up" not in k}, "has no 'lora_up'"),
        (good | {f"{name}.lora_up.weight": random(10, 3)}, "rank 2 in 'lora_down' and 3"),
        (good | {f"{name}.lora_up.weight": random(9, 2)}, "9 outputs and 6 inputs.*has 10 and 6"),
        (good | {f"{name}.alpha": random(2)}, "'alpha' must be a finite number"),
        (good | {f"{name}.alpha": number(float("nan"))}, "'alpha' must be a finite number"),
        (good | {f"{name}.lora_up.weight": random(10, 2) / 0}, "NaN or infinities"),
        (good | {f"{name}.dora_scale": random(7)}, "dora_scale"),
        (good | {f"{name}.dora_scale": -torch.ones(1, 6).double()}, "≤ 0"),
        ({k.replace("to_q", "to_k"): v for k, v in good.items()}, "no layer for.*Did you mean"),
        (good | {f"lora_{k}": v.clone() for k, v in good.items()}, "no layer for lora_lora_unet"),
    ]
    for number_, (file, said) in enumerate(cases):
        path = written(tmp_path / f"{number_}.safetensors", file)
        with pytest.raises(AdapterError, match=f"(?s){said}"):
            fxlora.load_adapter(gm, path)


def test_lycoris_with_rslora_asks_what_its_alpha_is(tmp_path: Path) -> None:
    model, x, gm = unet()
    tensors, delta = locon(10, 6, (), 3.0)
    file = {f"lora_unet_blocks_0_attn1_to_q.{end}": tensor for end, tensor in tensors.items()}
    metadata = {"ss_network_args": {"algo": "locon", "rs_lora": "True"}}
    path = written(tmp_path / "a.safetensors", file, **metadata)
    with pytest.raises(AdapterError, match=r"use_rslora=True.*use_rslora=False"):
        fxlora.load_adapter(gm, path)
    name = f"{ATTENTION}.to_q.weight"
    base = model.get_parameter(name).detach()
    for rslora, factor in ((False, 1.0), (True, R**0.5)):
        loaded = fxlora.load_adapter(gm, path, use_rslora=rslora)
        check(model, x, gm, loaded, {name: base + factor * delta}, tmp_path)


def test_a_note_on_products_of_full_rank(tmp_path: Path) -> None:
    _, _, gm = unet()
    tensors, _ = lokr((2, 3), (5, 2), "", 7.0)
    file = {f"lora_unet_blocks_0_attn1_to_q.{end}": tensor for end, tensor in tensors.items()}
    path = written(tmp_path / "a.safetensors", file)
    with pytest.warns(FxLoraWarning, match=r"more parameters than .*attn1\.to_q.*fxlora\.fold"):
        loaded = fxlora.load_adapter(gm, path)
    assert [entry.r for entry in plan_of(loaded)] == [2 * 2]
    # an ordinary LoRA of more than the largest rank
    large = {"lora_down.weight": random(9, 6), "lora_up.weight": random(10, 9)}
    file = {f"lora_unet_blocks_0_attn1_to_q.{end}": tensor for end, tensor in large.items()}
    path = written(tmp_path / "b.safetensors", file)
    with pytest.warns(FxLoraWarning) as caught:
        loaded = fxlora.load_adapter(gm, path)
    assert [entry.r for entry in plan_of(loaded)] == [9] and len(caught) == 1


def test_options_without_effect(tmp_path: Path) -> None:
    _, _, gm = unet()
    tensors, _ = locon(10, 6, (), 3.0)
    file = {f"lora_unet_blocks_0_attn1_to_q.{end}": tensor for end, tensor in tensors.items()}
    path = written(tmp_path / "a.safetensors", file)
    options: list[dict[str, Any]] = [{"lora_alpha": 3.0}, {"enable_lora": [True]}]
    for option in options:
        with pytest.raises(ConfigError, match="no effect on this file of kohya"):
            fxlora.load_adapter(gm, path, **option)
    options = [{"lora_alpha": "3"}, {"use_rslora": 1}, {"enable_lora": "yes"}, {"component": 1}]
    for option in options:
        with pytest.raises(ConfigError, match=f"{next(iter(option))} must be"):
            fxlora.load_adapter(gm, path, **option)
    loaded = fxlora.load_adapter(gm, path)
    fxlora.save_adapter(loaded, tmp_path / "ours")
    with pytest.raises(ConfigError, match="lora_alpha has no effect on an adapter folder"):
        fxlora.load_adapter(gm, tmp_path / "ours", lora_alpha=3)
    file_of_ours = tmp_path / "ours" / "adapter_model.safetensors"
    assert plan_of(fxlora.load_adapter(gm, file_of_ours)).entries == plan_of(loaded).entries


def test_no_file_runs_code(tmp_path: Path) -> None:
    _, _, gm = unet()

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"a.lora_A": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(AdapterError, match="could run code"):
        fxlora.load_adapter(gm, tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(AdapterError, match="not tensors by name"):
        fxlora.load_adapter(gm, tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "nested.pt")
    with pytest.raises(AdapterError, match="state_dict is none"):
        fxlora.load_adapter(gm, tmp_path / "nested.pt")
    for name in ("broken.pt", "broken.safetensors", "broken.zip"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(AdapterError, match=r"no adapter|not an adapter|could run code"):
            fxlora.load_adapter(gm, tmp_path / name)


class Wrapped(nn.Module):
    """A model around another one, with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"unet": nn.Linear(6, 5), "q": nn.Linear(6, 5)})
        self.q = nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(torch.tanh(self.inner["q"](x) * self.inner["unet"](x)))


@pytest.mark.parametrize(
    ("name", "site", "said"),
    [
        ("unet.inner.q", "inner.q", None),
        ("model.inner.q", "inner.q", "read without 'model.'"),
        ("unet.model.inner.q", "inner.q", "read without 'model.'"),
        ("lora_unet_inner_q", "inner.q", None),
        ("lora_unet_model_inner_unet", "inner.unet", "read without 'model_'"),
        ("lora_unet_unet", "inner.unet", "read with 'inner_' in front"),
    ],
)
def test_names_of_inner_and_outer_models(
    name: str, site: str, said: str | None, tmp_path: Path
) -> None:
    model, x = Wrapped().double().eval(), torch.randn(3, 6).double()
    gm = fxlora.capture(model, x)
    down, up = random(R, 6), random(5, R)
    ends = ("lora_down", "lora_up") if "lora_" in name else ("lora.down", "lora.up")
    file = {f"{name}.{end}.weight": t for end, t in zip(ends, (down, up), strict=True)}
    path = written(tmp_path / "a.safetensors", file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = fxlora.load_adapter(gm, path)
    assert [str(w.message) for w in caught if w.category is FxLoraWarning] == (
        [] if said is None else [f"{path}: its names are of another model ({name}): {said}."]
    )
    weights = {f"{site}.weight": model.get_parameter(f"{site}.weight").detach() + up @ down}
    check(model, x, gm, loaded, weights, tmp_path)


def test_names_that_fit_in_several_ways(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self, out: int) -> None:
            super().__init__()
            self.q = nn.Linear(6, 5)
            self.unet = nn.ModuleDict({"q": nn.Linear(6, out)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + torch.tanh(self.unet["q"](x)).mean(-1, keepdim=True)

    x = torch.randn(3, 6).double()
    down, up = random(R, 6), random(5, R)
    file = {"unet.q.lora.down.weight": down, "unet.q.lora.up.weight": up}
    path = written(tmp_path / "a.safetensors", file)
    model = Both(5).double().eval()
    gm = fxlora.capture(model, x)
    with pytest.raises(AdapterError, match=r"several ways.*component=\"\""):
        fxlora.load_adapter(gm, path)
    for component, name in (("unet", "q.weight"), ("", "unet.q.weight")):
        loaded = fxlora.load_adapter(gm, path, component=component)
        weights = {name: model.get_parameter(name).detach() + up @ down}
        check(model, x, gm, loaded, weights, tmp_path)
    model = Both(7).double().eval()  # the shapes tell
    loaded = fxlora.load_adapter(gm := fxlora.capture(model, x), path)
    weights = {"q.weight": model.q.weight.detach() + up @ down}
    check(model, x, gm, loaded, weights, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_narrow_file_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    gm = fxlora.capture(model, torch.randn(3, 6))
    narrow = {end: t.to(dtype) for end, t in locon(5, 6, (), 3.0)[0].items()}
    narrow["alpha"] = torch.tensor(3.0, dtype=torch.float16)
    file = {f"lora_unet_0.{end}": tensor for end, tensor in narrow.items()}
    loaded = fxlora.load_adapter(gm, written(tmp_path / "a.safetensors", file))
    (entry,) = plan_of(loaded)
    a = loaded.get_parameter(entry.name_a)
    assert a.dtype == torch.float32 and torch.equal(a, narrow["lora_down.weight"].float())
    assert entry.scaling == 3.0 / R
