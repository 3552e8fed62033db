"""The decision in words: sentences, numbers and commands for the terminal, decision.json, report.html and report.md.

Pure: the texts of all files come back as strings; `analysis.pick_beta` writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis import formatting
from analysis.behaviour.measured import Behaviour
from analysis.decision import Decision
from analysis.formatting import number, percent, signed
from analysis.report import figures
from analysis.report.commands import Commands, folded
from analysis.report.record import decision_json
from analysis.report.wording import explanation, headline

SAYS = {True: "yes", False: "no", None: "unknown"}
"""How a rule's `fired` reads."""


@dataclass(frozen=True)
class Trap:
    """A widespread reading of a sweep that misleads, and what this sweep shows instead."""

    title: str
    text: str


def render(
    decision: Decision,
    sweep: Mapping[str, Any],
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    behaviour: Sequence[Behaviour],
    commands: Commands,
) -> dict[str, str]:
    """Texts of all files of the report by their path under `report/`; decision.json is the last.

    Args:
        behaviour: of the model before training, then of trials; empty where none was measured.
        commands: to run next.
    """
    drawn = {
        "tradeoff": figures.draw_tradeoff(figures.prepare_tradeoff(trials, decision)),
        "by_setting": figures.draw_by_setting(figures.prepare_by_setting(trials, decision)),
        "curves": figures.draw_curves(figures.prepare_curves(curves, trials)),
    }
    context = {
        "decision": decision,
        "headline": headline(decision),
        "explanation": explanation(decision),
        "numbers": _four_numbers(decision),
        "command": folded(commands.next),
        "wider_command": folded(commands.wider or ""),
        "trains": commands.trains,
        "behaviour": behaviour,
        "says": SAYS,
        "traps": _traps(trials, curves),
        "trial_states": ", ".join(f"{amount} {state}" for state, amount in trials["status"].value_counts().items()),
        "sweep": sweep,
        "wording": formatting,
    }
    inline = {name: Markup(_inlined(svg, name)) for name, svg in drawn.items()}
    html = _template("report.html.j2", autoescape=True).render(**context, figures=inline)
    markdown = _template("report.md.j2", autoescape=False).render(**context)
    return {
        **{f"figures/{name}.svg": svg for name, svg in drawn.items()},
        "report.md": markdown,
        "report.html": html,
        "decision.json": decision_json(decision, sweep, trials, behaviour, commands),
    }


def _four_numbers(decision: Decision) -> list[tuple[str, str]]:
    if decision.verdict != "choose":
        return []
    lost, limit = signed(decision.reroute_delta or 0), number(decision.tolerance or 0, 2)
    return [
        ("drift kept", percent(decision.drift_kept or 0)),
        ("rerouting lost", f"{lost} of {limit}"),
        ("P(within the limit)", formatting.probability(decision.probability_feasible or 0)),
        ("seeds", f"{decision.n_seeds}, {'confirmed' if decision.confirmed else 'not confirmed'}"),
    ]


def _traps(trials: pd.DataFrame, curves: pd.DataFrame) -> list[Trap]:
    return [
        Trap(
            "“A larger beta_kl logs a larger loss_kl.”",
            "As a rule it logs a smaller one: loss_kl is logged without its weight, and more weight presses it down. "
            f"{_loss_kl_falls(trials)}",
        ),
        Trap(
            "“A short, gentle run left reroute unchanged, so KL does no harm.”",
            "Nothing had moved yet. At LoRA's start all gradients vanish: the rerouting loss stays flat, then "
            f"collapses; a run that ends before (such as 50 steps at a low lr) compares nothing. "
            f"{_when_collapsed(trials, curves)}",
        ),
    ]


def _loss_kl_falls(trials: pd.DataFrame) -> str:
    rows = trials[(trials["status"] == "completed") & (trials["beta_kl"] > 0) & (trials["kl_temperature"] == 1.0)]
    rows = rows[np.isfinite(rows["loss_kl"].astype(float))]
    if rows["beta_kl"].nunique() < 2:
        return "This sweep has too few trials at T 1 to show it."
    by_beta = rows.groupby("beta_kl")["loss_kl"].mean()
    low, high = by_beta.index[0], by_beta.index[-1]
    exception = "" if by_beta[high] < by_beta[low] else "an exception: "
    return (
        f"Here, at T 1, {exception}{number(by_beta[low])} at beta_kl {number(low)}, "
        f"{number(by_beta[high])} at {number(high)}. Values at different temperatures cannot be compared at all."
    )


def _when_collapsed(trials: pd.DataFrame, curves: pd.DataFrame) -> str:
    baselines = set(trials.loc[trials["beta_kl"] == 0, "trial_id"])
    if "loss_reroute" not in curves:
        return ""
    rows = curves[curves["trial_id"].isin(baselines) & (curves["loss_reroute"].astype(float) < 0.5)]
    if rows.empty:
        return "Here the baseline's training loss never fell below 0.5."
    last = int(rows.groupby("trial_id")["step"].min().max())
    return f"Here every baseline that collapsed had fallen below 0.5 by step {last} of {int(curves['step'].max())}."


def _inlined(svg: str, name: str) -> str:
    """The `<svg>` element alone, its ids made unique within the page, scaling to the page's width."""
    svg = svg[svg.index("<svg") :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
    return svg.replace('href="#', f'href="#{name}-').replace("<svg ", '<svg class="figure" ', 1)


def _template(name: str, autoescape: bool) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
