"""What trials that run have logged so far, read from where they write it: only what was added since."""

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Latest:
    """What a trial said last."""

    step: int = 0
    reroute: float | None = None
    """Held out, as is the drift; None before its first evaluation."""
    drift: float | None = None


@dataclass
class _Read:
    """How far a file was read."""

    inode: int = 0
    size: int = 0
    rest: bytes = b""
    """Of a line that was half written."""
    latest: Latest = Latest()


class Follower:
    """Reads `metrics.jsonl` of trials in a directory, which may lie on a shared file system."""

    def __init__(self, trials: Path) -> None:
        self._trials = trials
        self._files: dict[str, _Read] = {}

    def latest(self, trial_id: str) -> Latest:
        """What a trial has said last; of one that began anew, since then."""
        path, read = self._trials / trial_id / "metrics.jsonl", self._files.get(trial_id, _Read())
        try:
            now = path.stat()
            if now.st_ino != read.inode or now.st_size < read.size:
                read = _Read(now.st_ino)
            if now.st_size > read.size:
                with path.open("rb") as file:
                    file.seek(read.size)
                    added = file.read()
                *lines, rest = (read.rest + added).split(b"\n")
                read = _Read(read.inode, read.size + len(added), rest, _after(lines, read.latest))
        except OSError:
            return read.latest
        self._files[trial_id] = read
        return read.latest


def _after(lines: list[bytes], latest: Latest) -> Latest:
    """What is known after lines: the last step, and the last evaluation among them."""
    for index, line in enumerate(lines):
        if index < len(lines) - 1 and b'"eval_loss_reroute"' not in line:
            continue  # only the last says something new
        try:
            logged = json.loads(line)
            latest = replace(latest, step=int(logged["step"]))
            if "eval_loss_reroute" in logged:
                drift = float(logged["eval_benign_kl"])
                latest = replace(latest, reroute=float(logged["eval_loss_reroute"]), drift=drift)
        except (ValueError, KeyError, TypeError):
            continue  # damaged; the trial itself says so
    return latest
