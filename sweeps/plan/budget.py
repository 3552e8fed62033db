"""What a sweep of N trials consists of: its settings, and how many trials each phase gets.

`--num-samples` is the total. Baselines come first in the budget, then the ablation points, then the search;
confirmation takes a tenth where all of those have their place.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from analysis.constraint import CONFIDENCE, REROUTE_TOLERANCE
from analysis.noise import baseline_seeds_of
from analysis.surrogate.search_space import BETA_KL_RANGE, KL_TEMPERATURE_RANGE, SearchSpace
from cbtrain.config import InputError
from cbtrain.config.validation import check_fields

Phase = Literal["baseline", "ablation", "search", "confirm"]
SamplerName = Literal["gp", "tpe", "random"]

ABLATION_POINTS: tuple[tuple[float, float], ...] = ((0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 2.0))
"""(beta_kl, kl_temperature) of the fixed test; with the baseline it has five points."""
MIN_CONFIRMED_BUDGET = 15
"""Below this many trials none is spent on confirmation."""
MAX_CONFIRM = 20
"""More confirmations than this would be seeds beyond those of the baseline."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What is swept, and with how many trials."""

    num_samples: int = 20
    """Trials in all, whatever their phase."""
    seed: Annotated[int, Ge(0)] = 0
    """First trial seed; also seeds the search."""
    baseline_seeds: Annotated[int, Ge(1)] | None = None
    """Seeds on which `beta_kl = 0` is run; None is a fifth of the budget, at least 3, at most 8."""
    reroute_tolerance: Annotated[float, Gt(0), Lt(1), "must lie between 0 and 1"] = REROUTE_TOLERANCE
    """Share of the baseline's rerouting that a trial may lose."""
    confidence: Annotated[float, Gt(0.5), Lt(1), "must lie between 0.5 and 1"] = CONFIDENCE
    """Probability of keeping that limit which a recommended setting must reach."""
    sampler: SamplerName = "gp"
    """What searches: gp is the Gaussian process that also decides, tpe and random are Optuna's."""
    beta_kl_range: tuple[float, float] = BETA_KL_RANGE
    """Searched on a logarithmic scale."""
    kl_temperature_range: tuple[float, float] = KL_TEMPERATURE_RANGE
    """Searched on a linear scale; with equal ends the search is over beta_kl alone."""

    def __post_init__(self) -> None:
        """Raise `InputError` naming the flag of a value that makes no sweep."""
        _ = self.searched  # first: of what is no finite number it says more than the check of types
        check_fields(self, PlanSettings)

    @property
    def searched(self) -> SearchSpace:
        """Both ranges."""
        return SearchSpace(self.beta_kl_range, self.kl_temperature_range)

    @property
    def ablation_points(self) -> tuple[tuple[float, float], ...]:
        """Those of `ABLATION_POINTS` that lie within the ranges."""
        return tuple(point for point in ABLATION_POINTS if self.searched.contains(*point))


@dataclass(frozen=True)
class Budget:
    """Trials a phase; they add up to `num_samples`."""

    baseline: int
    ablation: int
    search: int
    confirm: int
    dropped: tuple[str, ...] = ()
    """Names what more trials would have had."""
    outside: tuple[str, ...] = ()
    """Names the ablation points that lie outside the ranges."""

    @property
    def total(self) -> int:
        """Trials in all."""
        return self.baseline + self.ablation + self.search + self.confirm


def allocate(settings: PlanSettings) -> Budget:
    """Share out `num_samples`.

    Raises:
        InputError: fewer trials than the baseline's seeds and one to compare with them.
    """
    total = settings.num_samples
    baseline = settings.baseline_seeds or baseline_seeds_of(total)
    if total < baseline + 1:
        mend = f"give {baseline + 1} or more" + (", or fewer --baseline-seeds" if baseline > 1 else "")
        seeds = f"{baseline} baseline seed{'s' if baseline > 1 else ''}"
        raise InputError(f"--num-samples {total}: {seeds} + 1 trial to compare = {baseline + 1} at least; {mend}")
    points = settings.ablation_points
    ablation = min(len(points), total - baseline)
    free = total - baseline - ablation
    wanted = min(MAX_CONFIRM, total // 10) if total >= MIN_CONFIRMED_BUDGET else 0
    confirm = min(wanted, max(0, free - 1))
    dropped = (*_dropped(free, confirm, wanted), *map(_named, reversed(points[ablation:])))
    outside = tuple(_named(point) for point in ABLATION_POINTS if point not in points)
    return Budget(baseline, ablation, free - confirm, confirm, dropped, outside)


def _dropped(free: int, confirm: int, wanted: int) -> tuple[str, ...]:
    """Names of the phases that got no trial or fewer, in the order in which they were given up."""
    names = []
    if confirm == 0:
        names.append("confirmation")
    elif confirm < wanted:
        names.append(f"{wanted - confirm} of {wanted} confirmation trials")
    if free == 0:
        names.append("search")
    return tuple(names)


def _named(point: tuple[float, float]) -> str:
    return f"ablation ({point[0]:g}, T {point[1]:g})"
