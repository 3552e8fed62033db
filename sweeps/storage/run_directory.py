"""The run directory on disk: made once, every file in it written whole or not at all."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from cbtrain.config import InputError
from cbtrain.config.validation import from_json
from cbtrain.utils.errors import reason
from cbtrain.utils.files import nearest_existing, write_whole
from cbtrain.utils.hardware import hardware
from sweeps.storage.lock import HeldError, held

PACKAGES = ("torch", "transformers", "peft", "ray", "optuna", "deepspeed", "pandas")


class RunDirectory:
    """`runs/<name>`: sweep.json, trials.csv, study.log, lock, trials/, teacher_cache/, ray/, logs/, report/."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.shown = path
        """The path as the user gave it."""
        self.record: dict[str, Any] = {}
        """What sweep.json holds."""

    @property
    def journal(self) -> Path:
        """The Optuna journal."""
        return self.path / "study.log"

    def trial(self, trial_id: str) -> Path:
        """The directory of a trial."""
        return self.path / "trials" / trial_id

    @contextlib.contextmanager
    def locked(self, *, or_next: bool = False) -> Iterator[None]:
        """Make the directory, and keep other drivers out of it for the body; it goes if no sweep begins in it.

        Args:
            or_next: where it exists already, take its name with -2, -3 … behind it.

        Raises:
            InputError: it cannot be made, or a sweep is running in it.
        """
        with contextlib.ExitStack() as stack:
            try:
                if or_next:
                    made = [*_missing(self.path.parent), self._make_the_next()]
                else:
                    made = [*_missing(self.path)]
                    self.path.mkdir(parents=True, exist_ok=True)
                made += [place for place in (self.path / "logs", self.path / "lock") if not place.exists()]
                (self.path / "logs").mkdir(exist_ok=True)
                stack.enter_context(held(self.path / "lock"))
            except HeldError as holder:
                raise InputError(f"{self.shown}: its sweep is still running ({holder}); wait, or end it") from None
            except OSError as error:
                raise InputError(f"--run-dir {self.shown}: cannot be made ({reason(error)})") from error
            refused = False
            try:
                yield
            except InputError:
                refused = True
                raise
            finally:
                # Once: what lies there a moment later may be another sweep's, which has taken the name.
                if refused or not (self.path / "sweep.json").exists():
                    _remove_empty(made)

    def _make_the_next(self) -> Path:
        """Make a directory that nobody else has, whoever begins in the same moment."""
        path, shown, number = self.path, self.shown, 1
        while True:
            try:
                self.path.mkdir(parents=True)
                return self.path
            except FileExistsError:
                number += 1
                self.path, self.shown = (each.with_name(f"{each.name}-{number}") for each in (path, shown))
            except FileNotFoundError:
                continue  # another one took its empty parent away

    def create(self, record: Mapping[str, object]) -> None:
        """Write sweep.json and point `runs/latest` here.

        Raises:
            InputError: it already holds a sweep.
        """
        self.refuse_if_taken()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.record = dict(record) | {
            "begun_at": now,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "hardware": hardware(),
        }
        self.update(status="running")
        self._point_latest_here()

    def read(self) -> None:
        """Take the record of the sweep that is here.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        path = self.shown / "sweep.json"
        if not path.is_file():
            raise InputError(f"--resume {self.shown}: holds no sweep (no sweep.json); name the directory of one")
        try:
            self.record = from_json(path.read_bytes(), dict[str, Any])
        except InputError as error:
            raise InputError(f"{path}: {error}: restore the file") from None

    def go_on(self, *, ended: int, **fields: object) -> None:
        """Write to sweep.json that the sweep is resumed, and point `runs/latest` here.

        Args:
            ended: how many trials had ended.
            fields: of sweep.json, to replace.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        session = {"at": now, "trials_ended": ended, "changed_software": self.changed_software()}
        self.update(status="running", resumed=[*self.record.get("resumed", []), session], **fields)
        self._point_latest_here()

    def changed_software(self) -> list[str]:
        """What runs now in another version than when the sweep began, in words."""
        then, now = dict(self.record.get("versions") or {}), _versions()
        changes = [f"{name} {then[name]} → {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
        commits = self.record.get("git_commit"), _git_commit()
        if all(commits) and commits[0] != commits[1]:
            short = [f"{commit:.7}" + "-dirty" * str(commit).endswith("-dirty") for commit in commits]
            changes.append(f"this repository {' → '.join(short)}")
        return changes

    def refuse_if_taken(self) -> None:
        """Raise `InputError` if there is a sweep here already, or none can be."""
        if (self.path / "sweep.json").exists() or self.journal.exists():
            resume = f"--resume {self.shown} to continue it, or " if (self.path / "sweep.json").exists() else "give "
            raise InputError(f"{self.shown} already holds a sweep{self._progress()}: {resume}another --run-dir")
        self.refuse_if_unwritable()

    def refuse_if_unwritable(self) -> None:
        """Raise `InputError` if no directory can be made here."""
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

    def remove_checkpoints(self, trial_ids: Iterable[str]) -> None:
        """Give back the room of trials that have ended."""
        for trial_id in trial_ids:
            shutil.rmtree(self.trial(trial_id) / "checkpoint", ignore_errors=True)

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


def _missing(path: Path) -> list[Path]:
    """A directory and its parents as far as they are not there, the outermost first."""
    return [place for place in (*reversed(path.parents), path) if not place.exists()]


def _remove_empty(made: Sequence[Path]) -> None:
    """Take away what was made for a sweep that was refused: its lock, which is held, and directories if empty."""
    for place in reversed(made):
        with contextlib.suppress(OSError):
            place.rmdir() if place.is_dir() else place.unlink()


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
