"""Coefficients and learning rate: reroute first, retain later."""

import pytest

from cbtrain.config import get_config
from cbtrain.losses.schedule import coefficients, learning_rate


def test_linear_schedule_ends_at_equal_coefficients_under_the_published_horizon():
    config = get_config("tiny", steps=100, alpha=8.0, beta_kl=0.5, schedule_horizon=2.0)
    first, last = coefficients(config, 0), coefficients(config, 100)
    assert (first.cs, first.cr, first.kl_weight) == (8.0, 0.0, 0.0)
    assert (last.cs, last.cr, last.kl_weight) == (4.0, 4.0, 2.0)
    assert coefficients(config, 50).cs == pytest.approx(6.0)


def test_coefficients_stay_within_0_and_alpha_beyond_the_horizon():
    config = get_config("tiny", steps=10, alpha=8.0, schedule_horizon=1.0)
    end = coefficients(config, 15)
    assert (end.cs, end.cr) == (0.0, 8.0)


def test_cosine_form_has_the_same_ends_and_middle():
    config = get_config("tiny", steps=10, alpha=2.0, schedule_horizon=1.0, coefficient_schedule="cosine")
    assert coefficients(config, 0).cs == pytest.approx(2.0)
    assert coefficients(config, 5).cs == pytest.approx(1.0)
    assert coefficients(config, 10).cs == pytest.approx(0.0)
    assert (
        coefficients(config, 2).cs > coefficients(get_config("tiny", steps=10, alpha=2.0, schedule_horizon=1.0), 2).cs
    )


def test_ramp_multiplies_beta_by_cr_over_alpha():
    config = get_config("tiny", steps=10, alpha=10.0, beta_kl=0.3, beta_kl_schedule="ramp")
    half = coefficients(config, 5)
    assert half.kl_weight == pytest.approx(half.cr * 0.3 * half.cr / 10.0)


def test_learning_rate_warms_up_then_decays_to_0():
    config = get_config("tiny", steps=10, warmup_steps=4, lr=1.0, lr_schedule="linear")
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(1 / 6)
    assert rates[10] == 0.0


def test_constant_learning_rate_stays_after_the_warm_up():
    config = get_config("tiny", steps=10, warmup_steps=2, lr=1.0, lr_schedule="constant")
    assert [learning_rate(config, step) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
