"""Configurations that earlier runs wrote down: a training run's `config.json`, and what a sweep's decision chose."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbtrain.config.presets import get_config
from cbtrain.config.schema import CircuitBreakerConfig
from cbtrain.utils.errors import InputError

_PLACES = ("model", "tokenizer", "harmful", "benign")
"""Recorded as paths; where the sweep was not told them, the preset knows them on this machine."""

_RECOMMENDING = ("choose", "no_candidate_qualifies")
"""Verdicts that come with a setting."""


def config_of_decision(file: Path) -> CircuitBreakerConfig:
    """The setting that a sweep's `report/decision.json` chose, trained as the sweep's trials were.

    Preset, data and every other field come from the `sweep.json` of the run directory that the decision lies in.

    Raises:
        InputError: a file is missing or not what it should be, or the decision recommends no setting.
    """
    decision = _read(file, "--from-decision")
    if "verdict" not in decision:
        raise InputError(f"--from-decision {file}: not a decision.json (no verdict); name the one that pick_beta wrote")
    if decision["verdict"] not in _RECOMMENDING:
        help_by = f": {decision['sweep_command']}" if decision.get("sweep_command") else ""
        raise InputError(f"--from-decision {file}: it chose nothing ({decision['verdict']}); sweep further{help_by}")
    source = file.resolve().parent.parent / "sweep.json"
    sweep = _read(source, "--from-decision")
    if not isinstance(sweep.get("config"), dict) or not isinstance(sweep.get("preset"), str):
        raise InputError(f"{source}: not the sweep.json of a KL ablation; leave the decision in its run directory")
    preset = get_config(sweep["preset"])
    told = sweep.get("config_overrides") or {}
    own = {name: getattr(preset, name) for name in _PLACES if name not in told}
    chosen = {name: decision.get(name) for name in ("beta_kl", "kl_temperature")}
    return _with_fields(preset, sweep["config"] | own | chosen, source)


def config_of_adapter(directory: Path) -> CircuitBreakerConfig | None:
    """How an adapter was trained, by the `config.json` beside its directory; None where there is none.

    Raises:
        InputError: the file is not the configuration of a training run.
    """
    file = directory.resolve().parent / "config.json"
    return _with_fields(CircuitBreakerConfig(), _read(file, "--adapter"), file) if file.is_file() else None


def require_adapter(directory: Path) -> None:
    """Raise `InputError` where no PEFT adapter was saved."""
    if not (directory / "adapter_config.json").is_file():
        raise InputError(f"--adapter {directory}: no adapter there (no adapter_config.json)")


def _with_fields(config: CircuitBreakerConfig, fields: Mapping[str, Any], source: Path) -> CircuitBreakerConfig:
    try:
        for name, value in fields.items():
            setattr(config, name, value)
    except InputError as error:
        raise InputError(f"{source}: written by another version ({error}); give the settings as flags") from None
    return config


def _read(file: Path, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{flag} {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{flag} {file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{flag} {file}: must hold a JSON object")
    return value
