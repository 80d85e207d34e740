"""Define tiny configurations of transformers' text families, by name, for `families.py`.

Each has every kind of layer of its family. `sw8` is a sliding window of 8 tokens (texts have up to 60), `chunk8` chunks
of 8.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

LAYERS = 4
SMALL: dict[str, Any] = {
    # the lab's tokenizer
    "vocab_size": 1024,
    "vocab_size_per_layer_input": 1024,
    "decoder_vocab_size": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_dim", "emb_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "d_inner", "dim_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dense_intermediate_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "moe_shared_expert_intermediate_size", "laurel_rank"), 16),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "dim_head", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "rotary_dim", "kv_channels", "query_pre_attn_scalar", "d_rel"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    "o_groups": 2,
    # lengths
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("model_max_length", "original_max_position_embeddings", "rel_extent"), 512),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    "zero_expert_num": 2,
    "num_nextn_predict_layers": 0,  # layers that predict further tokens: not part of the forward pass
    # states and convolutions
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "adapter_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "mamba_d_ssm": 64,
    "expand": 2,
    # indexers, which choose what a token sees
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 2),
    "index_topk": 64,
    # what a family does to its logits: no factor is 1, so that leaving one out is seen
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.5,
}

SLIDING, FULL, LINEAR, CONV = "sliding_attention", "full_attention", "linear_attention", "conv"
MIXED = [SLIDING, FULL, SLIDING, FULL]
STATES = [LINEAR, FULL, LINEAR, FULL]
HYBRID = [LINEAR, LINEAR, "hybrid", LINEAR, "hybrid", LINEAR]
NO_IMAGE = 1020  # a token that no text of the measurement holds, where a multimodal family wants the id of an image
DECODER = {"is_decoder": True}  # families that are encoders by default
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many of them as heads
SWA = dict.fromkeys(
    ("swa_num_attention_heads", "swa_num_key_value_heads"), 4
)  # of layers with a window, where they differ
SWA |= dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16)
SWA |= dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8)
INDEXER = {"indexer_kv_heads": 1, "indexer_budget": 64, "indexer_compress_ratio": 4}

# What a model type needs besides small sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "camembert": DECODER,
    "cohere_compass_text": {
        "layer_types": MIXED,
        "logit_scale": 0.5,
        "rope_parameters": {t: {"rope_type": "default", "rope_theta": 1e4} for t in (FULL, SLIDING)},
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "data2vec-text": DECODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT | {"n_group": None, "topk_group": None},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {"index_topk": 4, "num_nextn_predict_layers": 0},
    "dots3_note_text": LATENT
    | {"sliding_window": 8, "layer_types": ["indexed_attention", SLIDING] * 2, "head_dim": 16, **SWA},
    "dots1": {"max_window_layers": 2},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": MIXED},
    "electra": DECODER,
    "ernie": DECODER,
    "ernie4_5_moe": {"moe_layer_end_index": 3},
    "gemma3_text": {"layer_types": MIXED},
    "gemma4_text": {"layer_types": MIXED, "global_head_dim": 16},
    "gemma4_unified_text": {"layer_types": MIXED, "global_head_dim": 16},
    "gemma3n_text": {
        "layer_types": MIXED,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "granitemoehybrid": {"layer_types": STATES},
    "hrm_text": {"num_hidden_layers": 2},
    "hy_v4": LATENT,
    "hyperclovax": {"attention_multiplier": 0.35},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "logits_mup_width_multiplier": 2.0},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "unpadded_vocab_size": 1024,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "n_layers_per_attn_res_block": 1,
    },
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "unpadded_vocab_size": 1024},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | {"layer_types": STATES},
    "kolibri1": {"layer_types": MIXED},
    "laguna": {"layer_types": MIXED},
    "lfm2": {"layer_types": [CONV, FULL, CONV, FULL]},
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV, FULL]},
    "lfm3": {"layer_types": [CONV, FULL, CONV, SLIDING]},
    "llama4_text": {"floor_scale": 16},
    "longcat_flash": LATENT | {"num_layers": 2},
    "mamba2": {"head_dim": 16},
    "megatron-bert": DECODER,
    "mellum": {"layer_types": MIXED},
    "minicpm3": LATENT,
    "minimax": {"layer_types": STATES},
    "ministral": {"layer_types": MIXED},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": DECODER
    | {"axial_pos_embds": False, "feed_forward_size": 64, "attention_head_size": 8, "hidden_size": 32},
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER
    | {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "roformer": DECODER,
    "sarvam_mla": LATENT,
    "xlm": {"causal": True},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "ffn_round_up_to_multiple_of": 16},
    "xmod": DECODER | {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": HYBRID, "mamba_headdim": 16, "num_key_value_heads": 4},
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "num_experts_per_tok": 1, "num_attention_heads": 4},
}


def tiny(model_type: str, **fields: Any) -> PretrainedConfig:
    """Return the config of a model type with small sizes, and with the values of `fields`."""
    cls = CONFIG_MAPPING[model_type]
    small = {k: v for k, v in SMALL.items() if k in cls.__dataclass_fields__}
    return cls(**(small | FAMILIES.get(model_type, {}) | fields))


WINDOW, FAR = 8, 4096  # shorter than the texts, and longer
# Families measured in their plain form, under their model type.
PLAIN = [
    "llama", "qwen3", "gemma", "gpt2", "opt", "bloom", "mpt", "gpt_neox", "smollm3", "glm4", "bamba", "zamba2",
    "rwkv", "minimax", "ernie4_5", "xlstm", "mixtral", "phimoe", "olmo2", "olmoe", "flex_olmo", "olmo_hybrid",
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "qwen3_moe", "qwen3_next", "lfm2", "mamba2", "granitemoehybrid",
    "falcon_h1", "jamba", "hy_v3", "jais2", "internlm3", "iquestcoder", "exaone", "solar_open", "ernie4_5_moe",
    "granite", "granitemoe", "cohere", "phi", "stablelm", "persimmon", "nemotron", "nemotron_h", "apertus", "arcee",
    "seed_oss", "helium", "bitnet", "diffllama", "minicpm3", "hyperclovax", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "nanochat", "glm4_moe", "glm4_moe_lite", "minimax_m2", "longcat_flash", "lfm2_moe", "mamba", "falcon_mamba",
    "zamba", "jetmoe", "dbrx", "gptj", "codegen", "gpt_bigcode", "openai-gpt", "ctrl", "biogpt", "xglm", "glm",
    "olmo", "granitemoeshared", "aria_text", "qwen2_moe", "phi3", "kimi_linear", "bailing_hybrid", "axk1", "axk2",
    "sarvam_mla", "sarvam_moe", "youtu", "hy_v4", "hrm_text", "gpt_neox_japanese", "apertus1p5_text", "cpmant",
    "minimax_m3_vl_text", "ministral3", "inkling2_loop_text", "qwen4_exp_text", "xlnet", "reformer", "xlm", "bert",
    "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod", "bart",
    "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "prophetnet", "trocr", "whisper", "starcoder2", "moshi",
]  # fmt: skip
# Families measured with a window of WINDOW tokens.
WINDOWED = [
    "mistral", "gemma2", "gemma3_text", "phi3", "olmo3", "cohere2", "gpt_oss", "exaone4", "lfm3", "mellum",
    "granitemoe_swa", "granite_swa", "flint", "gemma3n_text", "gemma4_text", "vaultgemma", "starcoder2",
    "cohere2_moe", "ministral", "afmoe", "laguna", "mimo_v2_flash", "exaone_moe", "dots1", "doge", "beam", "cwm",
    "kolibri1", "lara_mini", "dory", "gemma4_unified_text", "dots3_note_text", "cohere_compass_text",
    "inkling_text", "inkling2_text", "zaya", "moshi",
]  # fmt: skip
WINDOW_FIELD = dict.fromkeys(("inkling_text", "inkling2_text"), "sliding_window_size")
TEXT_MODELS = ("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "inkling_text", "inkling2_text")
TEXT_MODELS += ("dots3_note_text", "cohere_compass_text")

# Name -> (model type, fields): families in more than one form.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5 default": ("qwen2", {}),
    "qwen2 sw8": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "deepseek_v4 sw8": (
        "deepseek_v4",
        {
            "sliding_window": WINDOW,
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        },
    ),
    "qwen2_moe sw8": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "gemma2 sw4096": ("gemma2", {"sliding_window": FAR}),
    "olmo3 sw4096": ("olmo3", {"sliding_window": FAR}),
    "cohere2 sw4096": ("cohere2", {"sliding_window": FAR}),
    "exaone4 sw4096": ("exaone4", {"sliding_window": FAR}),
    "mistral sw4096 (v0.1)": ("mistral", {"sliding_window": FAR}),
    "mistral no window": ("mistral", {"sliding_window": None}),
    "mixtral sw8": ("mixtral", {"sliding_window": WINDOW}),
    "qwen3 sw8": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "llama4 chunk8": ("llama4_text", {"attention_chunk_size": WINDOW}),
    "recurrent_gemma w8": ("recurrent_gemma", {"attention_window_size": WINDOW}),
    "modernbert-decoder lw8": ("modernbert-decoder", {"local_attention": 2 * WINDOW}),
    "falcon alibi": ("falcon", {"alibi": True}),
    "falcon rotary": ("falcon", {}),
    "falcon new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "zamba2 two hybrid layers": ("zamba2", {"num_mem_blocks": 2}),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}),
    "deepseek_v32 topk8": ("deepseek_v32", {"index_topk": 8}),
    "deepseek_v32 topk64": ("deepseek_v32", {"index_topk": 64}),
    "glm_moe_dsa topk64": ("glm_moe_dsa", {"index_topk": 64}),
    # a window that the family reads, or one that stands in its config and is not used
    "qwen3_moe sw8": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": WINDOW}),
    "phimoe sw8": ("phimoe", {"sliding_window": WINDOW}),
    "minimax sw8": ("minimax", {"sliding_window": WINDOW}),
    "ministral3 sw8": ("ministral3", {"sliding_window": WINDOW}),
    "smollm3 sw8": ("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED}),
    "nemotron_h sw8": ("nemotron_h", {"sliding_window": WINDOW}),
    "qwen3_moe aux loss": ("qwen3_moe", {"output_router_logits": True}),
    "mixtral aux loss": ("mixtral", {"output_router_logits": True}),
    "gpt_neo global": ("gpt_neo", {}),
    "gpt_neo local w8": ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW}),
    "doge keep8": ("doge", {"keep_window_size": 8}),
    "granitemoehybrid attention only": ("granitemoehybrid", {"layer_types": [FULL] * LAYERS}),
    "lfm2 attention only": ("lfm2", {"layer_types": [FULL] * LAYERS}),
    "phi3 longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        },
    ),
    "llama dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "minimax_m3_vl_text sparse": (
        "minimax_m3_vl_text",
        {"layer_types": ["minimax_m3_sparse", FULL] * 2, "index_block_size": 8, "index_topk_blocks": 2},
    ),
}

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_token_id": NO_IMAGE, "video_token_id": NO_IMAGE + 1, "audio_token_id": NO_IMAGE + 2}


def multimodal(model_type: str, text: PretrainedConfig, vision: dict[str, Any] | None = None, **fields: Any):
    """Return the config of a multimodal model around a text model."""
    return CONFIG_MAPPING[model_type](text_config=text.to_dict(), vision_config=vision, **fields)


def _gemma3() -> PretrainedConfig:
    vision = VISION | {"image_size": 32, "patch_size": 16}
    ids = {"image_token_index": NO_IMAGE, "boi_token_index": NO_IMAGE + 1, "eoi_token_index": NO_IMAGE + 2}
    return multimodal("gemma3", tiny("gemma3_text", sliding_window=WINDOW), vision, mm_tokens_per_image=4, **ids)


def _gemma4(model_type: str = "gemma4") -> PretrainedConfig:
    return multimodal(model_type, tiny(f"{model_type}_text", sliding_window=WINDOW), **IMAGES)


def _qwen3_5(model_type: str = "qwen3_5") -> PretrainedConfig:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return multimodal(
        model_type, tiny(f"{model_type}_text"), vision, image_token_id=NO_IMAGE, video_token_id=NO_IMAGE + 1
    )


def _llama4() -> PretrainedConfig:
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    vision = VISION | {"image_size": 28, "patch_size": 14} | widths
    return multimodal("llama4", tiny("llama4_text", attention_chunk_size=WINDOW), vision, image_token_index=NO_IMAGE)


def _phi4() -> PretrainedConfig:
    vision = VISION | {"num_hidden_layers": 2, "image_size": 28, "crop_size": 28, "image_token_id": NO_IMAGE}
    widths = dict.fromkeys(
        ("hidden_size", "ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 32
    )
    audio = widths | {
        "intermediate_size": 64,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "audio_token_id": NO_IMAGE + 1,
    }
    return tiny("phi4_multimodal", vision_config=vision, audio_config=audio, sliding_window=WINDOW)


def _mllama() -> PretrainedConfig:
    vision = {k: v for k, v in VISION.items() if k != "num_attention_heads"}
    vision |= {
        "attention_heads": 2,
        "num_global_layers": 1,
        "image_size": 28,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }
    return multimodal(
        "mllama", tiny("mllama_text_model", cross_attention_layers=[2]), vision, image_token_index=NO_IMAGE
    )


def _got_ocr2() -> PretrainedConfig:
    vision = VISION | {"output_channels": 16, "image_size": 64, "mlp_dim": 64, "global_attn_indexes": [0]}
    return multimodal("got_ocr2", tiny("qwen2"), vision, image_token_index=NO_IMAGE)


def _fuyu() -> PretrainedConfig:
    return CONFIG_MAPPING["fuyu"](text_config=tiny("persimmon").to_dict(), image_token_id=NO_IMAGE)


def _emu3() -> PretrainedConfig:
    images = {
        "codebook_size": 16,
        "base_channels": 32,
        "channel_multiplier": [1],
        "hidden_size": 32,
        "num_res_blocks": 1,
    }
    return CONFIG_MAPPING["emu3"](
        text_config=tiny("emu3_text_model").to_dict(), vq_config=images, vocabulary_map={"<image>": NO_IMAGE}
    )


MULTIMODAL: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3 multimodal sw8": _gemma3,
    "gemma4 multimodal sw8": _gemma4,
    "gemma4_unified multimodal sw8": partial(_gemma4, "gemma4_unified"),
    "qwen3_5 multimodal": _qwen3_5,
    "qwen3_5_moe multimodal": partial(_qwen3_5, "qwen3_5_moe"),
    "qwen4_exp multimodal": partial(_qwen3_5, "qwen4_exp"),
    "llama4 multimodal chunk8": _llama4,
    "phi4_multimodal sw8": _phi4,
    "mllama multimodal": _mllama,
    "got_ocr2 multimodal": _got_ocr2,
    "fuyu multimodal": _fuyu,
    "emu3 multimodal": _emu3,
}


def configurations() -> dict[str, Callable[[], PretrainedConfig]]:
    """Return each configuration's name and the function that makes it."""
    named: list[tuple[str, Callable[[], PretrainedConfig]]] = [(name, partial(tiny, name)) for name in PLAIN]
    for model_type in WINDOWED:
        window = {WINDOW_FIELD.get(model_type, "sliding_window"): WINDOW}
        named.append((f"{_short(model_type)} sw{WINDOW}", partial(tiny, model_type, **window)))
    named += [(name, partial(tiny, model_type, **fields)) for name, (model_type, fields) in VARIANTS.items()]
    named += MULTIMODAL.items()
    if len(dict(named)) < len(named):
        raise ValueError("two configurations have one name")
    return dict(named)


def _short(model_type: str) -> str:
    """Return the family's name: a text model is named like the multimodal model that it is a part of."""
    return model_type.removesuffix("_text") if model_type in TEXT_MODELS else model_type
