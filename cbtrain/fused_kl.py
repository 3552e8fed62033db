"""The language-model head and the KL to the teacher in one, without logits of more than a chunk of predictions.

Teacher and student share a frozen head W, so their logits differ by W (h_student − h_teacher). That difference is
computed as such, never as the difference of two rounded logits, and the loss and its gradient are formed from it:
both stay accurate where the KL is tiny, which is where a LoRA adapter starts.

Shapes: H hidden size, V vocabulary, N selected predictions, C predictions of one chunk. On CUDA the elementwise part
runs under `torch.compile`; on CPU eagerly, by blocks that stay in the cache.

Source: DESIGN.md §4, "Fused form"; Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", for the T².
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cbtrain.losses import kl_divergence_loss

# Beyond e^±REACH an increment is split into two factors; 1 ± e^-REACH is 1 in float64 too.
REACH = 40.0
# On CPU a block of the elementwise part and a tile of the head stay in the cache, and products gain little from
# more rows than these. On CUDA the head is read anew for every chunk, so only the budget limits it.
BLOCK_BYTES = 2**20
TILE_BYTES = 8 * 2**20
CPU_ROWS = 128
CPU_BYTES = 80 * 2**20
CUDA_BYTES = 256 * 2**20


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
            student_logits = _plain_logits(student, lm_head_weight, bias, softcap)
            teacher_logits = _plain_logits(teacher, teacher_weight.detach(), bias, softcap)
            return kl_divergence_loss(student_logits, teacher_logits, None, None, temperature) * (count / denominator)
        budget = (CUDA_BYTES if student.is_cuda else CPU_BYTES) if chunk_bytes is None else chunk_bytes
        arguments = (student, teacher, lm_head_weight, bias, softcap, temperature, denominator, budget)
        if torch.is_grad_enabled() and student.requires_grad:
            return _FusedLinearKL.apply(*arguments)
        return _loss_and_gradient(*arguments, with_gradient=False)[0]


@torch.no_grad()
def teacher_logits_and_difference(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_lm_head_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The teacher's logits and student − teacher, each [C, V], in float32 or better, without gradients.

    Their sum is the student's logits; the difference is more accurate than that of two logits. Both have passed
    bias and softcap. Arguments as in `fused_linear_kl`, both hidden states [C, H].
    """
    if teacher_lm_head_weight is not None:
        teacher_logits = _plain_logits(teacher_hidden, teacher_lm_head_weight, bias, softcap)
        return teacher_logits, _plain_logits(student_hidden, lm_head_weight, bias, softcap) - teacher_logits
    logits, difference = _project(student_hidden, teacher_hidden, lm_head_weight).chunk(2)
    return _cap(logits, difference, bias, softcap)[:2]


def rows_per_chunk(vocabulary: int, chunk_bytes: int, element_size: int = 4) -> int:
    """How many predictions C fit a budget with their two [C, V] buffers of `element_size` bytes; at least one."""
    return max(1, chunk_bytes // (2 * vocabulary * element_size))


class _FusedLinearKL(torch.autograd.Function):
    """The loss, with its gradient with respect to the student's selected states computed beside it."""

    @staticmethod
    def forward(ctx, student: Tensor, *arguments) -> Tensor:
        loss, gradient = _loss_and_gradient(student, *arguments, with_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
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
    """The scalar loss, and its gradient with respect to the student's states, [N, H] or empty."""
    dtype, operand = _arithmetic(student, teacher, weight), _operand(student, teacher, weight)
    count, vocabulary = student.shape[0], weight.shape[0]
    limit = rows_per_chunk(vocabulary, chunk_bytes, dtype.itemsize)
    limit = limit if student.is_cuda else min(limit, CPU_ROWS)
    # Chunks of equal size: a short last one would waste its matrix products.
    rows = -(-count // max(1, -(-count // limit)))
    buffer = student.new_empty((2 * rows, vocabulary), dtype=dtype)
    divergence = student.new_empty(count, dtype=dtype)
    gradient = student.new_empty(student.shape if with_gradient else 0, dtype=dtype)
    for start in range(0, count, max(rows, 1)):
        chunk = slice(start, min(start + rows, count))
        logits, difference = _project(student[chunk], teacher[chunk], weight, buffer).chunk(2)
        divergence[chunk], logit_gradient = _elementwise(logits, difference, bias, softcap, temperature, operand)
        if with_gradient:
            _back_project(logit_gradient, weight, gradient[chunk])
    return temperature**2 / denominator * divergence.sum(), gradient.mul_(temperature / denominator)


def _project(student: Tensor, teacher: Tensor, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
    """W applied to the teacher's states and to student − teacher: [2C, V], in one product and without a bias."""
    operand = _operand(student, teacher, weight)
    dtype = _arithmetic(student, teacher, weight)
    stacked = torch.cat([teacher.to(operand), (student.to(dtype) - teacher.to(dtype)).to(operand)])
    if buffer is None:
        buffer = student.new_empty((len(stacked), len(weight)), dtype=dtype)
    out = buffer[: len(stacked)]
    if operand != dtype:
        return torch.mm(stacked, weight.t(), out_dtype=dtype, out=out)
    for tile, head in _tiles(weight, dtype):
        torch.mm(stacked, head.t(), out=out[:, tile])
    return out


def _back_project(logit_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes the gradient with respect to the states, [C, H], from the one with respect to the logits, [C, V]."""
    if logit_gradient.dtype != out.dtype:
        torch.mm(logit_gradient, weight, out_dtype=out.dtype, out=out)
    elif weight.dtype == out.dtype:
        torch.mm(logit_gradient, weight, out=out)
    else:
        out.zero_()
        for tile, head in _tiles(weight, out.dtype):
            out.addmm_(logit_gradient[:, tile], head)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype` by vocabulary tiles, so that no upcast copy of all of it exists; whole where CUDA needs none.

    On CPU tiles serve a head that needs no copy too: for the logits, a product with all of it at once is slower.
    """
    vocabulary, hidden_size = weight.shape
    whole = weight.is_cuda and weight.dtype == dtype
    size = vocabulary if whole else max(1, TILE_BYTES // (hidden_size * dtype.itemsize))
    for start in range(0, vocabulary, size):
        tile = slice(start, min(start + size, vocabulary))
        yield tile, weight[tile].to(dtype)


def _elementwise(
    teacher_logits: Tensor,
    difference: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`divergence_and_gradient` of a chunk: compiled on CUDA; on CPU by blocks, the gradient over the difference.

    The compiled form has not been measured on a GPU.
    """
    if teacher_logits.is_cuda:
        return _compiled()(teacher_logits, difference, bias, softcap, temperature, operand)
    row_bytes = teacher_logits.shape[1] * teacher_logits.element_size()
    rows = max(torch.get_num_threads(), BLOCK_BYTES // row_bytes)
    divergences = []
    for logits, block in zip(teacher_logits.split(rows), difference.split(rows), strict=True):
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
    """KL of each row, [C], in nats, and T/T² of its gradient with respect to the student's logits, [C, V].

    With p = softmax(teacher logits / T) and d = difference / T, centred to Σ p·d ≈ 0: g = p·expm1(d) and s = Σ g give
    KL = log1p(s) − Σ p·d and q − p = (g − s·p) / (1 + s). Nothing cancels however small d is. However large it is,
    nothing overflows: g, s and the 1 of 1 + s carry e^−shift, which is 1 unless max(log p + d) exceeds `REACH`.

    Args:
        teacher_logits, difference: [C, V], as projected: before bias, softcap and temperature.
        operand: dtype in which the gradient enters its matrix product.
    """
    teacher_logits, difference, slope = _cap(teacher_logits, difference, bias, softcap)
    if temperature != 1:
        teacher_logits, difference = teacher_logits / temperature, difference / temperature
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    p = log_p.exp()
    difference = difference - torch.linalg.vecdot(p, difference)[:, None]
    residual = torch.linalg.vecdot(p, difference)[:, None]
    shift = ((log_p + difference).amax(dim=-1, keepdim=True) - REACH).clamp(min=0)
    near = difference.clamp(max=REACH)
    growth = difference.sub_(near).add_(log_p).sub_(shift).exp_().mul_(near.expm1_())
    total = growth.sum(dim=-1, keepdim=True)
    divergence = shift + torch.log1p(total + torch.expm1(-shift)) - residual
    gradient = growth.addcmul_(p, total, value=-1).div_(total + torch.exp(-shift))
    if slope is not None:
        gradient = gradient * slope
    return divergence[:, 0], gradient.to(operand)


def _cap(
    teacher_logits: Tensor, difference: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bias and softcap c on the teacher's logits and on student − teacher, and the cap's slope at the student's.

    c·tanh x − c·tanh y = c·tanh(x − y)·(1 − tanh x·tanh y) keeps a small difference accurate.
    """
    if bias is not None:
        teacher_logits = teacher_logits + bias
    if softcap is None:
        return teacher_logits, difference, None
    student = torch.tanh((teacher_logits + difference) / softcap)
    teacher = torch.tanh(teacher_logits / softcap)
    capped = softcap * torch.tanh(difference / softcap) * (1 - student * teacher)
    return softcap * teacher, capped, 1 - student * student


def _plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [N, V] in float32 or better, with a graph to all that carries one."""
    dtype = _arithmetic(hidden, weight)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _arithmetic(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _operand(*tensors: Tensor) -> torch.dtype:
    """What enters the matrix products: bfloat16 where a product of it accumulates to float32, which is on CUDA."""
    if all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in tensors):
        return torch.bfloat16
    return _arithmetic(*tensors)


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
    places = mask.flatten().nonzero().flatten()

    def chosen(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        return rows if len(places) == len(rows) else rows.index_select(0, places)

    selected = chosen(student)
    if teacher.shape == student.shape:
        teacher = chosen(teacher)
    if teacher.shape != selected.shape:
        needed = f"{tuple(student.shape)} or, selected, {tuple(selected.shape)}"
        raise ValueError(f"teacher hidden states {tuple(teacher.shape)}; the student's are {needed}")
    return selected, teacher
