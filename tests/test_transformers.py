"""Models of transformers: their caches, generate() on a graph, checkpointing, experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxlora
from fxlora import (
    FxLoraWarning,
    InjectError,
    InputError,
    LoraConfig,
    NotCapturedError,
    SubmoduleError,
)

from .laws import (
    assert_close,
    assert_same,
    assert_untouched,
    called_with,
    distance,
    floats,
    merged_weights,
    randomise,
    snapshot,
)
from .models import Mlp
from .oracle import declare
from .typed import grad_of, untyped

transformers = pytest.importorskip("transformers", reason="transformers is optional")
pytest.importorskip(
    "transformers.exporters.exporter_dynamo",
    reason="this release of transformers does not register its caches",
)

IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(5))
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
T5 = {"vocab_size": 97, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
ONE = {"num_hidden_layers": 1, "use_cache": False}


def build(kind: str, config: str, **options: Any) -> Any:
    """Return a random model, with weights so large that its outputs differ between inputs."""
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def llama(**options: Any) -> Any:
    return build("LlamaForCausalLM", "LlamaConfig", **SMALL | options)


def mistral() -> Any:
    one = SMALL | {"num_hidden_layers": 1}
    return build("MistralForCausalLM", "MistralConfig", **one, sliding_window=4)


def t5() -> Any:
    special = {"decoder_start_token_id": 1, "eos_token_id": None}
    return build("T5ForConditionalGeneration", "T5Config", **T5, **special)


def mamba() -> Any:
    config = {"vocab_size": 97, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 1}
    return build("MambaForCausalLM", "MambaConfig", **config)


def call(module: Any, kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        return module(**kwargs)


def assert_alike(found: Any, expected: Any) -> None:
    """Assert that types, attributes and tensors are equal, recursively and bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_alike(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_alike(ours, theirs)
    elif hasattr(expected, "__dict__") and not isinstance(expected, type):
        assert_alike(vars(found), vars(expected))
    else:
        assert found == expected


# ---- caches -------------------------------------------------------------------------------------

OUTPUTS = {
    "llama": (lambda: llama(num_hidden_layers=1), {"input_ids": IDS}, "past_key_values"),
    "mistral": (mistral, {"input_ids": IDS}, "past_key_values"),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, "past_key_values"),
    "mamba": (mamba, {"input_ids": IDS[:, :2], "use_cache": True}, "cache_params"),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if k in ("mistral", "t5") else ()) for k in OUTPUTS],
)
def test_caches_are_returned(kind: str) -> None:
    model_of, kwargs, name = OUTPUTS[kind]
    model = model_of()
    before = snapshot(model)
    gm = fxlora.capture(model, (), kwargs)
    for training in (False, True):
        source = copy.deepcopy(model).train(training)
        for rows in (slice(0, 3), slice(0, 2)):
            given = {
                key: value[rows] if isinstance(value, torch.Tensor) else value
                for key, value in kwargs.items()
            }
            found = call(gm.train(training), given)
            assert_alike(found, call(source, given))
        assert getattr(found, name) is found[name] is not None
        assert found.logits.shape[0] == 2
    assert_untouched(model, before)


def decode_step(model: Any, batch: int = 3, past: int = 7) -> dict[str, Any]:
    cache = call(model, {"input_ids": IDS[:batch, :past]}).past_key_values
    return {"input_ids": IDS[:batch, -1:], "past_key_values": cache, "use_cache": True}


def test_a_given_cache_follows_the_sources() -> None:
    model = llama()
    step = decode_step(model)
    kept = copy.deepcopy(step["past_key_values"])
    batch, past = Dim.AUTO, Dim.AUTO
    shapes = {"input_ids": {0: batch}, "past_key_values": [{0: batch, 2: past}] * 4}
    gm = fxlora.capture(model, (), step, dynamic_shapes=shapes | {"use_cache": None}).eval()
    assert_alike(step["past_key_values"], kept)
    for size, length in ((3, 7), (2, 2), (2, 5)):
        ours = decode_step(model, size, length)
        theirs = copy.deepcopy(ours)
        for _ in range(3):  # with the same cache object, which must grow
            found, expected = call(gm, ours), call(model, theirs)
            assert_close([found.logits], [expected.logits], 1e-6)
            assert_alike(ours["past_key_values"], found.past_key_values)
            for a, b in zip(found.past_key_values, expected.past_key_values, strict=True):
                assert_close(list(a[:2]), list(b[:2]), 1e-6)
        assert ours["past_key_values"].get_seq_length() == length + 3
    empty = transformers.DynamicCache(config=model.config)
    with pytest.raises(InputError, match="'keys': None"):
        gm(**step | {"past_key_values": empty})


def test_a_cache_that_the_graph_writes_to_follows_the_sources() -> None:
    model = mamba()
    cache = call(model, {"input_ids": IDS[:, :4], "use_cache": True}).cache_params
    step = {"input_ids": IDS[:, :1], "cache_params": cache, "use_cache": True}
    theirs = copy.deepcopy(step)
    gm = fxlora.capture(model, (), step).eval()
    assert_alike(step, theirs)
    for _ in range(2):
        assert_alike(call(gm, step), call(model, theirs))
        assert_alike(step, theirs)


def test_what_a_sliding_window_has_counted_is_part_of_the_capture() -> None:
    model = mistral()
    step = decode_step(model)
    theirs = copy.deepcopy(step)
    gm = fxlora.capture(model, (), step).eval()
    assert_close([call(gm, step).logits], [call(model, theirs).logits], 1e-6)
    with pytest.raises(InputError, match="'cumulative_length': 8"):
        gm(**step)


class Recorder(nn.Module):
    """Changes the dict and the list that it is given."""

    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.lin, self.returns = nn.Linear(5, 3), returns

    def forward(self, x: torch.Tensor, seen: dict[str, Any]) -> Any:
        seen["last"] = self.lin(x)
        seen["all"].append(x)
        return (x, {"state": seen}) if self.returns else x


def test_containers_that_a_forward_changes() -> None:
    x = torch.randn(4, 5)
    with pytest.warns(FxLoraWarning, match=r"changes its argument 1 \(dict\) in place"):
        gm = fxlora.capture(Recorder(False), (x, {"last": x, "all": [x]}))
    assert gm.regions == ("lin",)  # Python changes the containers
    model = Recorder(True)
    gm = fxlora.capture(model, (x, {"last": x, "all": [x]}))
    ours, theirs = {"last": x, "all": [x]}, {"last": x, "all": [x]}
    gm(x, ours)
    model(x, theirs)
    assert_alike(ours, theirs)
    with pytest.raises(InputError, match="another"):
        gm(x, ours)


def test_unregistered_containers_come_with_advice() -> None:
    class Box:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    class Boxing(Mlp):
        def forward(self, x: torch.Tensor) -> Any:
            return Box(super().forward(x))

    with pytest.warns(FxLoraWarning, match="use_cache=False"):
        fxlora.capture(Boxing(), torch.randn(4, 5))


# ---- hosts --------------------------------------------------------------------------------------


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, **options)


def merged(model: Any, lora: fxlora.CapturedModule) -> Any:
    """Return the source with W0 + s·BA for its weights."""
    result = copy.deepcopy(model)
    result.load_state_dict(merged_weights(model, lora, dict(lora.named_parameters())), strict=False)
    return result


def captured_for_generate(model: Any, **options: Any) -> fxlora.CapturedModule:
    with fxlora.recorded_calls(model) as calls:
        model.generate(IDS, max_new_tokens=1, **options)
    args, kwargs = calls[0]
    shapes = {
        name: {0: Dim.AUTO, 1: Dim.AUTO} if isinstance(value, torch.Tensor) else None
        for name, value in kwargs.items()
    }
    return fxlora.capture(model, args, kwargs, dynamic_shapes=shapes)


def adapted(gm: fxlora.CapturedModule) -> fxlora.CapturedModule:
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    randomise(lora, 1.0)
    return lora


@pytest.fixture(scope="module")
def generating() -> tuple[Any, fxlora.CapturedModule]:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1)
    return model, captured_for_generate(model, use_cache=False)


@pytest.mark.parametrize("size", [(2, 5), (1, 3)])
def test_generate_on_a_graph(generating: Any, size: tuple[int, int]) -> None:
    model, gm = generating
    before = snapshot(model)
    ids = IDS[: size[0], : size[1]]
    plain = generate(model, ids)
    assert torch.equal(generate(fxlora.hosted(model, gm), ids, use_cache=False), plain)
    lora = adapted(gm)
    expected = generate(merged(model, lora), ids)
    assert not torch.equal(expected, plain)
    for module in (lora, fxlora.fold(lora)):
        assert torch.equal(generate(fxlora.hosted(model, module), ids, use_cache=False), expected)
    assert_untouched(model, before)


def test_a_folded_host_is_saved_as_its_class(generating: Any, tmp_path: Any) -> None:
    model, gm = generating
    lora = adapted(gm)
    fxlora.hosted(model, fxlora.fold(lora)).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, IDS), generate(merged(model, lora), IDS))


def test_what_a_host_refuses(generating: Any) -> None:
    model, gm = generating
    host = fxlora.hosted(model, adapted(gm))
    assert type(host).__name__ == type(model).__name__ and isinstance(host, type(model))
    with pytest.raises(InputError, match=r"(past_key_values|cache): not among the captured"):
        generate(host, IDS)
    with pytest.raises(InputError, match="position_ids: missing"):
        host(IDS)
    with pytest.raises(
        SubmoduleError, match="'model' of a host has adapters, and cannot be called"
    ):
        host.model(IDS)
    with pytest.raises(InjectError, match="source model"):
        fxlora.hosted(host, gm)
    with pytest.raises(NotCapturedError, match="not Linear"):
        fxlora.hosted(model, untyped(nn.Linear(2, 3)))
    with pytest.raises(InjectError, match="captured from"):
        fxlora.hosted(nn.Linear(2, 3), gm)
    host.lm_head = nn.Linear(24, 97)
    with pytest.raises(InjectError, match="'lm_head' of the host was replaced"):
        generate(host, IDS, use_cache=False)


def gemma() -> Any:
    """A decoder with a window of 5 tokens in one layer, and without one in the other."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    window = {"sliding_window": 5, "tie_word_embeddings": False, "head_dim": 6}
    return build("Gemma3ForCausalLM", "Gemma3TextConfig", **SMALL | layers | window)


@pytest.mark.parametrize(
    ("make", "graphs", "prompts"),
    [
        (lambda: llama(num_hidden_layers=1), 2, (IDS, IDS[:, :3])),
        (gemma, 3, (IDS, IDS[:, :3])),
        pytest.param(gemma, 4, (IDS[:, :3], IDS), marks=pytest.mark.slow),
    ],
)
def test_generate_with_a_cache(make: Any, graphs: int, prompts: Any) -> None:
    """A prompt's graph and a step's have one set of adapters, and the sizes that vary may vary.

    So may the number of tokens that a window has seen; a full window has graphs of its own.
    """
    torch.manual_seed(0)
    model = make()
    with fxlora.recorded_calls(model) as calls:
        for ids in prompts:
            model.generate(ids, max_new_tokens=3)
    gm = fxlora.capture(model, calls=calls)
    assert len(gm.programs) == graphs
    lora = adapted(gm)
    expected = merged(model, lora)
    for module in (lora, fxlora.fold(lora)):
        host = fxlora.hosted(model, module)
        for ids in (IDS, IDS[:1, :4]):  # a batch of 1 and a prompt of 4 are no example's
            assert not torch.equal(generate(expected, ids), generate(model, ids))
            assert torch.equal(generate(host, ids), generate(expected, ids))


def marian() -> Any:
    layers = {f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in SIDES}
    special = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": None}
    return build(
        "MarianMTModel", "MarianConfig", vocab_size=97, d_model=24, **layers, **special,
        forced_eos_token_id=None,
    )  # fmt: skip


SIDES = [("layers", 1), ("attention_heads", 4), ("ffn_dim", 40)]


@pytest.mark.parametrize(
    ("make", "encoder"),
    [(t5, "encoder"), pytest.param(marian, "model.encoder", marks=pytest.mark.slow)],
)
def test_generate_with_an_encoder(make: Any, encoder: str) -> None:
    """`generate` calls the encoder on its own, then the model with what came out of it."""
    torch.manual_seed(0)
    model = make()
    with (
        fxlora.recorded_calls(model) as calls,
        fxlora.recorded_calls(model.get_submodule(encoder)) as of_encoder,
    ):
        for ids in (IDS, IDS[:, :3]):
            model.generate(ids, max_new_tokens=3)
    lora = adapted(fxlora.capture(model, calls=calls, methods={encoder: of_encoder}))
    host, expected = fxlora.hosted(model, lora), merged(model, lora)
    for ids in (IDS, IDS[:1, :4]):  # a batch of 1 and a text of 4 are no example's
        assert not torch.equal(generate(expected, ids), generate(model, ids))
        assert torch.equal(generate(host, ids), generate(expected, ids))


def qwen_vl(version: str, **vision: Any) -> Any:
    """A model whose `generate` keeps what it knows of positions in an attribute of its inside."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}
    text = SMALL | {"num_hidden_layers": 1, "rope_parameters": rope}
    size = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
    return build(
        f"{version}ForConditionalGeneration", f"{version}Config", text_config=text,
        vision_config=size | vision, vision_end_token_id=93, **special,
    )  # fmt: skip


def qwen2_vl() -> Any:
    return qwen_vl("Qwen2VL", embed_dim=16, hidden_size=24)


def qwen25_vl() -> Any:
    sizes = {"hidden_size": 16, "out_hidden_size": 24, "intermediate_size": 20}
    return qwen_vl("Qwen2_5_VL", window_size=16, fullatt_block_indexes=[0], **sizes)


def with_image(ids: torch.Tensor) -> dict[str, Any]:
    """Return the arguments for a prompt that begins with an image of 4 tokens, of 2 × 2 patches."""
    rows = len(ids)
    image = torch.tensor([92, 90, 90, 90, 90, 93]).expand(rows, 6)
    ids = torch.cat([image, ids.clamp(max=89)], 1)
    pixels = torch.randn(rows * 16, 96, generator=torch.Generator().manual_seed(2))
    grid = torch.tensor([[1, 4, 4]]).expand(rows, 3)
    kinds = {"mm_token_type_ids": (ids == 90).int(), "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, **kinds}


@pytest.mark.parametrize("make", [qwen2_vl, pytest.param(qwen25_vl, marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", [lambda ids: {"input_ids": ids}, with_image])
def test_generate_that_sets_an_attribute_of_a_submodule(make: Any, given: Any) -> None:
    torch.manual_seed(0)
    model = make()
    if not hasattr(model.model, "rope_deltas"):
        pytest.skip("this release of transformers keeps it elsewhere")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
    with fxlora.recorded_calls(model) as calls:
        for prompt in (IDS[:2], IDS[:2, :5]):
            model.generate(**given(prompt), **options)
    lora = adapted(fxlora.capture(model, calls=calls))
    assert lora.regions == ("",)
    host, expected = fxlora.hosted(model, lora), merged(model, lora)
    for ids in (IDS[:2, :7], IDS[:2]):
        options["max_new_tokens"] = 8
        wanted = expected.generate(**given(ids), **options)
        assert not torch.equal(wanted, model.generate(**given(ids), **options))
        assert torch.equal(host.generate(**given(ids), **options), wanted)
        assert torch.equal(host.model.rope_deltas, expected.model.rope_deltas)


def test_two_towers_by_their_methods() -> None:
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    text = SMALL | size | {"eos_token_id": 2, "max_position_embeddings": 12}
    image = size | {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    model = build("CLIPModel", "CLIPConfig", text_config=text, vision_config=image).double()
    inputs = {"input_ids": IDS[:, :7], "pixel_values": torch.randn(3, 3, 16, 16).double()}
    methods = {"get_text_features": "input_ids", "get_image_features": "pixel_values"}
    examples = {name: {given: inputs[given]} for name, given in methods.items()}
    lora = adapted(fxlora.capture(model, methods=examples))
    host, expected = fxlora.hosted(model, lora), merged(model, lora)
    for name, example in examples.items():
        outputs = [getattr(module, name)(**example) for module in (host, expected, model)]
        found, wanted, bare = (output.pooler_output for output in outputs)
        assert (found - bare).abs().max() > 1e-3
        assert (found - wanted).abs().max() <= 1e-10 * bare.abs().max()


def sam() -> Any:
    encoder = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 20}
    image = {"image_size": 16, "patch_size": 4}
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 18}
    embedding = {"output_channels": 32, "num_pos_feats": 16, "global_attn_indexes": [0]}
    decoder |= {"iou_head_hidden_dim": 14, "iou_head_depth": 2}
    model = build(
        "SamModel", "SamConfig", vision_config=encoder | image | embedding,
        prompt_encoder_config=image | {"hidden_size": 32, "mask_input_channels": 8},
        mask_decoder_config=decoder,
    )  # fmt: skip
    declare(model, {"*positional_embedding": "io"})  # coordinates @ embedding
    return model.double()


def sam_prompts(rows: int = 2) -> list[dict[str, Any]]:
    """Return the arguments of two calls: for three points in each image, and for three boxes.

    Points get three masks each, and boxes the other one, which a network of its own makes.
    """
    drawn = torch.Generator().manual_seed(6)
    pixels = torch.randn(2, 3, 16, 16, generator=drawn, dtype=torch.float64)
    points = 16 * torch.rand(2, 3, 2, 2, generator=drawn, dtype=torch.float64)
    labels = torch.randint(0, 2, (2, 3, 2), generator=drawn)
    boxes = torch.cat([points[:, :, 0] / 2, points[:, :, 1] / 2 + 8], -1)
    pixels, points, labels, boxes = (given[:rows] for given in (pixels, points, labels, boxes))
    return [
        {"pixel_values": pixels, "input_points": points, "input_labels": labels},
        {"pixel_values": pixels, "input_boxes": boxes, "multimask_output": False},
    ]


@pytest.mark.slow
def test_a_segmenter_by_its_prompts() -> None:
    """Points and boxes get a whole graph each; what only one of them reads is adapted there."""
    torch.manual_seed(0)
    model, prompts = sam(), sam_prompts()
    before = snapshot(model)
    gm = fxlora.capture(model, calls=[((), prompt) for prompt in prompts])
    assert len(gm.programs) == 2 and gm.regions == ("",)
    small = LoraConfig(r=1)
    rules = [
        fxlora.Rule("shared_image_embedding.positional_embedding", lora=small),
        fxlora.Rule("*.projection", lora=small),
        fxlora.Rule("*.upscale_conv?", lora=small),
        LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"),
    ]
    lora = fxlora.inject(gm, fxlora.match(gm, rules))
    # With B = 0. (torch chooses attention kernels by requires_grad.)
    frozen = [copy.deepcopy(m).requires_grad_(False) for m in (lora, model)]
    for prompt in (*prompts, *sam_prompts(rows=1)):
        assert_same(*(floats(call(module, prompt)) for module in frozen))
    randomise(lora)
    folded = fxlora.fold(lora)
    weights = merged_weights(model, lora, dict(lora.named_parameters()))
    assert "shared_image_embedding.positional_embedding" in weights
    for prompt in (*prompts, *sam_prompts(rows=1)):
        base, found = floats(call(model, prompt)), floats(call(lora, prompt))
        assert all(distance([a], [b]) > 1e-3 for a, b in zip(found, base, strict=True))
        with torch.no_grad():
            assert_close(found, called_with(model, weights, (), prompt))
        assert_close(floats(call(folded, prompt)), found)
    calls = [((), prompt) for prompt in prompts]
    assert all(site.effect > 0 for site in fxlora.verify(lora, calls=calls).sites)
    for module in (lora, fxlora.hosted(model, lora)):
        with pytest.raises(InputError, match="none of the 2 captured calls"):
            module(**prompts[0], input_boxes=prompts[1]["input_boxes"])
    assert_untouched(model, before)


# In the quick run, the captures for `generate` have examples of 3 rows and serve one of 1.
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_batch_with_a_mask_and_labels(batch: int) -> None:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1, use_cache=False).double()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    gm = fxlora.capture(model, kwargs={name: value[:batch] for name, value in inputs.items()})
    for size in (1, 2, 3):
        given = {name: value[:size] for name, value in inputs.items()}
        assert_alike(call(gm, given), call(model, given))


class Optional(Mlp):
    """An Mlp with optional arguments."""

    def forward(
        self, x: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = super().forward(x) * scale
        return y if bias is None else y + bias


def test_a_host_of_any_module() -> None:
    model, x = Optional().double(), torch.randn(4, 5, dtype=torch.double)
    lora = fxlora.adapt(model, x, rules=LoraConfig(r=2, target_modules=["up", "down"]))
    randomise(lora)
    host = fxlora.hosted(model, lora)
    assert [n for n, _ in host.named_parameters()] == [n for n, _ in lora.named_parameters()]
    assert all(p is lora.get_parameter(n) for n, p in host.named_parameters())
    assert list(host.state_dict()) == list(lora.state_dict())
    for training in (True, False):
        host.train(training)
        assert host.training == lora.training == host.up.training == training
        assert_alike(call(host, {"x": x}), call(lora, {"x": x}))
        assert_close([call(host, {"x": x})], [call(merged(model, lora).train(training), {"x": x})])
    assert_alike(host(x, 1.0, None), lora(x))
    for wrong in ({"scale": 2.0}, {"bias": x[0, :3]}):
        with pytest.raises(InputError, match="not among the captured arguments"):
            host(x, **wrong)


def test_a_copied_or_moved_host() -> None:
    model, x = Mlp().double().eval(), torch.randn(4, 5, dtype=torch.double)
    lora = fxlora.adapt(model, x, rules=LoraConfig(r=2, target_modules=["up", "down"]))
    randomise(lora)
    host = fxlora.hosted(model, lora)
    expected = host(x)
    copied = copy.deepcopy(host)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert float(copied(x).detach().abs().max()) == 0
    assert torch.equal(host(x), expected)
    assert host.float() is host
    assert {p.dtype for p in [*host.parameters(), *lora.parameters()]} == {torch.float}
    assert_close([host(x.float()).double()], [expected], 1e-5)
    assert model(x).dtype is torch.double
    host.load_state_dict({n: torch.zeros_like(t) for n, t in host.state_dict().items()})
    assert float(lora(x.float()).detach().abs().max()) == 0
    assert float(model(x).detach().abs().max()) > 0


def test_a_host_trains_its_adapters() -> None:
    model, x = Mlp(), torch.randn(4, 5)
    lora = fxlora.adapt(model, x, rules=LoraConfig(r=2, target_modules=["up", "down"]))
    host = fxlora.hosted(model, lora)
    trained = [p for p in host.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.SGD(trained, lr=0.5)
    before = snapshot(model)
    start = copy.deepcopy(host).eval()(x)
    host.train()(x).square().sum().backward()
    optimizer.step()
    assert float((host.eval()(x) - start).detach().abs().max()) > 0
    assert_untouched(model, before)


# ---- other features of transformers' models -----------------------------------------------------

LABELS = IDS.flip(1).contiguous()
MOE = {"num_experts_per_tok": 2, **ONE}


def mixtral() -> Any:
    return build("MixtralForCausalLM", "MixtralConfig", **SMALL | MOE, num_local_experts=4)


def qwen2_moe() -> Any:
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 18}
    return build("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **SMALL | MOE | experts)


def t5_for_labels() -> Any:
    config = {**T5, "decoder_start_token_id": 0, "pad_token_id": 0}
    return build("T5ForConditionalGeneration", "T5Config", **config)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral, tuple": (mixtral, {"input_ids": IDS, "labels": LABELS, "return_dict": False}),
    "qwen2_moe": (qwen2_moe, {"input_ids": IDS}),
    "encoder-decoder": (t5_for_labels, {"input_ids": IDS, "labels": LABELS}),
    "tied, tuple": (
        lambda: llama(**ONE, tie_word_embeddings=True),
        {"input_ids": IDS, "return_dict": False, "labels": LABELS},
    ),
    "eager, embeds": (
        lambda: llama(**ONE, attn_implementation="eager", attention_dropout=0.2),
        {
            "inputs_embeds": torch.linspace(-1, 1, 648).view(3, 9, 24),
            "output_attentions": True,
            "output_hidden_states": True,
        },
    ),
}
SLOW = ("encoder-decoder", "qwen2_moe", "mixtral, tuple")  # test_experts.py has their experts


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in CALLS]
)
def test_calls(kind: str) -> None:
    model_of, kwargs = CALLS[kind]
    model = model_of()
    gm = fxlora.capture(model, (), kwargs)
    wider = {k: torch.cat([v, v[:2]]) if torch.is_tensor(v) else v for k, v in kwargs.items()}
    for training in (True, False):
        source = copy.deepcopy(model).train(training)
        for given in (kwargs, wider):
            assert_alike(call(gm.train(training), given), call(source, given))
    targets = {"encoder-decoder": ["q", "v", "wi", "wo"], "qwen2_moe": ["q_proj", "up_proj"]}
    config = LoraConfig(r=3, target_modules=targets.get(kind, "all-linear"))
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    randomise(lora)
    expected = floats(call(merged(model, lora), kwargs))
    base = floats(call(gm, kwargs))
    assert max(float((a - b).abs().max()) for a, b in zip(base, expected, strict=True)) > 1e-3
    for module in (lora, fxlora.fold(lora)):
        assert_close(floats(call(module, kwargs)), expected, 1e-4)


@pytest.mark.slow  # the quick run has checkpoints that are not reentrant, in test_nested.py
def test_gradient_checkpointing() -> None:
    kwargs = {"input_ids": IDS, "labels": LABELS}
    model = llama(**ONE, attention_dropout=0.2).double().train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    gm = fxlora.capture(model, (), kwargs)
    lora = fxlora.inject(
        gm, fxlora.match(gm, LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    )
    randomise(lora)
    factors = {n: p.detach().clone().requires_grad_() for n, p in lora.named_parameters()}
    factors = {n: p for n, p in factors.items() if "lora_" in n}
    torch.manual_seed(3)
    expected = called_with(plain, merged_weights(plain, lora, factors), (), kwargs)[0]
    torch.manual_seed(3)
    found = lora(**kwargs).loss
    assert_close([found], [expected])
    found.backward()
    gradients = torch.autograd.grad(expected, list(factors.values()))
    for name, gradient in zip(factors, gradients, strict=True):
        assert float(gradient.abs().max()) > 0
        assert_close([grad_of(lora.get_parameter(name))], [gradient], 1e-8)
    folded = fxlora.fold(lora).eval()
    assert_close([call(folded, kwargs).loss], [call(lora.eval(), kwargs).loss])
