"""What the baseline and the chosen setting write, measured when the trials of a sweep have ended.

Losses say that hidden states turned away; this says what the model then makes of held-out prompts. It has no part in
the decision. The whole model lies on one device.
"""

import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray.exceptions import RayError

from analysis.behaviour import load_behaviour
from analysis.decision import Decision
from analysis.formatting import percent
from cbtrain.utils.environment import quiet_libraries
from sweeps.execution.trial import TrialContext, output_to, root_cause
from sweeps.plan.journal import TrialSpec, trial_config

LOG = "behaviour"
"""Of `logs/`, without its suffix: what the measuring process prints."""


def subjects(rows: Sequence[dict[str, Any]], decision: Decision) -> list[TrialSpec]:
    """The trials to measure: the first completed baseline, then the first one of the setting that is chosen.

    None where there is no baseline to compare with.
    """
    if decision.verdict in ("baseline_failed", "baseline_never_rerouted"):
        return []
    settings: list[tuple[float, float | None]] = [(0.0, 1.0)]
    if decision.verdict == "choose":
        settings.append((decision.beta_kl or 0.0, decision.kl_temperature))
    completed = [
        TrialSpec(**{field.name: row[field.name] for field in fields(TrialSpec)})
        for row in rows
        if row["status"] == "completed"
    ]
    return [next(spec for spec in completed if (spec.beta_kl, spec.kl_temperature) == setting) for setting in settings]


def file_of(run_dir: Path, spec: TrialSpec) -> Path:
    """Where a trial's behaviour is written."""
    return run_dir / "trials" / spec.trial_id / "behaviour.json"


def measure_all(specs: Sequence[TrialSpec], context: TrialContext, prompts: int) -> str:
    """Measure the adapters of trials, one after another in a process that has what one of their workers had.

    Returns:
        Why that failed, in a line; empty where it did not.
    """
    workers = context.workers
    measure = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=0)(_measure)
    try:
        ray.get(measure.remote(specs, context, prompts))
    except RayError as error:
        return f"{root_cause(error)} (logs/{LOG}.log)"
    return ""


def behaviour_sentences(run_dir: Path, specs: Sequence[TrialSpec]) -> list[str]:
    """What the last of the measured trials makes of each kind of prompt, and in brackets what the baseline does."""
    measured = load_behaviour(run_dir, pd.DataFrame(specs))[1:]
    if not measured:
        return []
    baseline, chosen = measured[0], measured[-1]

    def share(of_chosen: float, of_baseline: float, what: str) -> str:
        return f"{percent(of_chosen)} {what}" + (f" ({percent(of_baseline)} without KL)" if chosen != baseline else "")

    sentences = []
    for kind, now, without in (
        ("harmful", chosen.harmful, baseline.harmful),
        ("benign", chosen.benign, baseline.benign),
    ):
        same = share(now.unchanged or 0, without.unchanged or 0, "word for word as before training")
        sentences.append(f"{kind} prompts: {same}, {share(now.gibberish, without.gibberish, 'gibberish')}")
    return sentences


def _measure(specs: Sequence[TrialSpec], context: TrialContext, prompts: int) -> None:
    """Write each trial's `behaviour.json` and `completions.jsonl`; the base is loaded once."""
    with output_to(context.run_dir, LOG):
        quiet_libraries()
        import torch

        from cbtrain.evaluation.behaviour import measure

        torch.set_num_threads(context.workers.cpus)
        try:
            for spec in specs:
                directory = file_of(context.run_dir, spec).parent
                config = trial_config(context.config, spec)
                measure(config, directory / "adapter", prompts=prompts, output_dir=directory)
        except Exception:
            traceback.print_exc()  # Ray tells the driver, and the log's reader nothing
            raise
