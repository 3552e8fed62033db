"""What the baseline and the chosen setting write, measured when the trials of a sweep have ended.

Losses say that hidden states turned away; this says what the model then makes of held-out prompts, and the decision
passes over a setting that breaks it. The whole model lies on one device.
"""

import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from ray.exceptions import RayError

from analysis.behaviour import Behaviour
from analysis.decision import Decision
from analysis.formatting import percent
from cbtrain.utils.environment import quiet_libraries
from sweeps.execution.trial import TrialContext, output_to, root_cause
from sweeps.plan.journal import TrialSpec, trial_config

NEW_TOKENS = 64
"""Of each answer that is measured, at most."""
LOG = "behaviour"
"""Of `logs/`, without its suffix: what the measuring process prints."""


def subjects(rows: Sequence[dict[str, Any]], decision: Decision) -> list[TrialSpec]:
    """The trials to measure: those of the setting that is chosen, after the baselines of their seeds.

    Without a chosen setting the first baseline alone; none where there is no baseline to compare with. Trials that most
    likely failed are not measured.
    """
    if decision.verdict in ("baseline_failed", "baseline_never_rerouted"):
        return []
    suspect = {each.trial_id for each in decision.suspects}
    completed = [
        TrialSpec(**{field.name: row[field.name] for field in fields(TrialSpec)})
        for row in rows
        if row["status"] == "completed" and row["trial_id"] not in suspect
    ]
    baselines = [spec for spec in completed if spec.beta_kl == 0]
    setting = (decision.beta_kl, decision.kl_temperature) if decision.verdict == "choose" else None
    chosen = [spec for spec in completed if (spec.beta_kl, spec.kl_temperature) == setting]
    seeds = {spec.seed for spec in chosen}
    return [*([spec for spec in baselines if spec.seed in seeds] or baselines[:1]), *chosen]


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


def behaviour_sentences(measured: Sequence[Behaviour], decision: Decision) -> list[str]:
    """What the chosen setting makes of each kind of prompt, and in brackets what the baseline does.

    Args:
        measured: as `load_behaviour` gives it.
    """
    setting = (decision.beta_kl, decision.kl_temperature) if decision.verdict == "choose" else (0.0, 1.0)
    without_kl = [each for each in measured if each.beta_kl == 0]
    chosen = [each for each in measured if (each.beta_kl, each.kl_temperature) == setting]
    if not without_kl or not chosen:
        return []

    def share(kind: str, name: str, what: str) -> str:
        of_chosen, of_baseline = (
            fmean(getattr(getattr(each, kind), name) or 0 for each in found) for found in (chosen, without_kl)
        )
        return f"{percent(of_chosen)} {what}" + (f" ({percent(of_baseline)} without KL)" if setting[0] else "")

    return [
        f"{kind} prompts: {share(kind, 'unchanged', 'word for word as before training')}, "
        f"{share(kind, 'gibberish', 'gibberish')}"
        for kind in ("harmful", "benign")
    ]


def _measure(specs: Sequence[TrialSpec], context: TrialContext, prompts: int) -> None:
    """Write each trial's `behaviour.json` and `completions.jsonl`; the base is loaded once."""
    with output_to(context.run_dir, LOG):
        quiet_libraries()
        import torch

        from cbtrain.evaluation.behaviour import Completion, measure

        torch.set_num_threads(context.workers.cpus)
        said: dict[tuple[int, ...], Completion] = {}
        try:
            for spec in specs:
                directory = file_of(context.run_dir, spec).parent
                config = trial_config(context.config, spec)
                measure(
                    config,
                    directory / "adapter",
                    prompts=prompts,
                    max_new_tokens=NEW_TOKENS,
                    output_dir=directory,
                    teacher_said=said,
                )
        except Exception:
            traceback.print_exc()  # Ray tells the driver, and the log's reader nothing
            raise
