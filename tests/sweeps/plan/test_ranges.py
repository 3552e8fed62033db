"""Every sampler keeps to the ranges, a single temperature included; a journal keeps them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from simulated import BASELINE_LOSS, drive, file_storage, next_trial, plan_of, true_reroute, world

from analysis.decide import decide
from cbtrain.config import InputError
from sweeps.plan.budget import SamplerName
from sweeps.plan.journal import TrialOutcome, TrialSpec

SPACES = [
    {"kl_temperature_range": (2.0, 2.0)},
    {"kl_temperature_range": (1.0, 1.0), "beta_kl_range": (3.0, 30.0)},
    {"kl_temperature_range": (0.5, 9.0), "beta_kl_range": (0.02, 0.4)},
    {"beta_kl_range": (1e-7, 2e-4)},
]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
@pytest.mark.parametrize("ranges", SPACES)
def test_every_trial_lies_in_the_ranges_whatever_searches(
    sampler: SamplerName, ranges: dict[str, tuple[float, float]]
) -> None:
    plan = plan_of(15, sampler=sampler, **ranges)
    asked = drive(plan, concurrent=2)
    with_kl = [spec for spec in asked if spec.beta_kl > 0]
    assert len(asked) == 15
    assert all(plan.settings.searched.contains(spec.beta_kl, spec.kl_temperature) for spec in with_kl), with_kl
    searched = {spec.beta_kl for spec in with_kl if spec.phase == "search"}
    assert len(searched) >= 3, searched
    assert np.isfinite([(spec.beta_kl, spec.kl_temperature) for spec in with_kl]).all()


@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_along_a_single_temperature_the_best_weight_within_the_limit_is_found(heat: float) -> None:
    plan = plan_of(20, kl_temperature_range=(heat, heat))
    drive(plan, lambda spec: world(spec, noise=0.002), concurrent=2)
    decision = decide(plan.table(), searched=plan.settings.searched)
    assert decision.verdict == "choose", decision.reason
    lost = true_reroute(decision.beta_kl, heat) - BASELINE_LOSS
    assert 0.03 < lost <= 0.05 * (1 - BASELINE_LOSS), f"{lost} lost at {decision.beta_kl}"


def test_weights_far_below_the_default_range_are_told_from_the_baseline() -> None:
    def shifted(spec: TrialSpec) -> TrialOutcome:
        return world(dataclasses.replace(spec, beta_kl=1e4 * spec.beta_kl), noise=0.002)

    plan = plan_of(20, beta_kl_range=(1e-7, 2e-4), kl_temperature_range=(1.0, 1.0))
    drive(plan, shifted, concurrent=2)
    decision = decide(plan.table(), searched=plan.settings.searched)
    assert decision.verdict == "choose", decision.reason
    lost = true_reroute(1e4 * decision.beta_kl, 1.0) - BASELINE_LOSS
    assert 0.02 < lost <= 0.05 * (1 - BASELINE_LOSS), f"{lost} lost at {decision.beta_kl}"


def test_a_range_where_all_is_within_the_limit_is_searched_to_its_end() -> None:
    plan = plan_of(20, beta_kl_range=(1e-3, 0.12), kl_temperature_range=(1.0, 1.0))
    drive(plan, lambda spec: world(spec, noise=0.002), concurrent=2)
    decision = decide(plan.table(), searched=plan.settings.searched)
    assert "upper end of the beta_kl range 0.001–0.12" in decision.range_warning, decision
    assert decision.wider is not None
    assert decision.wider.beta_kl == (1e-3, 1.2)


@pytest.mark.usefixtures("quick")
def test_where_no_ablation_point_lies_in_the_ranges_the_search_follows_the_baseline() -> None:
    plan = plan_of(12, beta_kl_range=(3.0, 30.0))
    phases = [spec.phase for spec in drive(plan)]
    assert phases == ["baseline"] * 3 + ["search"] * 9


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("heats", [(2.0, 2.0), (1.0, 1.0)])
def test_the_remaining_ablation_points_run_in_their_order(heats: tuple[float, float]) -> None:
    plan = plan_of(12, kl_temperature_range=heats)
    points = [(s.beta_kl, s.kl_temperature) for s in drive(plan) if s.phase == "ablation"]
    assert points == ([(0.3, 2.0)] if heats[0] == 2 else [(0.1, 1.0), (0.3, 1.0), (0.5, 1.0)])


def test_a_journal_goes_on_in_its_ranges_and_in_no_others(tmp_path: Path) -> None:
    ranges = {"beta_kl_range": (0.02, 0.4), "kl_temperature_range": (2.0, 2.0)}
    expected = drive(plan_of(10, **ranges))
    for spec in expected:
        plan = plan_of(10, file_storage(tmp_path), **ranges)
        assert next_trial(plan) == spec
        plan.tell(spec.trial_id, world(spec))
    with pytest.raises(InputError, match=r"kl_temperature_range \[2\.0, 2\.0\], not \[1\.0, 4\.0\]"):
        plan_of(10, file_storage(tmp_path), beta_kl_range=(0.02, 0.4))
