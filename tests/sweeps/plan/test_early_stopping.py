"""Which search trials are stopped, at which evaluation, and what is said about them."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.plan.early_stopping import StopRule, stop_rule

STEPS, TOLERANCE = 100, 0.05
LEVELS = {10: 0.8, 20: 0.5} | dict.fromkeys(range(30, 101, 10), 0.1)
BASELINES = {seed: dict(LEVELS) for seed in range(3)}
"""Three baselines without any spread: the limit at a step is its level + the tolerance."""


def rule(baselines: dict[int, dict[int, float]] = BASELINES, seed: int = 0) -> StopRule:
    """The rule for a trial of these baselines, which must give one."""
    made = stop_rule(baselines, seed, STEPS, TOLERANCE)
    assert made is not None
    return made


def above(*steps: int) -> dict[int, float]:
    """A trial's curve, just over the limit at some steps and just within it at the others."""
    return {step: level + TOLERANCE + (1e-6 if step in steps else -1e-6) for step, level in LEVELS.items()}


def stopped_at(curve: dict[int, float], with_rule: StopRule | None = None) -> int | None:
    """The step at which a trial that evaluates in this order ends; None where it runs to its end."""
    with_rule = with_rule or rule()
    seen: dict[int, float] = {}
    for step, loss in curve.items():
        seen[step] = loss
        if with_rule.reason(seen):
            return step
    return None


def test_the_limit_is_the_paired_baseline_plus_tolerance_plus_1_64_errors_of_a_difference() -> None:
    # σ at 50 is 0.01; at the six other judged steps there is none, so the σ pooled over the seven is smaller.
    spread = {seed: LEVELS | {50: loss} for seed, loss in enumerate((0.09, 0.10, 0.11))}
    pooled = math.sqrt(0.01**2 / 7)
    limits = [rule(spread, seed).limits for seed in spread]
    assert [made[50] for made in limits] == pytest.approx(
        [loss + TOLERANCE + 1.64 * math.sqrt(2) * 0.01 for loss in (0.09, 0.10, 0.11)]
    )
    assert limits[0][60] == pytest.approx(0.10 + TOLERANCE + 1.64 * math.sqrt(2) * pooled)


def test_two_evaluations_in_a_row_over_the_limit_stop_a_trial_at_the_second() -> None:
    assert stopped_at(above(50, 60)) == 60


def test_one_evaluation_over_the_limit_does_not_stop_a_trial() -> None:
    assert {step: stopped_at(above(step)) for step in LEVELS} == dict.fromkeys(LEVELS)


def test_two_evaluations_over_the_limit_with_one_within_it_between_do_not_stop_a_trial() -> None:
    assert stopped_at(above(40, 60, 80)) is None


def test_a_trial_exactly_at_the_limit_goes_on() -> None:
    limits = rule().limits
    assert stopped_at(limits) is None
    assert stopped_at({step: math.nextafter(limit, 1) for step, limit in limits.items()}) is not None


def test_before_30_percent_of_its_steps_no_trial_is_judged() -> None:
    assert stopped_at(above(10, 20)) is None
    assert stopped_at(above(10, 20, 30)) is None
    assert stopped_at(above(20, 30, 40)) == 40
    assert min(rule().limits) == 30


def test_at_its_last_step_a_trial_is_not_stopped_since_it_has_run() -> None:
    assert stopped_at(above(90, 100)) is None
    assert stopped_at(above(80, 90, 100)) == 90


def test_a_trial_without_a_completed_baseline_of_its_seed_has_no_rule() -> None:
    assert stop_rule(BASELINES, 7, STEPS, TOLERANCE) is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_baselines_carry_no_rule(count: int) -> None:
    assert stop_rule(dict.fromkeys(range(count), LEVELS), 0, STEPS, TOLERANCE) is None


def test_only_steps_at_which_every_baseline_was_evaluated_are_judged() -> None:
    sparse = BASELINES | {2: {step: loss for step, loss in LEVELS.items() if step not in (50, 60)}}
    assert sorted(rule(sparse).limits) == [30, 40, 70, 80, 90]
    assert stopped_at(above(50, 60), rule(sparse)) is None


def test_a_step_that_is_not_judged_lies_between_two_that_are() -> None:
    sparse = {seed: {step: LEVELS[step] for step in (40, 60, 80, 100)} for seed in range(3)}
    assert stopped_at(above(40, 60, 80), rule(sparse)) is None
    assert stopped_at({40: 0.2, 60: 0.2}, rule(sparse)) == 60


def test_baselines_evaluated_only_at_the_end_carry_no_rule() -> None:
    assert stop_rule({seed: {100: 0.01} for seed in range(3)}, 0, STEPS, TOLERANCE) is None


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_nothing(missing: float) -> None:
    assert 50 not in rule(BASELINES | {1: LEVELS | {50: missing}}).limits
    assert stopped_at(dict.fromkeys(LEVELS, math.nan)) is None


def test_a_trial_that_makes_up_for_its_lag_goes_on_and_one_that_does_not_is_stopped() -> None:
    # From 0.40 at step 40, and with 50 steps to go at step 50, a fall of 0.042 reaches 0.148 and one of 0.041 0.154.
    assert stopped_at({40: 0.40, 50: 0.358}) is None
    assert stopped_at({40: 0.40, 50: 0.359}) == 50
    assert stopped_at({40: 0.40, 50: 0.41}) == 50


def test_a_lag_that_is_not_made_up_for_stops_a_trial_as_soon_as_it_slows_down() -> None:
    assert stopped_at({30: 0.8, 40: 0.5, 50: 0.35, 60: 0.30, 70: 0.28, 80: 0.27}) == 70


def test_a_trial_within_what_its_baseline_ends_at_is_not_stopped_because_the_baseline_was_lower_before() -> None:
    rising = {seed: LEVELS | {100: 0.2} for seed in range(3)}
    assert stopped_at(dict.fromkeys(LEVELS, 0.25), rule(rising)) is None
    assert stopped_at(dict.fromkeys(LEVELS, 0.26), rule(rising)) == 40


def test_a_paired_baseline_without_its_last_evaluation_carries_no_rule() -> None:
    cut = {step: loss for step, loss in LEVELS.items() if step < STEPS}
    assert stop_rule(BASELINES | {0: cut}, 0, STEPS, TOLERANCE) is None
    assert stop_rule(BASELINES | {0: LEVELS | {STEPS: math.nan}}, 0, STEPS, TOLERANCE) is None
    assert stop_rule(BASELINES | {1: cut}, 0, STEPS, TOLERANCE) is not None


def test_the_reason_is_one_line_with_step_loss_limit_baseline_and_goal() -> None:
    assert rule().reason({40: 0.31, 50: 0.29}) == (
        "step 50: held-out reroute 0.2900 is over 0.1500 (baseline 0.1000), as at step 40, and falls too slowly to "
        "end at 0.1500"
    )


def test_a_rule_goes_to_another_process_and_stays_as_it_is() -> None:
    assert pickle.loads(pickle.dumps(rule())) == rule()


@given(
    shift=st.floats(0, 0.3),
    losses=st.lists(st.floats(0, 1), min_size=len(LEVELS), max_size=len(LEVELS)),
    spread=st.floats(0, 0.1),
)
def test_a_trial_that_never_does_worse_than_another_is_never_stopped_before_it(
    shift: float, losses: list[float], spread: float
) -> None:
    baselines = {seed: {step: loss + seed * spread for step, loss in LEVELS.items()} for seed in range(3)}
    worse = dict(zip(LEVELS, losses, strict=True))
    better = {step: loss - shift for step, loss in worse.items()}
    ends = [stopped_at(curve, rule(baselines)) or STEPS for curve in (better, worse)]
    assert ends[0] >= ends[1], (better, worse, ends)


@given(offset=st.floats(-0.2, 0.05), spread=st.floats(0, 0.1), seed=st.integers(0, 2))
def test_a_trial_within_tolerance_of_its_baseline_at_each_step_is_never_stopped(
    offset: float, spread: float, seed: int
) -> None:
    baselines = {number: {step: loss + number * spread for step, loss in LEVELS.items()} for number in range(3)}
    trial = {step: loss + offset for step, loss in baselines[seed].items()}
    assert stopped_at(trial, rule(baselines, seed)) is None
