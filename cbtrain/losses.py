"""The three losses of a circuit breaker: tensors in, a scalar out, nothing kept.

Shapes: B rows, S positions, V vocabulary, H hidden size. Each loss is a mean over the scored positions of its
own batch, in float32 or better whatever the input's dtype, and carries gradients to the student only. A batch
without a scored position gives 0 with the student's graph intact, so that every rank still reaches backward.

Source: Zou et al. 2024, "Improving Alignment and Robustness with Circuit Breakers", Algorithm 1, for reroute
and retain; Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", for the T² of the KL term.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scored(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Scored positions of every layer, upcast: [L, N, H]."""
    return upcast(torch.stack([layer[mask] for layer in hidden]))


def _mean(values: Tensor) -> Tensor:
    """The mean, and 0 with the graph intact where there is nothing to average."""
    return values.sum() / max(values.numel(), 1)


def reroute_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over layers and scored tokens of ReLU(cos(h_student, h_teacher)); 1 where nothing has moved.

    Args:
        student, teacher: hidden states of the target layers, each [B, S, H].
        mask: scored harmful tokens, bool [B, S].
    """
    cosine = F.cosine_similarity(_scored(student, mask), _scored(teacher, mask).detach(), dim=-1)
    return _mean(F.relu(cosine))


def retain_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over layers and scored tokens of ‖h_student − h_teacher‖₂, in units of the hidden state.

    Args:
        student, teacher: hidden states of the retained layers, each [B, S, H].
        mask: scored benign tokens, bool [B, S].
    """
    difference = _scored(student, mask) - _scored(teacher, mask).detach()
    return _mean(torch.linalg.vector_norm(difference, dim=-1))


def kl_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    attention_mask: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, mean over the selected positions, in nats per token.

    The tensors are taken as aligned: position i of the masks selects position i of the logits. For a causal
    model whose mask marks *tokens*, shift it by one first (`TokenBatch.prediction_mask`).

    Args:
        student_logits, teacher_logits: [..., V].
        attention_mask, loss_mask: [...]; their product selects, None selects all. Entries other than 0 and 1
            weigh a position.
        temperature: T > 0.

    Raises:
        ValueError: temperature is not positive, or shapes differ.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be more than 0")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}")
    weight = torch.ones(student_logits.shape[:-1], device=student_logits.device, dtype=torch.float32)
    for mask in (attention_mask, loss_mask):
        if mask is not None:
            weight = weight * mask.to(weight)
    selected = weight != 0
    weight = weight[selected]
    log_q = F.log_softmax(upcast(student_logits[selected]) / temperature, dim=-1)
    log_p = F.log_softmax(upcast(teacher_logits[selected]).detach() / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    total = weight.sum()
    return temperature**2 * (weight * divergence).sum() / torch.where(total > 0, total, 1)


def nll(logits: Tensor, input_ids: Tensor, prediction_mask: Tensor) -> Tensor:
    """Negative log-likelihood of the token after each scored prediction: [N], nats.

    Args:
        logits: [B, S, V], where logits[:, i] predicts token i + 1.
        input_ids: int64 [B, S].
        prediction_mask: bool [B, S], False in the last column.
    """
    targets = torch.roll(input_ids, -1, dims=1)[prediction_mask]
    return F.cross_entropy(upcast(logits[prediction_mask]), targets, reduction="none")
