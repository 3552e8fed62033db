"""A batch's scored places as the boolean masks that they come from."""

import torch

from cbtrain.batches import TokenBatch


def token_mask(batch: TokenBatch) -> torch.Tensor:
    """[B, S], True at scored tokens."""
    return _mask(batch, batch.scored_tokens)


def prediction_mask(batch: TokenBatch) -> torch.Tensor:
    """[B, S], True where the next token is scored."""
    return _mask(batch, batch.scored_predictions)


def _mask(batch: TokenBatch, places: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.reshape(batch.input_ids.shape)
