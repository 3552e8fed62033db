"""One micro-step of the method: a paired batch in, the weighted loss and its parts out.

The step is an `nn.Module` so that one engine forward holds all four passes (student and teacher, harmful and
benign), which is what DeepSpeed's hooks around a module's forward expect.
"""

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from cbtrain import distributed
from cbtrain.config import CircuitBreakerConfig
from cbtrain.data import PairedBatch, ScoredCounts
from cbtrain.losses import kl_divergence_loss, reroute_loss, retain_loss
from cbtrain.model import forward, retained_layers, teacher_view
from cbtrain.schedule import Coefficients


class StepOutput(NamedTuple):
    """A micro-step's share of the whole update: summed over micro-steps and ranks it is the update's mean.

    A tuple, since DeepSpeed looks for a module's output tensors in tuples and dictionaries only.
    """

    loss: Tensor
    """cs · loss_reroute + cr · loss_retain + kl_weight · loss_kl, with gradient."""
    parts: Tensor
    """[4]: loss, loss_reroute, loss_retain, loss_kl, detached."""


class CircuitBreakerStep(nn.Module):
    """loss = cs · loss_reroute + cr · (loss_retain + beta_kl · loss_kl), DESIGN §4."""

    def __init__(self, model: PeftModel, config: CircuitBreakerConfig) -> None:
        super().__init__()
        self.model: PeftModel = model
        self.config = config
        self.retained = retained_layers(model.get_base_model(), config)

    def forward(self, batch: PairedBatch, counts: ScoredCounts, weights: Coefficients) -> StepOutput:
        """Losses of one micro-batch.

        Args:
            batch: rows of this micro-step on this rank.
            counts: scored tokens and predictions of the whole update, over all micro-steps and ranks.
            weights: the coefficients of this update.
        """
        config, via = self.config, self.config.hidden_states
        device = distributed.device()
        harmful, benign = batch.harmful.to(device), batch.benign.to(device)
        with teacher_view(self.model):
            harmful_teacher = forward(self.model, harmful, config.target_layers, logits=False, via=via)
            benign_teacher = forward(self.model, benign, self.retained, logits=True, via=via)
        harmful_student = forward(self.model, harmful, config.target_layers, logits=False, via=via)
        benign_student = forward(self.model, benign, self.retained, logits=True, via=via)

        reroute = reroute_loss(harmful_student.hidden, harmful_teacher.hidden, harmful.loss_mask)
        retain = retain_loss(benign_student.hidden, benign_teacher.hidden, benign.loss_mask)
        predictions = benign.prediction_mask
        kl = kl_divergence_loss(
            benign_student.logits, benign_teacher.logits, loss_mask=predictions, temperature=config.kl_temperature
        )
        reroute = reroute * _share(harmful.loss_mask, counts.harmful_tokens)
        retain = retain * _share(benign.loss_mask, counts.benign_tokens)
        kl = kl * _share(predictions, counts.benign_predictions)
        loss = weights.cs * reroute + weights.cr * retain + weights.kl_weight * kl
        return StepOutput(loss=loss, parts=torch.stack([loss, reroute, retain, kl]).detach())


def _share(mask: Tensor, total: int) -> Tensor:
    """This micro-batch's share of the update's scored positions, which turns its mean into a part of theirs."""
    return mask.sum() / max(total, 1)
