"""What a killed sweep left in its run directory, and whether it can be continued: `--resume RUN_DIR`.

The settings come from sweep.json, the trials from the journal. A resumed sweep is a new one over a plan rebuilt from
there; nothing of Ray's is read back.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from analysis.surrogate.search_space import BETA_KL_RANGE, KL_TEMPERATURE_RANGE
from cbtrain.config import CircuitBreakerConfig, InputError, flag
from cbtrain.config.validation import from_json, misfit
from cbtrain.utils.errors import named
from cbtrain.utils.files import write_whole
from sweeps.plan.budget import PlanSettings
from sweeps.reporting.console import resume_lines, wrapped
from sweeps.reporting.screen import SCREEN
from sweeps.storage.lock import LEFT_RUNNING_S, HeldError, held
from sweeps.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from sweeps.plan.journal import TrialSpec

ALLOWED = (
    *("num_samples", "max_concurrent", "workers_per_trial", "gpus_per_worker", "teacher_cache", "dry_run", "quiet"),
    *("max_failures", "retry_failed", "trial_timeout", "trust_remote_code"),
    *("profile", "behaviour_prompts", "storage_path", "copy_to", "wandb_project", "wandb_mode"),
    *("max_degenerate_rise", "max_degenerate_bound", "max_benign_nll_rise", "max_compliance_rise"),
)
"""What may be given beside `--resume`: how far the sweep goes, what belongs to the machine, and where results go."""
KEPT_ELSEWHERE = (
    *("preset", "config", "run_dir", "resume", "retry_failed", "dry_run", "quiet", "storage_path", "calibration"),
)
"""Fields of the sweep's settings that `flags` of sweep.json does not hold."""
ADDED = {"retain_norm": "absolute", "retain_scale": 10.0, "retain_norms": None, "trust_remote_code": False}
"""Configuration that sweeps of older versions do not name, as those versions trained."""
ADDED_SETTINGS = {"beta_kl_range": BETA_KL_RANGE, "kl_temperature_range": KL_TEMPERATURE_RANGE}
"""Settings that they do not name, as those versions searched."""
Fields = TypeVar("Fields", bound=Any)


@dataclasses.dataclass(frozen=True)
class _Record:
    """What is read of sweep.json."""

    config: dict[str, Any]
    settings: dict[str, Any]
    plan: dict[str, Any]
    preset: str = "tiny"
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)


def given_flags(argv: Sequence[str]) -> list[str]:
    """Names of the fields whose flags are on a command line that was parsed without an error, in its order."""
    words = [word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")]
    return [{"config": "preset"}.get(word, word.removeprefix("no_")) for word in words]


def flags_to_keep(settings: Any) -> dict[str, object]:
    """The sweep's settings that stand nowhere else in sweep.json."""
    elsewhere = {*KEPT_ELSEWHERE, *(field.name for field in dataclasses.fields(PlanSettings))}
    names = [field.name for field in dataclasses.fields(settings) if field.name not in elsewhere]
    return {name: getattr(settings, name) for name in names}


def recorded(run: RunDirectory, settings: Fields, argv: Sequence[str]) -> tuple[Fields, PlanSettings]:
    """The settings to continue with: those of sweep.json, and what `argv` may change of them.

    Raises:
        InputError: a flag that sweep.json decides was given, or sweep.json does not hold a sweep's settings.
    """
    given = [name for name in given_flags(argv) if name != "resume"]
    where = f"{run.shown}/sweep.json"
    for name in given:
        if name not in ALLOWED:
            raise InputError(f"{flag(name)}: comes from {where} when resuming; leave it out")
    try:
        record = from_json(json.dumps(run.record), _Record)
    except InputError as error:
        raise InputError(f"{where}: {error}: not a sweep that can be continued") from None
    config = _rebuilt(CircuitBreakerConfig, ADDED | dict(record.config), f"{where}: config")
    # Nothing that lies in a run directory lets code run.
    config = dataclasses.replace(config, trust_remote_code=settings.config.trust_remote_code)
    # The number of baselines follows from the first budget: a larger one must not ask for more of them.
    fields = ADDED_SETTINGS | record.settings | {"baseline_seeds": record.plan.get("baseline")}
    plan = _rebuilt(PlanSettings, fields, f"{where}: settings")
    if "num_samples" in given:
        if settings.num_samples < plan.num_samples:
            raise InputError(
                f"--num-samples {settings.num_samples}: the sweep has {plan.num_samples}; it can grow, not shrink"
            )
        plan = dataclasses.replace(plan, num_samples=settings.num_samples)
    kept = {name: value for name, value in record.flags.items() if name not in given}
    _require_fields(type(settings), kept, f"{where}: flags", complete=False)
    kept |= {"preset": record.preset, "config": config, "num_samples": plan.num_samples}
    return dataclasses.replace(settings, **kept), plan


def _rebuilt(cls: type[Fields], given: Mapping[str, Any], where: str) -> Fields:
    """The dataclass that was written as `given`, which JSON has turned its tuples into lists in."""
    _require_fields(cls, given, where, complete=True)
    try:
        return cls(**{name: _with_tuples(value) for name, value in given.items()})
    except ValueError as error:  # an InputError, or a range of more than two numbers
        raise InputError(f"{where}: {error}") from None


def _require_fields(cls: type, given: Mapping[str, Any], where: str, *, complete: bool) -> None:
    hints = get_type_hints(cls)
    for name in given:
        if name not in hints:
            raise InputError(f"{where}.{name}: no such field; the sweep was begun by another version of this program")
    for name, hint in hints.items():
        if name not in given:
            if complete:
                raise InputError(f"{where}.{name}: missing; the sweep was begun by another version of this program")
        elif mend := misfit(_with_tuples(given[name]), hint):
            raise InputError(f"{where}.{name}: {given[name]!r} {mend}")


def _with_tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Found:
    """The trials of a sweep that is to be continued."""

    ended: tuple[str, ...]
    interrupted: "tuple[TrialSpec, ...]"
    done: bool
    """Whether nothing is left to run."""


def find_trials(run: RunDirectory, settings: PlanSettings, *, retry_failed: bool = False) -> Found:
    """What the journal knows; it is left as it is. Trials that failed are interrupted ones where they shall run again.

    Raises:
        InputError: it is damaged, of other settings, or holds more trials than the settings.
    """
    from sweeps.plan.journal import TrialSpec
    from sweeps.plan.plan import SweepPlan
    from sweeps.storage.journal_file import open_journal

    whole, _ = _journal_lines(run)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "study.log")
        copy.write_bytes(whole)
        try:
            plan = SweepPlan(settings, open_journal(copy))
            if retry_failed:
                plan.retry_failed()
            rows = [dict[str, Any](row) for row in plan.rows()]
        except InputError:
            raise
        except Exception as error:  # lines that are JSON and no journal fail in Optuna in many ways
            cause = named(error)
            raise InputError(f"{run.shown}/study.log: not this sweep's journal ({cause}): restore the file") from error
    if len(rows) > settings.num_samples:
        mend = f"give {len(rows)} or more"
        raise InputError(f"--num-samples {settings.num_samples}: {len(rows)} trials were begun already; {mend}")
    ended = tuple(row["trial_id"] for row in rows if row["status"] != "running")
    names = [field.name for field in dataclasses.fields(TrialSpec)]
    interrupted = tuple(TrialSpec(**{name: row[name] for name in names}) for row in rows if row["status"] == "running")
    return Found(ended, interrupted, plan.done)


def steps_done(run: RunDirectory, found: Found, config: CircuitBreakerConfig, workers: int) -> list[int]:
    """The step from which each interrupted trial goes on; 0 where it has no checkpoint that it can load."""
    from cbtrain.checkpoints.manifest import progress_of
    from sweeps.plan.journal import trial_config

    return [
        progress_of(run.trial(spec.trial_id) / "checkpoint", trial_config(config, spec), workers).step
        for spec in found.interrupted
    ]


def mend_journal(run: RunDirectory) -> None:
    """Make the journal of a killed driver fit to be written to; needs the run's lock.

    A half-written last line, to which Optuna would append the next, goes to `study.log.torn`. Optuna's own lock, a
    link that a killed process leaves behind, is taken away.
    """
    for left in run.path.glob("study.log.lock*"):
        left.unlink(missing_ok=True)
    whole, torn = _journal_lines(run)
    if torn:
        with (run.path / "study.log.torn").open("ab") as file:
            file.write(torn)
        write_whole(run.journal, whole)


def _journal_lines(run: RunDirectory) -> tuple[bytes, bytes]:
    """The journal's whole lines, and what of the last is half written.

    Raises:
        InputError: a line before the last is no JSON.
    """
    content = run.journal.read_bytes() if run.journal.is_file() else b""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n") and _is_json(line):
            continue
        if number < len(lines):
            raise InputError(f"{run.shown}/study.log:{number}: damaged (not JSON): restore the file")
        return content[: -len(line)], line
    return content, b""


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def resumed_lines(run: RunDirectory, found: Found, config: CircuitBreakerConfig, workers: int, total: int) -> list[str]:
    """What a resumed sweep goes on from, and whether other software goes on with it."""
    changes = run.changed_software()
    warning = wrapped(f"warning   changed since the sweep began: {', '.join(changes)}") if changes else []
    return [*resume_lines(len(found.ended), total, steps_done(run, found, config, workers), found.done), *warning]


def wait_for_leftovers(run: RunDirectory, trial_ids: Sequence[str]) -> None:
    """Return when no process of the killed sweep trains any of these trials.

    Raises:
        InputError: one still does after `LEFT_RUNNING_S`.
    """
    for trial_id in trial_ids:
        lock = run.trial(trial_id) / "lock"
        if not lock.is_file():
            continue
        try:
            with held(lock):
                continue
        except HeldError as holder:
            waiting = f"for {holder}, which still trains {trial_id}"
        try:
            with SCREEN.phase("waiting", waiting), held(lock, wait_s=LEFT_RUNNING_S):
                pass
        except HeldError as holder:
            raise InputError(f"{run.shown}/trials/{trial_id}: {holder} still trains it; end that process") from None
