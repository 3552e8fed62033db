"""How much memory a rank of a trial needs at its peak, predicted from configuration and model structure alone.

The model is built without weights or memory (`meta` device). What its blocks keep for the backward is counted there,
by running them, so a new architecture needs no formula; all other terms are formulas, a line each in `Prediction`.
Two peaks are compared: a micro-step at the end of its forward, when the graphs of both sides are alive, and a held-out
forward. Libraries, the CUDA context and an allocator's unused blocks come on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import check_batch
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.tokenization import TokenRow
from cbtrain.evaluation.held_out import CHUNK_BYTES
from cbtrain.losses.head_products import BLOCK_BYTES, CPU_BYTES, CPU_ROWS, CUDA_BYTES, TILE_BYTES, rows_per_chunk
from cbtrain.model.checks import retained_layers
from cbtrain.model.loading import load_structure
from cbtrain.model.lora import add_adapter, decoder_blocks
from cbtrain.utils.errors import named

TRACED_TOKENS = 32
"""What blocks keep grows with the tokens, so few are traced."""
ELEMENTWISE = 6
"""[rows, V] tensors of the KL's elementwise part that are alive together, beside its two buffers."""
EVALUATED = 7
"""[rows, V] tensors that a held-out chunk of predictions has alive together."""
PASSING = 4
"""Tensors of a block's widest layer that are alive within its forward or backward, beside what is kept."""
_ATTENTION = "memory_prediction"


@dataclass(frozen=True)
class Rows:
    """A batch of one side."""

    count: int
    length: int
    """Tokens, padding included."""
    scored: int
    """Scored tokens of all rows."""

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Prediction:
    """Bytes of one rank, by what holds them."""

    weights: int
    """The frozen model; under ZeRO-3 this rank's part, and two blocks, or the head, gathered whole."""
    adapter: int
    """Trained weights in the model's dtype."""
    optimizer: int
    """Their float32 copy and AdamW's two moments, 12 bytes a weight; ZeRO divides them among the ranks."""
    gradients: int
    """Of the trained weights: as the backward leaves them, in the bucket that is reduced, and what ZeRO keeps."""
    activations: int
    """What the student's passes of both sides keep for the backward, from the first adapted block to the last one
    whose output a loss reads; with checkpointing a state a block, and one block whole."""
    teacher: int
    """Both views' states at the scored positions, and the float32 copies that the losses make of them."""
    head: int
    """The KL's two buffers of logits, its elementwise part, and its gradient [M, H]."""
    passing: int
    """Tensors that live within one block's forward or backward."""
    evaluation: int
    """A held-out forward, of which no backward keeps anything: passing states, states at scored positions, logits."""

    @property
    def standing(self) -> int:
        """What is there all the time."""
        return self.weights + self.adapter + self.optimizer

    @property
    def peak(self) -> int:
        """The larger of the two peaks."""
        ahead = self.activations + self.teacher + max(self.head, self.passing)
        return self.standing + self.gradients + max(ahead, self.evaluation)


def structure(config: CircuitBreakerConfig, model: PretrainedConfig) -> PeftModel:
    """The adapted model without weights."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            model, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
        adapted = add_adapter(base.requires_grad_(False), config)
        return adapted.to(getattr(torch, config.dtype))


def predict(
    config: CircuitBreakerConfig,
    adapted: PeftModel,
    harmful: Rows,
    benign: Rows,
    held_out: Rows,
    *,
    world_size: int = 1,
    cuda: bool = False,
) -> Prediction:
    """The peak memory of one rank.

    Args:
        adapted: of `structure`.
        harmful, benign: a micro-step's rows on one rank.
        held_out: the largest held-out batch.
        cuda: whether the step runs on a GPU, where chunks of logits are larger and the head enters in its own dtype.
    """
    text = adapted.get_base_model().config.get_text_config()
    vocabulary, hidden, blocks = text.vocab_size, text.hidden_size, text.num_hidden_layers
    size = getattr(torch, config.dtype).itemsize
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    partitions = world_size if config.zero_stage else 1
    targets, retained = len(config.target_layers), len(retained_layers(config, blocks))
    kept = _kept_by_token(adapted)
    state_bytes = harmful.scored * targets + benign.scored * (retained + 1)
    widest = max(max(weight.shape) for weight in _matrices(adapted))
    passing = PASSING * max(harmful.tokens, benign.tokens) * widest * size
    return Prediction(
        weights=_weights(config, adapted, world_size),
        adapter=trained * size,
        optimizer=0 if config.cpu_offload and cuda else 12 * trained // partitions,
        gradients=trained * (2 * size if config.zero_stage else size) + (4 * trained // partitions),
        activations=_activations(config, kept, harmful, benign, hidden * size),
        teacher=state_bytes * hidden * (2 * size + 3 * 4),
        head=_head(benign.scored, vocabulary, hidden, cuda=cuda),
        passing=passing,
        evaluation=_evaluation(held_out, vocabulary, hidden, max(targets, retained) + 1, widest, size),
    )


def predict_run(
    config: CircuitBreakerConfig, data: CircuitBreakerData, *, world_size: int = 1, cuda: bool = False
) -> Prediction:
    """`predict` for a run on these rows, taking the longest of each side for a micro-step.

    Raises:
        ValueError: the model cannot be traced without its weights; says why.
    """

    def longest(rows: Sequence[TokenRow], count: int) -> Rows:
        scored = sorted(row.scored_tokens for row in rows)[-count:]
        return Rows(min(count, len(rows)), max(len(row.input_ids) for row in rows), sum(scored))

    count = check_batch(config, world_size)
    held_out = [longest(side.held_out, config.eval_batch_size) for side in (data.harmful, data.benign)]
    sides = longest(data.harmful.train, count), longest(data.benign.train, count)
    largest = max(held_out, key=lambda rows: rows.tokens)
    try:
        adapted = structure(config, load_structure(config.model, config.trust_remote_code))
        return predict(config, adapted, *sides, largest, world_size=world_size, cuda=cuda)
    except Exception as error:  # of experts that are chosen by value, or whatever another build makes of it
        raise ValueError(f"the model cannot be traced without its weights ({named(error)})") from error


def _weights(config: CircuitBreakerConfig, adapted: PeftModel, world_size: int) -> int:
    """The frozen weights; ZeRO-3 gathers a block while the next one is fetched, and the head for its chunks."""
    frozen = {id(p): p for p in adapted.parameters() if not p.requires_grad}
    total = sum(p.numel() * p.element_size() for p in frozen.values())
    if config.zero_stage < 3 or world_size == 1:
        return total
    found = decoder_blocks(adapted.get_base_model())
    largest = max(sum(p.numel() * p.element_size() for p in b.parameters()) for b in (found[1] if found else [adapted]))
    head = adapted.get_base_model().get_output_embeddings().weight
    return total // world_size + max(2 * largest, head.numel() * head.element_size())


def _matrices(adapted: PeftModel) -> list[Tensor]:
    """The weights of the blocks' linear maps, the adapter's left out."""
    found = decoder_blocks(adapted.get_base_model())
    parameters = found[1].parameters() if found else adapted.parameters()
    return [p for p in parameters if p.ndim == 2 and not p.requires_grad]


def _activations(config: CircuitBreakerConfig, kept: Sequence[int], harmful: Rows, benign: Rows, state: int) -> int:
    """Bytes of both sides' graphs; `state` is the size of one token's hidden state."""
    adapted = sorted(config.lora_layers or range(len(kept)))
    top = len(kept) if config.hidden_states == "output_hidden_states" else max(config.target_layers)
    total = 0
    for rows, last in ((harmful, top), (benign, len(kept) if config.beta_kl > 0 else top)):
        graph = kept[adapted[0] : last]
        if config.gradient_checkpointing:
            total += rows.tokens * state * len(graph)
        else:
            total += rows.tokens * sum(graph)
    recomputed = max(harmful.tokens, benign.tokens) * max(kept) if config.gradient_checkpointing else 0
    return total + recomputed


def _head(predictions: int, vocabulary: int, hidden: int, *, cuda: bool) -> int:
    """Bytes of the KL's chunks and its gradient."""
    gradient = predictions * hidden * 4
    if cuda:
        rows = min(predictions, rows_per_chunk(vocabulary, CUDA_BYTES))
        return gradient + 3 * rows * vocabulary * 4
    rows = min(predictions, CPU_ROWS, rows_per_chunk(vocabulary, CPU_BYTES))
    return gradient + 2 * rows * vocabulary * 4 + ELEMENTWISE * max(BLOCK_BYTES, vocabulary * 4) + TILE_BYTES


def _evaluation(rows: Rows, vocabulary: int, hidden: int, layers: int, widest: int, size: int) -> int:
    """Bytes of a held-out batch: both views' states, and the larger of a block's own tensors and the logits."""
    states = rows.tokens * hidden * size * (layers + 2) + 2 * rows.scored * layers * hidden * (size + 4)
    chunk = min(rows.scored, rows_per_chunk(vocabulary, CHUNK_BYTES)) * vocabulary * 4
    return states + max(PASSING * rows.tokens * widest * size, EVALUATED * chunk)


def _kept_by_token(adapted: PeftModel) -> list[int]:
    """Bytes that each block keeps for the backward of one token, counted by autograd; weights are not kept anew."""
    base = adapted.get_base_model()
    found = decoder_blocks(base)
    if found is None:
        raise ValueError(f"found no list of decoder blocks in {type(base).__name__}")
    weights = {p.untyped_storage()._cdata for p in adapted.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}  # the tensor is held, so that its storage's place is not given anew

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = tensor, storage.nbytes()
        return tensor

    marks = [0]
    count = [b.register_forward_hook(lambda *_: marks.append(sum(n for _, n in storages.values()))) for b in found[1]]
    before = base.config._attn_implementation
    try:
        base.set_attn_implementation(_ATTENTION)
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            length = TRACED_TOKENS
            mask = torch.ones(1, 1, length, length, dtype=torch.bool)
            base.get_decoder()(
                input_ids=torch.zeros(1, length, dtype=torch.int64), attention_mask=mask, use_cache=False
            )
    finally:
        base.set_attn_implementation(before)
        for handle in count:
            handle.remove()
    return [-(-(after - earlier) // TRACED_TOKENS) for earlier, after in pairwise(marks)]


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels keep: queries, keys, values, output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **_: Any
) -> tuple[Tensor, None]:
    """What the model library calls; with a mask it hands the kernel keys and values repeated for each query head."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _Attention.apply(query, key, value), None


AttentionInterface.register(_ATTENTION, _attention)
