"""Read a sweep's run directory into tidy tables. Every error names the file, and the line where one is."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.columns import METRIC_COLUMNS, NUMBER_COLUMNS, STATUSES, TEXT_COLUMNS, impossible_value
from analysis.constraint import CONFIDENCE, REROUTE_TOLERANCE
from analysis.surrogate.search_space import BETA_KL_RANGE, KL_TEMPERATURE_RANGE, SearchSpace
from cbtrain.config.validation import from_json
from cbtrain.utils.errors import InputError, first_line
from cbtrain.utils.metrics_file import read_metrics


@dataclass(frozen=True)
class _Settings:
    reroute_tolerance: float = REROUTE_TOLERANCE
    confidence: float = CONFIDENCE
    beta_kl_range: tuple[float, float] = BETA_KL_RANGE
    kl_temperature_range: tuple[float, float] = KL_TEMPERATURE_RANGE


@dataclass(frozen=True)
class _Sweep:
    """What is read of a sweep.json, and what stands for a key that an older one lacks."""

    settings: _Settings
    preset: str = "tiny"
    git_commit: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_overrides: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


def load_trials(run_dir: str | Path) -> pd.DataFrame:
    """`trials.csv`, a row a trial: numbers as floats (blank is NaN), `seed` as int, text as it stands.

    Raises:
        InputError: no such directory or file, a column missing, a line that is half there or not a number.
    """
    path = _sweep_file(run_dir, "trials.csv", "the sweep writes it when its first trial ends")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            lines = [(reader.line_num, fields) for fields in reader if fields]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not CSV ({first_line(error)}): restore the file, or run the sweep again") from None
    missing = [name for name in (*TEXT_COLUMNS, *NUMBER_COLUMNS) if name not in header]
    if missing:
        raise InputError(f"{path}:1: no column {', '.join(missing)}: not the trials.csv of a KL ablation")
    rows = [_parse_row(f"{path}:{line}", header, fields) for line, fields in lines]
    seen: dict[str, int] = {}
    for (line, _), row in zip(lines, rows, strict=True):
        first = seen.setdefault(row["trial_id"], line)
        if first != line:
            raise InputError(f"{path}:{line}: trial {row['trial_id']} is also on line {first}: keep one of them")
    return pd.DataFrame(rows, columns=header)


def load_curves(run_dir: str | Path) -> pd.DataFrame:
    """Every line of every `trials/<id>/metrics.jsonl`: `trial_id`, `step` and the metrics logged there.

    A last line that is half written (a run that is still going, or was killed) is left out. Without any curve the
    table is empty, with those two columns.

    Raises:
        InputError: a broken line elsewhere, or a line without a step.
    """
    rows = [
        {"trial_id": path.parent.name, **metrics}
        for path in sorted(Path(run_dir).glob("trials/*/metrics.jsonl"))
        for metrics in read_metrics(path)
    ]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["trial_id", "step"])


def load_settings(run_dir: str | Path) -> dict[str, Any]:
    """`sweep.json`: `settings`, `preset`, `config`, `config_overrides`, `plan`, `tolerance`, `status`, `versions`, …;
    `searched`, the `SearchSpace` of its settings; and `run_dir`, as it was named.

    Raises:
        InputError: no such directory or file, not JSON, or no `settings` in it that a sweep can have.
    """
    path = _sweep_file(run_dir, "sweep.json", "name the directory of a sweep, such as runs/latest")
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}): restore the file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}): restore the file") from None
    try:
        sweep = from_json(text, _Sweep)
        searched = SearchSpace(sweep.settings.beta_kl_range, sweep.settings.kl_temperature_range)
    except InputError as error:
        raise InputError(f"{path}: {error}: not the sweep.json of a KL ablation") from None
    settings = record["settings"] | vars(sweep.settings)
    return {"run_dir": str(run_dir), **vars(sweep), **record, "settings": settings, "searched": searched}


def _sweep_file(run_dir: str | Path, name: str, mend: str) -> Path:
    directory = Path(run_dir)
    if not directory.exists():
        raise InputError(f"{directory}: no such directory: run `python sweeps/kl_ablation.py` first, or name another")
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory: name the directory of a sweep, such as runs/latest")
    path = directory / name
    if not path.is_file():
        raise InputError(f"{path}: no such file: {mend}")
    return path


def _parse_row(where: str, header: list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(header):
        raise InputError(f"{where}: {len(fields)} of {len(header)} fields: half a line; remove it, or restore the file")
    row: dict[str, Any] = dict(zip(header, fields, strict=True))
    for name, text in row.items():
        if name in NUMBER_COLUMNS:
            row[name] = _number(where, name, text)
        elif name not in TEXT_COLUMNS:
            row[name] = _number_or_text(text)
    if row["status"] not in STATUSES:
        raise InputError(f"{where}: status {row['status']!r}: must be one of {', '.join(STATUSES)}")
    if not 0 <= row["beta_kl"] < math.inf or not 0 < row["kl_temperature"] < math.inf:
        raise InputError(f"{where}: beta_kl must be finite and 0 or more, kl_temperature finite and more than 0")
    if not float(row["seed"]).is_integer():
        raise InputError(f"{where}: seed {fields[header.index('seed')]!r}: must be a whole number")
    row["seed"] = int(row["seed"])
    for name in METRIC_COLUMNS if row["status"] == "completed" else ():
        if impossible := impossible_value(name, row[name]):
            raise InputError(f"{where}: {name} {row[name]:g}: {impossible}; no training gives it, restore the file")
    return row


def _number(where: str, name: str, text: str) -> float:
    try:
        return float(text) if text.strip() else math.nan
    except ValueError:
        raise InputError(f"{where}: {name} {text!r}: must be a number") from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text) if text.strip() else math.nan
    except ValueError:
        return text
