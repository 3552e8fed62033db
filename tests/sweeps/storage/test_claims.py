"""Sweeps that begin at once, each in a directory of its own; file systems that know neither links nor locks."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import ROOT

from cbtrain.config import InputError
from sweeps.storage.journal_file import open_journal
from sweeps.storage.run_directory import RunDirectory

WITHOUT_LINKS_AND_LOCKS = """
import ctypes, errno, json, os, platform, struct, sys

# A filter of system calls by which making links and locking files fail, as on FAT or some network file systems.
NUMBERS = {"x86_64": (0xC000003E, (73, 88, 266)), "aarch64": (0xC00000B7, (32, 36))}
if platform.machine() not in NUMBERS:
    sys.exit(77)
architecture, refused = NUMBERS[platform.machine()]
LOAD, EQUAL, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, 0)]
for index, number in enumerate(refused):
    program.append((EQUAL, len(refused) - index, 0, number))
program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | errno.EPERM)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

libc = ctypes.CDLL(None, use_errno=True)
program = Program(len(program), ctypes.cast(code, ctypes.c_void_p))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit(77)
for call in (lambda: os.symlink("a", "b"), lambda: __import__("fcntl").flock(0, 2)):
    try:
        call()
    except OSError as error:
        assert error.errno == errno.EPERM
    else:
        sys.exit("links and locks are known here")

from pathlib import Path
from optuna.storages.journal import JournalFileOpenLock
from simulated import measured, next_trial, plan_of
from sweeps.storage.journal_file import open_journal
from sweeps.storage.resume import find_trials, mend_journal
from sweeps.storage.run_directory import RunDirectory
from cbtrain.utils.files import exclusive

run = RunDirectory(Path("runs", "a"))
with run.locked(or_next=True):
    run.create({"preset": "tiny"})
    plan = plan_of(6, open_journal(run.journal), baseline_seeds=3)
    for spec in [next_trial(plan) for _ in range(3)]:
        plan.tell(spec.trial_id, measured(spec))
    with exclusive(Path("cache")):
        pass
again = RunDirectory(Path("runs", "a"))
with again.locked():
    mend_journal(again)
    found = find_trials(again, plan.settings)
print(json.dumps({"ended": found.ended, "latest": os.path.lexists("runs/latest"), "left": os.listdir("runs/a")}))
"""


def test_sweeps_that_begin_in_the_same_second_each_have_a_directory(tmp_path: Path) -> None:
    def begin(number: int) -> str:
        run = RunDirectory(tmp_path / "runs" / "kl_ablation-20260101-000000")
        with run.locked(or_next=True):
            run.create({"number": number})
        return run.shown.name

    with ThreadPoolExecutor(10) as pool:
        names = list(pool.map(begin, range(10)))
    first = "kl_ablation-20260101-000000"
    assert sorted(names) == sorted([first, *(f"{first}-{number}" for number in range(2, 11))])
    for number, name in enumerate(names):
        assert json.loads((tmp_path / "runs" / name / "sweep.json").read_text())["number"] == number


def test_a_sweep_that_is_refused_takes_away_what_it_made_and_nothing_of_others(tmp_path: Path) -> None:
    def refused(number: int) -> None:
        run = RunDirectory(tmp_path / "new" / "runs" / "a")
        with pytest.raises(InputError, match="refused"), run.locked(or_next=True):
            raise InputError("refused")

    refused(0)
    assert os.listdir(tmp_path) == []
    (tmp_path / "new" / "runs" / "other").mkdir(parents=True)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(refused, range(40)))
    assert os.listdir(tmp_path / "new" / "runs") == ["other"]


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="refused"), RunDirectory(tmp_path / "mine").locked():
        raise InputError("refused")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_the_journal_is_locked_by_a_link_where_there_are_links(tmp_path: Path) -> None:
    open_journal(tmp_path / "study.log")
    assert [path.name for path in tmp_path.iterdir()] == ["study.log"]


def test_a_sweep_is_kept_where_the_file_system_knows_neither_links_nor_locks(tmp_path: Path) -> None:
    helpers = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LINKS_AND_LOCKS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("no filter of system calls here")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["ended"]) == 3
    assert told["latest"] is False
    assert not [name for name in told["left"] if name.startswith(("probe", "study.log."))]
