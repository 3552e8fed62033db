"""The four rules of thumb, each fired and not fired."""

import pandas as pd
import pytest
from synthetic import Surface, make_trials

from analysis.decide import decide
from analysis.rules_of_thumb import TOO_FEW, Outlook, evaluate_rules

HOLDS, BREAKS = Outlook(0.5, 0.98, 0.2), Outlook(0.5, 0.4, 0.2)
STRONG, RISES, GOOD, STRONGER = range(4)


def rules(trials: pd.DataFrame, at_05: Outlook = HOLDS) -> tuple:
    return evaluate_rules(trials, 0.3, Outlook(0.3, 0.97, 0.7), at_05, 0.95)


def flat(loss_kl: float) -> pd.DataFrame:
    """Training metrics with this loss_kl, and a loss_reroute that does not depend on beta_kl."""
    trials = make_trials(Surface())
    return trials.assign(loss_kl=loss_kl, loss_reroute=[0.01, 0.02] * (len(trials) // 2))


@pytest.mark.parametrize(("loss_kl", "fired"), [(1.3, True), (0.4, False)])
def test_a_loss_kl_above_one_is_too_strong(loss_kl: float, fired: bool) -> None:
    rule = rules(flat(loss_kl))[STRONG]
    assert rule.fired is fired
    assert rule.evidence == f"{loss_kl} at (0.3, T 1)"


def test_loss_kl_at_another_temperature_is_not_read() -> None:
    trials = flat(0.4)
    trials.loc[trials["kl_temperature"] != 1.0, "loss_kl"] = 50.0
    assert rules(trials)[STRONG].fired is False
    hot = trials[(trials["kl_temperature"] != 1.0)]
    assert rules(hot)[STRONG].fired is None


def test_the_setting_nearest_the_pick_is_read() -> None:
    trials = flat(0.4)
    trials.loc[trials["beta_kl"] == 0.1, "loss_kl"] = 2.0
    near = evaluate_rules(trials, 0.12, HOLDS, HOLDS, 0.95)[STRONG]
    assert near.fired is True
    assert "(0.1, T 1)" in near.evidence


def test_a_rising_reroute_fires_and_a_flat_one_does_not() -> None:
    assert rules(flat(0.4))[RISES].fired is False
    rising = make_trials(Surface(threshold=0.05, slope=0.2))
    rule = rules(rising)[RISES]
    assert rule.fired is True
    assert rule.evidence.startswith("+0.")


def test_two_trials_cannot_show_a_rise() -> None:
    assert rules(flat(0.4).iloc[[0, 4]])[RISES].fired is None


@pytest.mark.parametrize(("loss_kl", "fired"), [(0.4, True), (1.3, False)])
def test_all_is_good_when_neither_rule_above_fires(loss_kl: float, fired: bool) -> None:
    assert rules(flat(loss_kl))[GOOD].fired is fired


@pytest.mark.parametrize(("at_05", "fired"), [(HOLDS, True), (BREAKS, False)])
def test_half_is_verified_by_its_probability(at_05: Outlook, fired: bool) -> None:
    rule = rules(flat(0.4), at_05)[STRONGER]
    assert rule.fired is fired
    assert "drift 0.2" in rule.evidence


def test_without_trials_no_rule_can_tell() -> None:
    nothing = make_trials(Surface()).iloc[:0]
    found = evaluate_rules(nothing, None, TOO_FEW, TOO_FEW, 0.95)
    assert [rule.fired for rule in found] == [None] * 4
    assert [rule.evidence for rule in found[GOOD:]] == ["not enough trials"] * 2


def test_a_weight_that_was_not_searched_is_said_in_place_of_an_outlook() -> None:
    found = evaluate_rules(flat(0.4), 0.3, HOLDS, "(0.5, T 1) is not searched", 0.95)
    assert found[GOOD].fired is True
    assert (found[STRONGER].fired, found[STRONGER].evidence) == (None, "(0.5, T 1) is not searched")


def test_a_decision_carries_the_four_rules(trials: pd.DataFrame) -> None:
    assert len(decide(trials).rules_of_thumb) == 4
    assert all(rule.fired is not None and rule.evidence for rule in decide(trials).rules_of_thumb)
