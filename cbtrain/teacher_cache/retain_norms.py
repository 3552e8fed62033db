"""How long the teacher's hidden states are: the unit in which `retain_norm="relative"` measures a distance."""

import math
from dataclasses import replace

import torch

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.data.batches import held_out_batches
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.losses.losses import token_norm
from cbtrain.model.checks import retained_layers
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache.store import TeacherCache, with_teacher_states
from cbtrain.utils import distributed

MEASURED_ROWS = 1024
"""At most so many rows, evenly spread over the training side: their tokens tell the mean to a fraction of a percent."""


def with_retain_norms(
    config: CircuitBreakerConfig,
    data: CircuitBreakerData,
    pad_token_id: int,
    decoder: Decoder,
    cache: TeacherCache | None,
) -> CircuitBreakerConfig:
    """The configuration with `retain_norms`, measured where it needs them and has none. Every rank calls it.

    Each is the teacher's mean norm of one retained layer over scored benign training tokens, from the cache where
    there is one; the same number on every rank.

    Raises:
        InputError: a layer is 0 everywhere, so that nothing can be measured by its norm.
    """
    if config.retain_norm == "absolute" or config.retain_norms is not None:
        return config
    layers = retained_layers(config, decoder.layers)
    rows = data.benign.train
    chosen = [rows[i * len(rows) // MEASURED_ROWS] for i in range(MEASURED_ROWS)] if len(rows) > MEASURED_ROWS else rows
    batches = held_out_batches(chosen, config.eval_batch_size, pad_token_id)
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64, device=distributed.device())
    rank, world = distributed.rank(), distributed.world_size()
    for start in range(0, len(batches), world):
        # Under ZeRO-3 a pass is a collective: a rank without a batch of its own repeats one and counts nothing.
        mine, weight = (start + rank, 1) if start + rank < len(batches) else (0, 0)
        batch = with_teacher_states(batches[mine], layers, True, cache)
        states = batch.teacher or decoder.teacher(batch, layers, final=False)
        norms = token_norm(states.hidden).double()
        sums[:-1] += weight * norms.sum(0)
        sums[-1] += weight * len(norms)
    *totals, tokens = distributed.reduce_sum(sums).tolist()
    norms_of_layers = tuple(total / tokens for total in totals)
    for layer, norm in zip(layers, norms_of_layers, strict=True):
        if not (norm > 0 and math.isfinite(norm)):
            raise InputError(f"--retain-norm relative: the teacher's hidden state {layer} has the mean norm {norm:g}")
    return replace(config, retain_norms=norms_of_layers)
