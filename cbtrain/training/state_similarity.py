"""How alike the two sides are to the model before training: rerouting one moves what is like it on the other."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import held_out_batches
from cbtrain.data.tokenization import TokenRow
from cbtrain.model.checks import prepare
from cbtrain.model.partial_forward import Decoder
from cbtrain.training.engine import adapted_model
from cbtrain.utils import distributed

ROWS = 256
"""Of each side, evenly spread, at most."""


@dataclass(frozen=True)
class Likeness:
    """Cosines between mean hidden states of one target layer, over scored tokens."""

    layer: int
    sides: float
    """Harmful against benign."""
    within: float
    """A random half of the benign rows against the other: what two samples of one text come to."""

    @property
    def too_alike(self) -> bool:
        """Whether the sides lie hardly farther apart than samples of one side do."""
        return 1 - self.sides <= 2 * (1 - self.within)


def state_similarity(config: CircuitBreakerConfig) -> list[Likeness]:
    """How alike the sides' mean hidden states are at the target layers; loads the model.

    Hidden states of one model have much in common whatever they are of, so a cosine near 1 says little by itself:
    it is to be read beside that of two halves of one side.

    Args:
        config: with `model` and data files that exist on this machine (`model.resolve`).

    Raises:
        InputError: configuration, model and data do not fit.
    """
    data, pad = prepare(config)
    with adapted_model(config) as model:
        decoder = Decoder(model, config.hidden_states)
        harmful = _sums(_spread(data.harmful.rows), config, pad, decoder)
        benign_rows = _spread(data.benign.rows)
        random.Random(0).shuffle(benign_rows)  # in files every other row may be of another kind
        halves = [_sums(benign_rows[i::2], config, pad, decoder) for i in range(2)]
    sides, within = _cosine(harmful, halves[0] + halves[1]), _cosine(*halves)
    return [Likeness(*each) for each in zip(config.target_layers, sides, within, strict=True)]


def _spread(rows: Sequence[TokenRow]) -> list[TokenRow]:
    return [rows[i * len(rows) // ROWS] for i in range(ROWS)] if len(rows) > ROWS else list(rows)


def _sums(rows: Sequence[TokenRow], config: CircuitBreakerConfig, pad: int, decoder: Decoder) -> Tensor:
    """[K, H] float64: hidden states at the target layers, summed over scored tokens; a cosine needs no mean."""
    total: Tensor | float = 0.0
    for batch in held_out_batches(list(rows), config.eval_batch_size, pad):
        states = decoder.teacher(batch.to(distributed.device()), config.target_layers, final=False)
        total = total + states.hidden.double().sum(0)
    assert isinstance(total, Tensor), "both sides have rows"
    return total


def _cosine(a: Tensor, b: Tensor) -> list[float]:
    return [float(each) for each in torch.nn.functional.cosine_similarity(a, b, dim=-1)]
