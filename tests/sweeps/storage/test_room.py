"""Room on the disk: told before a sweep begins, between its trials and by a trial that cannot write."""

import errno
import re
import subprocess
from pathlib import Path

import pytest
from simulated import plan_of

from cbtrain.config import get_config
from sweeps.execution.searcher import PlanSearcher
from sweeps.runtime.failures import told_in_a_line
from sweeps.storage.room import RESERVE, NoRoomError, Room, TrialFiles


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", place], check=True)


def test_what_a_trial_writes_is_told_by_the_models_structure(small_config, tmp_path):
    from cbtrain.training.loop import train

    files = TrialFiles.of(small_config)
    config = get_config("tiny", **{**vars(small_config), "checkpoint_every": 2})
    train(config, tmp_path, lambda _metrics: None)
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    checkpoint = sum(file.stat().st_size for file in next((tmp_path / "checkpoint").glob("step-*")).iterdir())
    assert files.adapter == pytest.approx(adapter, rel=0.1)
    assert 0.7 * checkpoint < files.checkpoint < 1.3 * checkpoint, "beside what headers and random states take"


def test_too_little_room_is_one_line_with_both_numbers_and_the_command_that_goes_on(small_disk):
    room = Room(small_disk / "not" / "there", Path("runs/a"), TrialFiles(adapter=100_000, checkpoint=200_000))
    room.require()
    said = r"5\.2 MB are free, and 20 trials write up to 7\.4 MB; make room, then .*kl_ablation.py --resume runs/a "
    with pytest.raises(NoRoomError, match=said) as raised:
        room.require(trials=20, at_a_time=2)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "runs/a")
    (small_disk / "full").write_bytes(bytes(5 * 2**20 - RESERVE))
    with pytest.raises(NoRoomError, match="the next trial writes up to"):
        room.require()


def test_a_trial_that_could_not_write_has_no_outcome_and_no_other_is_given():
    plan, room = plan_of(8), Room(Path("a"), Path("runs/a"), TrialFiles())
    searcher = PlanSearcher(plan, max_failures=1, on_no_room=room.ran_out)
    searcher.suggest("first")
    searcher.on_trial_complete("first", {"status": "failed", "failure": "no_room", "error": "OSError: No space left"})
    assert isinstance(searcher.failure, NoRoomError)
    assert "t000: OSError: No space left" in str(searcher.failure)
    assert searcher.suggest("second") == PlanSearcher.FINISHED
    assert [row["status"] for row in plan.rows()] == ["running"]


def test_what_a_library_raises_is_one_line_and_its_trace_is_in_the_log(tmp_path):
    from cbtrain.utils.errors import FailedError

    (tmp_path / "logs").mkdir()
    with (
        pytest.raises(FailedError, match=re.escape("KeyError: 'gone' (trace in runs/a/logs/driver.log)")) as raised,
        told_in_a_line(tmp_path, Path("runs/a"), Path("logs/driver.log")),
    ):
        raise KeyError("gone")
    assert "\n" not in str(raised.value)
    assert "--resume runs/a goes on" in str(raised.value)
    assert "Traceback" in (tmp_path / "logs" / "driver.log").read_text()
    with pytest.raises(PermissionError), told_in_a_line(tmp_path, Path("runs/a"), Path("logs/driver.log")):
        raise PermissionError(errno.EACCES, "Permission denied", "trials.csv")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOSPC, "No space left on device", "trials.csv"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0"),
    ],
)
def test_a_full_disk_is_told_with_the_run_directory_and_the_mend_whoever_met_it(error, tmp_path):
    with pytest.raises(NoRoomError) as raised, told_in_a_line(tmp_path, Path("runs/a"), Path("logs/driver.log")):
        raise error
    assert str(error) in str(raised.value)
    assert "make room, then python sweeps/kl_ablation.py --resume runs/a goes on" in str(raised.value)
