"""Processes that tests start."""

import re
import signal
import subprocess
import time
from pathlib import Path

PATIENCE_S = 60.0


def heed_interrupts() -> None:
    """For a child about to start: a test run in the background inherits SIGINT ignored, and would pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def waited_for(log: Path, pattern: str, process: subprocess.Popen) -> str:
    """The first group of a pattern as soon as it stands in what a process writes."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found.group(1)
        time.sleep(0.1)
    raise AssertionError(f"{pattern} is not in what it wrote: {log.read_text(errors='replace')}")
