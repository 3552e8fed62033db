"""Attention in float32 for bfloat16 models on a CPU: transformers' own, nearer to the truth."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cbtrain.model.attention import attention_in_float32

MASKS = {
    "none": None,
    "bool": torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12),
    "additive": torch.full((12, 12), -1e9).triu(1).expand(2, 1, 12, 12),
}


class Module(torch.nn.Module):
    """As much of an attention module as is read: three query heads to a key head."""

    is_causal = True
    num_key_value_groups = 3


def run(function, dtype: torch.dtype, mask_name: str) -> list[torch.Tensor]:
    """The output, and the gradients of query, key and value."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 12, 16).bfloat16().to(dtype).requires_grad_() for heads in (6, 2, 2)]
    mask = MASKS[mask_name]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    output, weights = function(Module(), *inputs, mask, dropout=0.0, scaling=0.25)
    assert weights is None
    assert output.dtype == dtype
    output.backward(torch.randn(output.shape).bfloat16().to(dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("mask_name", MASKS)
def test_in_bfloat16_it_is_nearer_to_float64_than_the_librarys(mask_name):
    exact = run(sdpa_attention_forward, torch.float64, mask_name)

    def errors(function) -> list[float]:
        found = run(function, torch.bfloat16, mask_name)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    ours, theirs = errors(attention_in_float32), errors(sdpa_attention_forward)
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < 2**-8, ours  # the rounding of the results to bfloat16


@pytest.mark.parametrize("mask_name", MASKS)
def test_in_float32_it_is_the_librarys_bit_for_bit(mask_name):
    ours, theirs = (
        run(function, torch.float32, mask_name) for function in (attention_in_float32, sdpa_attention_forward)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
