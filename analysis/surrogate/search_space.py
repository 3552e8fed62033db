"""The settings that a sweep searches: a range of beta_kl, and one of kl_temperature or a single temperature.

The search (`sweeps.plan`), the model's coordinates, the decision's map and the report all go by one `SearchSpace`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbtrain.config import InputError, flag

_Array = NDArray[np.float64]
Bounds = tuple[float, float]
Parameter = Literal["beta_kl", "kl_temperature"]

BETA_KL_RANGE: Bounds = (1e-3, 2.0)
"""Searched unless the sweep says otherwise; on a logarithmic scale."""
KL_TEMPERATURE_RANGE: Bounds = (1.0, 4.0)
"""The same; on a linear scale."""
AT_END = 0.05
"""Share of a range, on its scale, within which a setting lies at the range's end."""
_LEAST, _MOST = 1e-9, 1e9
"""Bounds of all bounds: beyond them nothing can be trained, and powers of them leave double precision."""
_ROUNDING = 1e-9
_MAP_WEIGHTS, _MAP_TEMPERATURES = 13, 5
_SEARCHED: tuple[Parameter, ...] = ("beta_kl", "kl_temperature")
_WIDER_BY: dict[Parameter, float] = {"beta_kl": 10.0, "kl_temperature": 2.0}
"""Factors by which a range is widened at an end."""


@dataclass(frozen=True)
class RangeEnd:
    """One end of one searched range."""

    parameter: Parameter
    side: Literal["lower", "upper"]


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, ends included. Equal ends of `kl_temperature` are a single temperature."""

    beta_kl: Bounds = BETA_KL_RANGE
    kl_temperature: Bounds = KL_TEMPERATURE_RANGE

    def __post_init__(self) -> None:
        """Raise `InputError` naming the flag of bounds that make no range."""
        (low, high), (cold, hot) = self.beta_kl, self.kl_temperature
        if not _LEAST <= low < high <= _MOST:
            raise _no_range("beta_kl_range", self.beta_kl, "two numbers")
        if not _LEAST <= cold <= hot <= _MOST:
            raise _no_range("kl_temperature_range", self.kl_temperature, "one or two numbers")

    def __str__(self) -> str:
        """`beta_kl 0.001–2, kl_temperature 1–4`."""
        return f"beta_kl {self.range_of('beta_kl')}, kl_temperature {self.range_of('kl_temperature')}"

    @property
    def single_temperature(self) -> bool:
        """Whether the search is over beta_kl alone."""
        return self.kl_temperature[0] == self.kl_temperature[1]

    def contains(self, beta_kl: float, kl_temperature: float) -> bool:
        """Whether a setting lies within both ranges."""
        (low, high), (cold, hot) = self.beta_kl, self.kl_temperature
        return low <= beta_kl <= high and cold <= kl_temperature <= hot

    def to_unit(self, beta_kl: ArrayLike, kl_temperature: ArrayLike) -> _Array:
        """`[n, 2]` places within the ranges, 0 to 1: of beta_kl by its logarithm; a single temperature is at 0."""
        low, high = np.log(self.beta_kl)
        cold, hot = self.kl_temperature
        weight = (np.log(np.asarray(beta_kl, dtype=float)) - low) / (high - low)
        heat = (np.asarray(kl_temperature, dtype=float) - cold) / (1.0 if self.single_temperature else hot - cold)
        return np.stack([weight, heat], axis=1)

    def from_unit(self, points: _Array) -> tuple[_Array, _Array]:
        """beta_kl and kl_temperature `[n]` of places `[n, 2]` as `to_unit` gives them."""
        low, high = np.log(self.beta_kl)
        cold, hot = self.kl_temperature
        return np.exp(low + points[:, 0] * (high - low)), cold + points[:, 1] * (hot - cold)

    def grid(self) -> tuple[_Array, _Array]:
        """beta_kl and kl_temperature of the map: 13 weights × 5 temperatures, or × the single one; ends included."""
        temperatures = 1 if self.single_temperature else _MAP_TEMPERATURES
        pairs = np.meshgrid(np.geomspace(*self.beta_kl, _MAP_WEIGHTS), np.linspace(*self.kl_temperature, temperatures))
        return pairs[0].ravel(), pairs[1].ravel()

    def ends_at(self, pick: tuple[float, float], ran: ArrayLike) -> tuple[RangeEnd, ...]:
        """The ends of the ranges at which a pick sits; none for a pick outside the space.

        It sits at an end within `AT_END` of it, unless a setting that ran lies nearer: that one has shown already what
        comes of going on.

        Args:
            pick: (beta_kl, kl_temperature).
            ran: `[n, 2]` settings that ran, the pick among them.
        """
        if not self.contains(*pick):
            return ()
        settings, ends = np.asarray(ran, dtype=float), []
        here, there = self.to_unit([pick[0]], [pick[1]])[0], self.to_unit(settings[:, 0], settings[:, 1])
        for column, parameter in enumerate(_SEARCHED[:1] if self.single_temperature else _SEARCHED):
            place, places = here[column], there[:, column]
            if place <= min(AT_END, places.min() + _ROUNDING):
                ends.append(RangeEnd(parameter, "lower"))
            if place >= max(1 - AT_END, places.max() - _ROUNDING):
                ends.append(RangeEnd(parameter, "upper"))
        return tuple(ends)

    def widened(self, ends: Iterable[RangeEnd]) -> "SearchSpace":
        """The space for a further sweep: at these ends ten times the weight, or twice the temperature, further."""
        bounds = {parameter: list(getattr(self, parameter)) for parameter in _SEARCHED}
        for end in ends:
            factor, index = _WIDER_BY[end.parameter], ("lower", "upper").index(end.side)
            wider = bounds[end.parameter][index] * (factor if end.side == "upper" else 1 / factor)
            bounds[end.parameter][index] = min(max(float(f"{wider:.6g}"), _LEAST), _MOST)
        return SearchSpace(**{parameter: (low, high) for parameter, (low, high) in bounds.items()})

    def says(self, end: RangeEnd) -> str:
        """`the upper end of the beta_kl range 0.001–2: what lies above was not searched.`"""
        beyond = "below" if end.side == "lower" else "above"
        ranged = f"{end.parameter} range {self.range_of(end.parameter)}"
        return f"the {end.side} end of the {ranged}: what lies {beyond} was not searched."

    def range_of(self, parameter: Parameter) -> str:
        """`0.001–2`; a single temperature is one number."""
        low, high = getattr(self, parameter)
        return f"{low:g}" if low == high else f"{low:g}–{high:g}"


DEFAULT_SPACE = SearchSpace()


def _no_range(name: str, bounds: Bounds, numbers: str) -> InputError:
    given = " ".join(f"{bound:g}" for bound in bounds)
    return InputError(f"{flag(name)} {given}: must be {numbers} from {_LEAST:g} to {_MOST:g}, the smaller first")
