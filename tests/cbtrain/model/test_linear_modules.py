"""Which modules LoRA may go on: those that give the product of input and weight, by whatever class."""

import pytest
import torch
from torch import nn
from transformers import PhimoeConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from cbtrain.model.linear_modules import is_linear


class Capped(nn.Linear):
    def forward(self, states):
        return super().forward(states).clamp(-100, 100)


class Dropping(nn.Linear):
    def forward(self, states):
        return nn.functional.dropout(super().forward(states), 0.5, self.training)


class Shifted(nn.Linear):
    def forward(self, states):
        return super().forward(states) + 1e-3


class Buffered(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, states):
        return super().forward(states) * self.scale


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 8),
        lambda: Conv1D(8, 6),
        lambda: FalconLinear(6, 8),
        lambda: FalconLinear(6, 8, bias=False),
        lambda: Dropping(6, 8),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_map_is_known_with_weights_and_without(make, device):
    with torch.device(device):
        module = make()
        before = torch.get_rng_state(), list(module.parameters()), module.training
        assert is_linear(module)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(one is other for one, other in zip(module.parameters(), before[1], strict=True))
    assert module.training == before[2]
    assert module.in_features == 6 if isinstance(module, nn.Linear) else module.nx == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: Llama4Router(Llama4TextConfig(hidden_size=6, num_local_experts=4)),
        lambda: PhimoeTopKRouter(PhimoeConfig(hidden_size=6, num_local_experts=4)),
        lambda: DeepseekV4GroupedLinear(6, 8, 2),
        lambda: Capped(6, 8),
        lambda: Shifted(6, 8),
        lambda: Buffered(6, 8),
        lambda: nn.Embedding(6, 8),
        lambda: nn.Conv1d(6, 8, 2),
    ],
)
def test_what_gives_more_or_other_than_the_product_is_none(make):
    assert not is_linear(make())
