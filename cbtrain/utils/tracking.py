"""Weights & Biases beside a run: metrics, a summary and figures; a failure there is one line and never fails a run.

W&B itself is imported when a run is opened, and nothing of its own appears on the screen.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cbtrain.utils.errors import first_line

Mode = Literal["online", "offline"]
INIT_TIMEOUT_S = 60.0
"""How long the start of a run waits for the server; without an answer the run goes on untracked."""
FINISH_TIMEOUT_S = 120.0
"""How long the end of a run waits for uploads; what is left then stays on disk for `wandb sync`."""


class Tracker:
    """One W&B run, made by `open_tracker`. No method raises: the first failure is one line on stderr and ends it."""

    def __init__(self, run: Any = None) -> None:
        """Without a run it drops what it is given, so that callers need no branch."""
        self._run = run

    @property
    def active(self) -> bool:
        """Whether all that was logged so far was taken."""
        return self._run is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log a line of metrics under their own names; steps must not fall."""
        self._attempt(lambda run: run.log(dict(metrics), step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run as a whole: numbers, texts, and mappings of those."""
        self._attempt(lambda run: run.summary.update(dict(values)))

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
    project: str | None, mode: Mode, *, group: str | None, name: str, directory: Path, config: Mapping[str, Any]
) -> Tracker:
    """A W&B run to log to; never raises.

    Args:
        project: W&B's project; None gives a tracker that drops everything.
        mode: `offline` writes to disk and needs neither login nor network; `wandb sync` uploads it later.
        group: what the run belongs to, a sweep's name for one.
        name: the run's name.
        directory: W&B's files go to `wandb/` under it; made where missing.
        config: the run's settings, as W&B's config.
    """
    if project is None:
        return Tracker()
    os.environ["WANDB_SILENT"] = "true"  # read before the settings below exist
    try:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key; run `wandb login`, or give --wandb-mode offline")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        )
        run = wandb.init(
            project=project,
            mode=mode,
            group=group,
            name=name,
            dir=directory,
            config=dict(config),
            reinit="create_new",  # several may be open in one process
            settings=settings,
        )
    except Exception as error:  # missing, too old, offline, full disk: the run goes on untracked
        _say(error)
        return Tracker()
    return Tracker(run)


def _say(error: Exception) -> None:
    print(f"W&B: not tracked ({first_line(error)})", file=sys.stderr, flush=True)


def _media(path: Path) -> Any:
    import wandb

    if path.suffix in (".svg", ".html"):
        return wandb.Html(path.read_text(encoding="utf-8"), inject=False)
    return wandb.Image(str(path))
