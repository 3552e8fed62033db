"""Where a run's time goes, in seconds a kind of work, written to `profile.json`.

Where nobody asks for one nothing is timed: `OFF` hands out a context that does nothing. On a GPU each span waits for
the device at its end, since a kernel that was only asked for has cost no time yet; that wait is what a profile costs.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch

from cbtrain.utils.files import write_whole

Kind = Literal[
    "data", "forward_harmful", "forward_benign", "kl", "backward", "optimizer", "evaluation", "checkpoint", "report"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Item = TypeVar("Item")


class Profile:
    """Seconds by kind; of spans within spans the inner one alone counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._open: list[Kind] = []
        self._began = self._since = time.perf_counter()

    @contextlib.contextmanager
    def span(self, kind: Kind) -> Iterator[None]:
        """Count the body as work of this kind."""
        self._lap()
        self._open.append(kind)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def each(self, kind: Kind, items: Iterable[Item]) -> Iterator[Item]:
        """The items, the making of each counted as work of this kind."""
        iterator = iter(items)
        while True:
            with self.span(kind):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def write(self, path: Path, steps: int) -> None:
        """Write the seconds, with `other` for what was of no kind, and `total`.

        Args:
            steps: updates that were made meanwhile.
        """
        total = time.perf_counter() - self._began
        seconds = {**self.seconds, "other": total - sum(self.seconds.values()), "total": total}
        write_whole(path, json.dumps({"schema_version": 1, "steps": steps, "seconds": seconds}, indent=1) + "\n")

    def _lap(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class _Off(Profile):
    """Times nothing."""

    def span(self, kind: Kind) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING

    def each(self, kind: Kind, items: Iterable[Item]) -> Iterator[Item]:
        return iter(items)

    def write(self, path: Path, steps: int) -> None:
        """Leave no profile of an earlier run."""
        path.unlink(missing_ok=True)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_END = object()
OFF: Profile = _Off()
