"""A circuit-breaker step as public implementations write it: four whole forwards, every hidden state, all logits."""

import torch
import torch.nn.functional as F
from masks import prediction_mask, token_mask, whole
from peft import PeftModel
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import PairedBatch, TokenBatch
from cbtrain.losses.schedule import Coefficients


def four_forwards(model: PeftModel, harmful: TokenBatch, benign: TokenBatch):
    """The whole outputs: harmful teacher, benign teacher, harmful student, benign student."""

    def run(rows: TokenBatch):
        return model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True, use_cache=False
        )

    with model.disable_adapter(), torch.no_grad():
        teachers = run(harmful), run(benign)
    return *teachers, run(harmful), run(benign)


def seed_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The KL over all positions of [B, S, V], masked at the end."""
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    p = F.softmax(teacher_logits / temperature, dim=-1)
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1)
    return temperature**2 * (divergence * mask).sum() / mask.sum()


def plain_step(
    model: PeftModel, batch: PairedBatch, config: CircuitBreakerConfig, weights: Coefficients
) -> tuple[Tensor, Tensor]:
    """The loss with its graph, and [loss, loss_reroute, loss_retain, loss_kl]; means over this batch."""
    harmful, benign = whole(batch.harmful), whole(batch.benign)
    harmful_teacher, benign_teacher, harmful_student, benign_student = four_forwards(model, harmful, benign)
    layers = config.target_layers
    states = len(benign_student.hidden_states)
    retained = {"target": layers, "through_target": range(max(layers) + 1), "all": range(states)}[config.retain_layers]
    relative = config.retain_norm == "relative"
    scales = [config.retain_scale / norm for norm in config.retain_norms or ()] if relative else [1.0] * states
    mask = token_mask(harmful)
    cosines = [
        F.cosine_similarity(harmful_student.hidden_states[k], harmful_teacher.hidden_states[k], dim=-1)[mask]
        for k in layers
    ]
    mask = token_mask(benign)
    distances = [
        scale * (benign_student.hidden_states[k] - benign_teacher.hidden_states[k])[mask].norm(dim=-1)
        for k, scale in zip(retained, scales, strict=relative)
    ]
    reroute, retain = F.relu(torch.cat(cosines)).mean(), torch.cat(distances).mean()
    kl = seed_kl(benign_student.logits, benign_teacher.logits, prediction_mask(benign), config.kl_temperature)
    loss = weights.cs * reroute + weights.cr * retain + weights.kl_weight * kl
    return loss, torch.stack([loss, reroute, retain, kl]).detach()
