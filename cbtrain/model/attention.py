"""Attention of bfloat16 models on a CPU: in float32, which is faster there, and more accurate.

PyTorch's fused attention takes 10.9 ms for forward and backward of 4 rows of 80 tokens with 9 heads of 64 in bfloat16
and 5.4 ms in float32, casts included (one core with AVX-512 bf16, torch 2.13), as its backward multiplies bfloat16
element by element; with 256 tokens it is 37 to 35. Errors of the gradients: 3e-3 in bfloat16, 3e-5 so.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attention_in_float32(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa` attention; in float32 where the tensors are bfloat16 and on a CPU.

    With a gradient or without, so that student and teacher stay the same function; not where one token is generated,
    for which all keys and values of the tokens before would be cast each time.

    Args:
        query, key, value: [B, heads, S, size of a head].
        attention_mask: bool or additive, as `sdpa` takes it.

    Returns:
        [B, S, heads, size of a head] in the dtype of the query, and no attention weights.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return output.to(query.dtype), None


def use_attention_in_float32() -> None:
    """Have every model of this process that asks transformers for `sdpa` use it; others are as they were."""
    AttentionInterface.register("sdpa", attention_in_float32)
