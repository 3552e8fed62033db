"""The decision in words: sentences, numbers and commands for the terminal, decision.json, report.html and report.md.

Pure: the contents of all files come back; `analysis.pick_beta` writes them.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis import formatting
from analysis.behaviour.judge import BehaviourLimits
from analysis.behaviour.measured import Behaviour
from analysis.decision import Decision
from analysis.formatting import number, percent, signed
from analysis.report import tables, traps, wording
from analysis.report.commands import Commands, folded
from analysis.report.completions import Completions, next_best_measured
from analysis.report.figures import by_setting, evidence, settings_map, training
from analysis.report.figures.evidence_drawing import draw_evidence
from analysis.report.figures.style import WIDTHS, Drawn, Numbers, Width, png_of, style, svg_of
from analysis.report.provenance import about, provenance
from analysis.report.record import decision_json
from analysis.report.state import SweepState
from analysis.surrogate.surrogate import Surrogate

SAYS = {True: "yes", False: "no", None: "unknown"}
"""How a rule's `fired` reads."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sweep:
    """All that the report is made of."""

    decision: Decision
    model: Surrogate | None
    """None where no baseline can be compared with."""
    record: Mapping[str, Any]
    """sweep.json, as `load_settings` gives it."""
    trials: pd.DataFrame
    curves: pd.DataFrame
    behaviour: Sequence[Behaviour]
    """Of the model before training, then of trials; empty where none was measured."""
    completions: Sequence[Completions]
    """What is shown of the models' answers; empty where nothing is."""
    commands: Commands
    state: SweepState

    def decision_json(self) -> str:
        """The text of decision.json."""
        return decision_json(self.decision, self.record, self.trials, self.behaviour, self.commands)


def render(sweep: Sweep) -> dict[str, str | bytes]:
    """Contents of all files of the report by their path under `report/`; decision.json is the last."""
    drawn = draw(sweep)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    context = _said(sweep) | {
        "figures": drawn,
        "says": SAYS,
        "f": formatting,
        "shown": tables.shown,
        "css": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    html = _template("report.html.j2", autoescape=True).render(**context)
    markdown = _template("report.md.j2", autoescape=False).render(**context)
    return {
        **{f"figures/{name}.svg": each.svg["wide"] for name, each in drawn.items()},
        **{f"figures/{name}.png": each.png for name, each in drawn.items()},
        "report.md": markdown,
        "report.html": html,
        "decision.json": sweep.decision_json(),
    }


def _said(sweep: Sweep) -> dict[str, Any]:
    """What both pages say of a sweep, by the names of their templates."""
    decision, trials = sweep.decision, sweep.trials
    return {
        "decision": decision,
        "state": sweep.state,
        "headline": wording.headline(decision),
        "sentence": wording.sentence(decision),
        "lead": wording.lead(decision),
        "less_drift": wording.less_drift(decision),
        "check_after": wording.check_after(decision),
        "next_best": wording.next_best(decision),
        "rule": wording.rule(decision),
        "baseline_answer": wording.baseline_answer(decision),
        "about": about(sweep.record),
        "limits": BehaviourLimits.of(sweep.record.get("flags", {})),
        "writes": tables.what_it_writes(sweep.behaviour, decision),
        "run_dir": shlex.quote(sweep.record["run_dir"]),
        "sensitivity": wording.sensitivity_line(decision),
        "suspects": wording.suspect_lines(decision),
        "tiles": _tiles(decision),
        "command": folded(sweep.commands.next, 74),
        "wider_command": folded(sweep.commands.wider or "", 74),
        "trains": sweep.commands.trains,
        "behaviour": sweep.behaviour,
        "next_best_measured": next_best_measured(sweep.behaviour, decision),
        "completions": sweep.completions,
        "ablation": tables.ablation(trials, decision),
        "low_weights": tables.low_weights(decision),
        "paired": tables.paired_seeds(trials, decision),
        "rows": tables.every_trial(trials, decision),
        "folded_from": tables.FOLDED_FROM,
        "states": tables.states(trials),
        "traps": traps.traps(trials, sweep.curves),
        "provenance": provenance(sweep.record, trials),
    }


def draw(sweep: Sweep) -> dict[str, Drawn]:
    """The figures by name, those of which there is nothing to show left out."""
    decision, trials = sweep.decision, sweep.trials
    of_evidence = evidence.prepare_evidence(trials, decision)
    settings = by_setting.prepare_by_setting(trials, decision, sweep.model)
    of_map = settings_map.prepare_map(decision, sweep.model)
    trained = training.prepare_training(sweep.curves, trials, decision)
    drawn = [
        _drawn(
            "evidence",
            "Benign drift against rerouting lost",
            evidence.describe_evidence(of_evidence),
            partial(draw_evidence, of_evidence),
            evidence.numbers_of_evidence(of_evidence),
        ),
        _drawn(
            "by_setting",
            "Drift and rerouting lost over beta_kl",
            "Lines are the model's, one a band of temperatures; shaded is the 95 % interval of one of them.",
            partial(by_setting.draw_by_setting, settings),
            by_setting.numbers_of_by_setting(settings),
        ),
        *(
            [
                _drawn(
                    "map",
                    settings_map.title_of(of_map),
                    "The probability of keeping the limit over beta_kl and kl_temperature; dashed is P = 0.5.",
                    partial(settings_map.draw_map, of_map),
                    settings_map.numbers_of_map(of_map),
                )
            ]
            if of_map
            else []
        ),
        _drawn(
            "curves",
            "Rerouting over training steps",
            "Training loss_reroute of each trial; it falls from 1 as harmful text is turned away.",
            partial(training.draw_curves, trained.curves),
            training.numbers_of_curves(trained.curves),
        ),
        _drawn(
            "layers",
            "Cosine by layer at the end, and gradient norms of the three terms",
            "A layer that was rerouted has a cosine of 0 or less. Gradients are means over seeds.",
            partial(training.draw_layers, trained),
            training.numbers_of_layers(trained),
        ),
    ]
    return {each.name: each for each in drawn}


def _drawn(name: str, title: str, description: str, picture: Callable[[Width], Figure], numbers: Numbers) -> Drawn:
    with style():
        figures = {width: picture(width) for width in WIDTHS}
        svg = {width: svg_of(figure) for width, figure in figures.items()}
        return Drawn(name, title, description, numbers, svg, png_of(figures["wide"]))


def _tiles(decision: Decision) -> list[tuple[str, str]]:
    """Four numbers: of the pick, else of what stands in its way."""
    limit = number(decision.tolerance or 0, 2)
    if decision.verdict == "choose":
        return [
            ("of the drift without KL", percent(decision.drift_kept or 0)),
            ("rerouting lost", f"{signed(decision.reroute_delta or 0)} of {limit}"),
            ("P(within the limit)", formatting.probability(decision.probability_feasible or 0)),
            ("seeds", _seeds(decision)),
        ]
    if decision.baseline is None:
        return []
    baseline = decision.baseline
    failed = f", {baseline.n_failed} failed" if baseline.n_failed else ""
    tiles = [
        ("rerouted without KL", percent(baseline.achieved)),
        ("baseline seeds", f"{baseline.n_seeds}{failed}"),
        ("may be lost", limit),
    ]
    if decision.settings:
        best = max(each.probability_feasible for each in decision.settings)
        tiles.append(("best P(within the limit)", formatting.probability(best)))
    elif baseline.reroute_sd is not None:
        tiles.append(("σ between seeds", number(baseline.reroute_sd, 2)))
    return tiles


def _seeds(decision: Decision) -> str:
    """`3, confirmed`; `4, 1 failed`."""
    failed = (decision.n_seeds or 0) - (decision.n_sound_seeds or 0)
    if failed:
        return f"{decision.n_seeds}, {failed} failed"
    return f"{decision.n_seeds}, {'confirmed' if decision.confirmed else 'not confirmed'}"


def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["together"] = lambda text: text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return environment.get_template(name)


def _cell(text: object) -> str:
    """A text within a cell of a Markdown table: on one line, what Markdown or HTML would read escaped."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\|`\[*#]", r"\\\g<0>", line)
