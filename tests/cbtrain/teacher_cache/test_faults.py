"""Building the teacher cache under faults: killed and concurrent builders, ranks that fail, full disks."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from lookup_teacher import PROCESSES, LookupTeacher, assert_holds, build, files, token_row, token_rows, wanted

from cbtrain.data.batches import TeacherStates, TokenBatch
from cbtrain.data.tokenization import TokenRow
from cbtrain.teacher_cache import store
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.utils.files import exclusive


def build_and_hang_in_a_write(directory: Path, rows: list[TokenRow], hang_at: int, hanging: Path) -> None:
    """Builds, and stops while its shard number `hang_at` is still under its scratch name."""
    real, calls = os.fsync, []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) == hang_at:
            hanging.touch()
            time.sleep(600)
        real(file)

    os.fsync = fsync
    with exclusive(directory):
        build(TeacherCache(directory, "one"), wanted(rows), LookupTeacher())


def test_a_builder_killed_half_way_leaves_what_it_finished_and_the_next_does_the_rest(tmp_path):
    rows, directory, hanging = token_rows(9), tmp_path / "cache", tmp_path / "hanging"
    process = PROCESSES.Process(target=build_and_hang_in_a_write, args=(directory, rows, 5, hanging))
    process.start()
    wait_for(hanging.exists, process)
    process.kill()
    process.join()
    assert [Path(name).suffix for name in files(directory)].count(".tmp") == 1
    done = [row for row in rows if not TeacherCache(directory, "one").missing(wanted([row]))]
    assert len(done) == 4
    run = LookupTeacher()
    with exclusive(directory):
        build(TeacherCache(directory, "one"), wanted(rows), run)
    assert sorted(run.rows, key=rows.index) == [row for row in rows if row not in done]
    assert {Path(name).suffix for name in files(directory)} == {".safetensors"}
    assert_holds(directory, rows)


def build_beside_another(directory: Path, rows: list[TokenRow], locked: bool, meeting, note: Path) -> None:
    """Builds after, or with `locked` before, the other has begun too; notes the rows it ran."""
    run = LookupTeacher()

    def after_both_began(batch: TokenBatch, layers: tuple[int, ...], final: bool) -> TeacherStates:
        if not run.batches:
            meeting.wait(60)
        return run(batch, layers, final)

    if locked:
        meeting.wait(60)
    with exclusive(directory) if locked else nullcontext():
        build(TeacherCache(directory, "one"), wanted(rows), run if locked else after_both_began)
    note.write_text(str(len(run.rows)))


@pytest.mark.parametrize(("locked", "rows_run"), [(False, ["30", "30"]), (True, ["0", "30"])])
def test_two_builders_at_once_both_end_with_all_rows_and_with_the_lock_one_runs_none(tmp_path, locked, rows_run):
    rows, directory, meeting = token_rows(30), tmp_path / "cache", PROCESSES.Barrier(2)
    notes = [tmp_path / "first", tmp_path / "second"]
    processes = [
        PROCESSES.Process(target=build_beside_another, args=(directory, rows, locked, meeting, note)) for note in notes
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(note.read_text() for note in notes) == rows_run
    assert {Path(name).suffix for name in files(directory)} == {".safetensors"}
    assert_holds(directory, rows)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), "ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_comes_into_the_lock_removes_no_scratch_file_of_a_live_builder(tmp_path, monkeypatch):
    rows, real, seen = token_rows(3), os.fsync, []

    def fsync(file: int) -> None:
        with exclusive(tmp_path):
            seen.append([name for name in files(tmp_path) if name.endswith(".tmp")])
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    assert [len(names) for names in seen] == [1, 1, 1]
    assert_holds(tmp_path, rows)


def test_the_lock_removes_scratch_files_of_dead_builders_and_no_other_file(tmp_path):
    (tmp_path / "one").mkdir()
    dead = tmp_path / "one" / f"{'0' * 64}.safetensors.{'a' * 32}.tmp"
    others = [tmp_path / "one" / "mine.tmp", tmp_path / "notes.tmp"]
    for path in (dead, *others):
        path.touch()
    with exclusive(tmp_path):
        assert [path.exists() for path in (dead, *others)] == [False, True, True]


def test_without_locks_in_the_file_system_a_build_goes_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path):
        build(TeacherCache(tmp_path, "one"), wanted(token_rows(3)), LookupTeacher())
    assert_holds(tmp_path, token_rows(3))


@pytest.mark.parametrize(("count", "world_size"), [(1, 2), (9, 2), (13, 3)])
def test_ranks_share_the_rows_and_run_equally_often_on_the_same_kinds(tmp_path, count, world_size):
    rows, finished = token_rows(count + 4), []
    asked = [*wanted(rows[:count]), *wanted(rows[count:], (1,), False)]
    caches = [TeacherCache(tmp_path, "one") for _ in range(world_size)]
    runs = [LookupTeacher() for _ in caches]
    for rank, (cache, run) in enumerate(zip(caches, runs, strict=True)):
        share = {"rank": rank, "world_size": world_size, "batch_size": 2, "shard_bytes": 10**6}
        build(cache, asked, run, progress=finished.append, **share)
    batches = -(-count // 2), 2
    turns = sum(-(-number // world_size) for number in batches)
    assert [len(run.batches) for run in runs] == [turns] * world_size
    assert all(run.kinds == runs[0].kinds for run in runs)
    assert sum(finished) == world_size * len(asked)
    written = [key for shard in (tmp_path / "one").iterdir() for key in store._map_shard(shard)]
    assert sorted(written) == sorted(each.key for each in asked)
    for cache in caches:
        cache.open()
        assert cache.missing(asked) == []
    assert_holds(tmp_path, rows[:count])


def test_a_rank_that_cannot_write_runs_as_often_as_the_others_and_then_raises(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_whole", full)
    for world_size, calls in ((1, 1), (2, 5)):
        run = LookupTeacher()
        with pytest.raises(OSError, match="No space left"):
            build(TeacherCache(tmp_path, "one"), wanted(token_rows(10)), run, batch_size=1, world_size=world_size)
        assert len(run.batches) == calls


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        # Lazily: shards may still be mapped.
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**6])
def test_a_full_disk_is_an_error_that_takes_back_what_was_written_and_nothing_else(small_disk, shard_bytes):
    held, rows = token_rows(5), token_rows(300, first=5, longest=60)
    build(TeacherCache(small_disk, "one"), wanted(held), LookupTeacher(), shard_bytes=10**6)
    before = files(small_disk)
    run = LookupTeacher()
    with pytest.raises(OSError, match="No space left") as raised:
        build(TeacherCache(small_disk, "one"), wanted(rows), run, batch_size=8, shard_bytes=shard_bytes)
    assert raised.value.errno == errno.ENOSPC
    assert len(run.rows) >= 8
    assert files(small_disk) == before
    with pytest.raises(OSError, match="No space left"):
        build(TeacherCache(small_disk, "two"), wanted(rows), LookupTeacher(), shard_bytes=shard_bytes)
    assert files(small_disk) == before
    assert not (small_disk / "two").exists()
    assert_holds(small_disk, held)


def build_with_small_files(directory: Path, rows: list[TokenRow]) -> None:
    """Exits with the error's number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    try:
        build(TeacherCache(directory, "one"), wanted(rows), LookupTeacher(), batch_size=1, shard_bytes=1)
    except OSError as error:
        sys.exit(error.errno)


def test_a_limit_on_file_sizes_is_an_error_that_leaves_nothing(tmp_path):
    rows = [*token_rows(4), token_row(range(200))]
    process = PROCESSES.Process(target=build_with_small_files, args=(tmp_path, rows))
    process.start()
    process.join(60)
    assert process.exitcode == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
