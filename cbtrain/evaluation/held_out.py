"""Held-out metrics of a student against its teacher: a fixed set of rows, no schedule, comparable between trials.

Every metric is a mean over all scored positions of the held-out rows, summed in float64 over batches and ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import TeacherStates, TokenBatch, held_out_batches
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.tokenization import TokenRow
from cbtrain.losses.head_products import rows_per_chunk, teacher_logits_and_difference
from cbtrain.losses.losses import nll, token_cosine, token_kl, token_l2, token_norm
from cbtrain.model.checks import retained_layers
from cbtrain.model.lora import student_mode
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache.store import TeacherCache, with_teacher_states
from cbtrain.utils import distributed

CHUNK_BYTES = 64 * 2**20
"""Of each of the two [chunk, V] tensors of logits."""


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
        self._sums: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros(2, dtype=torch.float64, device=distributed.device())
        )

    def add(self, name: str, values: Tensor, weight: int) -> None:
        """Add values of any shape, each counted `weight` (0 or 1) times."""
        pair = torch.stack([values.detach().double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
        self._sums[name] = self._sums[name] + weight * pair

    def read(self) -> dict[str, float]:
        """The means over all ranks."""
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        sums, counts = distributed.reduce_sum(table).cpu().unbind(1)
        return dict(zip(names, (sums / counts).tolist(), strict=True))


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    batches: HeldOut,
    config: CircuitBreakerConfig,
    cache: TeacherCache | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics on held-out rows, by name.

    `before_each` is called before each batch, as often on every rank, and may raise.

    `eval_loss_reroute`, and per target layer `eval_cosine_layer_K` (mean cosine) and `eval_cosine_positive_layer_K`
    (share of tokens with a cosine above 0); `eval_loss_retain` (units of the hidden state) and
    `eval_loss_retain_relative` (each layer's distance as a share of the teacher's mean norm there, comparable between
    models), and per target layer that share, `eval_distance_layer_K`, and norm, `base_norm_layer_K`; `eval_benign_kl`
    (KL(teacher ‖ student) at T = 1, nats per scored prediction); `eval_benign_top1_agreement` (share of predictions
    whose most likely token is the teacher's); `eval_benign_nll`, `eval_harmful_nll` and the teacher's own
    `base_benign_nll`, `base_harmful_nll` (nats per scored prediction).
    """
    decoder.model.eval()
    means = Means()
    targets, retained = config.target_layers, retained_layers(config, decoder.layers)
    for batch, weight in _share(batches.harmful):
        before_each()
        student, teacher = decoder.states(with_teacher_states(batch, targets, True, cache), targets, final=True)
        _add_cosines(student, teacher, targets, means, weight)
        for logits, difference, following in _predictions(decoder, batch, student, teacher):
            means.add("eval_harmful_nll", nll(logits + difference, following), weight)
            means.add("base_harmful_nll", nll(logits, following), weight)
    for batch, weight in _share(batches.benign):
        before_each()
        student, teacher = decoder.states(with_teacher_states(batch, retained, True, cache), retained, final=True)
        _add_distances(student, teacher, retained, means, weight)
        for logits, difference, following in _predictions(decoder, batch, student, teacher):
            _add_drift(logits, difference, following, means, weight)
    student_mode(decoder.model)
    return _relative(means.read(), targets, retained)


class RowNLL(NamedTuple):
    """Negative log-likelihood of each of a row's scored tokens that is predicted, nats."""

    student: tuple[float, ...]
    teacher: tuple[float, ...]


@torch.no_grad()
def row_nll(
    decoder: Decoder, rows: Sequence[TokenRow], config: CircuitBreakerConfig, pad_token_id: int
) -> list[RowNLL]:
    """The NLL of each row by itself under student and teacher, in the order of `rows`; every rank does all of them."""
    decoder.model.eval()
    found: dict[int, RowNLL] = {}
    for batch in held_out_batches(rows, config.eval_batch_size, pad_token_id):
        student, teacher = decoder.states(batch.to(distributed.device()), config.target_layers, final=True)
        chunks = [
            torch.stack([nll(logits + difference, following), nll(logits, following)]).double()
            for logits, difference, following in _predictions(decoder, batch, student, teacher)
        ]
        counts = [row.scored_predictions for row in batch.rows]
        parts = torch.cat(chunks, dim=1).cpu().split(counts, dim=1) if chunks else [torch.zeros(2, 0)] * len(counts)
        for row, part in zip(batch.rows, parts, strict=True):
            found[id(row)] = RowNLL(*map(tuple, part.tolist()))
    student_mode(decoder.model)
    return [found[id(row)] for row in rows]


def _share(batches: list[TokenBatch]) -> Iterator[tuple[TokenBatch, int]]:
    """This rank's batches; a rank that runs out repeats the first with weight 0, as every rank must do as many."""
    rank, world = distributed.rank(), distributed.world_size()
    for start in range(0, len(batches), world):
        mine = start + rank
        yield batches[mine] if mine < len(batches) else batches[0], int(mine < len(batches))


def _add_cosines(
    student: TeacherStates, teacher: TeacherStates, layers: Sequence[int], means: Means, weight: int
) -> None:
    cosine = token_cosine(student.hidden, teacher.hidden)
    means.add("eval_loss_reroute", F.relu(cosine), weight)
    for layer, values in zip(layers, cosine.unbind(1), strict=True):
        means.add(f"eval_cosine_layer_{layer}", values, weight)
        means.add(f"eval_cosine_positive_layer_{layer}", values > 0, weight)


def _add_distances(
    student: TeacherStates, teacher: TeacherStates, layers: Sequence[int], means: Means, weight: int
) -> None:
    distance, norm = token_l2(student.hidden, teacher.hidden), token_norm(teacher.hidden)
    means.add("eval_loss_retain", distance, weight)
    for index, layer in enumerate(layers):
        means.add(f"distance_{layer}", distance[:, index], weight)
        means.add(f"norm_{layer}", norm[:, index], weight)


def _relative(metrics: dict[str, float], targets: Sequence[int], retained: Sequence[int]) -> dict[str, float]:
    """The metrics with each layer's mean distance and norm made into the relative retain loss."""
    norms = {layer: metrics.pop(f"norm_{layer}") for layer in retained}
    shares = {layer: metrics.pop(f"distance_{layer}") / norms[layer] for layer in retained}
    metrics["eval_loss_retain_relative"] = fmean(shares.values())
    for layer in targets:
        metrics |= {f"base_norm_layer_{layer}": norms[layer], f"eval_distance_layer_{layer}": shares[layer]}
    return metrics


def _predictions(
    decoder: Decoder, batch: TokenBatch, student: TeacherStates, teacher: TeacherStates
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of a chunk of predictions at a time: the teacher's logits, the student's less those, the tokens that came."""
    following = batch.input_ids.flatten()[batch.scored_predictions + 1].to(distributed.device())
    with distributed.gathered(decoder.head.parameters()):
        head, scale = decoder.head.arguments(), decoder.head.scale
        rows = rows_per_chunk(head["lm_head_weight"].shape[0], CHUNK_BYTES)
        for start in range(0, len(following), rows):
            chunk = slice(start, start + rows)
            logits, difference = teacher_logits_and_difference(
                student.head_input[chunk], teacher.head_input[chunk], **head
            )
            yield scale * logits, scale * difference, following[chunk]


def _add_drift(logits: Tensor, difference: Tensor, following: Tensor, means: Means, weight: int) -> None:
    log_p, log_q = F.log_softmax(logits, dim=-1), F.log_softmax(logits + difference, dim=-1)
    means.add("eval_benign_kl", token_kl(log_p, log_q), weight)
    means.add("eval_benign_top1_agreement", log_q.argmax(-1) == log_p.argmax(-1), weight)
    means.add("eval_benign_nll", F.nll_loss(log_q, following, reduction="none"), weight)
    means.add("base_benign_nll", F.nll_loss(log_p, following, reduction="none"), weight)
