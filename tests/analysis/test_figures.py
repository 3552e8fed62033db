"""Figures: what is prepared is the sweep's own numbers; what is drawn is the same each time, and told in words."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import BASELINE_LOSS, MakeRun, Surface, failing, make_trials, repeated, write_behaviour

from analysis.behaviour.measured import load_behaviour
from analysis.decide import decide, decide_with_model
from analysis.report.figures import style as figure_style
from analysis.report.figures.by_setting import draw_by_setting, numbers_of_by_setting, prepare_by_setting
from analysis.report.figures.evidence import ZOOM, describe_evidence, numbers_of_evidence, prepare_evidence
from analysis.report.figures.evidence_drawing import draw_evidence
from analysis.report.figures.labels import Label, place
from analysis.report.figures.settings_map import draw_map, numbers_of_map, prepare_map
from analysis.report.figures.style import WIDTHS, Drawn, panels, renderer_of, style, svg_of
from analysis.report.figures.training import draw_curves, draw_layers, numbers_of_curves, prepare_training
from analysis.surrogate.kernel import coordinates
from analysis.trials import load_curves


def test_rerouting_lost_is_paired_with_the_baseline_of_the_same_seed(trials: pd.DataFrame) -> None:
    data = prepare_evidence(trials, decide(trials))
    own = trials.loc[(trials["beta_kl"] == 0) & (trials["seed"] == 2), "eval_loss_reroute"].item()
    row = int(np.flatnonzero((trials["seed"] == 2) & (trials["beta_kl"] > 0))[0])
    assert data.lost[row] == pytest.approx(trials["eval_loss_reroute"][row] - own)
    assert np.abs(data.lost[:4]).max() == 0


def test_a_seed_without_a_baseline_is_compared_with_the_mean(trials: pd.DataFrame) -> None:
    trials.loc[9, "seed"] = 77
    data = prepare_evidence(trials, decide(trials))
    assert data.lost[9] == pytest.approx(trials["eval_loss_reroute"][9] - trials["eval_loss_reroute"][:4].mean())


def test_the_pick_its_seeds_and_the_limit_are_the_decisions() -> None:
    trials = repeated(make_trials(Surface()), (0.3, 1.0), (2, 3))
    decision = decide(trials)
    assert (decision.beta_kl, decision.kl_temperature) == (0.3, 1.0)
    data = prepare_evidence(trials, decision)
    assert data.pick is not None
    assert (data.pick.lost, data.pick.drift) == (decision.reroute_delta, decision.eval_benign_kl)
    assert (data.pick.low, data.pick.high) == decision.reroute_delta_interval
    assert data.tolerance == decision.tolerance
    assert sum(data.of_pick) == 3
    assert {each.name for each in data.others}.isdisjoint({data.pick.name})
    assert len(data.others) == len(decision.settings) - 1


def test_what_looks_better_than_the_pick_is_explained_on_the_spot(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials)
    for trial_id, broken in {"t000": 0.0, "t005": 0.5, "t004": 0.0}.items():
        write_behaviour(run, trial_id, degenerate=broken)
    decision = decide(trials, behaviour=load_behaviour(run, trials))
    assert (decision.verdict, decision.beta_kl) == ("choose", pytest.approx(0.125, rel=0.5))
    notes = {note.text for note in prepare_evidence(trials, decision).notes}
    assert "0.3, T 1.0:\nbreaks what it writes" in notes


def test_both_metrics_by_setting_are_the_trials_and_the_models(trials: pd.DataFrame) -> None:
    decision, model = decide_with_model(trials)
    assert model is not None
    data = prepare_by_setting(trials, decision, model)
    assert sorted(np.concatenate([band.beta_kl for band in data.bands])) == sorted(
        trials.loc[trials["beta_kl"] > 0, "beta_kl"]
    )
    band = data.bands[0]
    at = coordinates(band.line, np.full(len(band.line), band.temperature), decision.searched)
    assert band.line_drift[0] == pytest.approx(np.exp(model.drift.value(at).expectation()))
    assert (band.line_lost[1] <= band.line_lost[0]).all()
    assert (band.line_lost[0] <= band.line_lost[2]).all()
    assert data.chosen == (
        decision.beta_kl,
        decision.kl_temperature,
        decision.eval_benign_kl,
        decision.reroute_delta,
    )
    on_map = prepare_map(decision, model)
    assert on_map is not None
    row, column = 3, 11
    here = coordinates(on_map.beta_kl[column], on_map.kl_temperature[row], decision.searched)
    assert on_map.probability[row, column] == pytest.approx(model.probability_feasible(here)[0])
    assert numbers_of_map(on_map).rows[0][0] == "1.0"


def test_curves_end_where_the_trials_do_baseline_and_pick_on_top(
    make_run: Callable[..., Path], trials: pd.DataFrame
) -> None:
    decision = decide(trials)
    data = prepare_training(load_curves(make_run(trials)), trials, decision)
    assert len(data.curves) == len(trials)
    assert [curve.kind for curve in data.curves[-5:]] == ["baseline"] * 4 + ["pick"]
    final = dict(zip(trials["trial_id"], trials["loss_reroute"], strict=True))
    assert all(curve.loss_reroute[-1] == pytest.approx(final[curve.trial_id], abs=1e-4) for curve in data.curves)
    assert [row[1] for row in numbers_of_curves(data.curves).rows] == ["baseline"] * 4 + ["pick"]


def test_layers_collapses_and_gradients_are_the_trials_own(make_run: Callable[..., Path], trials: pd.DataFrame) -> None:
    trials["eval_cosine_layer_10"], trials["eval_cosine_layer_9"] = -0.2, 0.1
    trials["collapse_step_layer_9"] = [30.0, *[float("nan")] * (len(trials) - 1)]
    run = make_run(trials)
    lines = [f'{{"step": {step}, "grad_norm_reroute": {step}, "grad_norm_retain": 2.0, "grad_norm_kl": 0.0}}\n'
             for step in (10, 20)]  # fmt: skip
    for trial_id in ("t000", "t001"):
        (run / "trials" / trial_id / "metrics.jsonl").write_text("".join(lines))
    data = prepare_training(load_curves(run), trials, decide(trials))
    baseline = data.layers[0]
    assert (baseline.kind, baseline.layer, baseline.cosine.shape) == ("baseline", (9, 10), (4, 2))
    assert baseline.cosine[0].tolist() == [0.1, -0.2]
    assert [(each.kind, each.step.tolist()) for each in data.gradients] == [("baseline", [10.0, 20.0])]
    assert data.gradients[0].norm["reroute"].tolist() == [10.0, 20.0]
    with style():
        ElementTree.fromstring(svg_of(draw_layers(data, "wide")))


def drawn(trials: pd.DataFrame, curves: pd.DataFrame | None = None) -> dict[str, str]:
    """Every figure of these trials in both widths, by name."""
    decision, model = decide_with_model(trials)
    curves = pd.DataFrame(columns=["trial_id", "step"]) if curves is None else curves
    trained, on_map = prepare_training(curves, trials, decision), prepare_map(decision, model)
    by_setting = prepare_by_setting(trials, decision, model)
    found = {}
    with style():
        for width in WIDTHS:
            figures = {
                "evidence": draw_evidence(prepare_evidence(trials, decision), width),
                "by_setting": draw_by_setting(by_setting, width),
                "curves": draw_curves(trained.curves, width),
                "layers": draw_layers(trained, width),
                **({"map": draw_map(on_map, width)} if on_map else {}),
            }
            found |= {f"{name}-{width}": svg_of(figure) for name, figure in figures.items()}
    return found


def test_drawing_twice_gives_the_same_bytes_with_labels_and_units(trials: pd.DataFrame) -> None:
    once = drawn(trials)
    assert once == drawn(trials)
    assert len(once) == 10
    for name, texts in {
        "evidence-wide": ("nats per token", "rerouting lost", "without KL", "limit 0.049", "pick: 0.3, T 1.0"),
        "by_setting-wide": ("nats/token", "rerouting lost", "T 1.0", "beta_kl", "limit 0.049"),
        "map-narrow": ("kl_temperature", "beta_kl", "candidate"),
    }.items():
        for text in texts:
            assert text in once[name], (name, text)
        assert "<dc:date>" not in once[name]


def test_what_lies_off_the_scale_is_counted_at_the_edge() -> None:
    trials = make_trials(Surface(slope=0.4))
    data = prepare_evidence(trials, decide(trials))
    assert data.tolerance is not None
    beyond = int((data.lost > (ZOOM + 0.12) * data.tolerance).sum())
    assert beyond > 0
    with style():
        assert f"{beyond} further, up to " in svg_of(draw_evidence(data, "wide"))


def test_numbers_and_descriptions_say_what_is_drawn(trials: pd.DataFrame) -> None:
    trials = failing(trials, "t004")
    decision, model = decide_with_model(trials)
    data = prepare_evidence(trials, decision)
    rows = {row[0]: row for row in numbers_of_evidence(data).rows}
    assert len(rows) == len(trials) + 1
    assert "suspect" in rows["t004"][-1]
    assert "a seed of the pick" in rows["t005"][-1]
    assert f"{len(trials)} completed trials" in describe_evidence(data)
    assert BASELINE_LOSS < 0.05  # the surface's, so that drift is compared with a baseline that rerouted
    assert numbers_of_by_setting(prepare_by_setting(trials, decision, model)).rows


def test_labels_cover_no_point_and_lie_within_the_panel() -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform(0.2, 0.8, (12, 2))]
    with style():
        _, (axes,) = panels("wide", [300])
        axes.set(xlim=(0, 1), ylim=(0, 1))
        place(axes, [Label("the first label", *points[0]), Label("the second", *points[1])], points, [])
        boxes = [text.get_window_extent(renderer_of(axes)) for text in axes.texts]
        pixels = axes.transData.transform(np.array(points))
        inside = axes.get_window_extent()
    assert len(boxes) == 2
    assert not boxes[0].overlaps(boxes[1])
    for box in boxes:
        assert not any(box.contains(x, y) for x, y in pixels)
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1


def test_in_the_page_a_figure_follows_the_readers_colours_and_names_itself(trials: pd.DataFrame) -> None:
    svg = drawn(trials)
    of_widths = {width: svg[f"evidence-{width}"] for width in WIDTHS}
    data = prepare_evidence(trials, decide(trials))
    figure = Drawn("evidence", "A <title>", "What & why", numbers_of_evidence(data), of_widths)
    inline = str(figure.inline)
    assert not re.findall(r"#[0-9a-f]{6}", inline), "a colour that does not follow the reader's theme"
    assert inline.count('role="img"') == 2
    assert "A &lt;title&gt;" in inline
    assert "What &amp; why" in inline
    ids = re.findall(r'id="([^"]+)"', inline)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 4), slice(4, None), slice(0, 5)])
def test_every_figure_is_drawn_from_whatever_there_is(trials: pd.DataFrame, rows: slice) -> None:
    for svg in drawn(trials.iloc[rows].reset_index(drop=True)).values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_every_colour_of_a_figure_stands_out_from_the_page_in_both_themes() -> None:
    """WCAG 2.1 AA, which a checker of pages cannot tell of text within an SVG."""
    css = Path(figure_style.__file__).parents[1].joinpath("page.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{[^}]*\}", css)]
    light, dark, printed = themes
    assert light == printed
    for name, instead in figure_style.IN_PAGE.items():
        variable = {"currentColor": "ink"}.get(instead) or instead.removeprefix("var(--").removesuffix(")")
        assert light[variable] == name, "the file's colour is not the light theme's"
    for theme in (light, dark):
        for name in ("ink", "muted", "accent", "beyond", "warm", "hot", "good"):
            assert contrast(theme[name], theme["page"]) >= 4.5, (name, theme)


def contrast(one: str, other: str) -> float:
    """Between 1 and 21."""
    light = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)
