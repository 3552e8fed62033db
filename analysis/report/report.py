"""The decision in words: sentences, numbers and commands for the terminal, decision.json, report.html and report.md.

Pure: the texts of all files come back as strings; `analysis.pick_beta` writes them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis import formatting
from analysis.behaviour import Behaviour
from analysis.decision import Decision, Verdict
from analysis.formatting import count, number, percent, signed, temperature, with_relation
from analysis.report import figures
from analysis.report.commands import Commands, folded, train_command, wider_command
from analysis.verdict import nearly_chosen
from cbtrain.utils.files import finite_or_none

SCHEMA_VERSION = 2
"""Of decision.json; rises when a key changes its meaning or goes."""
SAYS = {True: "yes", False: "no", None: "unknown"}
"""How a rule's `fired` reads."""
_HEADLINES: dict[Verdict, str] = {
    "no_candidate_qualifies": "Use beta_kl = 0: no KL weight of {searched} keeps rerouting within the limit.",
    "no_setting_behaves": "Ship none of these: every setting that keeps rerouting within the limit breaks behaviour.",
    "insufficient_evidence": "Not enough evidence to choose beta_kl.",
    "baseline_never_rerouted": "Cannot choose beta_kl: the baseline never rerouted.",
    "baseline_failed": "Cannot choose beta_kl: no baseline trial completed.",
}


@dataclass(frozen=True)
class Trap:
    """A widespread reading of a sweep that misleads, and what this sweep shows instead."""

    title: str
    text: str


def headline(decision: Decision) -> str:
    """The first line: what to use, or that nothing can be said; a warning about behaviour stands in it."""
    if decision.verdict == "baseline_never_rerouted" and decision.baseline and decision.baseline.n_failed:
        return "Cannot choose beta_kl: the baseline does not reroute at every seed."
    if decision.so_far:
        return f"So far ({decision.so_far}): {_headline(decision)}"
    return _headline(decision)


def _headline(decision: Decision) -> str:
    if decision.verdict != "choose":
        return _HEADLINES[decision.verdict].format(searched=decision.searched.range_of("beta_kl"))
    beta_kl, heat = number(decision.beta_kl or 0), temperature(decision.kl_temperature or 1)
    reservations = ["on one seed"] if decision.n_seeds == 1 else []
    reservations += [decision.behaviour_warning] if decision.behaviour_warning else []
    if (decision.drift_kept or 0) >= 1:
        reservations.append("benign drift is no less than at beta_kl = 0")
    but = f", but {' and '.join(reservations)}" if reservations else ""
    return f"Use beta_kl = {beta_kl} at kl_temperature = {heat}{but}."


def suspect_lines(decision: Decision) -> list[str]:
    """A line for each trial that most likely failed: `t018, seed 1, beta_kl 0.5, T 2.0: …`."""
    return [
        f"{each.trial_id}, seed {each.seed}, {formatting.setting(each.beta_kl, each.kl_temperature)}: {each.evidence}"
        for each in decision.suspects
    ]


def explanation(decision: Decision) -> str:
    """Why, in one or two sentences with the numbers."""
    if decision.verdict == "baseline_never_rerouted" and not decision.mend:
        # Not alpha: it scales all terms alike, to which AdamW is indifferent.
        return f"{decision.reason} Give rerouting more room: more --steps, a higher --lr, a larger --schedule-horizon."
    if decision.verdict == "insufficient_evidence" and decision.needed is not None:
        needed = decision.needed
        noise = f"σ {number(needed.sigma, 2)}{'' if needed.measured else ' assumed'}"
        return (
            f"{decision.reason} About {count(needed.seeds, 'seed')} of baseline and setting would suffice "
            f"({noise}, paired correlation {number(needed.correlation, 2)}).{_why_another(decision)}"
        )
    if decision.verdict != "choose":
        return decision.reason
    pick = next(
        s for s in decision.settings if (s.beta_kl, s.kl_temperature) == (decision.beta_kl, decision.kl_temperature)
    )
    seeds = count(pick.n_seeds, "seed") + (f" of which {pick.n_failed} failed" if pick.n_failed else "")
    confirmed = seeds if decision.confirmed else f"{seeds}, not yet confirmed"
    return (
        f"Benign drift is {number(decision.eval_benign_kl or 0)} nats/token, {percent(decision.drift_kept or 0)} of "
        f"what it is without KL, and rerouting stays within the limit: {percent(decision.confidence)} sure that it "
        f"loses at most {signed(decision.reroute_delta_bound or 0)} of {number(decision.tolerance or 0, 2)} allowed, "
        f"{with_relation('P', decision.probability_feasible or 0)}, {confirmed}.{_cheaper(decision)}"
    )


def _cheaper(decision: Decision) -> str:
    near = nearly_chosen(decision)
    if near is None:
        return ""
    named = formatting.setting(near.beta_kl, near.kl_temperature)
    return f" {named} drifts less, {with_relation('P', near.probability_feasible)}."


def _why_another(decision: Decision) -> str:
    """Why more trials of the same sweep would not do; empty where they do."""
    seeds = decision.baseline.n_seeds if decision.baseline else 0
    if decision.needed is None or decision.needed.seeds <= seeds:
        return ""
    return f" That takes another sweep: a baseline of {count(seeds, 'seed')} cannot get more when it is resumed."


def decision_json(decision: Decision, sweep: Mapping[str, Any], trials: pd.DataFrame, commands: Commands) -> str:
    """decision.json: every field of `Decision`, the sentence, the commands and where it comes from; all finite."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "sentence": headline(decision),
        "explanation": explanation(decision),
        **dataclasses.asdict(decision),
        "train_command": train_command(decision, sweep) if commands.trains else None,
        "sweep_command": None if commands.trains else commands.next,
        "wider_command": wider_command(decision, sweep, len(trials)),
        "trials": {str(status): int(amount) for status, amount in trials["status"].value_counts().items()},
        "preset": sweep.get("preset"),
        "versions": sweep.get("versions"),
        "git_commit": sweep.get("git_commit"),
    }
    return json.dumps(finite_or_none(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
        "decision.json": decision_json(decision, sweep, trials, commands),
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
