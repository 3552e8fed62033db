"""What the baseline and the chosen setting write, measured when the trials of a sweep have ended.

Losses say that hidden states turned away; this says what the model then makes of held-out prompts, and the decision
passes over a setting that breaks it. The whole model lies on one device, however it was partitioned in training.
"""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from analysis.behaviour.measured import Behaviour
from analysis.decision import Decision
from analysis.formatting import percent
from cbtrain.config import CircuitBreakerConfig
from cbtrain.utils.environment import quiet_libraries
from sweeps.execution.trial import TrialContext, output_to, root_cause
from sweeps.plan.journal import TrialSpec, trial_config

if TYPE_CHECKING:
    from cbtrain.evaluation.completions import Known

NEW_TOKENS = 64
"""Of each answer that is measured, at most."""
_START_S = 20.0
"""Measuring does not wait longer for another process once one has started."""
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


class Meter:
    """Measures trials' behaviour in processes that each have what one worker of a trial had, and share the work.

    Args:
        prompts: held-out prompts of each kind, at most.
        judge: `module:function` of a user's classifier; empty for the judge of this package.
        processes: as many as there were trials at a time, at most.
    """

    def __init__(self, context: TrialContext, prompts: int, judge: str = "", processes: int = 1) -> None:
        workers = context.workers
        actor = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=0)(_Measuring)
        wanted = [actor.remote(context, prompts, judge) for _ in range(processes)]
        starting = [process.started.remote() for process in wanted]
        ray.wait(starting)
        started, _ = ray.wait(starting, num_returns=processes, timeout=_START_S)
        self._processes = [process for process, start in zip(wanted, starting, strict=True) if start in started]
        for process in set(wanted) - set(self._processes):  # a node may be gone since the trials ran
            ray.kill(process)
        self._teacher_said: dict[tuple[int, ...], Known] = {}

    def expected_seconds(self, specs: Sequence[TrialSpec]) -> float:
        """At most so many seconds to measure trials, told by some tokens of the model before training.

        Raises:
            BehaviourError: why it cannot be told, and nothing can be measured.
        """
        at_work, known = self._at_work(specs), set(self._teacher_said)
        told = [process.expected_seconds.remote(specs, known, len(at_work)) for process in at_work]
        return max(self._asked(told))

    def measure(self, specs: Sequence[TrialSpec]) -> None:
        """Write each trial's `behaviour.json` and `completions.jsonl`.

        Raises:
            BehaviourError: why that fails.
        """
        at_work, known = self._at_work(specs), set(self._teacher_said)
        of_all = len(at_work)
        for said in self._asked(
            [process.ask_teacher.remote(specs[0], known, (i, of_all)) for i, process in enumerate(at_work)]
        ):
            self._teacher_said |= said
        said = ray.put(self._teacher_said)
        self._asked([process.measure.remote(specs[i::of_all], said) for i, process in enumerate(at_work)])

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            ray.kill(process)

    def _at_work(self, specs: Sequence[TrialSpec]) -> list[Any]:
        return self._processes[: len(specs)]

    def _asked(self, answers: list[Any]) -> list[Any]:
        try:
            return ray.get(answers)
        except RayError as error:
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


class _Measuring:
    """The process of a `Meter`."""

    def __init__(self, context: TrialContext, prompts: int, judge: str) -> None:
        self._context, self._prompts, self._judge = context, prompts, judge

    def started(self) -> None:
        """Returns once the process is there."""

    def expected_seconds(self, specs: Sequence[TrialSpec], known: set[tuple[int, ...]], processes: int) -> float:
        with self._logged():
            from cbtrain.evaluation.behaviour import expected_seconds

            return expected_seconds(
                trial_config(self._context.config, specs[0]),
                len(specs),
                self._prompts,
                NEW_TOKENS,
                teacher_known=known,
                processes=processes,
            )

    def ask_teacher(
        self, spec: TrialSpec, known: set[tuple[int, ...]], part: tuple[int, int]
    ) -> dict[tuple[int, ...], "Known"]:
        with self._logged():
            from cbtrain.evaluation.behaviour import teacher_answers

            return teacher_answers(
                *self._trained(spec),
                prompts=self._prompts,
                max_new_tokens=NEW_TOKENS,
                judge=self._judge,
                known=known,
                part=part,
            )

    def measure(self, specs: Sequence[TrialSpec], teacher_said: dict[tuple[int, ...], "Known"]) -> None:
        with self._logged():
            from cbtrain.evaluation.behaviour import measure

            for spec in specs:
                config, adapter = self._trained(spec)
                measure(
                    config,
                    adapter,
                    prompts=self._prompts,
                    max_new_tokens=NEW_TOKENS,
                    judge=self._judge,
                    output_dir=adapter.parent,
                    teacher_said=teacher_said,
                )

    def _trained(self, spec: TrialSpec) -> tuple[CircuitBreakerConfig, Path]:
        """A trial's configuration and adapter."""
        return trial_config(self._context.config, spec), file_of(self._context.run_dir, spec).parent / "adapter"

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        with output_to(self._context.run_dir, LOG):
            quiet_libraries()
            import torch

            torch.set_num_threads(self._context.workers.cpus)
            try:
                yield
            except Exception:
                traceback.print_exc()  # Ray tells the driver, and the log's reader nothing
                raise
