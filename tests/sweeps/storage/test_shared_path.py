"""Where run directories lie, and where results are copied to."""

from pathlib import Path

import pytest

from cbtrain.config import InputError
from sweeps.storage.export import Destination
from sweeps.storage.shared_path import JOB_ENVIRONMENT, require_durable, run_path


def test_a_relative_run_directory_is_below_the_storage_path(tmp_path):
    assert run_path(None, Path("runs/a")) == Path("runs/a")
    assert run_path(tmp_path, Path("a")) == tmp_path / "a"
    assert run_path(tmp_path, tmp_path / "b" / "a") == tmp_path / "b" / "a"


@pytest.mark.parametrize("run_dir", ["/elsewhere/a", "../a"])
def test_a_run_directory_outside_of_the_storage_path_is_refused(tmp_path, run_dir):
    with pytest.raises(InputError, match="outside of --storage-path"):
        run_path(tmp_path, Path(run_dir))


def test_a_storage_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        run_path(tmp_path / "nowhere", Path("a"))


def test_a_job_on_several_nodes_needs_a_storage_path_and_nothing_else_does(tmp_path):
    job = {JOB_ENVIRONMENT: "{}"}
    with pytest.raises(InputError, match=r"--storage-path: needed in a job on 2 nodes.*vanishes"):
        require_durable(2, None, job)
    require_durable(2, tmp_path, job)
    require_durable(1, None, job)
    require_durable(2, None, {})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with a file of every kind."""
    kept = ["sweep.json", "trials.csv", "trials/t000/config.json", "trials/t000/adapter/a.bin", "logs/t000.log"]
    dropped = ["lock", "trials/t000/lock", "teacher_cache/x/0.bin", "ray/session-0/x", "trials/t000/checkpoint/y"]
    for name in (*kept, *dropped):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "run"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_copy_is_whole_but_for_what_is_large_or_locked(run_dir, tmp_path, scheme):
    destination = Destination(f"{scheme}{tmp_path}/out/", "run")
    destination.check(new=True)
    assert [*(tmp_path / "out" / "run").iterdir()] == [], "the check left something behind"
    files, size = destination.copy(run_dir)
    copied = {str(path.relative_to(tmp_path / "out" / "run")): path for path in (tmp_path / "out").rglob("*.*")}
    assert set(copied) == {
        *("sweep.json", "trials.csv", "trials/t000/config.json", "trials/t000/adapter/a.bin", "logs/t000.log")
    }
    assert all(path.read_text() == name for name, path in copied.items())
    assert (files, size) == (5, sum(map(len, copied)))


def test_a_copy_that_stops_short_has_no_sweep_json(run_dir, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "trials.csv").mkdir()  # in the way
    with pytest.raises(OSError, match=r"trials\.csv"):
        Destination(str(tmp_path / "out"), "run").copy(run_dir)
    assert not (tmp_path / "out" / "run" / "sweep.json").exists()


def test_a_place_that_holds_a_sweep_serves_only_to_go_on_with_it(run_dir, tmp_path):
    destination = Destination(str(tmp_path / "out"), "run")
    destination.copy(run_dir)
    with pytest.raises(InputError, match="already holds a sweep"):
        destination.check(new=True)
    destination.check(new=False)
