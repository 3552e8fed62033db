"""Configurations that earlier runs wrote down: a training run's `config.json`, and what a sweep's decision chose."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from cbtrain.config.presets import get_config
from cbtrain.config.schema import CircuitBreakerConfig
from cbtrain.config.validation import check_fields, from_json
from cbtrain.config.validation import flag as name_as_flag
from cbtrain.utils.errors import InputError, reason

Shape = TypeVar("Shape")
_PATHS = ("model", "tokenizer", "harmful", "benign")
"""Recorded as paths; where the sweep was not told them, the preset knows them on this machine."""

_RECOMMENDING = ("choose", "no_candidate_qualifies")
"""Verdicts that come with a setting."""


@dataclass(frozen=True)
class _Decision:
    """What is read of decision.json, of any schema."""

    verdict: str
    beta_kl: float | None = None
    kl_temperature: float | None = None
    sweep_command: str | None = None
    sentence: str = ""
    explanation: str = ""
    warnings: tuple[str, ...] = ()
    so_far: str = ""


@dataclass(frozen=True)
class _Sweep:
    """What is read of sweep.json."""

    preset: str
    config: dict[str, Any]
    config_overrides: dict[str, Any] | None = None


def said_by_decision(file: Path) -> list[str]:
    """What a decision says of the setting that it recommends: the sentence, its numbers and its warnings.

    Raises:
        InputError: the file is missing or not what it should be.
    """
    decision = _read_decision(file)
    said = [decision.sentence, decision.explanation, *(f"warning: {warning}" for warning in decision.warnings)]
    return [line for line in said if line]


def config_of_decision(file: Path, *, despite_verdict: bool = False) -> CircuitBreakerConfig:
    """The setting that a sweep's `report/decision.json` chose, trained as the sweep's trials were.

    Preset, data and every other field come from the `sweep.json` of the run directory that the decision lies in.

    Args:
        despite_verdict: take also what is no choice: `beta_kl` 0 where no weight qualifies, or of a sweep that goes on.

    Raises:
        InputError: a file is missing or not what it should be, or the decision recommends no setting.
    """
    decision = _read_decision(file)
    if decision.verdict not in _RECOMMENDING:
        help_by = f": {decision.sweep_command}" if decision.sweep_command else ""
        raise InputError(f"--from-decision {file}: it chose nothing ({decision.verdict}); sweep further{help_by}")
    if not despite_verdict and (decision.verdict != "choose" or decision.so_far):
        found = (
            f"of a sweep that has not ended ({decision.so_far})"
            if decision.so_far
            else f"{decision.verdict}, no choice"
        )
        raise InputError(
            f"--from-decision {file}: {found}; --despite-verdict trains beta_kl {decision.beta_kl:g} anyhow"
        )
    source = file.resolve().parent.parent / "sweep.json"
    mend = "not the sweep.json of a KL ablation; leave the decision in its run directory"
    sweep = _read(source, "--from-decision", _Sweep, mend)
    preset = get_config(sweep.preset)
    own = {name: getattr(preset, name) for name in _PATHS if name not in (sweep.config_overrides or {})}
    chosen = {"beta_kl": decision.beta_kl, "kl_temperature": decision.kl_temperature}
    return _with_fields(preset, sweep.config | own | chosen, source)


def _read_decision(file: Path) -> _Decision:
    return _read(file, "--from-decision", _Decision, "name the decision.json that pick_beta wrote")


@dataclass(frozen=True)
class _Calibration:
    """What is read of calibration.json."""

    converged: bool
    reason: str
    settings: dict[str, float]
    config: dict[str, Any]


_DATA = ("harmful", "benign")
RECIPE = ("lr", "retain_scale", "steps")
"""What a calibration finds."""
_OWN = (
    *("beta_kl", "kl_temperature", "beta_kl_schedule", "seed", "retain_norms"),  # of a trial, or measured
    *("tokenizer", "eval_fraction", "eval_every", "eval_batch_size", "log_every", "checkpoint_every"),
    *("hidden_states", "zero_stage", "micro_batch_size", "gradient_accumulation", "gradient_checkpointing"),
    "cpu_offload",
)
"""Fields in which a run may differ from the calibration's; any other would make its recipe one of other runs."""


def with_calibration(config: CircuitBreakerConfig, file: Path, given: Collection[str] = ()) -> CircuitBreakerConfig:
    """The configuration with the recipe of a `calibration.json`.

    Args:
        given: fields that keep their value.

    Raises:
        InputError: the file is missing or no calibration, it found nothing, or its runs differ from these.
    """
    found = _read(file, "--calibration", _Calibration, "name the calibration.json that cbtrain.calibrate wrote")
    if not found.converged:
        raise InputError(f"--calibration {file}: it found no recipe ({found.reason})")
    recorded = _with_fields(replace(config), found.config, file)
    for field in fields(config):
        there, here = getattr(recorded, field.name), getattr(config, field.name)
        if field.name not in (*RECIPE, *_OWN, "model", *_DATA) and there != here:
            mend = f"give {name_as_flag(field.name)} as there, or calibrate anew"
            raise InputError(f"--calibration {file}: made with {field.name} {there}, not {here}; {mend}")
    if config.model != "tiny" and not _same_place(recorded.model, config.model):
        raise InputError(f"--calibration {file}: made for {recorded.model}, not {config.model}; calibrate anew")
    for side in _DATA:
        there, here = getattr(recorded, side), getattr(config, side)
        alike = len(there) == len(here) and all(map(_same_place, there, here))
        if not alike and (there or here) and (here or config.model != "tiny"):
            named = " and ".join(here) or "the embedded rows"
            raise InputError(f"--calibration {file}: made with --{side} {' '.join(there)}, not {named}; calibrate anew")
    recipe: dict[str, Any] = {name: getattr(recorded, name) for name in RECIPE if name not in given}
    return replace(config, **recipe)


def _same_place(there: str, here: str) -> bool:
    """Whether two paths or hub ids are one; of a path that is not on this machine the name alone can tell."""
    if there == here or Path(there).resolve() == Path(here).resolve():
        return True
    return not Path(there).exists() and Path(there).name == Path(here).resolve().name


def config_of_adapter(directory: Path) -> CircuitBreakerConfig | None:
    """How an adapter was trained, by the `config.json` beside its directory; None where there is none.

    Raises:
        InputError: the file is not the configuration of a training run.
    """
    file = directory.resolve().parent / "config.json"
    if not file.is_file():
        return None
    return _with_fields(CircuitBreakerConfig(), _read(file, "--adapter", dict[str, Any], "restore the file"), file)


def require_adapter(directory: Path) -> None:
    """Raise `InputError` where no PEFT adapter was saved."""
    if not (directory / "adapter_config.json").is_file():
        raise InputError(f"--adapter {directory}: no adapter there (no adapter_config.json)")


def _with_fields(config: CircuitBreakerConfig, fields: Mapping[str, Any], source: Path) -> CircuitBreakerConfig:
    try:
        for name, value in fields.items():
            if name != "trust_remote_code":  # a flag alone gives that
                setattr(config, name, value)
        check_fields(config, CircuitBreakerConfig)
    except InputError as error:
        raise InputError(f"{source}: written by another version ({error}); give the settings as flags") from None
    return config


def _read(file: Path, flag: str, shape: type[Shape], mend: str) -> Shape:
    try:
        return from_json(file.read_bytes(), shape)
    except OSError as error:
        raise InputError(f"{flag} {file}: {reason(error)}") from None
    except InputError as error:
        raise InputError(f"{flag} {file}: {error}: {mend}") from None
