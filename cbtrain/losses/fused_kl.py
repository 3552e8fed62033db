"""The language-model head and the KL to the teacher in one, without logits of more than a chunk of predictions.

Teacher and student share a frozen head W, so their logits differ by W (h_student − h_teacher). That difference is
computed as such, never as the difference of two rounded logits, and the loss and its gradient are formed from it:
both stay accurate where the KL is tiny, which is where a LoRA adapter starts.

Shapes: H hidden size, V vocabulary, N selected predictions, C predictions of one chunk. On CUDA the elementwise part
runs under `torch.compile`; on CPU eagerly, by blocks that stay in the cache.

Derivation, with the numbers of the steps below: `cbtrain/README.md`, "The KL from the difference". The T² is that of
Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cbtrain.losses.head_products import (
    BLOCK_BYTES,
    CPU_BYTES,
    CPU_ROWS,
    CUDA_BYTES,
    arithmetic_dtype,
    back_project,
    capped,
    operand_dtype,
    plain_logits,
    project,
    rows_per_chunk,
)
from cbtrain.losses.losses import kl_divergence_loss

# From here on e^d − 1 is e^d to the last bit, as e^−40 < 2^−53, the rounding of float64; e^40 is far from float32's
# largest number, e^88, and so is a sum of as many such terms as a vocabulary has.
REACH = 40.0


def fused_linear_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    denominator: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """T² · Σ KL(teacher ‖ student) / denominator at temperature T, in nats; `kl_divergence_loss` of the two heads.

    The gradient reaches the student only, and is computed with the loss: N × H numbers wait for backward. Arithmetic
    is in float32, or float64 where an input is. Where the head itself carries a gradient, or the teacher has another,
    the plain formula takes over: it holds logits [N, V] and sends gradients to the head as well.

    Args:
        student_hidden: [..., H], hidden states after the final norm.
        teacher_hidden: the same shape, or already compacted to the selected predictions, [N, H].
        lm_head_weight: [V, H].
        mask: bool [...], the predictions to score, selected before the projection; None selects all.
        temperature: T > 0.
        bias: [V], added to both logits.
        softcap: logits become softcap · tanh(logits / softcap) before the temperature (Gemma 2).
        teacher_lm_head_weight: [V, H] where the student's head differs from the teacher's (an adapted head).
        denominator: None is N. The count of a whole optimizer step makes micro-steps and ranks sum to its mean.
        chunk_bytes: budget of the chunk's two [C, V] buffers; None is `CPU_BYTES` or `CUDA_BYTES`. On CPU a chunk has
            at most `CPU_ROWS` rows besides.

    Raises:
        ValueError: temperature is not positive, denominator is not, or shapes do not fit.
        RuntimeError: a second derivative is asked for.
    """
    # Longer than fifty lines for its signature and docstring.
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be more than 0")
    student, teacher = _selected(student_hidden, teacher_hidden, mask)
    _check_head(student, lm_head_weight, bias, teacher_lm_head_weight)
    count = student.shape[0]
    denominator = max(count, 1) if denominator is None or not count else denominator
    if denominator <= 0:
        raise ValueError(f"denominator is {denominator}; it must be more than 0")
    head_has_gradient = lm_head_weight.requires_grad or (bias is not None and bias.requires_grad)
    # Autocast would round the logits to bfloat16.
    with torch.autocast(student.device.type, enabled=False):
        if teacher_lm_head_weight is not None or (head_has_gradient and torch.is_grad_enabled()):
            teacher_weight = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
            student_logits = plain_logits(student, lm_head_weight, bias, softcap)
            teacher_logits = plain_logits(teacher, teacher_weight.detach(), bias, softcap)
            return kl_divergence_loss(student_logits, teacher_logits, None, None, temperature) * (count / denominator)
        budget = (CUDA_BYTES if student.is_cuda else CPU_BYTES) if chunk_bytes is None else chunk_bytes
        arguments = (student, teacher, lm_head_weight, bias, softcap, temperature, denominator, budget)
        if torch.is_grad_enabled() and student.requires_grad:
            loss: Tensor = _FusedLinearKL.apply(*arguments)  # type: ignore[no-untyped-call]
            return loss
        return _loss_and_gradient(*arguments, with_gradient=False)[0]


class _FusedLinearKL(torch.autograd.Function):
    """The loss, with its gradient with respect to the student's selected states computed beside it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> Tensor:
        loss, gradient = _loss_and_gradient(student, *arguments, with_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused_linear_kl has no second derivative; kl_divergence_loss has")
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), *(None,) * 7


def _loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    denominator: float,
    chunk_bytes: int,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The scalar loss, and its gradient with respect to the student's states, [N, H] or empty.

    The gradient is formed here and not in the backward, while a chunk's logits exist: [N, H] is kept, not [N, V].
    """
    dtype, operand = arithmetic_dtype(student, teacher, weight), operand_dtype(student, teacher, weight)
    count, vocabulary = student.shape[0], weight.shape[0]
    limit = rows_per_chunk(vocabulary, chunk_bytes, dtype.itemsize)
    limit = limit if student.is_cuda else min(limit, CPU_ROWS)
    # Chunks of equal size, as a short last one would waste its matrix products: ⌈N / ⌈N / limit⌉⌉ rows, 0 where N is 0.
    rows = -(-count // max(1, -(-count // limit)))
    # Allocated once: a chunk's logits are not needed when the next chunk overwrites them.
    buffer = student.new_empty((2 * rows, vocabulary), dtype=dtype)
    divergence = student.new_empty(count, dtype=dtype)
    gradient = student.new_empty(student.shape if with_gradient else 0, dtype=dtype)
    for start in range(0, count, max(rows, 1)):
        chunk = slice(start, min(start + rows, count))
        # z_t and W (h_s − h_t), [C, V] each: the two halves of the buffer.
        logits, difference = project(student[chunk], teacher[chunk], weight, buffer).chunk(2)
        divergence[chunk], logit_gradient = _elementwise(logits, difference, bias, softcap, temperature, operand)
        if with_gradient:
            back_project(logit_gradient, weight, gradient[chunk])
    # T²/N on the sum of the KLs. Each one's gradient in z_s is (q − p) / T, so T/N is left for W^T (q − p).
    return temperature**2 / denominator * divergence.sum(), gradient.mul_(temperature / denominator)


def _elementwise(
    teacher_logits: Tensor,
    difference: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`divergence_and_gradient` of a chunk: compiled on CUDA; on CPU by blocks, the gradient over the difference.

    A block is a view of the buffer. Its differences have been read when its gradient, in the same dtype on CPU, is
    written in their place. The compiled form has not been measured on a GPU.
    """
    if teacher_logits.is_cuda:
        return _compiled()(teacher_logits, difference, bias, softcap, temperature, operand)
    row_bytes = teacher_logits.shape[1] * teacher_logits.element_size()
    rows = max(torch.get_num_threads(), BLOCK_BYTES // row_bytes)
    divergences = []
    for logits, block in zip(torch.split(teacher_logits, rows), torch.split(difference, rows), strict=True):
        divergence, gradient = divergence_and_gradient(logits, block, bias, softcap, temperature, operand)
        block.copy_(gradient)
        divergences.append(divergence)
    return torch.cat(divergences), difference


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(divergence_and_gradient, dynamic=True)


def divergence_and_gradient(
    teacher_logits: Tensor,
    difference: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) of each row, [C], in nats, and T times its gradient in the student's logits, [C, V]: q − p.

    d = difference / T, centred; g = p·expm1(d); s = Σ g; Z = 1 + s = Σ p·e^d. `growth` is g and `total` is s, both
    times e^−shift, which is 1 unless d is very large. The steps have the numbers of the derivation.

    Args:
        teacher_logits, difference: [C, V], as projected: before bias, softcap and temperature. They stay as they are.
        operand: dtype in which the gradient enters its matrix product.
    """
    # 1. z_t / T and d, [C, V]. A bias drops out of d. A softcap does not: its slope is needed in step 7.
    teacher_logits, difference, slope = capped(teacher_logits, difference, bias, softcap)
    if temperature != 1:
        teacher_logits, difference = teacher_logits / temperature, difference / temperature
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    p = log_p.exp()
    # 2. Centre d: a constant changes neither p nor q. Then Σ p·d = 0, so s ≥ 0, and s is of second order in d, as the
    # KL is. The result is a new tensor, so that the steps below may overwrite it.
    difference = difference - torch.linalg.vecdot(p, difference)[:, None]
    # Rounding leaves Σ p·d a little off 0. That is of first order, and s contains it: step 5 subtracts it. [C, 1].
    residual = torch.linalg.vecdot(p, difference)[:, None]
    # 3. The shift [C, 1] looks at log p + d, the logarithm of a term of Z: a large d where p is tiny does no harm.
    shift = ((log_p + difference).amax(dim=-1, keepdim=True) - REACH).clamp(min=0)
    # 4. g as e^(log p + d − near − shift), at most 1, times expm1(near), at most e^REACH. Neither can overflow, as
    # expm1(d) does. exp(d) − 1 would lose the digits of a small d. In place: g takes the memory of d, which is not
    # read again; `near` is a copy, read by sub_ before expm1_ overwrites it.
    near = difference.clamp(max=REACH)
    growth = difference.sub_(near).add_(log_p).sub_(shift).exp_().mul_(near.expm1_())
    total = growth.sum(dim=-1, keepdim=True)
    # 5. KL = log Z − Σ p·d. e^−shift·Z is 1 + (total + expm1(−shift)); log(1 + …) would lose a small s, log1p does not.
    divergence = shift + torch.log1p(total + torch.expm1(-shift)) - residual
    # 6. q − p = (g − s·p) / Z; softmax(z_s) − softmax(z_t) would cancel. e^−shift is in both parts of the fraction.
    # In place: g was summed above and is not read again.
    gradient = growth.addcmul_(p, total, value=-1).div_(total + torch.exp(-shift))
    # 7. The chain rule through the softcap.
    if slope is not None:
        gradient = gradient * slope
    return divergence[:, 0], gradient.to(operand)


def _check_head(student: Tensor, weight: Tensor, bias: Tensor | None, teacher_weight: Tensor | None) -> None:
    hidden_size, vocabulary = student.shape[-1], weight.shape[0]
    if weight.ndim != 2 or weight.shape[1] != hidden_size:
        raise ValueError(f"head {tuple(weight.shape)}; hidden states of size {hidden_size} need (V, {hidden_size})")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias {tuple(bias.shape)}; the head {tuple(weight.shape)} needs ({vocabulary},)")
    if teacher_weight is not None and teacher_weight.shape != weight.shape:
        raise ValueError(f"head {tuple(weight.shape)}, teacher's {tuple(teacher_weight.shape)}")


def _selected(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The predictions to score, [N, H] each; the teacher's without a graph.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.
    """
    teacher = teacher.detach()
    if mask is None:
        if student.shape != teacher.shape:
            raise ValueError(f"student hidden states {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
        return student.flatten(0, -2), teacher.flatten(0, -2)
    if mask.dtype != torch.bool or mask.shape != student.shape[:-1]:
        raise ValueError(f"mask {mask.dtype} {tuple(mask.shape)}; bool {tuple(student.shape[:-1])} is needed")
    positions = mask.flatten().nonzero().flatten()

    def chosen(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        return rows if len(positions) == len(rows) else rows.index_select(0, positions)

    selected = chosen(student)
    if teacher.shape == student.shape:
        teacher = chosen(teacher)
    if teacher.shape != selected.shape:
        needed = f"{tuple(student.shape)} or, selected, {tuple(selected.shape)}"
        raise ValueError(f"teacher hidden states {tuple(teacher.shape)}; the student's are {needed}")
    return selected, teacher
