"""How strongly each term of the loss pulls at the adapter: gradient norms, and whether the terms oppose each other.

The sum of the losses hides a term that holds another back: a run then stands still at a point where their gradients
cancel. Seen apart, at a few training rows that are always the same, they tell which term does it.
"""

import torch
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import PairedBatch, ScoredCounts, collate
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.losses.schedule import coefficients
from cbtrain.model.lora import student_mode
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils import distributed

SHARE = 4
"""One in so many rows of a batch are looked at: three backward passes then cost half an update."""


class GradientNorms:
    """The three weighted terms' gradients over the adapter, at fixed rows without dropout."""

    def __init__(self, data: CircuitBreakerData, config: CircuitBreakerConfig, pad_token_id: int) -> None:
        rows = max(1, config.batch_size // SHARE)
        harmful, benign = data.harmful.train[:rows], data.benign.train[:rows]
        self._config = config
        self._batch = PairedBatch((collate(harmful, pad_token_id),), (collate(benign, pad_token_id),))
        self._counts = ScoredCounts(
            harmful_tokens=sum(row.scored_tokens for row in harmful),
            benign_tokens=sum(row.scored_tokens for row in benign),
            benign_predictions=sum(row.scored_predictions for row in benign),
            tokens=sum(len(row.input_ids) for row in (*harmful, *benign)),
        )

    def measure(self, step: CircuitBreakerStep, done: int) -> dict[str, float]:
        """Norms after `done` updates, with the coefficients of the last; every rank computes the same.

        `grad_norm_reroute`, `grad_norm_retain`, `grad_norm_kl`, and `grad_cosine_reroute`, the cosine between the
        first gradient and the sum of the others: −1 where they cancel. 0 where a gradient is 0. Nothing under ZeRO-3,
        where no rank holds the whole adapter.
        """
        if self._config.zero_stage == 3:
            return {}
        parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
        device = distributed.device()
        step.model.eval()
        weights = coefficients(self._config, done - 1)
        losses = step.losses(self._batch.each(lambda rows: rows.to(device)), self._counts, weights)
        reroute, retain, kl = (
            _gradient(weight, loss, parameters)
            for weight, loss in zip((weights.cs, weights.cr, weights.kl_weight), losses, strict=True)
        )
        student_mode(step.model)
        against = retain + kl
        product = (reroute.norm() * against.norm()).clamp(min=torch.finfo(torch.float32).tiny)
        values = torch.stack([reroute.norm(), retain.norm(), kl.norm(), reroute.dot(against) / product])
        names = ("grad_norm_reroute", "grad_norm_retain", "grad_norm_kl", "grad_cosine_reroute")
        return dict(zip(names, values.tolist(), strict=True))


def _gradient(weight: float, loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """The weighted loss's gradient over all parameters as one vector, in float32; 0 where nothing reaches them."""
    zero = torch.zeros(sum(parameter.numel() for parameter in parameters), device=loss.device)
    if weight == 0 or not loss.requires_grad:
        return zero
    found = torch.autograd.grad(weight * loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
    )
