"""One micro-step of the method: a paired batch in, the weighted loss and its parts out.

The step is an `nn.Module` so that one engine forward holds all passes (student and teacher, harmful and benign),
which is what DeepSpeed's hooks around a module's forward expect.
"""

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import PairedBatch, ScoredCounts, TeacherStates
from cbtrain.losses.fused_kl import fused_linear_kl
from cbtrain.losses.losses import relative_retain_loss, reroute_loss, retain_loss
from cbtrain.losses.schedule import Coefficients
from cbtrain.model.checks import retained_layers
from cbtrain.model.partial_forward import Decoder
from cbtrain.utils import distributed
from cbtrain.utils.profile import OFF


class StepOutput(NamedTuple):
    """A micro-step's share of the whole update: summed over micro-steps and ranks it is the update's mean.

    A tuple, since DeepSpeed looks for a module's output tensors in tuples and dictionaries only.
    """

    loss: Tensor
    """cs · loss_reroute + cr · loss_retain + kl_weight · loss_kl, with gradient."""
    parts: Tensor
    """[4]: loss, loss_reroute, loss_retain, loss_kl, detached."""


class CircuitBreakerStep(nn.Module):
    """loss = cs · loss_reroute + cr · (loss_retain + beta_kl · loss_kl); the parts are in `cbtrain/README.md`."""

    def __init__(self, model: PeftModel, config: CircuitBreakerConfig) -> None:
        super().__init__()
        self.model: PeftModel = model
        self.config = config
        self.decoder = Decoder(model, config.hidden_states)
        self.retained = retained_layers(config, self.decoder.layers)
        self.profile = OFF

    def forward(self, batch: PairedBatch, counts: ScoredCounts, weights: Coefficients) -> StepOutput:
        """Losses of one micro-batch.

        Args:
            batch: rows of this micro-step on this rank, on the model's device.
            counts: scored tokens and predictions of the whole update, over all micro-steps and ranks.
            weights: the coefficients of this update.
        """
        losses = self.losses(batch, counts, weights)
        loss = weights.cs * losses[0] + weights.cr * losses[1] + weights.kl_weight * losses[2]
        return StepOutput(loss=loss, parts=torch.stack([loss, *losses]).detach())

    def losses(self, batch: PairedBatch, counts: ScoredCounts, weights: Coefficients) -> list[Tensor]:
        """loss_reroute, loss_retain and loss_kl of a micro-batch, unweighted; the arguments are those of `forward`."""
        reroute, retain, kl = [], [], []
        for rows in batch.harmful:
            with self.profile.span("forward_harmful"):
                student, teacher = self.decoder.states(rows, self.config.target_layers, final=False)
                reroute.append(reroute_loss(student.hidden, teacher.hidden, counts.harmful_tokens))
        for rows in batch.benign:
            with self.profile.span("forward_benign"):
                student, teacher = self.decoder.states(
                    rows, self.retained, final=True, final_gradient=weights.kl_weight > 0
                )
                retain.append(self._retain(student.hidden, teacher.hidden, counts.benign_tokens))
            with self.profile.span("kl"):
                kl.append(self._kl(student, teacher, counts.benign_predictions))
        return [torch.stack(shares).sum() for shares in (reroute, retain, kl)]

    def _retain(self, student: Tensor, teacher: Tensor, denominator: int) -> Tensor:
        if self.config.retain_norm == "absolute":
            return retain_loss(student, teacher, denominator)
        assert self.config.retain_norms is not None, "measured before the first step"
        return relative_retain_loss(student, teacher, self.config.retain_norms, self.config.retain_scale, denominator)

    def _kl(self, student: TeacherStates, teacher: TeacherStates, denominator: int) -> Tensor:
        """T² · KL(T) of scaled logits is scale² · (T / scale)² · KL(T / scale) of the head's own."""
        head = self.decoder.head
        with distributed.gathered(head.parameters()):
            return head.scale**2 * fused_linear_kl(
                student.head_input,
                teacher.head_input,
                temperature=self.config.kl_temperature / head.scale,
                denominator=max(denominator, 1),
                **head.arguments(),
            )
