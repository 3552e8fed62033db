"""What a sweep says that it will do."""

from pathlib import Path

import pytest
from simulated import plan_of

from sweeps.reporting.plan_lines import behaviour_line, plan_lines


def test_the_plan_is_printed_with_what_was_dropped():
    plan = plan_of(4, reroute_tolerance=0.025)
    lines = plan_lines(plan.settings, plan.budget, "12 kB of 3 GB free", Path("runs/a"))
    assert lines[0] == "plan      4 trials = 3 baseline + 1 ablation"
    assert "left out for want of trials: confirmation, search, ablation (0.3, T 2)" in " ".join(
        line.strip() for line in lines[1:3]
    )
    assert lines[-4] == "search    beta_kl 0.001–2 (log) × kl_temperature 1–4 · Gaussian process"
    assert lines[-3] == "goal      least benign drift, rerouting lost ≤ 2.5 % of what baselines achieve"
    assert lines[-2:] == ["cache     12 kB of 3 GB free", "run       runs/a"]
    assert max(map(len, [*lines, behaviour_line(64)])) <= 80, lines


@pytest.mark.parametrize(
    ("ranges", "search"),
    [
        ({"beta_kl_range": (0.2, 3.5)}, "search    beta_kl 0.2–3.5 (log) × kl_temperature 1–4 · Gaussian process"),
        (
            {"kl_temperature_range": (2.0, 2.0)},
            "search    beta_kl 0.001–2 (log) at kl_temperature 2 · Gaussian process",
        ),
        (
            {"beta_kl_range": (0.000123, 123.456), "kl_temperature_range": (1.2345, 4.5678)},
            "search    beta_kl 0.000123–123.456 (log) × kl_temperature 1.2345–4.5678 · Gaussian process",
        ),
    ],
)
def test_the_plan_says_what_is_searched_and_what_lies_outside(ranges, search):
    plan = plan_of(20, **ranges)
    lines = plan_lines(plan.settings, plan.budget, "off", Path("runs/a"))
    text = " ".join(" ".join(lines).split())
    assert " ".join(search.split()) in text
    assert f"left out as outside the ranges: {', '.join(plan.budget.outside)}" in text
    assert "for want of trials" not in text
    assert max(map(len, lines)) <= 80, lines


@pytest.mark.parametrize(
    ("options", "searches"),
    [
        ({}, "Gaussian process"),
        ({"sampler": "tpe"}, "TPE"),
        ({"sampler": "random"}, "random"),
        ({"num_samples": 340}, "Gaussian process"),
    ],
)
def test_the_plan_says_what_searches(options, searches):
    plan = plan_of(**{"num_samples": 20, **options})
    lines = plan_lines(plan.settings, plan.budget, "off", Path("runs/a"))
    begin, end = (next(i for i, line in enumerate(lines) if line.startswith(label)) for label in ("search", "goal"))
    assert " ".join(line.strip() for line in lines[begin:end]).endswith(f" · {searches}")
    assert max(map(len, lines)) <= 80, lines


@pytest.mark.parametrize(
    ("num_samples", "says"),
    [
        (12, "stop      search trials early whose held-out rerouting stays over the limit"),
        (7, "stop      nothing: only search trials are stopped early, and the plan has none"),
    ],
)
def test_the_plan_says_what_is_stopped_early(num_samples, says):
    plan = plan_of(num_samples)
    with_it, without = (plan_lines(plan.settings, plan.budget, "off", Path("a"), early) for early in (True, False))
    assert set(with_it) - set(without) == {says}
    assert len(says) <= 80
