"""What would be chosen if more or less rerouting might be lost, or more or less confidence were asked for."""

from collections.abc import Sequence

import numpy as np

from analysis.constraint import probably_feasible
from analysis.decision import Alternative, SettingAssessment
from analysis.surrogate.kernel import coordinates
from analysis.surrogate.surrogate import Surrogate
from analysis.verdict import out_by_behaviour

TOLERANCES = (0.02, 0.05, 0.1)
CONFIDENCES = (0.9, 0.99)


def alternatives(
    model: Surrogate,
    settings: Sequence[SettingAssessment],
    reroute_tolerance: float,
    confidence: float,
    n_stopped: int = 0,
) -> tuple[Alternative, ...]:
    """The choice at each of `TOLERANCES` by the decision's confidence, then at each of `CONFIDENCES` by its tolerance.

    By the model that decides, with another limit. Settings that fail or misbehave stay out.

    Args:
        n_stopped: trials that were stopped early under `reroute_tolerance`.
    """
    points = coordinates([each.beta_kl for each in settings], [each.kl_temperature for each in settings], model.space)
    lost, barred = model.lost(points), model.not_to_be_chosen()
    drift = np.array([each.drift for each in settings])
    out = [
        is_out or (each.beta_kl, each.kl_temperature) in barred
        for each, is_out in zip(settings, out_by_behaviour(settings), strict=True)
    ]
    asked = [(tolerance, confidence) for tolerance in TOLERANCES] + [(reroute_tolerance, each) for each in CONFIDENCES]
    found = []
    for tolerance, sure in asked:
        qualifies = [probably_feasible(chance, sure) for chance in lost.probability_below(tolerance)]
        allowed = np.where(np.array(qualifies) & ~np.array(out), drift, np.inf)
        best = settings[int(allowed.argmin())] if np.isfinite(allowed.min()) else None
        unknown = n_stopped if tolerance > reroute_tolerance else 0
        beta_kl, heat, drift_there = (best.beta_kl, best.kl_temperature, best.drift) if best else (None, None, None)
        found.append(Alternative(tolerance, sure, beta_kl, heat, drift_there, unknown))
    return tuple(found)
