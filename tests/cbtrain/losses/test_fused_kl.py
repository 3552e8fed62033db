"""The fused head and KL: identity with the plain formula, accuracy, what it refuses."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from cbtrain.losses import head_products
from cbtrain.losses.fused_kl import divergence_and_gradient, fused_linear_kl
from cbtrain.losses.head_products import back_project, cpu_rounds_once, project, teacher_logits_and_difference
from cbtrain.losses.losses import kl_divergence_loss

BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 7, 16, 50
ROW_BYTES = 2 * VOCABULARY * 8  # the two float64 buffers of one prediction
ONE, ODD, ALL = ROW_BYTES, 3 * ROW_BYTES, 2**26


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student [3, 7, 16] with graph, teacher, head [50, 16], in float64."""
    torch.manual_seed(0)
    student = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    return student, teacher, torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)


def random_mask(density: float | int) -> torch.Tensor:
    """[3, 7]: a share of the positions, or exactly one where density is the integer 1."""
    flat = torch.zeros(BATCH * LENGTH, dtype=torch.bool)
    count = density if isinstance(density, int) else round(density * len(flat))
    flat[torch.randperm(len(flat))[:count]] = True
    return flat.view(BATCH, LENGTH)


def head(hidden, weight, bias=None, softcap=None):
    logits = F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def with_gradient(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("density", [0, 1, 0.3, 1.0])
@pytest.mark.parametrize("chunk_bytes", [ONE, ODD, ALL], ids=["one-row", "odd", "all"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_it_is_the_kl_of_the_logits(case, temperature, chunk_bytes, density):
    student, teacher, weight = case
    mask = random_mask(density)
    plain = kl_divergence_loss(head(student, weight), head(teacher, weight), mask, None, temperature)
    expected, expected_gradient = with_gradient(plain, student)
    compacted = teacher[mask]
    for states in (teacher, compacted):
        fused = fused_linear_kl(student, states, weight, mask, temperature, chunk_bytes=chunk_bytes)
        loss, gradient = with_gradient(fused, student)
        assert abs(loss - expected) <= 1e-10 * max(1, expected), (loss.item(), expected.item())
        deviation = (gradient - expected_gradient).abs().max().item()
        assert deviation <= 1e-10, deviation


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_and_softcap_are_those_of_the_logits(case, with_bias, softcap):
    student, teacher, weight = case
    bias = torch.randn(VOCABULARY, dtype=torch.float64) if with_bias else None
    logits = [head(hidden, weight, bias, softcap) for hidden in (student, teacher)]
    expected = with_gradient(kl_divergence_loss(*logits, temperature=2.0), student)
    fused = fused_linear_kl(student, teacher, weight, None, 2.0, bias=bias, softcap=softcap, chunk_bytes=ODD)
    for value, reference in zip(with_gradient(fused, student), expected, strict=True):
        assert relative(value, reference) < 1e-10


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_agree_with_finite_differences(case, softcap):
    student, teacher, weight = case
    mask = random_mask(0.3)
    for temperature in (0.5, 1.0, 2.0):
        assert torch.autograd.gradcheck(
            lambda s, t=temperature: fused_linear_kl(s, teacher, weight, mask, t, softcap=softcap, chunk_bytes=ODD),
            student,
        )


def test_micro_batches_over_a_global_denominator_sum_to_the_mean(case):
    student, teacher, weight = case
    mask = random_mask(0.6)
    whole = with_gradient(fused_linear_kl(student, teacher, weight, mask), student)
    count = float(mask.sum())
    parts = sum(
        fused_linear_kl(student[row], teacher[row], weight, mask[row], denominator=count) for row in range(BATCH)
    )
    for value, reference in zip(with_gradient(parts, student), whole, strict=True):
        assert relative(value, reference) < 1e-12


@pytest.mark.parametrize("denominator", [None, 40.0])
def test_an_adapted_head_gets_the_gradients_of_autograd(case, denominator):
    student, teacher, weight = case
    a = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    b = torch.randn(VOCABULARY, 2, dtype=torch.float64, requires_grad=True)
    mask = random_mask(0.6)
    plain = kl_divergence_loss(head(student, weight + b @ a), head(teacher, weight), mask, None, 2.0)
    if denominator is not None:
        plain = plain * (mask.sum().item() / denominator)
    fused = fused_linear_kl(
        student, teacher, weight + b @ a, mask, 2.0, teacher_lm_head_weight=weight, denominator=denominator
    )
    for value, reference in zip(with_gradient(fused, student, a, b), with_gradient(plain, student, a, b), strict=True):
        assert relative(value, reference) < 1e-10


def test_a_trainable_head_and_bias_get_gradients(case):
    student, teacher, weight = case
    weight.requires_grad_()
    bias = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    logits = head(student, weight, bias, 3.0), head(teacher, weight, bias, 3.0)
    expected = with_gradient(kl_divergence_loss(*logits), student, weight, bias)
    fused = fused_linear_kl(student, teacher, weight, bias=bias, softcap=3.0)
    for value, reference in zip(with_gradient(fused, student, weight, bias), expected, strict=True):
        assert relative(value, reference) < 1e-10


def test_without_a_gradient_the_value_is_the_same_and_has_no_graph(case):
    student, teacher, weight = case
    expected = fused_linear_kl(student, teacher, weight).item()
    with torch.no_grad():
        assert fused_linear_kl(student, teacher, weight.requires_grad_()).item() == expected
    value = fused_linear_kl(student.detach(), teacher, weight.detach())
    assert not value.requires_grad
    assert value.item() == expected


@pytest.mark.parametrize("adapted", [False, True])
def test_an_empty_selection_gives_0_and_a_gradient_of_zeros(case, adapted):
    student, teacher, weight = case
    none = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    loss, gradient = with_gradient(
        fused_linear_kl(student, teacher, weight, none, teacher_lm_head_weight=weight if adapted else None), student
    )
    assert loss.item() == 0.0
    assert gradient.shape == student.shape
    assert gradient.abs().sum() == 0.0


def test_what_is_masked_out_has_no_influence(case):
    student, teacher, weight = case
    mask = random_mask(0.6)
    spoiled = torch.where(mask[..., None], student, torch.nan)
    assert fused_linear_kl(spoiled, teacher, weight, mask).item() == fused_linear_kl(student, teacher, weight, mask)


def test_the_gradient_is_scaled_by_what_follows(case):
    student, teacher, weight = case
    _, gradient = with_gradient(fused_linear_kl(student, teacher, weight), student)
    _, scaled = with_gradient(-3 * fused_linear_kl(student, teacher, weight), student)
    assert relative(scaled, -3 * gradient) < 1e-15


def test_a_second_derivative_is_refused(case):
    student, teacher, weight = case
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused_linear_kl(student, teacher, weight), student, create_graph=True)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(case, temperature):
    with pytest.raises(ValueError, match="temperature"):
        fused_linear_kl(*case, temperature=temperature)


def test_what_does_not_fit_is_refused_with_its_shape(case):
    student, teacher, weight = case
    mask = random_mask(0.3)
    vector = torch.zeros(VOCABULARY + 1, dtype=torch.float64)
    for message, call in {
        r"teacher \(2, 7, 16\)": lambda: fused_linear_kl(student, teacher[:2], weight),
        r"teacher hidden states \(5, 16\)": lambda: fused_linear_kl(student, teacher[0, :5], weight, mask),
        r"mask .*\(3, 6\)": lambda: fused_linear_kl(student, teacher, weight, mask[:, :6]),
        r"mask torch.int64": lambda: fused_linear_kl(student, teacher, weight, mask.long()),
        r"head \(50, 8\)": lambda: fused_linear_kl(student, teacher, weight[:, :8]),
        r"bias \(51,\)": lambda: fused_linear_kl(student, teacher, weight, bias=vector),
        r"teacher's \(49, 16\)": lambda: fused_linear_kl(student, teacher, weight, teacher_lm_head_weight=weight[1:]),
        r"denominator is 0": lambda: fused_linear_kl(student, teacher, weight, denominator=0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def at_kl(target: float, count: int, hidden: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 student, teacher and head of about that KL at temperature 1."""
    torch.manual_seed(0)
    weight, teacher = torch.randn(vocabulary, hidden) / hidden**0.5 * 3, torch.randn(count, hidden)
    direction, low, high = torch.randn(count, hidden), 1e-7, 1e3
    for _ in range(40):
        size = (low * high) ** 0.5
        value = fused_linear_kl((teacher + size * direction).double(), teacher.double(), weight.double())
        low, high = (size, high) if value < target else (low, size)
    return teacher + low * direction, teacher, weight


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("target", [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 10.0, 50.0])
def test_float32_is_accurate_from_the_smallest_kl_to_the_largest(target, shift):
    """Value to 1e-3 at a KL of 1e-9 and to 1e-5 from 1e-5 on, gradient to 1e-5; also on logits of a common shift,
    where float32 resolves the logits themselves to about 1e-5 only."""
    student, teacher, weight = at_kl(target, 6, 64, 4000)
    bias = torch.full((4000,), shift)
    exact = student.double().requires_grad_()
    reference = kl_divergence_loss(head(exact, weight.double()), head(teacher.double(), weight.double()))
    expected, expected_gradient = with_gradient(reference, exact)
    student.requires_grad_()
    loss, gradient = with_gradient(fused_linear_kl(student, teacher, weight, bias=bias), student)
    value_error, gradient_error = relative(loss, expected), relative(gradient, expected_gradient)
    print(f"\nKL {expected.item():.2e} shift {shift:g}: value {value_error:.1e}, gradient {gradient_error:.1e}")
    assert value_error < (1e-3 if target < 1e-5 else 1e-5) + shift * 1e-6
    assert gradient_error < 1e-5 + shift * 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("size", [5.0, 20.0, 100.0])
def test_rows_whose_increments_overflow_are_finite_and_right(size, temperature):
    """Beside a row that hardly moved, in one chunk: KL in the hundreds and thousands."""
    torch.manual_seed(0)
    weight, teacher = torch.randn(300, 16) * 3, torch.randn(4, 16)
    student = teacher + torch.randn(4, 16) * torch.tensor([[1e-4], [size], [size], [0.1]])
    exact = student.double().requires_grad_()
    logits = head(exact, weight.double()), head(teacher.double(), weight.double())
    expected, expected_gradient = with_gradient(kl_divergence_loss(*logits, temperature=temperature), exact)
    loss, gradient = with_gradient(
        fused_linear_kl(student.requires_grad_(), teacher, weight, None, temperature), student
    )
    assert relative(loss, expected) < 1e-5, (loss.item(), expected.item())
    for row in range(4):
        assert relative(gradient[row], expected_gradient[row]) < 1e-4, (row, gradient[row], expected_gradient[row])


def test_bfloat16_is_as_good_as_float32_of_the_same_numbers(case):
    """To the last digit where products are float32; where the CPU's round to bfloat16 once, to a thousandth."""
    of_loss, of_gradient = (1e-3, 1e-2) if cpu_rounds_once() else (1e-6, 4e-3)
    student, teacher, weight = (tensor.detach().bfloat16() for tensor in case)
    inputs = student.float().requires_grad_(), student.requires_grad_()
    expected = with_gradient(fused_linear_kl(inputs[0], teacher.float(), weight.float()), inputs[0])
    loss, gradient = with_gradient(fused_linear_kl(student, teacher, weight), student)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert relative(loss, expected[0]) < of_loss
    assert relative(gradient, expected[1]) < of_gradient
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_linear_kl(student, teacher, weight).item() == loss.item()
        assert relative(fused_linear_kl(inputs[0], teacher.float(), weight.float()), expected[0]) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("target", [5e-1, 5e-3, 5e-5])
def test_the_gradient_of_bfloat16_states_is_within_2_percent_where_rounded_logits_are_not(target, temperature):
    """Reference in float64 from the same bfloat16 numbers; the materialised formula rounds its logits to bfloat16."""
    student, teacher, weight = (tensor.bfloat16() for tensor in at_kl(target, 32, 256, 4000))
    exact = student.double().requires_grad_()
    reference = kl_divergence_loss(
        head(exact, weight.double()), head(teacher.double(), weight.double()), temperature=temperature
    )
    value, expected = with_gradient(reference, exact)
    student.requires_grad_()
    _, fused = with_gradient(fused_linear_kl(student, teacher, weight, None, temperature), student)
    logits = head(student, weight), head(teacher, weight)
    _, materialised = with_gradient(kl_divergence_loss(*logits, temperature=temperature), student)
    errors = relative(fused, expected), relative(materialised, expected)
    print(f"\nKL {value.item():.1e} T {temperature:g}: fused {errors[0]:.2%}, materialised {errors[1]:.2%}")
    assert errors[0] <= 0.02
    assert errors[1] > 2 * errors[0]


@pytest.mark.skipif(not cpu_rounds_once(), reason="this CPU multiplies no bfloat16")
def test_of_rounded_products_the_teachers_logits_keep_what_rounding_took(monkeypatch):
    """By vocabulary tiles as whole; against products in float32, which `project` falls back to."""
    torch.manual_seed(0)
    weight, teacher = (torch.randn(rows, 256).bfloat16() for rows in (1000, 24))
    student = (teacher + 0.01 * torch.randn(24, 256)).bfloat16()
    logits, difference = project(student, teacher, weight).split(24)
    exact = teacher.double() @ weight.double().t()
    rounded = (teacher @ weight.t()).double()
    assert (logits - exact).abs().max() < 2e-4 * exact.abs().max()
    assert (rounded - exact).abs().max() > 20 * (logits - exact).abs().max()
    assert relative(difference, (student.double() - teacher.double()) @ weight.double().t()) < 5e-3
    gradient, whole = torch.empty(24, 256), torch.empty(24, 256)
    back_project(difference, weight, whole)
    monkeypatch.setattr(head_products, "ROUNDED_BYTES", 24 * 2 * 300)
    assert torch.equal(project(student, teacher, weight), torch.cat([logits, difference]))
    back_project(difference, weight, gradient)
    assert relative(gradient, difference.double() @ weight.double()) < 5e-3
    assert relative(gradient, whole) < 5e-3
    assert not project(teacher, teacher, weight)[24:].any(), "equal states have no difference"


def test_logits_for_the_evaluation_are_the_teachers_and_sum_to_the_students(case):
    student, teacher, weight = (tensor.flatten(0, -2) for tensor in case)
    bias = torch.randn(VOCABULARY, dtype=torch.float64)
    for softcap in (None, 3.0):
        logits, difference = teacher_logits_and_difference(student, teacher, weight, bias, softcap)
        assert not difference.requires_grad
        assert relative(logits, head(teacher, weight, bias, softcap)) < 1e-12
        assert relative(logits + difference, head(student, weight, bias, softcap).detach()) < 1e-12


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_the_elementwise_part_compiles_to_what_it_is():
    torch.manual_seed(0)
    compiled = torch.compile(divergence_and_gradient, dynamic=True)
    for rows in (5, 6):
        logits, difference = torch.randn(rows, 300) * 3, torch.randn(rows, 300) * torch.logspace(-4, 2.5, rows)[:, None]
        arguments = (logits, difference, None, None, 2.0, torch.float32)
        for value, reference in zip(compiled(*arguments), divergence_and_gradient(*arguments), strict=True):
            assert relative(value, reference.double()) < 1e-5
