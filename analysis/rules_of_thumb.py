"""The four rules of thumb for choosing beta_kl by hand, evaluated on a sweep's own numbers.

They were stated on the training `loss_kl` at temperature 1, so only such trials are looked at: `loss_kl` carries T²
and is a divergence between softened distributions, which is not comparable between temperatures.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import linregress

from analysis.constraint import probably_feasible
from analysis.formatting import number, signed, with_relation

LOSS_KL_TOO_STRONG = 1.0
"""The first rule's threshold on the training `loss_kl`, T = 1."""
LOW_WEIGHT = 0.1
"""What the first two rules advise at most."""
_SLOPE_P_VALUE = 0.05
TOO_FEW = "not enough trials"


@dataclass(frozen=True)
class RuleOfThumb:
    """A rule, whether its condition holds (None: no trial to tell by), and the numbers that say so."""

    rule: str
    fired: bool | None
    evidence: str
    instead: str = ""
    """Why the decision does otherwise, where the rule fired; else empty."""


@dataclass(frozen=True)
class Outlook:
    """What the model expects at a setting that need not have run."""

    beta_kl: float
    probability_feasible: float
    drift: float


def evaluate_rules(
    trials: pd.DataFrame, pick_beta_kl: float | None, at_03: Outlook | str, at_05: Outlook | str, confidence: float
) -> tuple[RuleOfThumb, ...]:
    """The four rules on completed trials; `pick_beta_kl` None looks at the rules' own default, 0.3.

    Args:
        trials: completed trials with finite metrics, the baseline included.
        pick_beta_kl: the recommended value, near which the first rule reads `loss_kl`.
        at_03: the model's outlook at (0.3, T 1), or why there is none.
        at_05: the same at (0.5, T 1).
        confidence: P from which a setting counts as holding the limit.
    """
    at_one = trials[(trials["kl_temperature"] == 1.0) | (trials["beta_kl"] == 0)]
    strong = _kl_too_strong(at_one, pick_beta_kl or 0.3)
    rising = _reroute_rises(at_one)
    return strong, rising, _all_good(strong, rising, at_03, confidence), _stronger(at_05, confidence)


def with_reasons(
    rules: tuple[RuleOfThumb, ...], pick: Outlook, cost: str, at_03: Outlook | str, at_05: Outlook | str
) -> tuple[RuleOfThumb, ...]:
    """The rules, each that fired and advises another weight than the pick's with a sentence why it is not followed.

    Args:
        pick: the recommended setting.
        cost: what rerouting it loses, of what is allowed.
    """
    drifts = f"{number(pick.beta_kl)} drifts by {number(pick.drift)}"
    instead = [
        f"what beta_kl {number(pick.beta_kl)} costs was measured: {cost}" if pick.beta_kl > LOW_WEIGHT else "",
        f"a rise is no breach of the limit: {cost}" if pick.beta_kl > LOW_WEIGHT else "",
        *(
            ""
            if isinstance(at, str) or at.beta_kl == pick.beta_kl
            else f"{drifts}, {number(at.beta_kl)} at T 1 by {number(at.drift)}"
            for at in (at_03, at_05)
        ),
    ]
    return tuple(replace(rule, instead=why if rule.fired else "") for rule, why in zip(rules, instead, strict=True))


def _kl_too_strong(at_one: pd.DataFrame, near: float) -> RuleOfThumb:
    rule = f"loss_kl > {LOSS_KL_TOO_STRONG} → too strong, use 0.1"
    with_kl = _finite(at_one[at_one["beta_kl"] > 0], "loss_kl")
    if with_kl.empty:
        return RuleOfThumb(rule, None, "no completed trial at T 1")
    distance = np.abs(np.log(with_kl["beta_kl"] / near))
    beta = float(with_kl["beta_kl"].loc[distance.idxmin()])
    loss_kl = float(with_kl.loc[with_kl["beta_kl"] == beta, "loss_kl"].mean())
    return RuleOfThumb(rule, loss_kl > LOSS_KL_TOO_STRONG, f"{number(loss_kl)} at ({number(beta)}, T 1)")


def _reroute_rises(at_one: pd.DataFrame) -> RuleOfThumb:
    rule = "reroute rises with KL → 0.1 or disable"
    rows = _finite(at_one, "loss_reroute")
    if len(rows) < 3 or rows["beta_kl"].nunique() < 2:
        return RuleOfThumb(rule, None, "under 3 trials at T 1")
    log_beta = np.log1p(rows["beta_kl"] / 1e-3)
    line = linregress(log_beta, rows["loss_reroute"], alternative="greater")
    if not line.pvalue < _SLOPE_P_VALUE:
        return RuleOfThumb(rule, False, "slope within noise")
    top = rows["beta_kl"] == rows["beta_kl"].max()
    bottom = rows["beta_kl"] == rows["beta_kl"].min()
    rise = float(rows.loc[top, "loss_reroute"].mean() - rows.loc[bottom, "loss_reroute"].mean())
    low, high = float(rows["beta_kl"].min()), float(rows["beta_kl"].max())
    return RuleOfThumb(rule, True, f"{signed(rise)} from {number(low)} to {number(high)}")


def _all_good(strong: RuleOfThumb, rising: RuleOfThumb, at_03: Outlook | str, confidence: float) -> RuleOfThumb:
    rule = "all looks good → 0.3"
    if isinstance(at_03, str):
        return RuleOfThumb(rule, None, at_03)
    if strong.fired is None or rising.fired is None:
        return RuleOfThumb(rule, None, TOO_FEW)
    outlook = with_relation("P(0.3)", at_03.probability_feasible)
    quiet = not strong.fired and not rising.fired
    return RuleOfThumb(
        rule,
        quiet and probably_feasible(at_03.probability_feasible, confidence),
        outlook if quiet else f"by rule 1 or 2; {outlook}",
    )


def _stronger(at_05: Outlook | str, confidence: float) -> RuleOfThumb:
    rule = "stronger preservation → 0.5, verify"
    if isinstance(at_05, str):
        return RuleOfThumb(rule, None, at_05)
    probability = at_05.probability_feasible
    evidence = f"{with_relation('P(0.5)', probability)}, drift {number(at_05.drift, 2)}"
    return RuleOfThumb(rule, probably_feasible(probability, confidence), evidence)


def _finite(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    if column not in rows:
        return rows.iloc[:0]
    return rows[np.isfinite(rows[column].astype(float))]
