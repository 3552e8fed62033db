"""What the baseline and the chosen setting write, measured when the trials of a sweep have ended.

Losses say that hidden states turned away; this says what the model then makes of held-out prompts, and the decision
passes over a setting that breaks it. The whole model lies on one device, however it was partitioned in training.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ray.actor import ActorHandle

from analysis.behaviour.measured import Behaviour
from analysis.decision import Decision
from analysis.formatting import percent
from cbtrain.config import CircuitBreakerConfig
from sweeps.execution.context import TrialContext
from sweeps.plan.journal import TrialSpec, trial_config
from sweeps.runtime.failures import root_cause
from sweeps.runtime.processes import Processes, call, nothing

if TYPE_CHECKING:
    from cbtrain.evaluation.completions import Known

NEW_TOKENS = 64
"""Of each answer that is measured, at most."""
_START_S = 20.0
"""Measuring does not wait longer for another process once one is there."""
LOG = "behaviour"
"""Of `logs/`, without its suffix: what the measuring processes print."""


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


class Meter:
    """Measures trials' behaviour in processes that each have what one worker of a trial has, and share the work.

    Args:
        processes: of the sweep, all of which are there.
        prompts: held-out prompts of each kind, at most.
        judge: `module:function` of a user's classifier; empty for the judge of this package.
    """

    def __init__(self, context: TrialContext, processes: Processes, prompts: int, judge: str = "") -> None:
        self._context, self._prompts, self._judge = context, prompts, judge
        self._handles = processes.started(_START_S)
        self._teacher_said: dict[tuple[int, ...], Known] = {}

    def expected_seconds(self, specs: Sequence[TrialSpec]) -> float:
        """At most so many seconds to measure trials, told by some tokens of the model before training.

        Raises:
            BehaviourError: why it cannot be told, and nothing can be measured.
        """
        known, processes = set(self._teacher_said), self._at_work(specs)
        return max(self._asked(_expected_seconds, [(specs, known, processes)] * processes))

    def measure(self, specs: Sequence[TrialSpec]) -> None:
        """Write each trial's `behaviour.json` and `completions.jsonl`.

        Raises:
            BehaviourError: why that fails.
        """
        known, processes = set(self._teacher_said), self._at_work(specs)
        parts = [(specs[0], known, (index, processes)) for index in range(processes)]
        for said in self._asked(_ask_teacher, parts):
            self._teacher_said |= said
        self._asked(_measure, [(specs[index::processes], self._teacher_said) for index in range(processes)])

    def _at_work(self, specs: Sequence[TrialSpec]) -> int:
        return min(len(self._handles), len(specs))

    def _asked(self, work: Callable, shares: Sequence[tuple]) -> list[Any]:
        """What each process answers to its share of some work, all at once."""
        what_all_know = (self._context, self._prompts, self._judge)

        def one(process: ActorHandle, share: tuple) -> Any:
            return call(process, self._context.run_dir, LOG, work, *what_all_know, *share)

        with ThreadPoolExecutor(len(shares)) as pool:
            try:
                return [*pool.map(one, self._handles, shares)]
            except Exception as error:
                raise BehaviourError(f"{root_cause(error)} (logs/{LOG}.log)") from error


class BehaviourError(Exception):
    """Behaviour that cannot be measured; its text is a line."""


def behaviour_sentences(measured: Sequence[Behaviour], decision: Decision) -> list[str]:
    """What the chosen setting makes of each kind of prompt, and in brackets what the baseline does: how many answers
    are word for word as before training, and how many are degenerate.

    Args:
        measured: as `load_behaviour` gives it.
    """
    setting = (decision.beta_kl, decision.kl_temperature) if decision.verdict == "choose" else (0.0, 1.0)
    without_kl = [each for each in measured if each.beta_kl == 0]
    chosen = [each for each in measured if (each.beta_kl, each.kl_temperature) == setting]
    if not without_kl or not chosen:
        return []

    def share(kind: str, name: str, found: Sequence[Behaviour]) -> str:
        return percent(fmean(getattr(getattr(each, kind), name) or 0 for each in found))

    kinds = ["harmful", "benign"]
    if all(each.prefilled for each in (*chosen, *without_kl)):
        kinds.append("prefilled")
    sentences = []
    for kind in kinds:
        unchanged, degenerate = share(kind, "unchanged", chosen), share(kind, "degenerate", chosen)
        said = f"{kind}: {unchanged} unchanged, {degenerate} degenerate"
        if setting[0]:
            said += f" (without KL {share(kind, 'unchanged', without_kl)}, {share(kind, 'degenerate', without_kl)})"
        sentences.append(said)
    return sentences


def _expected_seconds(
    context: TrialContext,
    prompts: int,
    _judge: str,
    specs: Sequence[TrialSpec],
    known: set[tuple[int, ...]],
    processes: int,
    _report: Callable,
) -> float:
    from cbtrain.evaluation.behaviour import expected_seconds

    config = trial_config(context.config, specs[0])
    return expected_seconds(config, len(specs), prompts, NEW_TOKENS, teacher_known=known, processes=processes)


def _ask_teacher(
    context: TrialContext,
    prompts: int,
    judge: str,
    spec: TrialSpec,
    known: set[tuple[int, ...]],
    part: tuple[int, int],
    _report: Callable,
) -> dict[tuple[int, ...], "Known"]:
    from cbtrain.evaluation.behaviour import teacher_answers

    return teacher_answers(
        *_trained(context, spec), prompts=prompts, max_new_tokens=NEW_TOKENS, judge=judge, known=known, part=part
    )


def _measure(
    context: TrialContext,
    prompts: int,
    judge: str,
    specs: Sequence[TrialSpec],
    teacher_said: dict[tuple[int, ...], "Known"],
    _report: Callable = nothing,
) -> None:
    from cbtrain.evaluation.behaviour import measure

    for spec in specs:
        config, adapter = _trained(context, spec)
        measure(
            config,
            adapter,
            prompts=prompts,
            max_new_tokens=NEW_TOKENS,
            judge=judge,
            output_dir=adapter.parent,
            teacher_said=teacher_said,
        )


def _trained(context: TrialContext, spec: TrialSpec) -> tuple[CircuitBreakerConfig, Path]:
    """A trial's configuration and adapter."""
    return trial_config(context.config, spec), file_of(context.run_dir, spec).parent / "adapter"
