"""The head applied to teacher and student: logits and their difference by chunks, upcast by tiles, never all at once.

Shapes: H hidden size, V vocabulary, N selected predictions, C predictions of one chunk.

In bfloat16 products run in bfloat16, whose results PyTorch rounds to bfloat16 on a CPU. Of W (h_student − h_teacher)
and of the gradient that does no harm: the error is relative to a small number. The teacher's logits are not small, and
what is made of them would be off by percents. So they are computed twice, the second time less the first result before
rounding, z = ⌊W h⌋ + ⌊W h − ⌊W h⌋⌋: two fast products in place of one in float32 that takes eight times as long.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# On CPU a block of the elementwise part and a tile of the head stay in the cache, and products gain little from
# more rows than these. On CUDA the head is read anew for every chunk, so only the budget limits it.
BLOCK_BYTES = 2**20
TILE_BYTES = 8 * 2**20
ROUNDED_BYTES = 16 * 2**20
CPU_ROWS = 128
CPU_BYTES = 80 * 2**20
CUDA_BYTES = 256 * 2**20


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
        teacher_logits = plain_logits(teacher_hidden, teacher_lm_head_weight, bias, softcap)
        return teacher_logits, plain_logits(student_hidden, lm_head_weight, bias, softcap) - teacher_logits
    logits, difference = project(student_hidden, teacher_hidden, lm_head_weight).chunk(2)
    return capped(logits, difference, bias, softcap)[:2]


def rows_per_chunk(vocabulary: int, chunk_bytes: int, element_size: int = 4) -> int:
    """How many predictions C fit a budget with their two [C, V] buffers of `element_size` bytes; at least one."""
    return max(1, chunk_bytes // (2 * vocabulary * element_size))


def project(student: Tensor, teacher: Tensor, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
    """W applied to the teacher's states and to student − teacher: [2C, V], in one product and without a bias."""
    operand = operand_dtype(student, teacher, weight)
    dtype = arithmetic_dtype(student, teacher, weight)
    stacked = torch.cat([teacher.to(operand), (student.to(dtype) - teacher.to(dtype)).to(operand)])
    if buffer is None:
        buffer = student.new_empty((len(stacked), len(weight)), dtype=dtype)
    out = buffer[: len(stacked)]
    if operand != dtype and student.is_cuda:
        return torch.mm(stacked, weight.t(), out_dtype=dtype, out=out)
    if operand != dtype:
        _project_rounded(stacked, weight, out)
        return out
    for tile, head in head_tiles(weight, dtype):
        torch.mm(stacked, head.t(), out=out[:, tile])
    return out


def _project_rounded(stacked: Tensor, weight: Tensor, out: Tensor) -> None:
    """`project` by products that are rounded to bfloat16: to the teacher's, what rounding took is added."""
    count = len(stacked) // 2
    teacher = stacked[:count]
    for tile, head in _rounded_tiles(weight, len(stacked)):
        rounded = torch.mm(stacked, head.t())
        out[:, tile] = rounded
        out[:count, tile] += torch.addmm(rounded[:count], teacher, head.t(), beta=-1)


def _rounded_tiles(weight: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The head by vocabulary tiles, so that what is rounded takes little memory beside the chunk."""
    size = max(1, ROUNDED_BYTES // (max(rows, 1) * weight.itemsize))
    yield from ((tile, weight[tile]) for tile in _slices(len(weight), size))


def back_project(logit_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes the gradient with respect to the states, [C, H], from the one with respect to the logits, [C, V]."""
    if logit_gradient.dtype != out.dtype:
        torch.mm(logit_gradient, weight, out_dtype=out.dtype, out=out)
    elif operand_dtype(weight) != out.dtype:
        out.zero_()
        for tile, head in _rounded_tiles(weight, len(out)):
            out += torch.mm(logit_gradient[:, tile].to(head.dtype), head)
    elif weight.dtype == out.dtype:
        torch.mm(logit_gradient, weight, out=out)
    else:
        out.zero_()
        for tile, head in head_tiles(weight, out.dtype):
            out.addmm_(logit_gradient[:, tile], head)


def head_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype` by vocabulary tiles, so that no upcast copy of all of it exists; whole where CUDA needs none.

    On CPU tiles serve a head that needs no copy too: for the logits, a product with all of it at once is slower.
    """
    vocabulary, hidden_size = weight.shape
    whole = weight.is_cuda and weight.dtype == dtype
    size = vocabulary if whole else max(1, TILE_BYTES // (hidden_size * dtype.itemsize))
    yield from ((tile, weight[tile].to(dtype)) for tile in _slices(vocabulary, size))


def _slices(vocabulary: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))


def capped(
    teacher_logits: Tensor, difference: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bias and softcap c on the teacher's logits and on student − teacher, and the cap's slope at the student's.

    All [C, V], in new tensors where anything changes; the slope is None without a cap.
    """
    # Both logits carry the bias, so student − teacher does not.
    if bias is not None:
        teacher_logits = teacher_logits + bias
    if softcap is None:
        return teacher_logits, difference, None
    student = torch.tanh((teacher_logits + difference) / softcap)
    teacher = torch.tanh(teacher_logits / softcap)
    # tanh x − tanh y = tanh(x − y)·(1 − tanh x·tanh y). The left side subtracts two numbers that nearly agree. On the
    # right the difference is a factor, with all its digits, and the other factor loses digits only near ±c, where
    # the cap lets little of a difference through.
    rise = softcap * torch.tanh(difference / softcap) * (1 - student * teacher)
    # d c·tanh(z/c) / dz = 1 − tanh²(z/c), at the student's z: only the student gets a gradient.
    return softcap * teacher, rise, 1 - student * student


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [N, V] in float32 or better, with a graph to all that carries one."""
    dtype = arithmetic_dtype(hidden, weight)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """What enters the matrix products: bfloat16 where all is and the device multiplies it with float32 sums."""
    if all(tensor.dtype == torch.bfloat16 and (tensor.is_cuda or cpu_rounds_once()) for tensor in tensors):
        return torch.bfloat16
    return arithmetic_dtype(*tensors)


@functools.cache
def cpu_rounds_once() -> bool:
    """Whether this CPU multiplies bfloat16, and rounds a product with an addend once, at its end.

    The first by its instructions (AVX-512 bf16, AMX), the second by trying, since no documentation promises it.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    generator = torch.Generator().manual_seed(0)
    states, head = (torch.randn(rows, 512, generator=generator).bfloat16() for rows in (16, 256))
    rounded = torch.mm(states, head.t())
    corrected = rounded.float() + torch.addmm(rounded, states, head.t(), beta=-1).float()
    exact = states.float() @ head.float().t()
    # One rounding leaves 2⁻⁹ of 2⁻⁹ of a logit; two would leave 2⁻⁹ of it.
    return bool((corrected - exact).abs().max() < 2**-14 * exact.abs().max())
