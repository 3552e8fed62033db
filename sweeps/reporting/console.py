"""What a sweep says of itself in words: labelled lines of the screen's width, on noise and on what is resumed."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from analysis.baseline import failed_by_rule, failed_sentence, unconverged_sentence
from analysis.formatting import count, number, percent
from analysis.noise import excessive_spread, samples_for, seeds_needed
from sweeps.plan.budget import PlanSettings
from sweeps.reporting.progress import Row
from sweeps.reporting.screen import WIDTH

INDENT = " " * 10


def noise_lines(rows: Sequence[Row], tolerance: float, settings: PlanSettings) -> list[str]:
    """What the spread between the baseline's seeds asks for, where it is large for the limit; else nothing.

    Args:
        rows: of trials.csv, with the whole baseline.
        tolerance: the allowed rise of `eval_loss_reroute`.
        settings: of the sweep.
    """
    completed = [row for row in rows if row["phase"] == "baseline" and row["status"] == "completed"]
    losses = [row["eval_loss_reroute"] for row in completed]
    sigma = excessive_spread(losses, tolerance)
    baselines = pd.DataFrame(completed)
    if completed and (failed := failed_sentence(baselines, failed_by_rule(baselines))):
        return wrapped(f"baseline  {failed}")
    if sigma is None:
        return []
    if unfinished := unconverged_sentence(pd.DataFrame(completed)):
        return wrapped(f"baseline  {unfinished}")
    seeds = seeds_needed(sigma, tolerance)
    samples = samples_for(seeds)
    more = f" (--num-samples {samples})" if samples > settings.num_samples else ""
    if seeds > len(losses):  # which a sweep that goes on cannot have
        samples = max(samples, settings.num_samples)
        more = f" (another sweep, --num-samples {samples} --baseline-seeds {seeds})"
    again = "; settings that ran are repeated where a new one is worth no more" if settings.sampler == "gp" else ""
    return wrapped(
        f"noise     σ {number(sigma, 2)} between seeds is {percent(sigma / tolerance)} of the limit "
        f"{number(tolerance, 2)}: an answer may need up to {seeds} seeds a setting{more}{again}"
    )


def resume_lines(ended: int, total: int, steps: Sequence[int], done: bool) -> list[str]:
    """What a resumed sweep found; `steps` are those from which the interrupted trials go on."""
    found = f"resume    {ended} of {count(total, 'trial')} ended"
    if done:
        more = " (--num-samples N adds trials)" if ended == total else ""
        return wrapped(f"{found}: nothing is left to run{more}")
    if steps:
        places = [f"step {step}" if step else "the start" for step in steps]
        listed = " and from ".join(filter(None, [", ".join(places[:-1]), places[-1]]))
        verb, they = ("was", "it goes") if len(steps) == 1 else ("were", "they go")
        found += f", {len(steps)} {verb} interrupted: {they} on from {listed}"
    return wrapped(found)


def wrapped(text: str) -> list[str]:
    """A labelled text in lines of the screen's width."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False)


def indented(text: str) -> list[str]:
    """What goes on under a label."""
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
