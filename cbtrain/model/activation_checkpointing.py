"""Activation checkpointing by decoder block: what a block kept for its backward is computed again there instead.

The model library's own switch asks for training mode, which would turn on dropout of the base model, so the blocks'
forwards are wrapped here. Block by block or whole, with early exit or without: they are called alike.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.model.lora import decoder_blocks


@contextmanager
def recomputed_blocks(model: PeftModel, config: CircuitBreakerConfig) -> Iterator[None]:
    """Within the body, blocks keep their input alone where `config.gradient_checkpointing` asks for it.

    Raises:
        InputError: the model's blocks cannot be found.
    """
    if not config.gradient_checkpointing:
        yield
        return
    base = model.get_base_model()
    found = decoder_blocks(base)
    if found is None:
        raise InputError(f"--gradient-checkpointing: found no list of decoder blocks in {type(base).__name__}")
    for block in found[1]:
        block.__dict__["forward"] = functools.partial(_recomputed, block.forward)
    try:
        yield
    finally:
        for block in found[1]:
            del block.__dict__["forward"]


def _recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Tensor | tuple:
    """`forward` without what it keeps for its backward; dropout is drawn alike both times."""

    def run(*args: Any, **kwargs: Any) -> Tensor | tuple:
        output = forward(*args, **kwargs)
        return (_Last.apply(output[0]), *output[1:]) if isinstance(output, (tuple, list)) else _Last.apply(output)

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Not reentrant: that would tell ZeRO of a gradient once for each pass through a block, not once for all.
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


class _Last(torch.autograd.Function):
    """Has a block computed again before the backward enters any module of it.

    Otherwise the module that is entered first would have it done, and ZeRO-3, which puts weights away at the end of
    each forward, would do so with the weights it had just brought for that module's backward.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _ = ctx.saved_tensors  # this is what asks for it
        return gradient
