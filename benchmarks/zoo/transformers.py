"""Architectures of transformers in tiny configurations, without their caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from . import Case, Families

VOCABULARY, BATCH, TOKENS = 53, 2, 9
SIDE, PATCH = 32, 8
# What most configurations call it; a class that says otherwise gets its own words too.
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
GROUPED = {**CACHED, "num_key_value_heads": 1, "head_dim": 8}
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


# ---- inputs -------------------------------------------------------------------------------------


def text() -> dict[str, Any]:
    """Tokens of different lengths, the shorter padded."""
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def tokens_only() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS))}


def next_token() -> dict[str, Any]:
    inputs = text()
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def masked_token() -> dict[str, Any]:
    return next_token()


def sequence() -> dict[str, Any]:
    return text() | {"labels": torch.tensor([0, 1])}


def unmasked() -> dict[str, Any]:
    return tokens_only() | {"labels": torch.tensor([0, 1])}


def laid_out() -> dict[str, Any]:
    """A box (left, top, right, bottom) for every token."""
    corner, size = torch.randint(0, 30, (2, BATCH, TOKENS, 2))
    return sequence() | {"bbox": torch.cat([corner, corner + size], -1)}


def token_classes() -> dict[str, Any]:
    return text() | {"labels": torch.randint(0, 2, (BATCH, TOKENS))}


def answer() -> dict[str, Any]:
    return text() | {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    }


def translation() -> dict[str, Any]:
    return text() | {"labels": torch.randint(3, VOCABULARY, (BATCH, 7))}


def pixels(side: int = SIDE) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, side, side)}


def image_class(side: int = SIDE) -> dict[str, Any]:
    return pixels(side) | {"labels": torch.tensor([0, 1])}


def image_text(side: int = SIDE, **more: Any) -> dict[str, Any]:
    return pixels(side) | text() | more


def segmentation(side: int, labels: int | None = None) -> dict[str, Any]:
    size = labels or side
    return pixels(side) | {"labels": torch.randint(0, 5, (BATCH, size, size))}


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 400)}


def wave_class() -> dict[str, Any]:
    return wave() | {"labels": torch.tensor([0, 1])}


def wave_text() -> dict[str, Any]:
    return wave() | {"labels": torch.randint(3, VOCABULARY, (BATCH, 5))}


# ---- models -------------------------------------------------------------------------------------


Inputs = Callable[[], dict[str, Any]]


def build(architecture: str, config: dict[str, Any], inputs: Inputs) -> Case:
    """A model of a class of transformers by its name, from the class's own configuration."""
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**config))
    return Case(model, (), inputs())


def of(architecture: str, config: dict[str, Any], inputs: Inputs, **more: Any) -> Any:
    return partial(build, architecture, {**config, **more}, inputs)


DECODERS: dict[str, Any] = {
    "llama": of("LlamaForCausalLM", GROUPED, next_token),
    "llama tied": of("LlamaForCausalLM", GROUPED, next_token, tie_word_embeddings=True),
    "mistral": of("MistralForCausalLM", GROUPED, next_token, sliding_window=4),
    "ministral": of("MinistralForCausalLM", GROUPED, next_token),
    "qwen2": of("Qwen2ForCausalLM", CACHED, next_token, num_key_value_heads=1),
    "qwen3": of("Qwen3ForCausalLM", GROUPED, next_token),
    "gemma": of("GemmaForCausalLM", GROUPED, next_token),
    "gemma2": of("Gemma2ForCausalLM", GROUPED, next_token, sliding_window=4),
    "gemma3 text": of("Gemma3ForCausalLM", GROUPED, next_token, sliding_window=4),
    "phi": of("PhiForCausalLM", CACHED, next_token, partial_rotary_factor=0.5),
    "phi3": of("Phi3ForCausalLM", CACHED, next_token),
    "gpt2": of("GPT2LMHeadModel", TOKENS_ONLY, next_token, n_layer=2, n_embd=24, n_head=3),
    "gpt2 classes": of(
        "GPT2ForSequenceClassification", TOKENS_ONLY, sequence, n_layer=2, n_embd=24, n_head=3
    ),
    "gpt_bigcode": of(
        "GPTBigCodeForCausalLM", TOKENS_ONLY, next_token, n_layer=2, n_embd=24, n_head=3
    ),
    "gpt_neo": of(
        "GPTNeoForCausalLM",
        TOKENS_ONLY,
        next_token,
        hidden_size=24,
        num_layers=2,
        num_heads=3,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
    "gpt_neox": of("GPTNeoXForCausalLM", CACHED, next_token),
    "gptj": of(
        "GPTJForCausalLM", TOKENS_ONLY, next_token, n_layer=2, n_embd=24, n_head=3, rotary_dim=4
    ),
    "codegen": of(
        "CodeGenForCausalLM", TOKENS_ONLY, next_token, n_layer=2, n_embd=32, n_head=4, rotary_dim=4
    ),
    "opt": of("OPTForCausalLM", CACHED, next_token, ffn_dim=40, word_embed_proj_dim=16),
    "bloom": of("BloomForCausalLM", TOKENS_ONLY, next_token, hidden_size=24, n_layer=2, n_head=3),
    "falcon": of("FalconForCausalLM", CACHED, next_token),
    "falcon alibi": of(
        "FalconForCausalLM", CACHED, next_token, alibi=True, new_decoder_architecture=False
    ),
    "mpt": of(
        "MptForCausalLM", TOKENS_ONLY, next_token, d_model=24, n_heads=3, n_layers=2, max_seq_len=64
    ),
    "stablelm": of("StableLmForCausalLM", CACHED, next_token, num_key_value_heads=3),
    "olmo": of("OlmoForCausalLM", CACHED, next_token),
    "olmo2": of("Olmo2ForCausalLM", CACHED, next_token),
    "cohere": of("CohereForCausalLM", CACHED, next_token),
    "starcoder2": of("Starcoder2ForCausalLM", CACHED, next_token, num_key_value_heads=1),
    "granite": of("GraniteForCausalLM", CACHED, next_token),
    "glm": of("GlmForCausalLM", GROUPED, next_token),
    "smollm3": of("SmolLM3ForCausalLM", CACHED, next_token, num_key_value_heads=1),
    "mixtral": of("MixtralForCausalLM", GROUPED, next_token, num_local_experts=4),
    "qwen2_moe": of(
        "Qwen2MoeForCausalLM",
        CACHED,
        next_token,
        num_experts=4,
        num_key_value_heads=1,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
    ),
    "olmoe": of("OlmoeForCausalLM", CACHED, next_token, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": of("GptOssForCausalLM", GROUPED, next_token, num_local_experts=4, sliding_window=4),
    "deepseek_v3": of(
        "DeepseekV3ForCausalLM",
        CACHED,
        next_token,
        num_key_value_heads=3,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_intermediate_size=20,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
    ),
    "mamba": of(
        "MambaForCausalLM",
        TOKENS_ONLY,
        next_token,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=4,
    ),
    "mamba2": of(
        "Mamba2ForCausalLM",
        TOKENS_ONLY,
        next_token,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=4,
        num_heads=6,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    "rwkv": of(
        "RwkvForCausalLM",
        TOKENS_ONLY,
        tokens_only,
        hidden_size=24,
        num_hidden_layers=2,
        attention_hidden_size=24,
    ),
    "recurrent_gemma": of(
        "RecurrentGemmaForCausalLM",
        CACHED,
        next_token,
        num_hidden_layers=3,
        lru_width=24,
        num_key_value_heads=1,
        attention_window_size=4,
    ),
    "jamba": of(
        "JambaForCausalLM",
        CACHED,
        next_token,
        num_key_value_heads=1,
        num_experts=2,
        mamba_d_state=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=3,
    ),
    "xglm": of(
        "XGLMForCausalLM",
        TOKENS_ONLY,
        next_token,
        d_model=24,
        ffn_dim=40,
        num_layers=2,
        attention_heads=3,
        max_position_embeddings=64,
        layerdrop=0.0,
    ),
    "biogpt": of("BioGptForCausalLM", CACHED, next_token, layerdrop=0.0),
    "persimmon": of("PersimmonForCausalLM", CACHED, next_token),
    "modernbert decoder": of("ModernBertDecoderForCausalLM", CACHED, next_token, local_attention=4),
}

ENCODERS: dict[str, Any] = {
    "bert": of("BertForSequenceClassification", TEXT, sequence),
    "bert masked": of("BertForMaskedLM", TEXT, masked_token),
    "roberta": of("RobertaForTokenClassification", TEXT, token_classes),
    "xlm_roberta": of("XLMRobertaForMaskedLM", TEXT, masked_token),
    "camembert": of("CamembertForSequenceClassification", TEXT, sequence),
    "electra": of("ElectraForQuestionAnswering", TEXT, answer, embedding_size=16),
    "albert": of("AlbertForMaskedLM", TEXT, masked_token, embedding_size=16),
    "deberta": of(
        "DebertaForSequenceClassification",
        TEXT,
        sequence,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "deberta_v2": of(
        "DebertaV2ForSequenceClassification",
        TEXT,
        sequence,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "distilbert": of(
        "DistilBertForSequenceClassification",
        TOKENS_ONLY | {"use_cache": None},
        sequence,
        dim=24,
        n_layers=2,
        n_heads=3,
        hidden_dim=40,
    ),
    "mpnet": of("MPNetForSequenceClassification", TEXT, sequence),
    "xlnet": of(
        "XLNetForSequenceClassification",
        {"vocab_size": VOCABULARY},
        sequence,
        d_model=24,
        n_layer=2,
        n_head=3,
        d_inner=40,
        use_mems_eval=False,
        use_mems_train=False,
    ),
    "funnel": of(
        "FunnelForSequenceClassification",
        {"vocab_size": VOCABULARY},
        sequence,
        block_sizes=[1, 1],
        d_model=24,
        n_head=3,
        d_head=8,
        d_inner=40,
        num_decoder_layers=1,
    ),
    "longformer": of("LongformerForSequenceClassification", TEXT, sequence, attention_window=4),
    "big_bird": of(
        "BigBirdForSequenceClassification", TEXT, sequence, attention_type="original_full"
    ),
    "convbert": of(
        "ConvBertForSequenceClassification",
        TEXT,
        sequence,
        embedding_size=24,
        num_attention_heads=4,
        head_ratio=2,
        conv_kernel_size=3,
    ),
    "squeezebert": of(
        "SqueezeBertForSequenceClassification",
        TEXT,
        sequence,
        embedding_size=24,
        q_groups=1,
        k_groups=1,
        v_groups=1,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    "mobilebert": of(
        "MobileBertForSequenceClassification",
        TEXT,
        sequence,
        embedding_size=16,
        intra_bottleneck_size=12,
    ),
    "fnet": of(
        "FNetForSequenceClassification",
        TEXT,
        unmasked,
    ),
    "nystromformer": of(
        "NystromformerForSequenceClassification",
        TEXT,
        unmasked,
        num_landmarks=3,
        segment_means_seq_len=9,
        conv_kernel_size=3,
    ),
    "roformer": of("RoFormerForSequenceClassification", TEXT, sequence, embedding_size=24),
    "rembert": of(
        "RemBertForSequenceClassification",
        TEXT,
        sequence,
        input_embedding_size=16,
        output_embedding_size=20,
    ),
    "ibert": of("IBertForSequenceClassification", TEXT, sequence),
    "esm": of(
        "EsmForMaskedLM", TEXT, masked_token, mask_token_id=3, position_embedding_type="rotary"
    ),
    "modernbert": of(
        "ModernBertForSequenceClassification",
        TEXT,
        sequence,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=4,
    ),
    "canine": of(
        "CanineForSequenceClassification",
        TEXT,
        lambda: {"input_ids": torch.randint(3, 99, (BATCH, 16)), "labels": torch.tensor([0, 1])},
        downsampling_rate=4,
        upsampling_kernel_size=4,
        local_transformer_stride=8,
        num_hash_functions=3,
        num_hash_buckets=32,
    ),
    "layoutlm": of(
        "LayoutLMForSequenceClassification",
        TEXT,
        laid_out,
        max_2d_position_embeddings=64,
    ),
    "dpr": of("DPRQuestionEncoder", TEXT, text),
}

ENCODER_DECODERS: dict[str, Any] = {
    "t5": of("T5ForConditionalGeneration", T5, translation),
    "t5 gated": of(
        "T5ForConditionalGeneration",
        T5,
        translation,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "mt5": of("MT5ForConditionalGeneration", T5, translation),
    "umt5": of("UMT5ForConditionalGeneration", T5, translation),
    "longt5": of("LongT5ForConditionalGeneration", T5, translation, local_radius=3),
    "switch": of(
        "SwitchTransformersForConditionalGeneration",
        T5,
        translation,
        num_experts=4,
        expert_capacity=8,
    ),
    "bart": of("BartForConditionalGeneration", ENCODER_DECODER, translation),
    "bart classes": of(
        "BartForSequenceClassification",
        ENCODER_DECODER,
        lambda: {
            "input_ids": torch.cat(
                [torch.randint(3, VOCABULARY, (BATCH, TOKENS)), torch.full((BATCH, 1), 2)], 1
            ),
            "labels": torch.tensor([0, 1]),
        },
    ),
    "mbart": of("MBartForConditionalGeneration", ENCODER_DECODER, translation),
    "pegasus": of("PegasusForConditionalGeneration", ENCODER_DECODER, translation),
    "marian": of("MarianMTModel", ENCODER_DECODER, translation),
    "blenderbot": of("BlenderbotForConditionalGeneration", ENCODER_DECODER, translation),
    "m2m_100": of("M2M100ForConditionalGeneration", ENCODER_DECODER, translation),
    "led": of(
        "LEDForConditionalGeneration",
        ENCODER_DECODER,
        translation,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "plbart": of("PLBartForConditionalGeneration", ENCODER_DECODER, translation),
    "prophetnet": of(
        "ProphetNetForConditionalGeneration",
        TOKENS_ONLY,
        translation,
        hidden_size=24,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=3,
        num_decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        decoder_start_token_id=1,
    ),
    "fsmt": of(
        "FSMTForConditionalGeneration",
        {k: v for k, v in ENCODER_DECODER.items() if k != "vocab_size"},
        lambda: text() | {"labels": torch.randint(3, VOCABULARY, (BATCH, TOKENS))},
        langs=["a", "b"],
        src_vocab_size=VOCABULARY,
        tgt_vocab_size=VOCABULARY,
    ),
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
}


def backbone() -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )


def detr(architecture: str, **more: Any) -> Case:
    config = {
        **DETR,
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": backbone(),
        "use_pretrained_backbone": False,
        **more,
    }
    return build(architecture, config, partial(pixels, 64))


STAGES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "num_labels": 5}
SWIN: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [1, 2],
    "num_heads": [2, 3],
    "window_size": 4,
    "num_labels": 5,
}

IMAGES: dict[str, Any] = {
    "vit": of("ViTForImageClassification", VISION, image_class),
    "vit masked": of(
        "ViTForMaskedImageModeling",
        VISION,
        lambda: pixels() | {"bool_masked_pos": torch.randint(0, 2, (BATCH, 16)).bool()},
        encoder_stride=PATCH,
    ),
    "deit": of("DeiTForImageClassification", VISION, image_class),
    "beit": of("BeitForImageClassification", VISION, image_class, use_relative_position_bias=True),
    "data2vec vision": of("Data2VecVisionForImageClassification", VISION, image_class),
    "dinov2": of("Dinov2ForImageClassification", VISION, image_class, mlp_ratio=2),
    "dinov3": of("DINOv3ViTModel", VISION, pixels),
    "vit_mae": of(
        "ViTMAEForPreTraining",
        VISION,
        pixels,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    ),
    "swin": of("SwinForImageClassification", SWIN, image_class),
    "swinv2": of("Swinv2ForImageClassification", SWIN, image_class),
    "convnext": of("ConvNextForImageClassification", STAGES, image_class),
    "convnextv2": of("ConvNextV2ForImageClassification", STAGES, image_class),
    "resnet": of("ResNetForImageClassification", STAGES, image_class, embedding_size=8),
    "regnet": of(
        "RegNetForImageClassification", STAGES, image_class, embedding_size=8, groups_width=4
    ),
    "bit": of(
        "BitForImageClassification",
        STAGES,
        image_class,
        embedding_size=8,
        num_groups=4,
        hidden_sizes=[8, 16, 24, 32],
    ),
    "segformer": of(
        "SegformerForSemanticSegmentation",
        {"num_labels": 5},
        partial(segmentation, 64),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    ),
    "pvt": of(
        "PvtForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
    ),
    "pvt_v2": of(
        "PvtV2ForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
    ),
    "poolformer": of("PoolFormerForImageClassification", STAGES, partial(image_class, 64)),
    "mobilevit": of(
        "MobileViTForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        image_size=64,
        hidden_sizes=[24, 28, 32],
        neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 28],
    ),
    "mobilenet_v2": of(
        "MobileNetV2ForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        depth_multiplier=0.35,
    ),
    "levit": of(
        "LevitForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    ),
    "cvt": of(
        "CvtForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        embed_dim=[8, 12, 16],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    "focalnet": of(
        "FocalNetForImageClassification",
        {"num_labels": 5},
        image_class,
        image_size=SIDE,
        embed_dim=12,
        depths=[1, 2],
        hidden_sizes=[12, 24],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "hiera": of(
        "HieraForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        image_size=[64, 64],
        embed_dim=12,
        depths=[1, 1, 1],
        num_heads=[1, 2, 3],
        num_query_pool=2,
    ),
    "swiftformer": of(
        "SwiftFormerForImageClassification",
        {"num_labels": 5},
        partial(image_class, 64),
        image_size=64,
        embed_dims=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
    ),
    "dpt": of(
        "DPTForSemanticSegmentation",
        VISION,
        partial(segmentation, SIDE),
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 12, 16, 20],
        fusion_hidden_size=16,
        is_hybrid=False,
        auxiliary_loss_weight=0.4,
    ),
    "depth_anything": of(
        "DepthAnythingForDepthEstimation",
        {},
        pixels,
        backbone_config=transformers.Dinov2Config(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
            out_features=["stage1", "stage2", "stage3", "stage4"],
            reshape_hidden_states=False,
        ),
        patch_size=PATCH,
        reassemble_hidden_size=24,
        neck_hidden_sizes=[8, 12, 16, 20],
        fusion_hidden_size=16,
        head_hidden_size=8,
    ),
    "detr": partial(detr, "DetrForObjectDetection"),
    "conditional_detr": partial(detr, "ConditionalDetrForObjectDetection"),
    "table_transformer": partial(detr, "TableTransformerForObjectDetection"),
    "yolos": of(
        "YolosForObjectDetection", VISION, pixels, num_detection_tokens=5, image_size=[SIDE, SIDE]
    ),
    "videomae": of(
        "VideoMAEForVideoClassification",
        VISION,
        lambda: {
            "pixel_values": torch.randn(BATCH, 4, 3, SIDE, SIDE),
            "labels": torch.tensor([0, 1]),
        },
        num_frames=4,
    ),
    "timesformer": of(
        "TimesformerForVideoClassification",
        VISION,
        lambda: {
            "pixel_values": torch.randn(BATCH, 4, 3, SIDE, SIDE),
            "labels": torch.tensor([0, 1]),
        },
        num_frames=4,
    ),
    "vivit": of(
        "VivitForVideoClassification",
        VISION,
        lambda: {
            "pixel_values": torch.randn(BATCH, 4, 3, SIDE, SIDE),
            "labels": torch.tensor([0, 1]),
        },
        num_frames=4,
        tubelet_size=[2, PATCH, PATCH],
    ),
    "sam": of(
        "SamModel",
        {},
        lambda: pixels(32) | {"input_points": torch.rand(BATCH, 1, 2, 2) * 32},
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "mlp_dim": 40,
            "image_size": 32,
            "patch_size": 8,
            "window_size": 2,
            "global_attn_indexes": [1],
            "output_channels": 16,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 32,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "mlp_dim": 20,
            "num_hidden_layers": 1,
            "iou_head_hidden_dim": 12,
        },
    ),
    "swin2sr": of(
        "Swin2SRForImageSuperResolution",
        {},
        partial(pixels, 16),
        image_size=16,
        embed_dim=12,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
}

TOWER = {
    key: VISION[key]
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
}
PAIRED: dict[str, Any] = {
    "text_config": {**TEXT, "projection_dim": 16},
    "vision_config": {**TOWER, "projection_dim": 16},
    "projection_dim": 16,
}

MULTIMODAL: dict[str, Any] = {
    "clip": of("CLIPModel", PAIRED, partial(image_text, return_loss=True)),
    "siglip": of("SiglipModel", PAIRED, partial(image_text, return_loss=True)),
    "altclip": of(
        "AltCLIPModel",
        {**PAIRED, "text_config": {**TEXT, "project_dim": 16}},
        partial(image_text, return_loss=True),
    ),
    "chinese_clip": of("ChineseCLIPModel", PAIRED, image_text),
    "clipseg": of(
        "CLIPSegForImageSegmentation",
        PAIRED,
        lambda: image_text() | {"labels": torch.rand(BATCH, SIDE, SIDE)},
        reduce_dim=12,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    ),
    "owlvit": of("OwlViTModel", PAIRED, image_text),
    "blip": of(
        "BlipForConditionalGeneration",
        {
            **PAIRED,
            "text_config": {
                **TEXT,
                "encoder_hidden_size": 24,
                "is_decoder": True,
                "use_cache": False,
            },
        },
        image_text,
    ),
    "vilt": of("ViltModel", {**TEXT, **TOWER}, image_text),
    "llava": of(
        "LlavaForConditionalGeneration",
        {},
        lambda: _with_image(pixels(), 16),
        text_config=transformers.LlamaConfig(**GROUPED),
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        image_token_id=3,
        vision_feature_layer=-1,
        use_cache=False,
    ),
    "paligemma": of(
        "PaliGemmaForConditionalGeneration",
        {},
        lambda: _with_image(pixels(), 16),
        text_config=transformers.GemmaConfig(**GROUPED),
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        image_token_id=3,
        projection_dim=24,
    ),
    "vision encoder decoder": lambda: _image_to_text(),
    "trocr": of(
        "TrOCRForCausalLM", ENCODER_DECODER, tokens_only, decoder_layers=2, is_decoder=True
    ),
    "layoutlmv3": of(
        "LayoutLMv3ForSequenceClassification",
        {**TEXT, "hidden_size": 24, "input_size": SIDE, "patch_size": PATCH},
        lambda: image_text(
            labels=torch.tensor([0, 1]), bbox=torch.randint(0, 60, (BATCH, TOKENS, 4))
        ),
        coordinate_size=4,
        shape_size=4,
        max_2d_position_embeddings=64,
    ),
    "flava": of("FlavaTextModel", TEXT, text),
}


def _with_image(images: dict[str, Any], patches: int) -> dict[str, Any]:
    """Text behind one placeholder token for every patch."""
    words = text()
    places = torch.full((BATCH, patches), 3)
    ids = torch.cat([places, words["input_ids"].clamp_min(4)], 1)
    mask = torch.cat([torch.ones_like(places), words["attention_mask"]], 1)
    return images | {"input_ids": ids, "attention_mask": mask}


def _image_to_text() -> Case:
    encoder = transformers.ViTConfig(**VISION)
    decoder = transformers.GPT2Config(
        **TOKENS_ONLY, n_layer=1, n_embd=16, n_head=2, add_cross_attention=True, is_decoder=True
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    config.use_cache = config.decoder.use_cache = False
    model = transformers.VisionEncoderDecoderModel(config)
    return Case(model, (), pixels() | {"labels": torch.randint(3, VOCABULARY, (BATCH, 6))})


def mel(bins: int, frames: int) -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, bins, frames)}


SPOKEN: dict[str, Any] = {
    "whisper": of(
        "WhisperForConditionalGeneration",
        ENCODER_DECODER,
        lambda: mel(8, 40) | {"labels": torch.randint(3, VOCABULARY, (BATCH, 7))},
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "whisper classes": of(
        "WhisperForAudioClassification",
        ENCODER_DECODER,
        lambda: mel(8, 40) | {"labels": torch.tensor([0, 1])},
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        classifier_proj_size=16,
    ),
    "wav2vec2": of("Wav2Vec2ForCTC", SPEECH, wave_text),
    "wav2vec2 masked": of(
        "Wav2Vec2ForSequenceClassification",
        SPEECH,
        wave_class,
        mask_time_prob=0.2,
        mask_time_length=2,
        layerdrop=0.1,
    ),
    "hubert": of("HubertForSequenceClassification", SPEECH, wave_class),
    "wavlm": of("WavLMForSequenceClassification", SPEECH, wave_class),
    "unispeech": of("UniSpeechForSequenceClassification", SPEECH, wave_class),
    "sew": of("SEWForSequenceClassification", SPEECH, wave_class),
    "data2vec audio": of(
        "Data2VecAudioForSequenceClassification",
        SPEECH,
        wave_class,
        num_conv_pos_embeddings=2,
        conv_pos_kernel_size=3,
    ),
    "wav2vec2_conformer": of(
        "Wav2Vec2ConformerForSequenceClassification",
        SPEECH,
        wave_class,
        num_attention_heads=3,
        conv_depthwise_kernel_size=3,
    ),
    "wav2vec2_bert": of(
        "Wav2Vec2BertForSequenceClassification",
        SPEECH,
        lambda: {"input_features": torch.randn(BATCH, 20, 12), "labels": torch.tensor([0, 1])},
        feature_projection_input_dim=12,
        conv_depthwise_kernel_size=3,
        left_max_position_embeddings=4,
        right_max_position_embeddings=4,
    ),
    "audio_spectrogram_transformer": of(
        "ASTForAudioClassification",
        VISION,
        lambda: {"input_values": torch.randn(BATCH, 40, 16), "labels": torch.tensor([0, 1])},
        max_length=40,
        num_mel_bins=16,
        frequency_stride=4,
        time_stride=4,
    ),
    "speech_to_text": of(
        "Speech2TextForConditionalGeneration",
        ENCODER_DECODER,
        lambda: {
            "input_features": torch.randn(BATCH, 40, 8),
            "labels": torch.randint(3, VOCABULARY, (BATCH, 7)),
        },
        input_feat_per_channel=8,
        conv_channels=12,
        num_conv_layers=2,
        max_source_positions=40,
        max_target_positions=40,
    ),
    "clap": of("ClapTextModelWithProjection", TEXT, text, projection_dim=16),
    "moonshine": of(
        "MoonshineForConditionalGeneration",
        TOKENS_ONLY,
        lambda: {
            "input_values": torch.randn(BATCH, 4000),
            "labels": torch.randint(3, VOCABULARY, (BATCH, 5)),
        },
        hidden_size=24,
        intermediate_size=40,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=3,
        decoder_num_attention_heads=3,
        decoder_start_token_id=1,
    ),
    "encodec": of(
        "EncodecModel",
        {},
        lambda: {"input_values": torch.randn(BATCH, 1, 640)},
        num_filters=4,
        hidden_size=8,
        codebook_size=16,
        codebook_dim=8,
        target_bandwidths=[24.0],
        upsampling_ratios=[4, 2],
    ),
}

SERIES: dict[str, Any] = {
    "patchtst": of(
        "PatchTSTForPrediction",
        {},
        lambda: {
            "past_values": torch.randn(BATCH, 24, 3),
            "future_values": torch.randn(BATCH, 6, 3),
        },
        num_input_channels=3,
        context_length=24,
        prediction_length=6,
        patch_length=4,
        patch_stride=4,
        d_model=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        ffn_dim=40,
    ),
    "patchtsmixer": of(
        "PatchTSMixerForPrediction",
        {},
        lambda: {
            "past_values": torch.randn(BATCH, 24, 3),
            "future_values": torch.randn(BATCH, 6, 3),
        },
        num_input_channels=3,
        context_length=24,
        prediction_length=6,
        patch_length=4,
        patch_stride=4,
        d_model=24,
        num_layers=2,
    ),
    "decision_transformer": of(
        "DecisionTransformerModel",
        {"use_cache": False},
        lambda: {
            "states": torch.randn(BATCH, 5, 6),
            "actions": torch.randn(BATCH, 5, 4),
            "rewards": torch.randn(BATCH, 5, 1),
            "returns_to_go": torch.randn(BATCH, 5, 1),
            "timesteps": torch.arange(5).repeat(BATCH, 1),
            "attention_mask": torch.ones(BATCH, 5),
        },
        state_dim=6,
        act_dim=4,
        hidden_size=24,
        n_layer=2,
        n_head=3,
        max_ep_len=20,
    ),
}

MODELS: Families = {
    "decoder": DECODERS,
    "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "vision": IMAGES,
    "multimodal": MULTIMODAL,
    "speech": SPOKEN,
    "time series": SERIES,
}
