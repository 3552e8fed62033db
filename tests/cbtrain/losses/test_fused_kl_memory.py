"""What the fused head and KL hold in memory: chunks within a budget, and the gradient of the states."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cbtrain.losses.fused_kl import fused_linear_kl
from cbtrain.losses.head_products import rows_per_chunk


class LargestOutput(TorchDispatchMode):
    """The most elements that any operation gave back, views and what a call was given apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        sizes = [output.numel() for output in outputs if isinstance(output, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_exceeds_the_budget_and_only_the_gradient_of_the_states_is_kept(dtype):
    count, hidden, vocabulary, budget = 64, 8, 1000, 8 * 2 * 1000 * 4
    torch.manual_seed(0)
    student = torch.randn(count, hidden, dtype=dtype, requires_grad=True)
    teacher, weight = torch.randn(count, hidden, dtype=dtype), torch.randn(vocabulary, hidden, dtype=dtype)
    kept: list[torch.Size] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with hooks, LargestOutput() as largest:
        fused_linear_kl(student, teacher, weight, chunk_bytes=budget).backward()
    assert largest.elements * 4 <= budget, largest.elements
    assert kept == [student.shape]


def test_rows_per_chunk_fit_the_budget_and_are_at_least_1():
    assert rows_per_chunk(128_256, 64 * 2**20) == 65
    assert rows_per_chunk(128_256, 1) == 1
