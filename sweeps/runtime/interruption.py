"""How the driver asks what trains, on whatever node, to stop: a file that every process opens again and again.

It is there from the session's beginning, since a network file system may go on saying for a minute that a file is not
there, and what is opened anew is as its last writer closed it.
"""

import time
from pathlib import Path

INTERRUPTED = "interrupted"
"""The status of a trial that was asked to stop; its checkpoint holds what it had done."""
POLL_S = 0.5


class StopFile:
    """The file of one session, for the driver to write and for a trial to ask.

    Args:
        path: on what all nodes share.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._next, self._asked = path, 0.0, False

    def begin(self) -> None:
        """Nothing is asked yet."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")

    def ask(self) -> None:
        """Have all trials of the session stop."""
        self._path.write_text(INTERRUPTED)

    def asked(self) -> bool:
        """Whether they shall; looks at most every `POLL_S` seconds. Of a trial that runs by itself there is no file."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._next = now + POLL_S
            self._asked = self._path.is_file() and self._path.read_text() != ""
        return self._asked
