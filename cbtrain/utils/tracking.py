"""Weights & Biases beside a run: metrics, a summary and figures; a failure there is one line and never fails a run.

W&B itself is imported when a run is opened, and nothing of its own appears on the screen. A run's id is kept in the
directory that it is of, so that no two share one and a run that goes on is the same run there.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cbtrain.utils.errors import first_line
from cbtrain.utils.files import write_whole

Mode = Literal["online", "offline"]
INIT_TIMEOUT_S = 60.0
"""How long the start of a run waits for the server; without an answer the run goes on untracked."""
FINISH_TIMEOUT_S = 120.0
"""How long the end of a run waits for uploads; what is left then stays on disk for `wandb sync`."""
ID = Path("wandb", "id.txt")
"""Where a directory keeps what W&B knows it by."""
OF_ONE_RUN = (
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM"),
    *("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_JOB_TYPE", "WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR"),
)
"""What W&B reads from the environment and would give to every run alike, or to none. Entity, address, key, notes and
whatever else is there keep their meaning."""
_QUIETLY: dict[str, Any] = {
    **{"silent": True, "console": "off", "disable_git": True, "disable_code": True},
    **{"init_timeout": INIT_TIMEOUT_S, "finish_timeout": FINISH_TIMEOUT_S},
}
"""W&B's settings: nothing on the screen, nothing looked up, no waiting without end."""


class Tracker:
    """One W&B run, made by `open_tracker`. No method raises: the first failure is one line on stderr and ends it."""

    def __init__(self, run: Any = None) -> None:
        """Without a run it drops what it is given, so that callers need no branch."""
        self._run = run
        self.where = "" if run is None else str(run.url or Path(run.dir).parent)
        """The run's page, or offline its directory; empty without a run."""

    @property
    def active(self) -> bool:
        """Whether all that was logged so far was taken."""
        return self._run is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log a line of metrics under their own names. A step that is not above the last, as of a run that goes on
        from a checkpoint, is left as it was logged."""
        self._attempt(lambda run: run.log(dict(metrics), step=step, commit=True))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run as a whole: numbers, texts, and mappings of those."""
        self._attempt(lambda run: run.summary.update(dict(values)))

    def tag(self, *tags: str) -> None:
        """Add tags to the run."""
        self._attempt(lambda run: setattr(run, "tags", (*(run.tags or ()), *tags)))

    def figure(self, name: str, path: Path) -> None:
        """Log a figure: .svg and .html as they are, any other file as an image."""
        self._attempt(lambda run: run.log({name: _media(path)}))

    def close(self, exit_code: int = 0) -> None:
        """Finish the run; other than 0 marks it as failed. What is logged afterwards is dropped."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(int(kind is not None))

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever W&B raises, the run it stands beside goes on
            self._run = None
            _say(error)


def open_tracker(
    project: str | None,
    mode: Mode,
    *,
    directory: Path,
    name: str,
    config: Mapping[str, Any],
    job_type: str,
    group: str | None = None,
    tags: Sequence[str] = (),
    part: str = "",
    goes_on: bool = True,
) -> Tracker:
    """A W&B run to log to; never raises.

    Args:
        project: W&B's project; None gives a tracker that drops everything.
        mode: `offline` writes to disk and needs neither login nor network; `wandb sync` uploads it later.
        directory: what is tracked. W&B's files go to `wandb/` under it; made where missing.
        name: the run's name.
        config: the run's settings, as W&B's config.
        job_type: what kind of run it is.
        group: what the run belongs to, a sweep's name for one; None leaves that to `WANDB_RUN_GROUP`.
        tags: beside those of `WANDB_TAGS`.
        part: which of several runs of the directory it is.
        goes_on: continue the run that the directory had, if it had one, with the steps that are new.
    """
    if project is None:
        return Tracker()
    try:
        if mode == "online" and not logged_in():
            raise RuntimeError("no API key; run `wandb login`, or give --wandb-mode offline")
        with _without(OF_ONE_RUN):
            import wandb

            identity = _identity(directory, kept=goes_on)
            run = wandb.init(
                project=project,
                mode=mode,
                id=f"{identity}-{part}" if part else identity,
                resume="allow",
                group=group,
                job_type=job_type,
                name=name,
                tags=[*filter(None, os.environ.get("WANDB_TAGS", "").split(",")), *tags],
                dir=directory,
                config=dict(config),
                allow_val_change=True,
                reinit="create_new",  # several may be open in one process
                settings=wandb.Settings(**_QUIETLY),
            )
    except Exception as error:  # missing, too old, offline, full disk: the run goes on untracked
        _say(error)
        return Tracker()
    return Tracker(run)


def logged_in() -> bool:
    """Whether W&B knows a user on this machine; asks nobody."""
    with _without(OF_ONE_RUN):
        import wandb

        return wandb.login(prompt=False)


def _identity(directory: Path, *, kept: bool) -> str:
    """What W&B is to know a directory by: new, or with `kept` what it was known by; a copy elsewhere is the same."""
    path = directory / ID
    if kept and path.is_file() and (known := path.read_text().strip()):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(4)
    write_whole(path, new + "\n")
    return new


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Take variables out of the environment for the body, and have W&B say nothing from here on."""
    os.environ["WANDB_SILENT"] = "true"  # read before there are settings
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _say(error: Exception) -> None:
    print(f"W&B: not tracked ({first_line(error)})", file=sys.stderr, flush=True)


def _media(path: Path) -> Any:
    import wandb

    if path.suffix in (".svg", ".html"):
        return wandb.Html(path.read_text(encoding="utf-8"), inject=False)
    return wandb.Image(str(path))
