"""Processes that tests start."""

import signal


def heed_interrupts() -> None:
    """For a child about to start: a test run in the background inherits SIGINT ignored, and would pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
