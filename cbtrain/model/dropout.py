"""Dropout of the adapter on a CPU: four elements to a random number, where PyTorch's draws one for each.

PyTorch draws them one by one on one core: 2.9 ms for 320 × 1536 numbers, as long as the product with a weight of
1536 × 576 takes in bfloat16; this takes 0.7 ms (one core, torch 2.13). Other draws, from the same generator.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

LEVELS = 2**16
"""A probability is rounded to a multiple of 1 / LEVELS, and what is kept is scaled by what that comes to."""


class FastDropout(nn.Dropout):
    """`nn.Dropout`; on a CPU by random bits, 16 an element."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        return input * kept(input, self.p)


def kept(like: Tensor, probability: float) -> Tensor:
    """A tensor like the given one: 0 with this probability, in steps of 1 / LEVELS, else the inverse of its opposite.

    Args:
        probability: of a 0; less than 1 by more than half a step.
    """
    dropped = round(probability * LEVELS)
    count = like.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    levels = draws.view(torch.int16)[:count].view(like.shape)
    mask = torch.empty(like.shape, dtype=like.dtype)
    return torch.ge(levels, dropped - LEVELS // 2, out=mask).mul_(LEVELS / (LEVELS - dropped))


def use_fast_dropout(model: nn.Module) -> None:
    """Put it in place of the dropout of every adapted module."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    module.lora_dropout[name] = FastDropout(dropout.p)
