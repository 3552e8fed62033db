"""Response surfaces to search, with their truth known, and trials on them with paired noise.

Drift falls from its value without KL to a floor as beta_kl grows; rerouting is flat and then regresses beyond a
threshold; temperature moves both, each in its own measure. A family is a way to write the two curves: `softplus` is
the first choice, `hinge` differs mildly in both. The other two differ in form: by `cliff` rerouting is lost all at once
and drift falls slowly, like a logarithm; by `valley` rerouting is lost as a power of beta_kl without a threshold, least
at a middle temperature, and drift rises again where beta_kl is large.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sweeps.plan.budget import PlanSettings
from sweeps.plan.journal import TrialOutcome, TrialSpec

Array = NDArray[np.float64]
Family = Literal["softplus", "hinge", "cliff", "valley"]
Failing = Literal["none", "trials", "drift", "seed"]
"""Which runs fail: a share of the trials (they hardly reroute, and then drift hardly at all), in drift alone, or all of
one baseline seed in so many."""
Kind = Literal["reachable", "none_feasible", "never_rerouted"]

TOLERANCE = 0.05
MIN_GAIN = math.log(1.5)
"""Surfaces on which the best feasible setting lowers drift by less are drawn again: there is nothing to find."""
_SPACE = PlanSettings()
_LOG_BETA = np.log(_SPACE.beta_kl_range)


@dataclass(frozen=True)
class Surface:
    """Noise-free metrics over (beta_kl, kl_temperature)."""

    family: Family
    drift_0: float
    floor: float
    scale: float
    power: float
    drift_temperature: float
    loss_0: float
    slope: float
    width: float
    reroute_temperature: float
    threshold: float
    jump: float
    """Rerouting lost by any beta_kl above 0, however small."""

    def drift(self, beta_kl: ArrayLike, kl_temperature: ArrayLike) -> Array:
        """Nats per token."""
        strength = np.asarray(beta_kl, float) * np.asarray(kl_temperature, float) ** self.drift_temperature / self.scale
        if self.family == "hinge":
            kept = np.exp(-(strength ** (self.power / 2)))
        elif self.family == "cliff":
            kept = 1 / (1 + self.power * np.log1p(strength))
        else:
            kept = 1 / (1 + strength**self.power)
        rise = 1 + strength / 50 if self.family == "valley" else 1
        return self.drift_0 * (self.floor * rise + (1 - self.floor) * kept)

    def lost(self, beta_kl: ArrayLike, kl_temperature: ArrayLike) -> Array:
        """Rerouting lost, as a fraction of what the baseline achieves."""
        beta, heat = np.asarray(beta_kl, float), np.asarray(kl_temperature, float)
        with np.errstate(divide="ignore"):
            middle = np.square(np.log(heat) - math.log(2)) if self.family == "valley" else 0
            beyond = np.log(beta) + self.reroute_temperature * (np.log(heat) + middle) - self.threshold
        z = beyond / self.width
        if self.family == "cliff":
            lost = 1 / (1 + np.exp(np.minimum(3 - 1.5 * z, 700)))
        elif self.family == "valley":
            lost = -np.expm1(-self.slope * np.exp(np.minimum((0.5 + self.width) * beyond, 700)))
        else:
            lost = (
                self.slope
                * self.width
                * (np.logaddexp(0, z) if self.family == "softplus" else np.maximum(0, z + 1) ** 1.3)
            )
        return np.where(beta > 0, np.minimum(self.jump + lost, 1), 0)

    @functools.cached_property
    def best_drift(self) -> float:
        """Least drift among feasible settings, beta_kl = 0 included."""
        beta, heat = _grid(201, 61)
        drift = np.where(self.lost(beta, heat) <= TOLERANCE, self.drift(beta, heat), np.inf)
        return min(float(drift.min()), self.drift_0)


def draw_surface(rng: np.random.Generator, family: Family, kind: Kind) -> Surface:
    """A surface whose feasible share of the space (beta_kl by its logarithm) is 10 to 90 %, or of another kind."""
    while True:
        shape = Surface(
            family=family,
            drift_0=math.exp(rng.uniform(0, 3)),
            floor=math.exp(rng.uniform(math.log(2e-3), math.log(0.1))),
            scale=math.exp(rng.uniform(math.log(0.01), math.log(0.5))),
            power=rng.uniform(0.7, 2),
            drift_temperature=rng.uniform(-0.3, 1.5),
            loss_0=rng.uniform(0.85, 1) if kind == "never_rerouted" else rng.uniform(0, 0.35),
            slope=math.exp(rng.uniform(math.log(0.04), math.log(0.3))),
            width=rng.uniform(0.15, 0.8),
            reroute_temperature=rng.uniform(-0.2, 1.5),
            threshold=rng.uniform(*_LOG_BETA),
            jump=0,
        )
        if kind == "none_feasible":
            jump = TOLERANCE * math.exp(rng.uniform(math.log(1.2), math.log(4)))
            return _with(shape, jump=jump)
        surface = _with(shape, threshold=_threshold(shape, rng.uniform(0.1, 0.9)))
        if kind == "never_rerouted" or math.log(surface.drift_0 / surface.best_drift) >= MIN_GAIN:
            return surface


class World:
    """Trials on a surface: noise on the achieved rerouting and on the logarithm of drift.

    Of the noise's variance a share `correlation` is common to all trials of a seed.
    """

    def __init__(
        self,
        surface: Surface,
        noise: float,
        correlation: float,
        seed: int,
        failing: Failing = "none",
        rate: float = 0.0,
        first_seed: int = 0,
    ) -> None:
        """
        Args:
            noise: standard deviation, as a fraction of the level.
            rate: of the runs that fail; 1 / rate seeds from `first_seed` on hold the one that fails.
        """
        self.surface, self._failing, self._rate = surface, failing, rate
        if failing == "seed":
            self._bad_seed = first_seed + int(np.random.default_rng([seed, 4]).integers(round(1 / rate)))
        self._noise, self._correlation, self._seed = noise, correlation, seed

    def __call__(self, spec: TrialSpec) -> TrialOutcome:
        """The outcome of a trial, the same whenever it is run."""
        shared = np.random.default_rng([self._seed, 1, spec.seed]).normal(size=2)
        own = np.random.default_rng([self._seed, 2, int(spec.trial_id[1:])]).normal(size=2)
        error = self._noise * (math.sqrt(self._correlation) * shared + math.sqrt(1 - self._correlation) * own)
        achieved = 1 - self.surface.loss_0
        lost = float(self.surface.lost(spec.beta_kl, spec.kl_temperature)) + error[0]
        loss = min(max(self.surface.loss_0 + achieved * lost, 0), 1)
        drift = float(self.surface.drift(spec.beta_kl, spec.kl_temperature)) * math.exp(error[1])
        chance = np.random.default_rng([self._seed, 3, int(spec.trial_id[1:])])
        if spec.seed == self._bad_seed if self._failing == "seed" else chance.random() < self._rate:
            if self._failing == "drift":
                drift *= math.exp(chance.choice([-1, 1]) * chance.uniform(2, 5))
            else:  # no layer collapsed, or one of two
                stays = chance.uniform(0.9, 1) if chance.random() < 0.5 else chance.uniform(0.4, 0.6)
                loss, drift = max(loss, stays), drift * math.exp(-chance.uniform(2, 6))
        return TrialOutcome("completed", drift, loss, 8.0, {"base_harmful_nll": 0.5, "loss_kl": 0.1})


def _with(surface: Surface, **changes: float) -> Surface:
    values = {name: value for name, value in vars(surface).items() if name in Surface.__dataclass_fields__}
    return Surface(**{**values, **changes})


def _threshold(shape: Surface, feasible_share: float) -> float:
    """Where the regression has to begin for this share of the space to be feasible."""
    beta, heat = _grid(61, 31)
    low, high = _LOG_BETA[0] - 4, _LOG_BETA[1] + 4
    for _ in range(30):
        middle = (low + high) / 2
        share = (_with(shape, threshold=middle).lost(beta, heat) <= TOLERANCE).mean()
        low, high = (middle, high) if share < feasible_share else (low, middle)
    return (low + high) / 2


@functools.cache
def _grid(betas: int, heats: int) -> tuple[Array, Array]:
    beta, heat = np.meshgrid(
        np.geomspace(*_SPACE.beta_kl_range, betas), np.linspace(*_SPACE.kl_temperature_range, heats)
    )
    return beta, heat
