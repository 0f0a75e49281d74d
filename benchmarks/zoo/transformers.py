"""Architectures of transformers in tiny configurations, without caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from . import Case, Families

VOCABULARY, BATCH, TOKENS = 53, 2, 9
SIDE, PATCH = 32, 8
# The names that most configuration classes use; models of other classes also get their own names.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CACHED = {**TEXT, "use_cache": False}
GROUPED: dict[str, Any] = {**CACHED, "num_key_value_heads": 1, "head_dim": 8}
TOKENS_ONLY = {
    key: CACHED[key]
    for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache")
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_labels": 5,
}
SPEECH: dict[str, Any] = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "classifier_proj_size": 16,
    "num_labels": 5,
}
ENCODER_DECODER: dict[str, Any] = {
    **TOKENS_ONLY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
T5: dict[str, Any] = {
    **TOKENS_ONLY,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
FSMT = {key: value for key, value in ENCODER_DECODER.items() if key != "vocab_size"}
LABELS = {"num_labels": 5}
STAGES: dict[str, Any] = {**LABELS, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
PYRAMID: dict[str, Any] = {
    **STAGES,
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
}
SWIN: dict[str, Any] = {
    **LABELS,
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [1, 2],
    "num_heads": [2, 3],
    "window_size": 4,
}
DETR: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "num_queries": 6,
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
}
TOWER = {key: value for key, value in VISION.items() if key != "num_labels"}
PAIRED: dict[str, Any] = {
    "text_config": {**TEXT, "projection_dim": 16},
    "vision_config": {**TOWER, "projection_dim": 16},
    "projection_dim": 16,
}
SEEING: dict[str, Any] = {**CACHED, "encoder_hidden_size": 24, "is_decoder": True}
DINO: dict[str, Any] = {
    **TOWER,
    "num_hidden_layers": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "reshape_hidden_states": False,
}
SAM: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "mlp_dim": 40,
        "image_size": SIDE,
        "patch_size": PATCH,
        "window_size": 2,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
    },
    "prompt_encoder_config": {
        "hidden_size": 16,
        "image_size": SIDE,
        "patch_size": PATCH,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "mlp_dim": 20,
        "num_hidden_layers": 1,
        "iou_head_hidden_dim": 12,
    },
}


# ---- inputs -------------------------------------------------------------------------------------

Inputs = Callable[[], dict[str, Any]]


def noise(**shapes: tuple[int, ...]) -> Inputs:
    """Return a maker of normal random inputs: a batch of each of these shapes."""
    return lambda: {name: torch.randn(BATCH, *shape) for name, shape in shapes.items()}


def pixels(side: int = SIDE) -> Inputs:
    return noise(pixel_values=(3, side, side))


def labelled(inputs: Inputs) -> Inputs:
    """Add a class label for each sample."""
    return lambda: inputs() | {"labels": torch.tensor([0, 1])}


def captioned(inputs: Inputs, tokens: int) -> Inputs:
    """Add `tokens` target tokens for each sample."""
    return lambda: inputs() | {"labels": torch.randint(3, VOCABULARY, (BATCH, tokens))}


def segmented(side: int) -> Inputs:
    """Return images with a class label for each pixel."""
    return lambda: pixels(side)() | {"labels": torch.randint(0, 5, (BATCH, side, side))}


def read_beside(images: Inputs, **more: Any) -> Inputs:
    """Add a text for each image, and the inputs in `more`."""
    return lambda: images() | text() | more


def tokens_only() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS))}


def text() -> dict[str, Any]:
    """Return token sequences of different lengths, the shorter one padded."""
    ids = tokens_only()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def next_token() -> dict[str, Any]:
    inputs = text()
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def token_classes() -> dict[str, Any]:
    return text() | {"labels": torch.randint(0, 2, (BATCH, TOKENS))}


def answer() -> dict[str, Any]:
    return text() | {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    }


def laid_out() -> dict[str, Any]:
    """Return a labelled text with a box (left, top, right, bottom) for every token."""
    corner, size = torch.randint(0, 30, (2, BATCH, TOKENS, 2))
    return labelled(text)() | {"bbox": torch.cat([corner, corner + size], -1)}


def ended() -> dict[str, Any]:
    """Return tokens that end with the end-of-sequence token, by which Bart classifies."""
    ids = tokens_only()["input_ids"]
    return {"input_ids": torch.cat([ids, torch.full((BATCH, 1), 2)], 1)}


def characters() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (BATCH, 16))}


def patches_hidden() -> dict[str, Any]:
    return pixels()() | {"bool_masked_pos": torch.randint(0, 2, (BATCH, 16)).bool()}


def pointed_at() -> dict[str, Any]:
    return pixels()() | {"input_points": torch.rand(BATCH, 1, 2, 2) * SIDE}


def image_in_text(patches: int = 16) -> dict[str, Any]:
    """Return images, and text after one placeholder token per patch."""
    images, words = pixels()(), text()
    places = torch.full((BATCH, patches), 3)
    ids = torch.cat([places, words["input_ids"].clamp_min(4)], 1)
    mask = torch.cat([torch.ones_like(places), words["attention_mask"]], 1)
    return images | {"input_ids": ids, "attention_mask": mask}


def page() -> dict[str, Any]:
    boxes = torch.randint(0, 60, (BATCH, TOKENS, 4))
    return labelled(read_beside(pixels(), bbox=boxes))()


def mask_asked_for() -> dict[str, Any]:
    return read_beside(pixels())() | {"labels": torch.rand(BATCH, SIDE, SIDE)}


def trajectory(steps: int = 5) -> dict[str, Any]:
    numbers = {"states": 6, "actions": 4, "rewards": 1, "returns_to_go": 1}
    return noise(**{name: (steps, size) for name, size in numbers.items()})() | {
        "timesteps": torch.arange(steps).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, steps),
    }


sequence, translation = labelled(text), captioned(text, 7)
image_class, large_image_class = labelled(pixels()), labelled(pixels(64))
clip_class = labelled(noise(pixel_values=(4, 3, SIDE, SIDE)))
image_text = read_beside(pixels())
contrast = read_beside(pixels(), return_loss=True)
wave = noise(input_values=(400,))
wave_class, wave_text = labelled(wave), captioned(wave, 5)
mel = noise(input_features=(8, 40))
series = noise(past_values=(24, 3), future_values=(6, 3))


# ---- models -------------------------------------------------------------------------------------


def build(architecture: str, config: dict[str, Any], inputs: Inputs) -> Case:
    """Return a model of a class of transformers, by name, with the class's own configuration."""
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**config))
    return Case(model, (), inputs())


def of(architecture: str, config: dict[str, Any], inputs: Inputs, **more: Any) -> Any:
    return partial(build, architecture, {**config, **more}, inputs)


def rows(head: str, config: dict[str, Any], inputs: Inputs) -> Callable[..., Any]:
    """Return a maker of rows, from the class's name without the head and further options."""
    return lambda name, **more: of(name + head, config, inputs, **more)


def image_to_text() -> Case:
    encoder = transformers.ViTConfig(**VISION)
    reading: dict[str, Any] = {"add_cross_attention": True, "is_decoder": True}
    decoder = transformers.GPT2Config(**TOKENS_ONLY, **reading, n_layer=1, n_embd=16, n_head=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    config.use_cache = config.decoder.use_cache = False
    model = transformers.VisionEncoderDecoderModel(config)
    return Case(model, (), captioned(pixels(), 6)())


def detr(architecture: str) -> Case:
    """Return a DETR with a new backbone configuration, because the model writes to it."""
    outputs: dict[str, Any] = {"out_features": ["stage4"]}
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **outputs,
    )
    return build(architecture, {**DETR, "backbone_config": backbone}, pixels(64))


# ---- the tables: a row for each model -----------------------------------------------------------

causal = rows("ForCausalLM", CACHED, next_token)
grouped = rows("ForCausalLM", GROUPED, next_token)
bare = rows("ForCausalLM", TOKENS_ONLY, next_token)
masked = rows("ForMaskedLM", TEXT, next_token)
classes = rows("ForSequenceClassification", TEXT, sequence)
unmasked = rows("ForSequenceClassification", TEXT, labelled(tokens_only))
t5 = rows("ForConditionalGeneration", T5, translation)
seq2seq = rows("ForConditionalGeneration", ENCODER_DECODER, translation)
vit = rows("ForImageClassification", VISION, image_class)
stages = rows("ForImageClassification", STAGES, image_class)
swin = rows("ForImageClassification", SWIN, image_class)
large = rows("ForImageClassification", LABELS, large_image_class)
video = rows("ForVideoClassification", VISION, clip_class)
speech = rows("ForSequenceClassification", SPEECH, wave_class)

# With one argument per line the tables would take a thousand lines.
# fmt: off
DECODERS: dict[str, Any] = {
    "llama": grouped("Llama"),
    "llama tied": grouped("Llama", tie_word_embeddings=True),
    "mistral": grouped("Mistral", sliding_window=4),
    "ministral": grouped("Ministral"),
    "qwen2": causal("Qwen2", num_key_value_heads=1),
    "qwen3": grouped("Qwen3"),
    "gemma": grouped("Gemma"),
    "gemma2": grouped("Gemma2", sliding_window=4),
    "gemma3 text": grouped("Gemma3", sliding_window=4),
    "phi": causal("Phi", partial_rotary_factor=0.5),
    "phi3": causal("Phi3"),
    "gpt2": of("GPT2LMHeadModel", TOKENS_ONLY, next_token, n_layer=2, n_embd=24, n_head=3),
    "gpt2 classes": of("GPT2ForSequenceClassification", TOKENS_ONLY, sequence, n_layer=2, n_embd=24,
        n_head=3),
    "gpt_bigcode": bare("GPTBigCode", n_layer=2, n_embd=24, n_head=3),
    "gpt_neo": bare("GPTNeo", hidden_size=24, num_layers=2, num_heads=3,
        attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64),
    "gpt_neox": causal("GPTNeoX"),
    "gptj": bare("GPTJ", n_layer=2, n_embd=24, n_head=3, rotary_dim=4),
    "codegen": bare("CodeGen", n_layer=2, n_embd=32, n_head=4, rotary_dim=4),
    "opt": causal("OPT", ffn_dim=40, word_embed_proj_dim=16),
    "bloom": bare("Bloom", hidden_size=24, n_layer=2, n_head=3),
    "falcon": causal("Falcon"),
    "falcon alibi": causal("Falcon", alibi=True, new_decoder_architecture=False),
    "mpt": bare("Mpt", d_model=24, n_heads=3, n_layers=2, max_seq_len=64),
    "stablelm": causal("StableLm", num_key_value_heads=3),
    "olmo": causal("Olmo"),
    "olmo2": causal("Olmo2"),
    "cohere": causal("Cohere"),
    "starcoder2": causal("Starcoder2", num_key_value_heads=1),
    "granite": causal("Granite"),
    "glm": grouped("Glm"),
    "smollm3": causal("SmolLM3", num_key_value_heads=1),
    "mixtral": grouped("Mixtral", num_local_experts=4),
    "qwen2_moe": causal("Qwen2Moe", num_experts=4, num_key_value_heads=1, moe_intermediate_size=20,
        shared_expert_intermediate_size=28),
    "olmoe": causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt_oss": grouped("GptOss", num_local_experts=4, sliding_window=4),
    "deepseek_v3": causal("DeepseekV3", num_key_value_heads=3, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, moe_intermediate_size=20,
        q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8),
    "mamba": bare("Mamba", hidden_size=24, num_hidden_layers=2, state_size=4),
    "mamba2": bare("Mamba2", hidden_size=24, num_hidden_layers=2, state_size=4, num_heads=6,
        head_dim=8, n_groups=2, chunk_size=4),
    "rwkv": of("RwkvForCausalLM", TOKENS_ONLY, tokens_only, hidden_size=24, num_hidden_layers=2,
        attention_hidden_size=24),
    "recurrent_gemma": causal("RecurrentGemma", num_hidden_layers=3, lru_width=24,
        num_key_value_heads=1, attention_window_size=4),
    "jamba": causal("Jamba", num_key_value_heads=1, num_experts=2, mamba_d_state=4,
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=3),
    "xglm": bare("XGLM", d_model=24, ffn_dim=40, num_layers=2, attention_heads=3,
        max_position_embeddings=64, layerdrop=0.0),
    "biogpt": causal("BioGpt", layerdrop=0.0),
    "persimmon": causal("Persimmon"),
    "modernbert decoder": causal("ModernBertDecoder", local_attention=4),
}

ENCODERS: dict[str, Any] = {
    "bert": classes("Bert"),
    "bert masked": masked("Bert"),
    "roberta": of("RobertaForTokenClassification", TEXT, token_classes),
    "xlm_roberta": masked("XLMRoberta"),
    "camembert": classes("Camembert"),
    "electra": of("ElectraForQuestionAnswering", TEXT, answer, embedding_size=16),
    "albert": masked("Albert", embedding_size=16),
    "deberta": classes("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": classes("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=8, conv_kernel_size=3, conv_act="gelu"),
    "distilbert": of("DistilBertForSequenceClassification", TOKENS_ONLY | {"use_cache": None},
        sequence, dim=24, n_layers=2, n_heads=3, hidden_dim=40),
    "mpnet": classes("MPNet"),
    "xlnet": of("XLNetForSequenceClassification", {"vocab_size": VOCABULARY}, sequence, d_model=24,
        n_layer=2, n_head=3, d_inner=40, use_mems_eval=False, use_mems_train=False),
    "funnel": of("FunnelForSequenceClassification", {"vocab_size": VOCABULARY}, sequence,
        block_sizes=[1, 1], d_model=24, n_head=3, d_head=8, d_inner=40, num_decoder_layers=1),
    "longformer": classes("Longformer", attention_window=4),
    "big_bird": classes("BigBird", attention_type="original_full"),
    "convbert": classes("ConvBert", embedding_size=24, num_attention_heads=4, head_ratio=2,
        conv_kernel_size=3),
    "squeezebert": classes("SqueezeBert", embedding_size=24, q_groups=1, k_groups=1, v_groups=1,
        post_attention_groups=1, intermediate_groups=2, output_groups=2),
    "mobilebert": classes("MobileBert", embedding_size=16, intra_bottleneck_size=12),
    "fnet": unmasked("FNet"),
    "nystromformer": unmasked("Nystromformer", num_landmarks=3, segment_means_seq_len=9,
        conv_kernel_size=3),
    "roformer": classes("RoFormer", embedding_size=24),
    "rembert": classes("RemBert", input_embedding_size=16, output_embedding_size=20),
    "ibert": classes("IBert"),
    "esm": masked("Esm", mask_token_id=3, position_embedding_type="rotary"),
    "modernbert": classes("ModernBert", cls_token_id=1, sep_token_id=2, local_attention=4),
    "canine": of("CanineForSequenceClassification", TEXT, labelled(characters), downsampling_rate=4,
        upsampling_kernel_size=4, local_transformer_stride=8, num_hash_functions=3,
        num_hash_buckets=32),
    "layoutlm": of("LayoutLMForSequenceClassification", TEXT, laid_out,
        max_2d_position_embeddings=64),
    "dpr": of("DPRQuestionEncoder", TEXT, text),
}

ENCODER_DECODERS: dict[str, Any] = {
    "t5": t5("T5"),
    "t5 gated": t5("T5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": t5("MT5"),
    "umt5": t5("UMT5"),
    "longt5": t5("LongT5", local_radius=3),
    "switch": t5("SwitchTransformers", num_experts=4, expert_capacity=8),
    "bart": seq2seq("Bart"),
    "bart classes": of("BartForSequenceClassification", ENCODER_DECODER, labelled(ended)),
    "mbart": seq2seq("MBart"),
    "pegasus": seq2seq("Pegasus"),
    "marian": of("MarianMTModel", ENCODER_DECODER, translation),
    "blenderbot": seq2seq("Blenderbot"),
    "m2m_100": seq2seq("M2M100"),
    "led": seq2seq("LED", attention_window=4, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64),
    "plbart": seq2seq("PLBart"),
    "prophetnet": of("ProphetNetForConditionalGeneration", TOKENS_ONLY, translation, hidden_size=24,
        num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=3,
        num_decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40,
        max_position_embeddings=64, decoder_start_token_id=1),
    "fsmt": of("FSMTForConditionalGeneration", FSMT, captioned(text, TOKENS), langs=["a", "b"],
        src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
}

IMAGES: dict[str, Any] = {
    "vit": vit("ViT"),
    "vit masked": of("ViTForMaskedImageModeling", VISION, patches_hidden, encoder_stride=PATCH),
    "deit": vit("DeiT"),
    "beit": vit("Beit", use_relative_position_bias=True),
    "data2vec vision": vit("Data2VecVision"),
    "dinov2": vit("Dinov2", mlp_ratio=2),
    "dinov3": of("DINOv3ViTModel", VISION, pixels()),
    "vit_mae": of("ViTMAEForPreTraining", VISION, pixels(), decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=20),
    "swin": swin("Swin"),
    "swinv2": swin("Swinv2"),
    "convnext": stages("ConvNext"),
    "convnextv2": stages("ConvNextV2"),
    "resnet": stages("ResNet", embedding_size=8),
    "regnet": stages("RegNet", embedding_size=8, groups_width=4),
    "bit": stages("Bit", embedding_size=8, num_groups=4, hidden_sizes=[8, 16, 24, 32]),
    "segformer": of("SegformerForSemanticSegmentation", PYRAMID, segmented(64),
        decoder_hidden_size=16),
    "pvt": large("Pvt", image_size=64, **PYRAMID),
    "pvt_v2": large("PvtV2", image_size=64, **PYRAMID),
    "poolformer": of("PoolFormerForImageClassification", STAGES, large_image_class),
    "mobilevit": large("MobileViT", image_size=64, hidden_sizes=[24, 28, 32],
        neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 28]),
    "mobilenet_v2": large("MobileNetV2", depth_multiplier=0.35),
    "levit": large("Levit", image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1], key_dim=[4, 4, 4]),
    "cvt": large("Cvt", embed_dim=[8, 12, 16], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    "focalnet": of("FocalNetForImageClassification", LABELS, image_class, image_size=SIDE,
        embed_dim=12, depths=[1, 2], hidden_sizes=[12, 24], focal_levels=[2, 2],
        focal_windows=[3, 3]),
    "hiera": large("Hiera", image_size=[64, 64], embed_dim=12, depths=[1, 1, 1],
        num_heads=[1, 2, 3], num_query_pool=2),
    "swiftformer": large("SwiftFormer", image_size=64, embed_dims=[8, 12, 16, 20],
        depths=[1, 1, 1, 1]),
    "dpt": of("DPTForSemanticSegmentation", VISION, segmented(SIDE), num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 12, 16, 20], fusion_hidden_size=16,
        is_hybrid=False, auxiliary_loss_weight=0.4),
    "depth_anything": of("DepthAnythingForDepthEstimation", {}, pixels(),
        backbone_config=transformers.Dinov2Config(**DINO), patch_size=PATCH,
        reassemble_hidden_size=24, neck_hidden_sizes=[8, 12, 16, 20], fusion_hidden_size=16,
        head_hidden_size=8),
    "detr": partial(detr, "DetrForObjectDetection"),
    "conditional_detr": partial(detr, "ConditionalDetrForObjectDetection"),
    "table_transformer": partial(detr, "TableTransformerForObjectDetection"),
    "yolos": of("YolosForObjectDetection", VISION, pixels(), num_detection_tokens=5,
        image_size=[SIDE, SIDE]),
    "videomae": video("VideoMAE", num_frames=4),
    "timesformer": video("Timesformer", num_frames=4),
    "vivit": video("Vivit", num_frames=4, tubelet_size=[2, PATCH, PATCH]),
    "sam": of("SamModel", SAM, pointed_at),
    "swin2sr": of("Swin2SRForImageSuperResolution", {}, pixels(16), image_size=16, embed_dim=12,
        depths=[1, 1], num_heads=[2, 2], window_size=4),
}

MULTIMODAL: dict[str, Any] = {
    "clip": of("CLIPModel", PAIRED, contrast),
    "siglip": of("SiglipModel", PAIRED, contrast),
    "altclip": of("AltCLIPModel", {**PAIRED, "text_config": {**TEXT, "project_dim": 16}}, contrast),
    "chinese_clip": of("ChineseCLIPModel", PAIRED, image_text),
    "clipseg": of("CLIPSegForImageSegmentation", PAIRED, mask_asked_for, reduce_dim=12,
        extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=20),
    "owlvit": of("OwlViTModel", PAIRED, image_text),
    "blip": of("BlipForConditionalGeneration", {**PAIRED, "text_config": SEEING}, image_text),
    "vilt": of("ViltModel", {**TEXT, **TOWER}, image_text),
    "llava": of("LlavaForConditionalGeneration", {}, image_in_text,
        text_config=transformers.LlamaConfig(**GROUPED),
        vision_config=transformers.CLIPVisionConfig(**TOWER), image_token_id=3,
        vision_feature_layer=-1, use_cache=False),
    "paligemma": of("PaliGemmaForConditionalGeneration", {}, image_in_text,
        text_config=transformers.GemmaConfig(**GROUPED),
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        image_token_id=3, projection_dim=24),
    "vision encoder decoder": image_to_text,
    "trocr": of("TrOCRForCausalLM", ENCODER_DECODER, tokens_only, decoder_layers=2,
        is_decoder=True),
    "layoutlmv3": of("LayoutLMv3ForSequenceClassification", TEXT, page, input_size=SIDE,
        patch_size=PATCH, coordinate_size=4, shape_size=4, max_2d_position_embeddings=64),
    "flava": of("FlavaTextModel", TEXT, text),
}

SPOKEN: dict[str, Any] = {
    "whisper": of("WhisperForConditionalGeneration", ENCODER_DECODER, captioned(mel, 7),
        num_mel_bins=8, max_source_positions=20, max_target_positions=20, suppress_tokens=None,
        begin_suppress_tokens=None),
    "whisper classes": of("WhisperForAudioClassification", ENCODER_DECODER, labelled(mel),
        num_mel_bins=8, max_source_positions=20, max_target_positions=20, classifier_proj_size=16),
    "wav2vec2": of("Wav2Vec2ForCTC", SPEECH, wave_text),
    "wav2vec2 masked": speech("Wav2Vec2", mask_time_prob=0.2, mask_time_length=2, layerdrop=0.1),
    "hubert": speech("Hubert"),
    "wavlm": speech("WavLM"),
    "unispeech": speech("UniSpeech"),
    "sew": speech("SEW"),
    "data2vec audio": speech("Data2VecAudio", num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
    "wav2vec2_conformer": speech("Wav2Vec2Conformer", num_attention_heads=3,
        conv_depthwise_kernel_size=3),
    "wav2vec2_bert": of("Wav2Vec2BertForSequenceClassification", SPEECH,
        labelled(noise(input_features=(20, 12))), feature_projection_input_dim=12,
        conv_depthwise_kernel_size=3, left_max_position_embeddings=4,
        right_max_position_embeddings=4),
    "audio_spectrogram_transformer": of("ASTForAudioClassification", VISION,
        labelled(noise(input_values=(40, 16))), max_length=40, num_mel_bins=16, frequency_stride=4,
        time_stride=4),
    "speech_to_text": of("Speech2TextForConditionalGeneration", ENCODER_DECODER,
        captioned(noise(input_features=(40, 8)), 7), input_feat_per_channel=8, conv_channels=12,
        num_conv_layers=2, max_source_positions=40, max_target_positions=40),
    "clap": of("ClapTextModelWithProjection", TEXT, text, projection_dim=16),
    "moonshine": of("MoonshineForConditionalGeneration", TOKENS_ONLY,
        captioned(noise(input_values=(4000,)), 5), hidden_size=24, intermediate_size=40,
        encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=3,
        decoder_num_attention_heads=3, decoder_start_token_id=1),
    "encodec": of("EncodecModel", {}, noise(input_values=(1, 640)), num_filters=4, hidden_size=8,
        codebook_size=16, codebook_dim=8, target_bandwidths=[24.0], upsampling_ratios=[4, 2]),
}

SERIES: dict[str, Any] = {
    "patchtst": of("PatchTSTForPrediction", {}, series, num_input_channels=3, context_length=24,
        prediction_length=6, patch_length=4, patch_stride=4, d_model=24, num_attention_heads=3,
        num_hidden_layers=2, ffn_dim=40),
    "patchtsmixer": of("PatchTSMixerForPrediction", {}, series, num_input_channels=3,
        context_length=24, prediction_length=6, patch_length=4, patch_stride=4, d_model=24,
        num_layers=2),
    "decision_transformer": of("DecisionTransformerModel", {"use_cache": False}, trajectory,
        state_dim=6, act_dim=4, hidden_size=24, n_layer=2, n_head=3, max_ep_len=20),
}
# fmt: on

MODELS: Families = {
    "decoder": DECODERS,
    "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "vision": IMAGES,
    "multimodal": MULTIMODAL,
    "speech": SPOKEN,
    "time series": SERIES,
}
