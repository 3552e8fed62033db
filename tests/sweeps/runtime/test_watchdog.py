"""A process without progress ends itself, also where Python would wait for a thread, and says what it hung in."""

import subprocess
import sys
import time

from commands import ROOT

from sweeps.runtime.watchdog import NOTICED_S

IN_TIME = """
import time
from sweeps.runtime.watchdog import ended_without_progress

with ended_without_progress(0.5):
    pass
with ended_without_progress(0):
    time.sleep(1)
time.sleep(7)
"""
HANGS = """
import sys, threading, time
from sweeps.runtime.watchdog import ended_without_progress

def collective():
    with ended_without_progress(0.5) as progress:
        for step in range(3):
            time.sleep(1)
            progress()
            print("step", step, flush=True)
        threading.Event().wait()

threading.Thread(target=collective).start()
"""


def test_a_thread_that_hangs_ends_its_process_with_a_trace_and_one_that_goes_on_does_not():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.split() == ["step", "0", "step", "1", "step", "2"]
    assert "in collective" in done.stderr, done.stderr
    assert time.monotonic() - began >= 3 + 0.5 + NOTICED_S


def test_what_has_ended_in_time_is_left_alone():
    done = subprocess.run([sys.executable, "-c", IN_TIME], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0
