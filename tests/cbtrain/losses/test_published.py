"""The published loss, written as its code has it, on the same tensors.

Source: `compute_loss` of the circuit-breakers code (Zou et al. 2024), which works on stacked hidden states
[layers, rows, positions, H] of a model that was cut above its highest target layer, times the attention mask.
"""

import pytest
import torch
import torch.nn.functional as F

from cbtrain.losses import reroute_loss, retain_loss

LAYERS, ROWS, POSITIONS, HIDDEN = 5, 3, 7, 16


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher."""
    draw = torch.Generator().manual_seed(0)
    shape = (LAYERS, ROWS, POSITIONS, HIDDEN)
    teacher = torch.randn(shape, generator=draw, dtype=torch.float64)
    return teacher + 0.5 * torch.randn(shape, generator=draw, dtype=torch.float64), teacher


def published_retain(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over every layer and position, padding among them."""
    mask = mask.expand(LAYERS, -1, -1).unsqueeze(-1)
    return torch.norm(student * mask - teacher * mask, dim=-1, p=2, dtype=torch.float64).nanmean()


def published_reroute(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over the layers given and unmasked positions."""
    mask = mask.expand(len(student), -1, -1)
    products = (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)) * mask.unsqueeze(-1)
    return torch.relu(products.sum(dim=-1)).sum() / mask.sum()


def at(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N, K, H] as the losses here take it."""
    return states[:, mask.bool()].transpose(0, 1)


def test_without_padding_and_with_every_state_retained_the_losses_are_the_same(states):
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.float64)
    student, teacher = states
    retain = retain_loss(at(student, mask), at(teacher, mask))
    assert retain.item() == pytest.approx(published_retain(student, teacher, mask).item(), rel=1e-12)
    targets = [2, 4]
    reroute = reroute_loss(at(student[targets], mask), at(teacher[targets], mask))
    published = published_reroute(student[targets], teacher[targets], mask)
    assert reroute.item() == pytest.approx(published.item(), rel=1e-12)


def test_of_padding_the_published_retain_term_is_smaller_by_its_share(states):
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.float64)
    mask[0, 3:] = 0
    mask[2, 5:] = 0
    student, teacher = states
    retain = retain_loss(at(student, mask), at(teacher, mask)).item()
    published = published_retain(student, teacher, mask).item()
    assert published == pytest.approx(retain * mask.mean().item(), rel=1e-12)
    reroute = reroute_loss(at(student, mask), at(teacher, mask)).item()
    assert reroute == pytest.approx(published_reroute(student, teacher, mask).item(), rel=1e-12)
