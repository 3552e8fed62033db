"""Small random decoders of many families, made from their configuration classes, and a batch for them."""

from collections.abc import Callable

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from cbtrain.data.batches import TokenBatch, collate
from cbtrain.data.tokenization import TokenRow

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = SHAPE | {"head_dim": 8, "sliding_window": 4}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=2.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gemma3 with images": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=GEMMA, vision_config=IMAGES, mm_tokens_per_image=4)
    ),
    "recurrent-gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**SHAPE, head_dim=8, attention_window_size=4, logits_soft_cap=2.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=100, bos_token_id=1, eos_token_id=2)
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(**{k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "intermediate_size")})
    ),
    "bamba": lambda: BambaForCausalLM(
        BambaConfig(**SHAPE, attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"})
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**SHAPE, intermediate_size_mlp=48, num_local_experts=2, head_dim=8, attention_chunk_size=4)
    ),
}


def model_of(name: str) -> PreTrainedModel:
    """The model of a family, with the same weights every time, larger than at a usual start."""
    torch.manual_seed(0)
    return with_large_weights(MODELS[name]())


def with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model, frozen, with other weights: small ones would hide what attention does."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()


def token_batch() -> TokenBatch:
    """Three rows of several lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 100, (3, 9), generator=generator).tolist()
    scored = (False, False, True, True, False, True, True, True, True)
    lengths = (9, 6, 8)
    rows = [TokenRow(tuple(row[:n]), scored[:n], f"prompt {n}", "f:1") for row, n in zip(ids, lengths, strict=True)]
    return collate(rows, 0)
