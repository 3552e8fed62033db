"""Whether a run had settled, told from curves drawn by hand."""

import pytest

from cbtrain.evaluation.convergence import collapse_steps, convergence_metrics, unsettled

LAYERS = (10, 20)


def curve(*points: tuple[int, float, float]) -> list[dict[str, float]]:
    """Held-out evaluations of (step, cosine at layer 10, cosine at layer 20)."""
    return [
        {
            "step": step,
            "loss_reroute": (max(a, 0) + max(b, 0)) / 2,
            "eval_loss_reroute": (max(a, 0) + max(b, 0)) / 2,
            "eval_cosine_layer_10": a,
            "eval_cosine_layer_20": b,
        }
        for step, a, b in points
    ]


SETTLED = curve((10, 0.98, 0.9), (20, 0.95, -0.1), (30, 0.4, -0.3), (40, -0.2, -0.2), (50, -0.3, -0.1))
ONE_LATE = curve((10, 0.99, 0.9), (20, 0.98, -0.1), (30, 0.98, -0.3), (40, 0.98, -0.2), (50, 0.98, -0.1))
FALLING = curve((10, 0.98, 0.98), (20, 0.9, 0.9), (30, 0.7, 0.7), (40, 0.4, 0.4), (50, 0.2, 0.2))
STILL = curve((10, 1.0, 1.0), (20, 1.0, 1.0), (30, 1.0, 1.0), (40, 1.0, 1.0), (50, 1.0, 1.0))
SUPPRESSED = curve((10, 0.99, 0.98), (20, 0.8, 0.8), (30, 0.7, 0.7), (40, 0.6, 0.6), (50, 0.59, 0.59))


@pytest.mark.parametrize(
    ("of", "steps"),
    [
        (SETTLED, {10: 30, 20: 20}),
        (ONE_LATE, {10: None, 20: 20}),
        (STILL, {10: None, 20: None}),
        (curve((10, 0.2, 0.2), (20, 0.9, 0.3), (30, 0.1, 0.2)), {10: 30, 20: 10}),
    ],
)
def test_a_layer_collapses_where_it_goes_down_for_good(of, steps):
    assert collapse_steps(of, LAYERS) == steps


@pytest.mark.parametrize("of", [SETTLED, STILL, SUPPRESSED], ids=["settled", "still", "held by KL"])
def test_a_level_curve_is_settled_wherever_it_lies(of):
    assert unsettled(of, LAYERS) == ""
    assert convergence_metrics(of, LAYERS)["converged"] == 1


def test_a_layer_that_waits_while_another_has_collapsed_is_named():
    assert unsettled(ONE_LATE, LAYERS) == "layer 10 at cosine 0.98 while others have collapsed"
    assert convergence_metrics(ONE_LATE, LAYERS) == {"converged": 0.0, "collapse_step_layer_20": 20.0}


def test_a_loss_that_falls_by_more_than_the_limit_over_the_last_fifth_is_not_settled():
    assert unsettled(FALLING, LAYERS) == "reroute still fell from 0.400 to 0.200 over the last fifth"


def test_without_evaluations_in_between_the_training_loss_tells():
    falling = [{"step": step, "loss_reroute": 1 - step / 100} for step in range(1, 100)]
    level = [{"step": step, "loss_reroute": 0.1} for step in range(1, 100)]
    last = curve((100, 0.1, 0.1))
    assert "still fell" in unsettled([*falling, *last], LAYERS)
    assert unsettled([*level, *last], LAYERS) == ""


@pytest.mark.parametrize(("limit", "why"), [(0.3, ""), (0.24, "reroute still fell from 0.400 to 0.200")])
def test_the_limit_is_the_callers(limit, why):
    found = unsettled(FALLING, LAYERS, limit)
    assert found is not None
    assert found.startswith(why)
    assert convergence_metrics(FALLING, LAYERS, limit)["converged"] == (not why)


def test_a_curve_too_sparse_to_tell_says_nothing():
    end = curve((50, 0.2, 0.2))
    assert unsettled(end, LAYERS) is None
    assert convergence_metrics(end, LAYERS) == {"collapse_step_layer_10": 50.0, "collapse_step_layer_20": 50.0}
