"""What training and evaluation ask of the teacher, row by row, and the key under which the cache holds it."""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.tokenization import TokenRow

FORMAT = 1
"""Of shards and keys; part of every key."""


@dataclass(frozen=True)
class WantedStates:
    """What is asked of the teacher for one row."""

    row: TokenRow
    layers: tuple[int, ...]
    """Indices into `hidden_states`: K of them at each scored token."""
    final: bool
    """Whether the state after the final norm is asked for too, at each scored prediction."""

    @functools.cached_property
    def key(self) -> str:
        """sha256 of token ids, scored mask, layers and `final`."""
        ids = self.row.input_ids
        digest = hashlib.sha256(repr((FORMAT, len(ids), self.layers, self.final)).encode())
        digest.update(array("q", ids).tobytes())
        digest.update(bytes(self.row.scored))
        return digest.hexdigest()

    @property
    def kind(self) -> tuple[tuple[int, ...], bool]:
        """Rows of one kind share batches and shards."""
        return self.layers, self.final

    @property
    def counts(self) -> tuple[int, int]:
        """Scored tokens, and scored predictions whose final state is kept."""
        return self.row.scored_tokens, self.row.scored_predictions * self.final

    def bytes(self, hidden_size: int, dtype: str) -> int:
        """Bytes of its tensors."""
        tokens, predictions = self.counts
        return (tokens * len(self.layers) + predictions) * hidden_size * getattr(torch, dtype).itemsize


def wanted_states(
    data: CircuitBreakerData, target_layers: Sequence[int], retained_layers: Sequence[int]
) -> list[WantedStates]:
    """What training and evaluation ask of the teacher, each once, in the data's order.

    Final states are the KL's on benign rows, and give the teacher's own NLL on held-out ones.
    """
    kinds = [
        (data.harmful.train, target_layers, False),
        (data.harmful.held_out, target_layers, True),
        (data.benign.train, retained_layers, True),
        (data.benign.held_out, retained_layers, True),
    ]
    wanted = [WantedStates(row, tuple(layers), final) for rows, layers, final in kinds for row in rows]
    return list({each.key: each for each in wanted}.values())


def estimated_bytes(wanted: Sequence[WantedStates], hidden_size: int, dtype: str) -> int:
    """Bytes that the cache takes on disk, but for some hundred a row of names and headers."""
    return sum(each.bytes(hidden_size, dtype) for each in wanted)
