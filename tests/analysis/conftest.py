"""Fixtures over the synthetic sweeps of `synthetic`."""

from pathlib import Path

import pandas as pd
import pytest
from synthetic import MakeRun, Surface, make_trials, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(trials, **sweep)` writes a run directory and returns it."""
    return lambda trials, **sweep: write_run(tmp_path / "run", trials, **sweep)


@pytest.fixture
def trials() -> pd.DataFrame:
    """A clear case: a setting can be chosen, and others are infeasible."""
    return make_trials(Surface())
