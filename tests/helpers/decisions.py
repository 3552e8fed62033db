"""A run directory decided without its report being drawn, which takes ten times as long."""

from pathlib import Path
from typing import Any

from analysis.decision import Decision
from analysis.pick_beta import decided
from analysis.report.commands import Commands


def decision_and_commands(run: Path, *given: Any, **more: Any) -> tuple[Decision, Commands]:
    """What `write_report` returns."""
    sweep = decided(run, *given, **more)
    return sweep.decision, sweep.commands
