"""The command that the reader runs next: it trains the recommended setting, or sweeps further."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.behaviour.judge import DEFAULT_LIMITS, BehaviourLimits
from analysis.constraint import CONFIDENCE, REROUTE_TOLERANCE
from analysis.decision import Decision
from analysis.noise import baseline_seeds_of
from analysis.surrogate.search_space import BETA_KL_RANGE, KL_TEMPERATURE_RANGE

_SWEPT = ("beta_kl", "kl_temperature", "seed")


@dataclass(frozen=True)
class Commands:
    """What to run after a decision."""

    next: str
    """Trains the recommended setting, or sweeps further where there is none."""
    wider: str | None
    """Sweeps wider ranges, where the pick sits at an end of those searched."""
    trains: bool = False
    """Whether `next` trains."""


def commands_after(
    decision: Decision,
    sweep: Mapping[str, Any],
    trials: pd.DataFrame,
    run_dir: Path,
    *,
    runs: bool = False,
    train_so_far: bool = False,
) -> Commands:
    """The commands that a decision ends with; of a sweep that has not ended, first of all the one that goes on with it.

    Args:
        run_dir: where the report is written, as the user named it.
        runs: the sweep is running: nothing is to be done but to look again.
        train_so_far: train a choice also where the sweep has not ended.
    """
    if decision.so_far and not (train_so_far and decision.verdict == "choose"):
        if runs:
            return Commands(f"python analysis/pick_beta.py {shlex.quote(str(run_dir))}", None)
        return Commands(f"python sweeps/kl_ablation.py {_flags({'resume': run_dir})}", None)
    wider = wider_command(decision, sweep, len(trials))
    if decision.verdict == "no_setting_behaves" and wider is not None:
        return Commands(wider, None)
    following = sweep_command(decision, sweep, len(trials)) or ""
    if train_command(decision, sweep) is not None:
        file = run_dir / "report" / "decision.json"
        anyhow = {"despite_verdict": True} if decision.so_far or decision.verdict != "choose" else {}
        return Commands(f"python -m cbtrain.train {_flags({'from_decision': file, **anyhow})}", wider, trains=True)
    return Commands(following, wider)


def train_command(decision: Decision, sweep: Mapping[str, Any]) -> str | None:
    """The command that trains the recommended setting as the sweep did, without the run directory.

    None where nothing is recommended.
    """
    if decision.beta_kl is None or decision.kl_temperature is None:
        return None
    swept = {"beta_kl": decision.beta_kl, "kl_temperature": decision.kl_temperature}
    values = {name: float(f"{value:.6g}") for name, value in swept.items()}
    flags = _flags({"preset": sweep.get("preset", "tiny"), **values, "output_dir": "outputs/cb", **_overrides(sweep)})
    return f"python -m cbtrain.train {flags}"


def sweep_command(decision: Decision, sweep: Mapping[str, Any], n_trials: int) -> str | None:
    """The sweep that would help where the verdict is none to ship; None where there is one.

    More trials of the same sweep where its baseline has seeds enough, else another.
    """
    if decision.beta_kl is not None:
        return None
    needed, seeds = decision.needed, decision.baseline.n_seeds if decision.baseline else 0
    if needed is not None and needed.seeds <= seeds and _as_swept(decision, sweep):
        more = {"resume": sweep["run_dir"], "num_samples": needed.num_samples}
        if n_trials < sweep["settings"].get("num_samples", n_trials):  # what was planned comes first
            del more["num_samples"]
        return f"python sweeps/kl_ablation.py {_flags(more)}"
    values: dict[str, Any] = {"preset": sweep.get("preset", "tiny")}
    overrides = _overrides(sweep)
    values["num_samples"] = sweep["settings"].get("num_samples", n_trials)
    if decision.mend:
        overrides |= decision.mend
    elif decision.verdict == "baseline_never_rerouted":
        overrides["steps"] = 2 * int(sweep.get("config", {}).get("steps", 50))
    asked = _asked_otherwise(_with_what_is_asked(decision, sweep))
    if needed is not None:
        values["num_samples"] = needed.num_samples
        wanted = max(needed.seeds, asked.pop("baseline_seeds", 0))
        if wanted > baseline_seeds_of(needed.num_samples):
            values["baseline_seeds"] = wanted
    values = asked | values
    return f"python sweeps/kl_ablation.py {_flags({**values, **overrides})}"


def wider_command(decision: Decision, sweep: Mapping[str, Any], n_trials: int) -> str | None:
    """The sweep of `Decision.wider`, as large as this one and otherwise what the decision asks; None where none is."""
    if decision.wider is None:
        return None
    settings = _with_what_is_asked(decision, sweep)["settings"]
    ranges = {"beta_kl_range": decision.wider.beta_kl, "kl_temperature_range": decision.wider.kl_temperature}
    first = {"preset": sweep.get("preset", "tiny"), "num_samples": settings.get("num_samples", n_trials)}
    values = first | _asked_otherwise({**sweep, "settings": settings | ranges})
    return f"python sweeps/kl_ablation.py {_flags({**values, **_overrides(sweep)})}"


def _with_what_is_asked(decision: Decision, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep's record with tolerance and confidence of the decision."""
    asked = {"reroute_tolerance": decision.reroute_tolerance, "confidence": decision.confidence}
    return {**sweep, "settings": sweep["settings"] | asked}


def _as_swept(decision: Decision, sweep: Mapping[str, Any]) -> bool:
    """Whether the decision asks what the sweep asked."""
    asked = {"reroute_tolerance": decision.reroute_tolerance, "confidence": decision.confidence}
    return all(sweep["settings"].get(name, value) == value for name, value in asked.items())


def _asked_otherwise(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Flags without which another sweep would answer another question."""
    settings, workers = sweep["settings"], sweep.get("workers", {})
    betas = tuple(settings.get("beta_kl_range", BETA_KL_RANGE))
    temperatures = tuple(settings.get("kl_temperature_range", KL_TEMPERATURE_RANGE))
    by_budget = baseline_seeds_of(settings.get("num_samples", 0))
    given = {
        "reroute_tolerance": (settings.get("reroute_tolerance", REROUTE_TOLERANCE), REROUTE_TOLERANCE),
        "confidence": (settings.get("confidence", CONFIDENCE), CONFIDENCE),
        "seed": (settings.get("seed", 0), 0),
        "baseline_seeds": (settings.get("baseline_seeds") or by_budget, by_budget),
        "workers_per_trial": (workers.get("count", 1), 1),
        "beta_kl_range": (betas, BETA_KL_RANGE),
        "kl_temperature_range": (temperatures, KL_TEMPERATURE_RANGE),
    }
    asked = {name: value for name, (value, default) in given.items() if value != default}
    allowed = {f"max_{name}": value for name, value in vars(BehaviourLimits.of(sweep.get("flags", {}))).items()}
    asked |= {name: value for name, value in allowed.items() if value != getattr(DEFAULT_LIMITS, name[4:])}
    found = sweep.get("calibration") or {}
    return asked | ({"calibrate": False} if found.get("converged") else {})  # its recipe is among the overrides


def _flags(values: Mapping[str, Any]) -> str:
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, list | tuple) else [value]
            words += [f"--{flag}", *(shlex.quote(str(item)) for item in items)]
    return " ".join(words)


def _overrides(sweep: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sweep.get("config_overrides", {}).items() if name not in _SWEPT}


def _parts(command: str, width: int) -> Iterator[str]:
    """What stays on one line: a flag with its values, or where these are longer than a line, each value by itself."""
    for part in command.replace(" --", "\0--").split("\0"):
        if len(part) <= width:
            yield part
            continue
        words = re.findall(r"(?:'[^']*'|[^\s'])+", part)
        flagged = 2 if words[0].startswith("--") else len(words)
        yield " ".join(words[:flagged])
        yield from words[flagged:]


def folded(command: str, width: int = 78) -> str:
    """The command over lines of at most `width` columns, broken before flags, as a shell takes it."""
    lines: list[str] = []
    for part in _parts(command, width - 4):
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += " " + part
        else:
            lines.append(part if not lines else "  " + part)
    return " \\\n".join(lines)
