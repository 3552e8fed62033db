"""The run directory on disk: made once, every file in it written whole or not at all."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd

from cbtrain.config import InputError
from cbtrain.files import nearest_existing, write_whole

PACKAGES = ("torch", "transformers", "peft", "ray", "optuna", "deepspeed", "pandas")


class RunDirectory:
    """`runs/<name>`: sweep.json, trials.csv, study.log, trials/, ray/, logs/, report/."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.shown = path
        """The path as the user gave it."""
        self.record: dict[str, object] = {}

    def create(self, record: dict[str, object]) -> None:
        """Make the directory, write sweep.json and point `runs/latest` here.

        Raises:
            InputError: it already holds a sweep, or cannot be written.
        """
        self.refuse_if_taken()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--run-dir {self.shown}: cannot be made ({error.strerror})") from error
        self.record = record | {"versions": _versions(), "git_commit": _git_commit()}
        self.update(status="running")
        self._point_latest_here()

    def refuse_if_taken(self) -> None:
        """Raise `InputError` if there is a sweep here already, or none can be."""
        if (self.path / "sweep.json").exists() or (self.path / "study.log").exists():
            raise InputError(f"{self.shown} already holds a sweep{self._progress()}: give another --run-dir")
        existing = nearest_existing(self.path)
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"--run-dir {self.shown}: {existing} is not a directory that can be written to")

    def update(self, **fields: object) -> None:
        """Replace fields of sweep.json."""
        self.record |= fields
        write_whole(self.path / "sweep.json", json.dumps(self.record, indent=1, default=str) + "\n")

    def write_trials(self, rows: Sequence[dict[str, object]]) -> None:
        """Rewrite trials.csv."""
        write_whole(self.path / "trials.csv", pd.DataFrame(list(rows)).to_csv(index=False))

    def _point_latest_here(self) -> None:
        """A convenience: where `runs/latest` cannot be a link, the run directory's own path serves as well."""
        latest = Path("runs", "latest")
        scratch = latest.with_name(f"latest.{os.getpid()}")
        with contextlib.suppress(OSError):
            latest.parent.mkdir(exist_ok=True)
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(os.path.relpath(self.path, latest.parent.resolve()))
            os.replace(scratch, latest)

    def _progress(self) -> str:
        try:
            status = pd.read_csv(self.path / "trials.csv")["status"]
            planned = json.loads((self.path / "sweep.json").read_text())["settings"]["num_samples"]
        except (OSError, ValueError, KeyError):
            return ""
        return f" ({(status != 'running').sum()} of {planned} trials ended)"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _git_commit() -> str | None:
    """The commit of this source, with `-dirty` where it was edited; None outside a checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
