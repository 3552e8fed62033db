"""Figures: what is prepared is the sweep's own numbers, and what is drawn is the same each time."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import BASELINE_LOSS

from analysis.decide import decide
from analysis.report import figures
from analysis.trials import load_curves


def test_rerouting_lost_is_paired_with_the_baseline_of_the_same_seed(trials: pd.DataFrame) -> None:
    data = figures.prepare_tradeoff(trials, decide(trials))
    own = trials.loc[(trials["beta_kl"] == 0) & (trials["seed"] == 2), "eval_loss_reroute"].item()
    row = int(np.flatnonzero((trials["seed"] == 2) & (trials["beta_kl"] > 0))[0])
    assert data.lost[row] == pytest.approx(trials["eval_loss_reroute"][row] - own)
    assert np.abs(data.lost[:4]).max() == 0


def test_a_seed_without_a_baseline_is_compared_with_the_mean(trials: pd.DataFrame) -> None:
    trials.loc[9, "seed"] = 77
    data = figures.prepare_tradeoff(trials, decide(trials))
    assert data.lost[9] == pytest.approx(trials["eval_loss_reroute"][9] - trials["eval_loss_reroute"][:4].mean())


def test_the_chosen_point_and_limit_are_the_decisions(trials: pd.DataFrame) -> None:
    decision = decide(trials)
    tradeoff, by_setting = figures.prepare_tradeoff(trials, decision), figures.prepare_by_setting(trials, decision)
    assert tradeoff.chosen == (decision.reroute_delta, decision.eval_benign_kl)
    assert tradeoff.tolerance == decision.tolerance
    assert by_setting.chosen == (decision.beta_kl, decision.kl_temperature)
    assert by_setting.limit == pytest.approx(decision.baseline.eval_loss_reroute + decision.tolerance)
    assert len(by_setting.beta_kl) == (trials["beta_kl"] > 0).sum()
    assert by_setting.baseline_loss_reroute.mean() == pytest.approx(BASELINE_LOSS, abs=0.01)


def test_curves_end_where_the_trials_do_and_baselines_come_last(
    make_run: Callable[..., Path], trials: pd.DataFrame
) -> None:
    curves = figures.prepare_curves(load_curves(make_run(trials)), trials)
    assert len(curves) == len(trials)
    assert [curve.beta_kl for curve in curves[-4:]] == [0.0] * 4
    final = dict(zip(trials["trial_id"], trials["loss_reroute"], strict=True))
    assert all(curve.loss_reroute[-1] == pytest.approx(final[curve.trial_id], abs=1e-4) for curve in curves)


def test_drawing_twice_gives_the_same_bytes_with_labels_and_units(trials: pd.DataFrame) -> None:
    data = figures.prepare_tradeoff(trials, decide(trials))
    svg = figures.draw_tradeoff(data)
    assert svg == figures.draw_tradeoff(data)
    ElementTree.fromstring(svg)
    for text in ("nats per token", "rerouting lost", "beta_kl = 0", "limit 0.049", data.chosen_label):
        assert text in svg, text
    assert "<dc:date>" not in svg


def test_both_metrics_are_drawn_over_beta(trials: pd.DataFrame) -> None:
    svg = figures.draw_by_setting(figures.prepare_by_setting(trials, decide(trials)))
    ElementTree.fromstring(svg)
    for text in ("nats per token", "loss_reroute", "kl_temperature", "beta_kl", "limit"):
        assert text in svg, text


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 4), slice(4, None), slice(0, 5)])
def test_every_figure_is_drawn_from_whatever_there_is(trials: pd.DataFrame, rows: slice) -> None:
    part = trials.iloc[rows].reset_index(drop=True)
    decision = decide(part)
    for svg in (
        figures.draw_tradeoff(figures.prepare_tradeoff(part, decision)),
        figures.draw_by_setting(figures.prepare_by_setting(part, decision)),
        figures.draw_curves(figures.prepare_curves(pd.DataFrame(columns=["trial_id", "step"]), part)),
    ):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
