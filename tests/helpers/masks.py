"""Batches in the forms that public code has them in: all rows padded alike, boolean masks."""

from collections.abc import Sequence

import torch

from cbtrain.data.batches import TokenBatch, collate


def whole(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The rows of a micro-step's side as one batch."""
    return collate([row for batch in batches for row in batch.rows], 0).to(batches[0].input_ids.device)


def token_mask(batch: TokenBatch) -> torch.Tensor:
    """[B, S], True at scored tokens."""
    return _mask(batch, batch.scored_tokens)


def prediction_mask(batch: TokenBatch) -> torch.Tensor:
    """[B, S], True where the next token is scored."""
    return _mask(batch, batch.scored_predictions)


def _mask(batch: TokenBatch, places: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=places.device)
    mask[places] = True
    return mask.reshape(batch.input_ids.shape)
