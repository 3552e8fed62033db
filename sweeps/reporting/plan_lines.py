"""What a sweep says that it will do, before it does."""

from pathlib import Path

from cbtrain.calibration.outcome import steps_allowed
from sweeps.plan.budget import Budget, PlanSettings
from sweeps.reporting.console import indented, wrapped

SAMPLERS = {"gp": "Gaussian process", "tpe": "TPE", "random": "random"}


def plan_lines(
    settings: PlanSettings, budget: Budget, cache: str, run_dir: Path, early_stop: bool = False
) -> list[str]:
    """The plan, in the order in which it will run; `cache` says what the teacher cache takes."""
    searched = settings.searched
    betas, temperatures = searched.range_of("beta_kl"), searched.range_of("kl_temperature")
    over = f"{betas} (log) {'at' if searched.single_temperature else '×'} kl_temperature {temperatures}"
    phases = ("baseline", "ablation", "search", "confirm")
    parts = " + ".join(f"{getattr(budget, phase)} {phase}" for phase in phases if getattr(budget, phase))
    lines = [f"plan      {budget.total} trials = {parts}"]
    lost = f"{100 * settings.reroute_tolerance:g} %"
    if budget.dropped:
        lines += indented(f"left out for want of trials: {', '.join(budget.dropped)}")
    if budget.outside:
        lines += indented(f"left out as outside the ranges: {', '.join(budget.outside)}")
    return [
        *lines,
        *wrapped(f"search    beta_kl {over} · {SAMPLERS[settings.sampler]}"),
        f"goal      least benign drift, rerouting lost ≤ {lost} of what baselines achieve",
        *(wrapped(f"stop      {_stopped_early(budget)}") if early_stop else []),
        *wrapped(f"cache     {cache}"),
        f"run       {run_dir}",
    ]


def calibration_line(trials: int, steps: int) -> str:
    """What a calibration may cost, before it begins."""
    allowed = steps_allowed(trials, steps)
    return (
        f"calibrate at most {allowed:,} steps first, beside the trials' {trials * steps:,}: a recipe that reroutes at "
        "three seeds (--no-calibrate leaves it out)"
    )


def behaviour_line(prompts: int) -> str:
    """What is measured when the trials have ended; its seconds are told then, by a model that runs."""
    return f"behaviour at the end, on up to {prompts} held-out prompts a kind (--behaviour-prompts)"


def _stopped_early(budget: Budget) -> str:
    if budget.search == 0:
        return "nothing: only search trials are stopped early, and the plan has none"
    return "search trials early whose held-out rerouting stays over the limit"
