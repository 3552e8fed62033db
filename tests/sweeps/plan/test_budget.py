"""How a total of trials is shared out, and which settings are refused."""

import math

import pytest

from cbtrain.config import InputError
from sweeps.plan.budget import PlanSettings, allocate


@pytest.mark.parametrize(
    ("num_samples", "phases"),
    [
        (40, (8, 4, 24, 4)),
        (20, (4, 4, 10, 2)),
        (19, (3, 4, 11, 1)),
        (15, (3, 4, 7, 1)),
        (14, (3, 4, 7, 0)),
        (10, (3, 4, 3, 0)),
        (7, (3, 4, 0, 0)),
        (6, (3, 3, 0, 0)),
        (4, (3, 1, 0, 0)),
        (100, (8, 4, 78, 10)),
    ],
)
def test_budget_is_shared_out_as_designed(num_samples: int, phases: tuple[int, ...]) -> None:
    budget = allocate(PlanSettings(num_samples=num_samples))
    assert (budget.baseline, budget.ablation, budget.search, budget.confirm) == phases


def test_what_is_dropped_is_named_confirmation_then_search_then_ablation_from_the_end() -> None:
    dropped = {n: allocate(PlanSettings(num_samples=n)).dropped for n in (20, 10, 7, 5)}
    assert dropped == {
        20: (),
        10: ("confirmation",),
        7: ("confirmation", "search"),
        5: ("confirmation", "search", "ablation (0.3, T 2)", "ablation (0.5, T 1)"),
    }


def test_many_baseline_seeds_cost_confirmation_before_search() -> None:
    budgets = [allocate(PlanSettings(num_samples=20, baseline_seeds=seeds)) for seeds in (13, 14, 15, 16, 19)]
    assert [(b.ablation, b.search, b.confirm) for b in budgets] == [
        (4, 1, 2),
        (4, 1, 1),
        (4, 1, 0),
        (4, 0, 0),
        (1, 0, 0),
    ]
    assert budgets[1].dropped == ("1 of 2 confirmation trials",)


@pytest.mark.parametrize(("num_samples", "seeds"), [(2, None), (3, None), (0, None), (-1, None), (1, 1), (4, 4)])
def test_a_budget_below_baseline_seeds_plus_one_is_refused_with_the_arithmetic(
    num_samples: int, seeds: int | None
) -> None:
    least = (seeds or 3) + 1
    with pytest.raises(InputError, match=rf"--num-samples {num_samples}: .*\+ 1 trial to compare = {least} at least"):
        allocate(PlanSettings(num_samples=num_samples, baseline_seeds=seeds))
    assert allocate(PlanSettings(num_samples=least, baseline_seeds=seeds)).total == least


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"baseline_seeds": 0}, "--baseline-seeds 0"),
        ({"reroute_tolerance": 0.0}, "--reroute-tolerance 0"),
        ({"seed": -1}, "--seed"),
        ({"confidence": 1.0}, "--confidence 1"),
    ],
)
def test_settings_that_make_no_sweep_are_refused_by_flag(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        PlanSettings(**options)


@pytest.mark.parametrize(
    "bounds", [(2.0, 0.1), (0.3, 0.3), (0, 2), (-1, 2), (math.nan, 2), (0.1, math.inf), (1e-12, 1)]
)
def test_bounds_that_make_no_range_of_weights_are_refused_by_flag(bounds: tuple[float, float]) -> None:
    with pytest.raises(
        InputError, match=rf"^--beta-kl-range {bounds[0]:g} {bounds[1]:g}: must be two numbers from 1e-09"
    ):
        PlanSettings(beta_kl_range=bounds)


@pytest.mark.parametrize("bounds", [(4.0, 1.0), (0, 0), (-1, 2), (math.nan, math.nan), (1, math.inf)])
def test_bounds_that_make_no_range_of_temperatures_are_refused_by_flag(bounds: tuple[float, float]) -> None:
    given = f"{bounds[0]:g} {bounds[1]:g}"
    with pytest.raises(InputError, match=rf"^--kl-temperature-range {given}: must be one or two numbers from 1e-09"):
        PlanSettings(kl_temperature_range=bounds)


def test_ablation_points_outside_the_ranges_are_named_and_leave_their_trials_to_the_search() -> None:
    def phases(**ranges: tuple[float, float]) -> tuple[int, int, tuple[str, ...]]:
        budget = allocate(PlanSettings(num_samples=20, **ranges))
        assert (budget.total, budget.baseline, budget.confirm, budget.dropped) == (20, 4, 2, ())
        return budget.ablation, budget.search, budget.outside

    below, middle, above, hot = (f"ablation ({point})" for point in ("0.1, T 1", "0.3, T 1", "0.5, T 1", "0.3, T 2"))
    assert phases() == (4, 10, ())
    assert phases(beta_kl_range=(0.2, 0.4)) == (2, 12, (below, above))
    assert phases(kl_temperature_range=(1.0, 1.0)) == (3, 11, (hot,))
    assert phases(kl_temperature_range=(2.0, 2.0)) == (1, 13, (below, middle, above))
    assert phases(beta_kl_range=(3.0, 30.0)) == (0, 14, (below, middle, above, hot))


def test_what_is_left_out_for_want_of_trials_is_named_apart_from_what_lies_outside() -> None:
    budget = allocate(PlanSettings(num_samples=5, kl_temperature_range=(1.0, 1.0)))
    assert budget.dropped == ("confirmation", "search", "ablation (0.5, T 1)")
    assert budget.outside == ("ablation (0.3, T 2)",)
