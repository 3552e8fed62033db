"""What a sweep was run on and with: enough to run it again, and to know what that costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.formatting import count, number

_HASH = 12
"""Characters of a hash that are shown; decision.json has all."""


def provenance(sweep: Mapping[str, Any], trials: pd.DataFrame) -> list[tuple[str, str]]:
    """Labels and texts, in the order of reading; what the sweep did not write down is left out."""
    config, inputs = sweep.get("config", {}), sweep.get("inputs", {})
    data = [name for side in ("harmful", "benign", "preference") for name in config.get(side) or []]
    found = [("run directory", str(sweep["run_dir"])), ("preset", str(sweep.get("preset") or ""))]
    found.append(("searched", str(sweep["searched"])))
    found.append(("model", _model(config, inputs, data)))
    found += [("data", f"{name}{_hashed(inputs.get(name))}") for name in dict.fromkeys(data)]
    found += [("rows", _rows(sweep.get("rows") or {})), ("software", _versions(sweep))]
    found += [("hardware", _hardware(sweep)), *_durations(sweep, trials)]
    calibration = sweep.get("calibration")
    if calibration:
        spent = f"{count(calibration['runs'], 'run')}, {count(calibration['steps_spent'], 'step')}"
        found.append(
            ("calibration", f"before the trials and no part of the decision: {calibration['reason']} {spent}.")
        )
    return [(label, text) for label, text in found if text]


def about(sweep: Mapping[str, Any]) -> str:
    """What was swept, in a line: model, rows, steps, day."""
    config = sweep.get("config", {})
    parts = [str(Path(str(config.get("model") or sweep.get("preset") or "")).name)]
    rows = sweep.get("rows") or {}
    sides = [f"{counts['train'] + counts['held_out']:,} {side}" for side, counts in rows.items()]
    parts += [f"{', '.join(sides)} rows"] if sides else []
    parts += [f"{config['steps']:,} steps"] if config.get("steps") else []
    parts += [str(sweep["begun_at"])[:10]] if sweep.get("begun_at") else []
    return " · ".join(part for part in parts if part)


def _hashed(digest: Any) -> str:
    if not isinstance(digest, str) or not digest:
        return ""
    how, _, value = digest.rpartition(" ")  # of large files some places are hashed: `sampled 58af…`
    return f" (SHA-256 {f'{how} ' if how else ''}{value[:_HASH]}…)"


def _model(config: Mapping[str, Any], inputs: Mapping[str, Any], data: list[str]) -> str:
    """The model with the hash of its weights, or of its files together where there are several."""
    name = config.get("model")
    if not name:
        return ""
    files = {path: digest for path, digest in inputs.items() if path not in data and str(path).startswith(str(name))}
    weights = [digest for path, digest in files.items() if str(path).endswith((".safetensors", ".bin"))]
    dtype = f", {config['dtype']}" if config.get("dtype") else ""
    if len(weights) == 1:
        return f"{name}{dtype}{_hashed(weights[0])}"
    return f"{name}{dtype}" + (f" ({count(len(files), 'file')} hashed in decision.json)" if files else "")


def _rows(rows: Mapping[str, Any]) -> str:
    return " · ".join(
        f"{side} {counts['train']:,} train, {counts['held_out']:,} held out" for side, counts in rows.items()
    )


def _versions(sweep: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in (sweep.get("versions") or {}).items()]
    commit = sweep.get("git_commit")
    return ", ".join([*versions, *([f"commit {commit[:_HASH]}"] if commit else [])])


def _hardware(sweep: Mapping[str, Any]) -> str:
    hardware = sweep.get("hardware") or {}
    parts = [str(hardware[key]) for key in ("cpu", "memory", "gpu") if hardware.get(key)]
    workers = sweep.get("workers") or {}
    if workers:
        of_each = f"{count(int(workers.get('count', 1)), 'worker')} a trial"
        cpus, gpus = workers.get("cpus", 0), workers.get("gpus", 0)
        of_each += f" of {count(int(cpus), 'CPU')}" + (f" and {number(gpus)} GPU" if gpus else "")
        parts.append(f"{of_each}, {sweep.get('concurrency', 1)} at a time")
    return ", ".join(parts)


def _durations(sweep: Mapping[str, Any], trials: pd.DataFrame) -> list[tuple[str, str]]:
    """How long the sweep took and occupied what it was given; the same again is what it would cost again."""
    wall_s, workers = sweep.get("wall_s"), sweep.get("workers") or {}
    spent = [("wall time", _time(float(wall_s)))] if wall_s else []
    if "wall_s" not in trials:
        return spent
    held_h = float(pd.to_numeric(trials["wall_s"], errors="coerce").sum()) / 3600 * int(workers.get("count", 1))
    if not held_h or not workers:
        return spent
    hours = [f"{number(held_h * float(workers.get('cpus', 0)), 2)} CPU-hours"]
    if workers.get("gpus"):
        hours.append(f"{number(held_h * float(workers['gpus']), 2)} GPU-hours")
    again = f"; to run it again costs the same, about {_time(float(wall_s))}" if wall_s else ""
    return [*spent, ("cost of the trials", f"{', '.join(hours)}{again}")]


def _time(seconds: float) -> str:
    """`41 s`, `61 min`, `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
