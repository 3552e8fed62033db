"""The three losses: hand-computed values, finite differences, invariances."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from cbtrain.losses.losses import kl_divergence_loss, nll, reroute_loss, retain_loss


def states(*layers: list[list[float]]) -> torch.Tensor:
    """Hidden states [N, K, H], given layer by layer."""
    return torch.tensor(layers).transpose(0, 1)


def test_reroute_is_the_mean_of_the_positive_cosines():
    student = states([[1.0, 0.0], [-2.0, 0.0]])  # cosines 0.6 and −1
    teacher = states([[3.0, 4.0], [5.0, 0.0]])
    assert reroute_loss(student, teacher).item() == pytest.approx(0.3)


def test_reroute_averages_over_layers():
    same, orthogonal = [[1.0, 1.0], [2.0, 0.0]], [[1.0, -1.0], [0.0, 3.0]]
    assert reroute_loss(states(same, orthogonal), states(same, same)).item() == pytest.approx(0.5)


def test_reroute_is_1_where_nothing_moved():
    hidden = torch.randn(14, 2, 16)
    assert reroute_loss(hidden, hidden).item() == pytest.approx(1.0)


def test_retain_is_the_mean_euclidean_distance():
    student, teacher = states([[3.0, 4.0], [1.0, 1.0]]), states([[0.0, 0.0], [1.0, 1.0]])
    assert retain_loss(student, teacher).item() == pytest.approx(2.5)


@pytest.mark.parametrize("loss", [reroute_loss, retain_loss])
def test_shares_of_a_larger_batch_sum_to_its_mean(loss):
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 2, 5), torch.randn(7, 2, 5)
    shares = [loss(student[part], teacher[part], 7).item() for part in (slice(0, 3), slice(3, 7), slice(7, 7))]
    assert sum(shares) == pytest.approx(loss(student, teacher).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [reroute_loss, retain_loss])
def test_without_a_scored_token_a_loss_is_0_and_reaches_backward(loss):
    student = torch.randn(4, 2, 3, requires_grad=True)
    value = loss(student[:0], torch.randn(0, 2, 3))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_kl_has_its_hand_computed_value():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_kl_at_a_temperature_divides_logits_and_carries_its_square():
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_divergence_loss(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


def test_kl_is_from_teacher_to_student_and_not_the_reverse():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    reference = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert kl_divergence_loss(student, teacher).item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_of_a_distribution_with_itself_is_0(temperature):
    logits = torch.randn(4, 50) * 5
    assert kl_divergence_loss(logits, logits.clone(), temperature=temperature).item() == 0.0


def test_kl_selects_by_the_product_of_both_masks():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    attention = torch.tensor([[1, 1, 0], [1, 1, 1]])
    scored = torch.tensor([[0, 1, 1], [0, 0, 1]])
    chosen = kl_divergence_loss(student[[0, 1], [1, 2]], teacher[[0, 1], [1, 2]])
    assert kl_divergence_loss(student, teacher, attention, scored).item() == pytest.approx(chosen.item(), rel=1e-6)


def test_kl_signature_is_the_one_users_know():
    parameters = inspect.signature(kl_divergence_loss).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("student_logits", inspect.Parameter.empty),
        ("teacher_logits", inspect.Parameter.empty),
        ("attention_mask", None),
        ("loss_mask", None),
        ("temperature", 1.0),
    ]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_kl_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        kl_divergence_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


def test_kl_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="student logits"):
        kl_divergence_loss(torch.zeros(1, 1, 2), torch.zeros(1, 3, 2))


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    student = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    for loss in (reroute_loss, retain_loss):
        assert torch.autograd.gradcheck(lambda s, f=loss: f(s, teacher), student)
    for temperature in (0.5, 1.0, 2.0):
        assert torch.autograd.gradcheck(
            lambda s, t=temperature: kl_divergence_loss(s, teacher, loss_mask=mask, temperature=t), student
        )


def test_kl_gradient_keeps_its_size_over_temperatures():
    """In the limit of small differences T² makes the gradient independent of T up to the softening of p."""
    torch.manual_seed(0)
    teacher = 1e-2 * torch.randn(8, 20, dtype=torch.float64)
    sizes = []
    for temperature in (1.0, 2.0, 4.0):
        student = (teacher + 1e-3 * torch.randn(8, 20, dtype=torch.float64)).requires_grad_()
        torch.manual_seed(1)
        kl_divergence_loss(student, teacher, temperature=temperature).backward()
        sizes.append((student.grad / (student.detach() - teacher)).abs().median().item())
    assert max(sizes) / min(sizes) < 1.2, sizes


def test_no_gradient_reaches_the_teacher():
    for loss in (reroute_loss, retain_loss, kl_divergence_loss):
        student, teacher = torch.randn(1, 3, 5, requires_grad=True), torch.randn(1, 3, 5, requires_grad=True)
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0


def test_what_is_masked_out_has_no_influence_on_the_kl():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    spoiled = torch.where(mask[..., None], student, torch.nan)
    expected = kl_divergence_loss(student, teacher, loss_mask=mask).item()
    assert kl_divergence_loss(spoiled, teacher, loss_mask=mask).item() == expected


def test_a_kl_without_a_scored_position_is_0_and_reaches_backward():
    student = torch.randn(1, 3, 5, requires_grad=True)
    value = kl_divergence_loss(student, torch.randn(1, 3, 5), attention_mask=torch.zeros(1, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().sum() == 0.0


def test_losses_of_bfloat16_are_computed_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 64).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    for loss in (reroute_loss, retain_loss, kl_divergence_loss):
        value = loss(student, teacher)
        assert value.dtype == torch.float32
        assert value.item() == loss(student.float(), teacher.float()).item()


def test_nll_scores_the_token_that_came():
    logits = torch.full((2, 4), -100.0)
    logits[0, 2] = logits[1, 3] = 0.0  # predicts tokens 2 and 3
    assert nll(logits, torch.tensor([2, 0])).tolist() == pytest.approx([0.0, 100.0])
