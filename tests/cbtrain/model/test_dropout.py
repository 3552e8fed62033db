"""The adapter's dropout: what PyTorch's is, by fewer random numbers."""

import pytest
import torch
from causal_models import model_of, token_batch

from cbtrain.config import get_config
from cbtrain.model.dropout import FastDropout, kept
from cbtrain.model.lora import add_adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for_and_the_rest_is_scaled(probability, dtype):
    count = 1_000_003  # no multiple of four
    torch.manual_seed(0)
    mask = kept(torch.empty(count, dtype=dtype), probability)
    dropped = (mask == 0).double().mean().item()
    error = (probability * (1 - probability) / count) ** 0.5
    assert abs(dropped - probability) < 5 * error + 2**-17, dropped
    (scale,) = mask[mask != 0].unique().tolist()
    assert abs(scale * (1 - probability) - 1) < max(torch.finfo(dtype).eps, 2**-13 if probability > 0.5 else 2**-16)


def test_neighbours_from_one_random_number_are_independent():
    torch.manual_seed(0)
    zeros = (kept(torch.empty(400_000, 4), 0.5) == 0).double()
    correlation = torch.corrcoef(zeros.T) - torch.eye(4)
    assert correlation.abs().max() < 5 * 400_000**-0.5, correlation


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    states = torch.randn(3, 5, 7, requires_grad=True)
    output = FastDropout(0.3)(states)
    output.sum().backward()
    assert torch.equal(states.grad * states.detach(), output.detach())
    assert 0 < (output == 0).sum() < output.numel()


def test_the_same_seed_draws_the_same_and_another_call_another():
    states, dropout = torch.ones(64, 64), FastDropout(0.5)
    torch.manual_seed(3)
    first, second = dropout(states), dropout(states)
    torch.manual_seed(3)
    assert torch.equal(dropout(states), first)
    assert not torch.equal(first, second)


def test_an_adapter_has_it_and_drops_in_training_only():
    model = add_adapter(model_of("llama"), get_config("tiny", lora_dropout=0.5, lora_init_std=0.1, lora_layers=None))
    kinds = {type(module) for name, module in model.named_modules() if name.endswith("lora_dropout.default")}
    assert kinds == {FastDropout}
    inputs = {"input_ids": token_batch().input_ids, "attention_mask": token_batch().attention_mask}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
