"""Shards of the teacher cache that are damaged, changed or deleted: exactly the rows that were lost are run again."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from lookup_teacher import LAYERS, LookupTeacher, assert_holds, assert_same, build, token_rows, wanted
from safetensors.torch import save

from cbtrain.teacher_cache import store
from cbtrain.teacher_cache.store import TeacherCache


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


def damaged(capsys: pytest.CaptureFixture[str]) -> int:
    """How many shards were said to be damaged."""
    return capsys.readouterr().err.count(" is damaged; its rows are computed again")


@pytest.mark.parametrize("damage", DAMAGE)
def test_exactly_the_rows_of_a_damaged_shard_are_run_again(tmp_path, damage, capsys):
    rows = token_rows(12)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher(), shard_bytes=1500)
    shards = sorted((tmp_path / "one").iterdir())
    assert len(shards) >= 3
    held = {each.key for each in wanted(rows)} & set(store._map_shard(shards[1]))
    DAMAGE[damage](shards[1])
    store._is_whole.cache_clear()  # as in the next process
    run, cache = LookupTeacher(), TeacherCache(tmp_path, "one")
    assert damaged(capsys) == (damage != "gone")
    assert not shards[1].exists()
    assert {each.key for each in cache.missing(wanted(rows))} == held
    build(cache, wanted(rows), run, shard_bytes=1500)
    assert {each.key for each in wanted(run.rows)} == held
    assert len(run.rows) == len(held)
    assert_holds(tmp_path, rows)


def test_a_whole_file_that_is_no_shard_is_damaged_and_a_file_of_another_name_is_left_alone(tmp_path, capsys):
    rows = token_rows(2)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    for data in (b"", b"not a shard", save({"hidden": torch.zeros(1)})):
        (tmp_path / "one" / f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    (tmp_path / "one" / "notes.safetensors").write_bytes(b"mine")
    cache = TeacherCache(tmp_path, "one")
    assert (damaged(capsys), cache.rows) == (3, 2)
    assert (tmp_path / "one" / "notes.safetensors").exists()
    assert_holds(tmp_path, rows)


def test_a_shard_that_changes_later_in_the_same_process_is_checked_again(tmp_path, capsys):
    rows = token_rows(3)
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), LookupTeacher())
    shard = next((tmp_path / "one").iterdir())
    flip_a_bit(shard)
    os.utime(shard, ns=(0, 0))
    cache.open()
    assert (damaged(capsys), len(cache.missing(wanted(rows)))) == (1, 1)


def test_a_shard_that_another_process_deletes_meanwhile_is_missing_and_not_damaged(tmp_path, monkeypatch, capsys):
    def too_late(path: Path) -> list[int]:
        path.unlink()
        return real(path)

    rows, real = token_rows(3), store.stamp
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    monkeypatch.setattr(store, "stamp", too_late)
    cache = TeacherCache(tmp_path, "one")
    assert (damaged(capsys), cache.rows) == (0, 0)


def test_an_unchanged_shard_is_read_in_full_once_a_process(tmp_path, monkeypatch):
    rows = token_rows(3)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    monkeypatch.setattr(store, "checksum", lambda path: pytest.fail(f"{path} read again"))
    assert_holds(tmp_path, rows)


def test_shards_deleted_behind_an_open_cache_can_still_be_read(tmp_path):
    rows = token_rows(3)
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), LookupTeacher())
    for shard in (tmp_path / "one").iterdir():
        shard.unlink()
    assert_same(cache.states(rows, LAYERS, True), LookupTeacher().expected(rows))
