"""The three losses of a circuit breaker: tensors in, a scalar out, nothing kept.

Shapes: N scored tokens, K layers, H hidden size, V vocabulary. Each loss is computed in float32 or better whatever
the input's dtype and carries gradients to the student only. It is a mean over its own scored positions, or a share of a
larger batch's mean where that one's count is given. Without a scored position it is 0 with the student's graph intact,
so that every rank still reaches backward.

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


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """cos(h_student, h_teacher) of hidden states [..., H] at each position: [...], in float32 or better."""
    return F.cosine_similarity(upcast(student), upcast(teacher), dim=-1)


def token_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """‖h_student − h_teacher‖₂ of hidden states [..., H] at each position: [...], in units of the hidden state."""
    distance: Tensor = torch.linalg.vector_norm(upcast(student) - upcast(teacher), dim=-1)
    return distance


def token_norm(hidden: Tensor) -> Tensor:
    """‖h‖₂ of hidden states [..., H] at each position: [...], in float32 or better."""
    norm: Tensor = torch.linalg.vector_norm(upcast(hidden), dim=-1)
    return norm


def token_kl(teacher_log_p: Tensor, student_log_q: Tensor) -> Tensor:
    """Σ_v p_v (log p_v − log q_v) of log-probabilities [..., V] at each position: [...], in nats."""
    return (teacher_log_p.exp() * (teacher_log_p - student_log_q)).sum(dim=-1)


def reroute_loss(student: Tensor, teacher: Tensor, denominator: int | None = None) -> Tensor:
    """Mean over layers and scored tokens of ReLU(cos(h_student, h_teacher)); 1 where nothing has moved.

    Args:
        student, teacher: hidden states of K target layers at N scored harmful tokens, [N, K, H].
        denominator: tokens that the mean is over; None is N.
    """
    return _mean(F.relu(token_cosine(student, teacher.detach())), denominator)


def retain_loss(student: Tensor, teacher: Tensor, denominator: int | None = None) -> Tensor:
    """Mean over layers and scored tokens of ‖h_student − h_teacher‖₂, in units of the hidden state.

    Args:
        student, teacher: hidden states of K retained layers at N scored benign tokens, [N, K, H].
        denominator: tokens that the mean is over; None is N.
    """
    return _mean(token_l2(student, teacher.detach()), denominator)


def relative_retain_loss(
    student: Tensor, teacher: Tensor, norms: Sequence[float], scale: float, denominator: int | None = None
) -> Tensor:
    """Mean over layers and scored tokens of scale · ‖h_student − h_teacher‖₂ / norm of the layer; no unit.

    The reroute term is a cosine, whose gradient is sin θ / ‖h‖; that of a plain distance is 1 whatever ‖h‖ is. So with
    long hidden states a plain distance outweighs the cosine by ‖h‖. Divided by the layer's own norm both go as 1 / ‖h‖,
    and `scale` is the norm at which the two forms are the same.

    Args:
        student, teacher: hidden states of K retained layers at N scored benign tokens, [N, K, H].
        norms: the teacher's mean norm of each of the K layers.
        scale: the loss at a distance of a whole norm.
        denominator: tokens that the mean is over; None is N.
    """
    distance = token_l2(student, teacher.detach())
    return _mean(distance * (scale / distance.new_tensor(norms)), denominator)


def _mean(values: Tensor, denominator: int | None) -> Tensor:
    """The mean of [N, K] over layers and `denominator` tokens; 0 with the graph intact where there is none."""
    tokens, layers = values.shape
    return values.sum() / (layers * max(tokens if denominator is None else denominator, 1))


def kl_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    attention_mask: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, mean over the selected positions, in nats per token.

    The tensors are taken as aligned: position i of the masks selects position i of the logits. For a causal
    model whose mask marks *tokens*, shift it by one first (`TokenBatch.scored_predictions` has the positions).

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
    total = weight.sum()
    return temperature**2 * (weight * token_kl(log_p, log_q)).sum() / torch.where(total > 0, total, 1)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the token after each of M predictions: [M], nats.

    Args:
        logits: [M, V].
        targets: int64 [M].
    """
    return F.cross_entropy(upcast(logits), targets, reduction="none")
