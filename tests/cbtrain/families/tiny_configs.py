"""A tiny configuration of every model type with a causal language model in transformers.

A configuration class is asked for its fields, and those that say a size get a small one; what a family insists on
beside that is in `OWN`.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 256
_SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim embedding_size lru_width hidden_dim "
    "attention_hidden_size out_hidden_size dim_model adapter_in_dim adapter_out_dim adapter_input_size "
    "text_hidden_size hidden_size_per_layer_input",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts n_mamba_heads mamba_num_heads depth",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk top_k_experts num_selected_experts "
    "encoder_layers linear_num_key_heads linear_num_value_heads moe_top_k hc_mult eos_token_id",
    48: "intermediate_size d_inner ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim d_ff dim_ff ffn_dim dff "
    "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp ext_pw_out_channel "
    "depthwise_separable_out_channel shared_intermediate_size expert_ffn_hidden_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions seq_length",
    8: "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim mamba_d_state state_size "
    "ssm_state_size linear_key_head_dim linear_value_head_dim global_head_dim attention_head_dim chunk_size "
    "laurel_rank sliding_window attention_window_size attention_chunk_size window_size index_topk",
    16: "q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim index_head_dim index_n_heads "
    "router_hidden_size adapter_rank mamba_chunk_size moe_latent_size",
    1: "n_group topk_group n_groups mamba_n_groups n_shared_experts first_k_dense_replace num_dense_layers "
    "bos_token_id first_k_dense o_groups num_nextn_predict_layers",
    0: "pad_token_id num_mtp_layers zero_expert_num",
    28: "image_size",
    14: "patch_size",
}
"""Sizes, and the fields that configuration classes give them under."""
_OF_FIELD: dict[str, Any] = {field: size for size, fields in _SIZES.items() for field in fields.split()}
_OF_FIELD["is_decoder"] = True
"""Of encoders that have a decoder's form too."""
_LATENT = {"num_key_value_heads": 4}
_NO_WINDOWS = {"layer_types": ["full_attention"] * 4, **_LATENT}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_ATTENTION_64 = {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid"] * 3,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT
    ),
    **dict.fromkeys(("longcat_flash", "minicpm3", "youtu"), _LATENT),
    "bailing_hybrid": {"layer_group_size": 2, **_LATENT},
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "blt": {part: {"hidden_size_global": 32} for part in ("encoder_config", "decoder_config")}
    | {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [2]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": _NO_WINDOWS, "vision_config": {"mlp_layer_types": ["dense"] * 4}},
    "dots3_note_text": _NO_WINDOWS,
    "emu3": {"vocabulary_map": {}, "vq_config": {"base_channels": 32}},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        **_LATENT,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 8}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16)},
    "roc_bert": {"shape_vocab_size": 8, "pronunciation_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ATTENTION_64,
    "zamba2": _ATTENTION_64,
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family's configuration must have beside its sizes."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """Its configuration with small sizes, parts for images and sound included."""
    kind = CONFIG_MAPPING[model_type]
    own = OWN.get(model_type, {})
    fields = _fields(kind) | {name: value for name, value in own.items() if not isinstance(value, dict)}
    for name, value in own.items():
        if isinstance(value, dict):
            fields[name] = {**fields.get(name, {}), **value}
    return kind(**fields)


def _fields(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """The small sizes of a configuration class, and of those within it."""
    usual = vars(kind())
    small: dict[str, Any] = {}
    for name, own in {**dict.fromkeys(usual), **kind.attribute_map}.items():
        value = usual.get(own or name)
        if isinstance(value, PretrainedConfig):
            small[name] = {**_fields(type(value)), "model_type": value.model_type}
        elif name in _OF_FIELD and (name == "eos_token_id" or not isinstance(value, (list, tuple, dict))):
            small[name] = _OF_FIELD[name]
    return small


NOT_TRIED = {
    "gemma3n": "its part for images needs the package timm",
    "gemma4_assistant": "a drafting head on another model's states",
    "gemma4_unified_assistant": "a drafting head on another model's states",
    "musicgen": "transformers makes its model from no configuration of this type",
    "musicgen_melody": "transformers makes its model from no configuration of this type",
}
"""Model types that no tiny model can be made of here, and why."""
