"""The teacher cache, with a teacher whose states are looked up by the tokens so far: a wrong row is a wrong number."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cbtrain import teacher
from cbtrain.batches import TeacherStates, TokenBatch, collate
from cbtrain.data import CircuitBreakerData, SideCounts, SideData
from cbtrain.files import exclusive
from cbtrain.teacher import TeacherCache, WantedStates, estimated_bytes, wanted_states
from cbtrain.tokens import TokenRow

WIDTH = 16
LAYERS = (2, 5)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cbtrain.teacher"])


class LookupTeacher:
    """State of a layer at a token: a row of a table, chosen by the sum of the ids up to it."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> None:
        self.table = torch.randn(997, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.batches: list[TokenBatch] = []
        self.kinds: list[tuple[tuple[int, ...], bool]] = []

    @property
    def rows(self) -> list[TokenRow]:
        """Rows run, as often as they were run."""
        return [row for batch in self.batches for row in batch.rows]

    def __call__(self, batch: TokenBatch, layers: tuple[int, ...], final: bool) -> TeacherStates:
        self.batches.append(batch)
        self.kinds.append((layers, final))
        return self.states(batch, layers, final)

    def states(self, batch: TokenBatch, layers: Sequence[int], final: bool) -> TeacherStates:
        so_far = batch.input_ids.cumsum(1).flatten()
        hidden = [self.table[(so_far[batch.scored_tokens] + 31 * layer) % 997] for layer in layers]
        return TeacherStates(
            torch.stack(hidden, 1), self.table[(so_far[batch.scored_predictions] + 17) % 997] if final else None
        )

    def expected(self, rows: Sequence[TokenRow], layers: Sequence[int] = LAYERS, final: bool = True) -> TeacherStates:
        """States of rows, each run alone."""
        alone = [self.states(collate([row], 0), layers, final) for row in rows]
        finals = [states.final for states in alone if states.final is not None]
        return TeacherStates(torch.cat([states.hidden for states in alone]), torch.cat(finals) if final else None)


def token_row(ids: Sequence[int], scored: Sequence[bool] | None = None, source: str = "rows.jsonl:1") -> TokenRow:
    mask = tuple(scored) if scored is not None else (False, *(True for _ in ids[1:]))
    return TokenRow(tuple(ids), mask, "prompt", source)


def token_rows(count: int, first: int = 0, longest: int = 12) -> list[TokenRow]:
    """Distinct rows of different lengths, the first half of each unscored."""
    rows = []
    for i in range(first, first + count):
        length = 3 + i * 7 % (longest - 2)
        ids = [i + 1, *((i * 13 + j * 5) % 90 for j in range(length - 1))]
        rows.append(token_row(ids, [j >= length // 2 for j in range(length)], f"rows.jsonl:{i + 1}"))
    return rows


def wanted(rows: Sequence[TokenRow], layers: Sequence[int] = LAYERS, final: bool = True) -> list[WantedStates]:
    return [WantedStates(row, tuple(layers), final) for row in rows]


def build(cache: TeacherCache, asked: Sequence[WantedStates], run, **changes) -> None:
    """One row a shard and three rows a batch, but for `changes`."""
    cache.build(asked, run, **{"batch_size": 3, "pad_token_id": 0, "shard_bytes": 1} | changes)


def assert_same(ours: TeacherStates, theirs: TeacherStates) -> None:
    """Bit for bit, whatever the bits mean."""
    for a, b in ((ours.hidden, theirs.hidden), (ours.final, theirs.final)):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_holds(directory: Path, rows: Sequence[TokenRow], identity: str = "one") -> None:
    """A reader that comes anew finds the right states of all rows."""
    assert_same(TeacherCache(directory, identity).states(rows, LAYERS, True), LookupTeacher().expected(rows))


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and p.name != "lock")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_come_back_bit_for_bit_in_their_dtype(tmp_path, dtype):
    run = LookupTeacher(dtype)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, torch.finfo(dtype).max], dtype=dtype)
    run.table[:, :6] = odd
    rows = token_rows(20)
    build(TeacherCache(tmp_path, "one"), wanted(rows), run, shard_bytes=1000)
    assert_same(TeacherCache(tmp_path, "one").states(rows, LAYERS, True), run.expected(rows))


@st.composite
def some_rows(draw: st.DrawFn) -> list[TokenRow]:
    texts = draw(st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=9), min_size=1, max_size=12))
    rows = []
    for text in texts:
        scored = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)).filter(any))
        rows.append(token_row(text, scored))
    return rows


@settings(max_examples=40, deadline=None)
@given(some_rows(), st.data())
def test_any_rows_in_any_batches_and_shards_are_read_in_any_order(rows, data):
    run, final = LookupTeacher(), data.draw(st.booleans())
    layers = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    asked = data.draw(st.permutations(wanted(rows, layers, final)))
    with tempfile.TemporaryDirectory() as directory:
        cache = TeacherCache(Path(directory), "one")
        sizes = {"batch_size": data.draw(st.integers(1, 5)), "shard_bytes": data.draw(st.sampled_from([1, 700, 10**6]))}
        build(cache, list({each.key: each for each in asked}.values()), run, **sizes)
        assert cache.missing(asked) == []
        for _ in range(3):
            read = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=6))
            assert_same(cache.states(read, layers, final), run.expected(read, layers, final))


def test_a_key_is_of_ids_mask_layers_and_final_and_of_nothing_else():
    base = WantedStates(token_row([1, 2, 3]), (1, 2), True)
    others = [
        replace(base, row=token_row([1, 2, 4])),
        replace(base, row=token_row([1, 2])),
        replace(base, row=token_row([2, 1, 3])),
        replace(base, row=token_row([1, 2, 3], [False, False, True])),
        replace(base, layers=(1,)),
        replace(base, layers=(2, 1)),
        replace(base, layers=(12,)),
        replace(base, final=False),
    ]
    assert len({each.key for each in (base, *others)}) == 1 + len(others)
    assert replace(base, row=replace(base.row, prompt="another", source="elsewhere:3")).key == base.key


def test_rows_of_equal_text_and_other_masks_have_states_of_their_own(tmp_path):
    run = LookupTeacher()
    masks = ("0111", "0001", "1010", "0100")
    rows = [token_row([5, 6, 7, 8], [digit == "1" for digit in mask]) for mask in masks]
    build(TeacherCache(tmp_path, "one"), wanted(rows), run)
    for row in rows:
        assert_holds(tmp_path, [row])


def test_a_scored_first_token_has_a_state_and_no_prediction(tmp_path):
    run = LookupTeacher()
    rows = [token_row([4, 5, 6], [True, False, True]), token_row([9, 8], [True, False]), token_row([7, 7, 7])]
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), run, shard_bytes=10**6)
    states = cache.states(rows, LAYERS, True)
    assert states.hidden.shape == (2 + 1 + 2, 2, WIDTH)
    assert states.final is not None
    assert states.final.shape == (1 + 0 + 2, WIDTH)
    assert_same(states, run.expected(rows))
    only_first = cache.states(rows[1:2], LAYERS, True)
    assert only_first.final is not None
    assert only_first.final.shape == (0, WIDTH)


def test_what_is_asked_is_what_each_side_needs_each_once_in_the_data_s_order():
    def side(train: list[TokenRow], held_out: list[TokenRow]) -> SideData:
        return SideData(train, held_out, SideCounts(*[0] * 7))

    rows = token_rows(8)
    again = replace(rows[0], source="copy.jsonl:1")
    data = CircuitBreakerData(side([*rows[:2], again], rows[2:4]), side([*rows[4:6], rows[4]], [*rows[6:], rows[0]]))
    asked = wanted_states(data, [1], [1, 2])
    assert [(each.row.input_ids, each.layers, each.final) for each in asked] == [
        *((row.input_ids, (1,), False) for row in rows[:2]),
        *((row.input_ids, (1,), True) for row in rows[2:4]),
        *((row.input_ids, (1, 2), True) for row in (*rows[4:], rows[0])),
    ]


def test_a_complete_cache_runs_nothing_and_one_changed_row_runs_alone(tmp_path):
    rows, run = token_rows(10), LookupTeacher()
    build(TeacherCache(tmp_path, "one"), wanted(rows), run)
    assert sorted(run.rows, key=rows.index) == rows
    changed = [*rows[:4], replace(rows[4], input_ids=(77, *rows[4].input_ids[1:])), *rows[5:]]
    for now, run_again in ((rows, []), (changed, [changed[4]]), (changed, [])):
        run = LookupTeacher()
        build(TeacherCache(tmp_path, "one"), wanted(now), run)
        assert run.rows == run_again
        assert_holds(tmp_path, now)


@pytest.mark.parametrize(("layers", "final"), [((2,), True), ((5, 2), True), (LAYERS, False)])
def test_other_layers_or_kinds_of_the_same_rows_are_missing(tmp_path, layers, final):
    rows, run = token_rows(4), LookupTeacher()
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), run)
    assert cache.missing(wanted(rows, layers, final)) == wanted(rows, layers, final)
    build(cache, [*wanted(rows), *wanted(rows, layers, final)], run, shard_bytes=10**6)
    assert_same(cache.states(rows, layers, final), run.expected(rows, layers, final))
    assert_same(cache.states(rows, LAYERS, True), run.expected(rows))
    assert cache.rows == 8


def test_another_identity_shares_nothing(tmp_path):
    rows = token_rows(2)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    assert TeacherCache(tmp_path, "two").missing(wanted(rows)) == wanted(rows)


def test_a_batch_gets_the_states_of_its_own_rows_and_a_row_that_is_not_held_is_named(tmp_path):
    rows, run = token_rows(6), LookupTeacher()
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows[:5]), run)
    batch = collate(rows[1:4], 0)
    attached = cache.attach(batch, LAYERS, True)
    assert attached.teacher is not None
    assert_same(attached.teacher, run.states(batch, LAYERS, True))
    assert attached.input_ids is batch.input_ids
    with pytest.raises(LookupError, match=r"^rows\.jsonl:6: hidden states \[2, 5\] and the final state not in .*one$"):
        cache.states([rows[0], rows[5]], LAYERS, True)


def test_what_is_read_is_a_copy(tmp_path):
    rows = token_rows(1)
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), LookupTeacher())
    cache.states(rows, LAYERS, True).hidden.zero_()
    assert_same(cache.states(rows, LAYERS, True), LookupTeacher().expected(rows))


def test_batches_are_of_one_kind_with_short_rows_together_and_progress_counts_them(tmp_path):
    rows, run, finished = token_rows(20), LookupTeacher(), []
    asked = [*wanted(rows[:7], (1,), False), *wanted(rows[7:], (1, 2), True)]
    build(TeacherCache(tmp_path, "one"), asked, run, batch_size=4, progress=finished.append)
    assert [len(batch.rows) for batch in run.batches] == finished == [4, 3, 4, 4, 4, 1]
    assert run.kinds == [((1,), False)] * 2 + [((1, 2), True)] * 4
    for kind_rows in (run.rows[:7], run.rows[7:]):
        lengths = [len(row.input_ids) for row in kind_rows]
        assert lengths == sorted(lengths)


def test_a_shard_is_written_once_it_is_full(tmp_path):
    rows = token_rows(30)
    largest = max(each.bytes(WIDTH, "float32") for each in wanted(rows))
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher(), batch_size=30, shard_bytes=4000)
    by_key = {each.key: each.bytes(WIDTH, "float32") for each in wanted(rows)}
    sizes = sorted(sum(by_key[key] for key in teacher._map_shard(shard)) for shard in (tmp_path / "one").iterdir())
    assert len(sizes) > 3
    assert all(4000 <= size < 4000 + largest for size in sizes[1:]), sizes


def test_states_that_do_not_fit_the_batch_are_refused(tmp_path):
    def one_layer_too_few(batch, layers, final):
        return LookupTeacher().states(batch, layers[:1], final)

    def one_prediction_too_few(batch, layers, final):
        states = LookupTeacher().states(batch, layers, final)
        return replace(states, final=states.final[1:])

    for wrong in (one_layer_too_few, one_prediction_too_few):
        with pytest.raises(ValueError, match="teacher gave"):
            build(TeacherCache(tmp_path, "one"), wanted(token_rows(2)), wrong)
    assert files(tmp_path) == []


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def flip_a_bit_of_the_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit flipped": flip_a_bit,
    "bit of header flipped": flip_a_bit_of_the_header,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 5),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"\xff" * 500),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_exactly_the_rows_of_a_damaged_shard_are_run_again(tmp_path, damage):
    rows = token_rows(12)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher(), shard_bytes=1500)
    shards = sorted((tmp_path / "one").iterdir())
    assert len(shards) >= 3
    held = {each.key for each in wanted(rows)} & set(teacher._map_shard(shards[1]))
    DAMAGE[damage](shards[1])
    teacher._is_whole.cache_clear()  # as in the next process
    run, cache = LookupTeacher(), TeacherCache(tmp_path, "one")
    assert cache.damaged == (damage != "gone")
    assert not shards[1].exists()
    assert {each.key for each in cache.missing(wanted(rows))} == held
    build(cache, wanted(rows), run, shard_bytes=1500)
    assert {each.key for each in wanted(run.rows)} == held
    assert len(run.rows) == len(held)
    assert_holds(tmp_path, rows)


def test_a_whole_file_that_is_no_shard_is_damaged_and_a_file_of_another_name_is_left_alone(tmp_path):
    rows = token_rows(2)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    for data in (b"", b"not a shard", save({"hidden": torch.zeros(1)})):
        (tmp_path / "one" / f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    (tmp_path / "one" / "notes.safetensors").write_bytes(b"mine")
    cache = TeacherCache(tmp_path, "one")
    assert (cache.damaged, cache.rows) == (3, 2)
    assert (tmp_path / "one" / "notes.safetensors").exists()
    assert_holds(tmp_path, rows)


def test_a_shard_that_changes_later_in_the_same_process_is_checked_again(tmp_path):
    rows = token_rows(3)
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), LookupTeacher())
    shard = next((tmp_path / "one").iterdir())
    flip_a_bit(shard)
    os.utime(shard, ns=(0, 0))
    cache.open()
    assert (cache.damaged, len(cache.missing(wanted(rows)))) == (1, 1)


def test_a_shard_that_another_process_deletes_meanwhile_is_missing_and_not_damaged(tmp_path, monkeypatch):
    def too_late(path: Path) -> list[int]:
        path.unlink()
        return real(path)

    rows, real = token_rows(3), teacher.stamp
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    monkeypatch.setattr(teacher, "stamp", too_late)
    cache = TeacherCache(tmp_path, "one")
    assert (cache.damaged, cache.rows) == (0, 0)


def test_an_unchanged_shard_is_read_in_full_once_a_process(tmp_path, monkeypatch):
    rows = token_rows(3)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    monkeypatch.setattr(teacher, "checksum", lambda path: pytest.fail(f"{path} read again"))
    assert_holds(tmp_path, rows)


def test_shards_deleted_behind_an_open_cache_can_still_be_read(tmp_path):
    rows = token_rows(3)
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), LookupTeacher())
    for shard in (tmp_path / "one").iterdir():
        shard.unlink()
    assert_same(cache.states(rows, LAYERS, True), LookupTeacher().expected(rows))


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
    written = [key for shard in (tmp_path / "one").iterdir() for key in teacher._map_shard(shard)]
    assert sorted(written) == sorted(each.key for each in asked)
    for cache in caches:
        cache.open()
        assert cache.missing(asked) == []
    assert_holds(tmp_path, rows[:count])


def test_a_rank_that_cannot_write_runs_as_often_as_the_others_and_then_raises(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher, "write_whole", full)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_the_tensors_bytes_and_nearly_the_disk_s(tmp_path, dtype):
    run, rows = LookupTeacher(getattr(torch, dtype), width=256), token_rows(60, longest=40)
    asked = [*wanted(rows[:30], (1,), False), *wanted(rows[30:])]
    cache = TeacherCache(tmp_path, "one")
    build(cache, asked, run, shard_bytes=10**5)
    estimate = estimated_bytes(asked, 256, dtype)
    harmful, benign = cache.states(rows[:30], (1,), False), cache.states(rows[30:], LAYERS, True)
    assert benign.final is not None
    assert estimate == harmful.hidden.nbytes + benign.hidden.nbytes + benign.final.nbytes
    assert cache.bytes_on_disk == sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    assert 1 < cache.bytes_on_disk / estimate < 1.04, (cache.bytes_on_disk, estimate)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_reading_maps_the_shards_and_costs_no_memory_for_what_is_not_asked(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    rows, run = token_rows(40, longest=60), LookupTeacher(width=8192)
    build(TeacherCache(tmp_path, "one"), wanted(rows), run, batch_size=4, shard_bytes=2**24)
    before = anonymous_bytes()
    cache = TeacherCache(tmp_path, "one")
    cache.states(rows[:1], LAYERS, True)
    assert cache.bytes_on_disk > 50 * 2**20
    assert anonymous_bytes() - before < 0.1 * cache.bytes_on_disk
