"""Held-out metrics of a student against its teacher: a fixed set of rows, no schedule, comparable between trials.

Every metric is a mean over all scored positions of the held-out rows, summed in float64 over batches and ranks.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from cbtrain import distributed
from cbtrain.config import CircuitBreakerConfig
from cbtrain.data import CircuitBreakerData, TokenBatch, TokenRow, held_out_batches
from cbtrain.losses import nll, upcast
from cbtrain.model import Outputs, forward, retained_layers, student_mode, teacher_view


@dataclass(frozen=True)
class HeldOut:
    """The held-out batches of both sides, in a fixed order."""

    harmful: list[TokenBatch]
    benign: list[TokenBatch]


def held_out(data: CircuitBreakerData, config: CircuitBreakerConfig, pad_token_id: int) -> HeldOut:
    """Batches of `config.eval_batch_size` rows."""

    def batches(rows: list[TokenRow]) -> list[TokenBatch]:
        return held_out_batches(rows, config.eval_batch_size, pad_token_id)

    return HeldOut(harmful=batches(data.harmful.held_out), benign=batches(data.benign.held_out))


class Means:
    """Sums and counts of metrics by name, in float64; reduced over ranks when read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, name: str, values: Tensor, weight: int) -> None:
        """Add values of any shape, each counted `weight` (0 or 1) times."""
        pair = torch.stack([values.detach().double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
        self._sums[name] = self._sums[name] + weight * pair.cpu()

    def read(self) -> dict[str, float]:
        """The means over all ranks."""
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names]).to(distributed.device())
        sums, counts = distributed.reduce_sum(table).cpu().unbind(1)
        return dict(zip(names, (sums / counts).tolist(), strict=True))


@torch.no_grad()
def evaluate(model: PeftModel, batches: HeldOut, config: CircuitBreakerConfig) -> dict[str, float]:
    """Metrics on held-out rows, by name.

    `eval_loss_reroute`, and per target layer `eval_cosine_layer_K` (mean cosine) and `eval_cosine_positive_layer_K`
    (share of tokens with a cosine above 0); `eval_loss_retain` (units of the hidden state); `eval_benign_kl`
    (KL(teacher ‖ student) at T = 1, nats per scored prediction); `eval_benign_top1_agreement` (share of
    predictions whose most likely token is the teacher's); `eval_benign_nll`, `eval_harmful_nll` and the teacher's
    own `base_benign_nll`, `base_harmful_nll` (nats per scored prediction).
    """
    model.eval()
    means = Means()
    for batch, weight in _share(batches.harmful):
        _harmful_metrics(model, batch, config, means, weight)
    for batch, weight in _share(batches.benign):
        _benign_metrics(model, batch, config, means, weight)
    student_mode(model)
    return means.read()


def _share(batches: list[TokenBatch]) -> Iterator[tuple[TokenBatch, int]]:
    """This rank's batches; a rank that runs out repeats the first with weight 0, as every rank must do as many."""
    rank, world = distributed.rank(), distributed.world_size()
    for start in range(0, len(batches), world):
        mine = start + rank
        batch = batches[mine] if mine < len(batches) else batches[0]
        yield batch.to(distributed.device()), int(mine < len(batches))


def _both_views(model: PeftModel, batch: TokenBatch, layers: Sequence[int], via: str) -> tuple[Outputs, Outputs]:
    """Student and teacher on one batch, with logits."""
    student = forward(model, batch, layers, logits=True, via=via)
    with teacher_view(model):
        return student, forward(model, batch, layers, logits=True, via=via)


def _harmful_metrics(
    model: PeftModel, batch: TokenBatch, config: CircuitBreakerConfig, means: Means, weight: int
) -> None:
    student, teacher = _both_views(model, batch, config.target_layers, config.hidden_states)
    mask = batch.loss_mask
    for layer, ours, theirs in zip(config.target_layers, student.hidden, teacher.hidden, strict=True):
        cosine = F.cosine_similarity(upcast(ours[mask]), upcast(theirs[mask]), dim=-1)
        means.add("eval_loss_reroute", F.relu(cosine), weight)
        means.add(f"eval_cosine_layer_{layer}", cosine, weight)
        means.add(f"eval_cosine_positive_layer_{layer}", cosine > 0, weight)
    means.add("eval_harmful_nll", nll(student.logits, batch.input_ids, batch.prediction_mask), weight)
    means.add("base_harmful_nll", nll(teacher.logits, batch.input_ids, batch.prediction_mask), weight)


def _benign_metrics(
    model: PeftModel, batch: TokenBatch, config: CircuitBreakerConfig, means: Means, weight: int
) -> None:
    layers = retained_layers(model.get_base_model(), config)
    student, teacher = _both_views(model, batch, layers, config.hidden_states)
    for ours, theirs in zip(student.hidden, teacher.hidden, strict=True):
        difference = upcast(ours[batch.loss_mask]) - upcast(theirs[batch.loss_mask])
        means.add("eval_loss_retain", torch.linalg.vector_norm(difference, dim=-1), weight)
    predictions = batch.prediction_mask
    log_q = F.log_softmax(upcast(student.logits[predictions]), dim=-1)
    log_p = F.log_softmax(upcast(teacher.logits[predictions]), dim=-1)
    means.add("eval_benign_kl", (log_p.exp() * (log_p - log_q)).sum(-1), weight)
    means.add("eval_benign_top1_agreement", log_q.argmax(-1) == log_p.argmax(-1), weight)
    means.add("eval_benign_nll", nll(student.logits, batch.input_ids, predictions), weight)
    means.add("base_benign_nll", nll(teacher.logits, batch.input_ids, predictions), weight)
