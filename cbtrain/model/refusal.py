"""Architectures that the method cannot run on: refused by name in one line, not by what they break later."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbtrain.config import InputError
from cbtrain.utils.errors import named


@contextmanager
def refused_by_name(model: PreTrainedModel) -> Iterator[None]:
    """Raise whatever trying a model in the body ends in as an `InputError` that names its class."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model of another build makes of it
        raise InputError(
            f"--model: {type(model).__name__} cannot be taken apart as a decoder ({named(error)})"
        ) from error


def blocks_of(model: PreTrainedModel) -> int:
    """Number N of decoder blocks, as the configuration has it.

    Raises:
        InputError: it has none.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise InputError(f"--model: {type(model).__name__} names no num_hidden_layers, so its blocks are not known")
    return count


def check_states(model: PreTrainedModel, states: Collection[Tensor], ids: Tensor) -> None:
    """Refuse a model whose hidden states are not N + 1 of [B, S, H].

    Args:
        states: what it gives for `ids`, [B, S].

    Raises:
        InputError: some families pass several streams from block to block, or count other blocks than they name.
    """
    blocks, name = blocks_of(model), type(model).__name__
    if len(states) != blocks + 1:
        raise InputError(
            f"--model: {name} gives not one hidden state more than it has blocks ({len(states)}, {blocks})"
        )
    for state in states:
        if state.ndim != 3 or state.shape[:2] != ids.shape:
            shape = "×".join(map(str, state.shape))
            raise InputError(f"--model: {name} passes several streams from block to block, not [B, S, H] ({shape})")
