"""Whether there is a teacher cache: planned by what it takes and gives, given up or refused where there can be none."""

import re
import shutil

import pytest
from rich.filesize import decimal

from cbtrain.config import InputError
from cbtrain.model.checks import prepare
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache import build
from cbtrain.teacher_cache.build import open_or_build
from cbtrain.teacher_cache.plan import CacheUnavailableError, estimate_cache, plan_cache
from cbtrain.teacher_cache.store import TeacherCache, bytes_there
from cbtrain.training.engine import adapted_model
from cbtrain.training.loop import run_teacher


def test_a_model_without_weight_files_has_no_identity(small_config, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    monkeypatch.setattr(build, "_model_directory", lambda _model: tmp_path / "empty")
    with pytest.raises(CacheUnavailableError, match="no weights"):
        run_teacher(small_config, tmp_path / "cache")


def test_the_estimate_is_what_is_then_on_disk(small_config, tmp_path):
    data, _ = prepare(small_config)
    estimate = estimate_cache(small_config, data, 3, tmp_path / "not" / "there" / "yet")
    assert not (tmp_path / "not").exists()
    run_teacher(small_config, tmp_path / "cache")
    (identity,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    on_disk = TeacherCache(tmp_path / "cache", identity.name)
    assert on_disk.rows == len(estimate.wanted)
    # Of these few thousand numbers a row, names and headers are a noticeable part.
    assert estimate.bytes < bytes_there(tmp_path / "cache") < 1.3 * estimate.bytes


def test_rows_that_are_not_seen_after_they_were_written_leave_the_live_teacher(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherCache, "open", lambda self: None)  # a file system that lists late
    data, pad = prepare(small_config)
    with adapted_model(small_config) as model, pytest.raises(CacheUnavailableError, match="not seen after"):
        open_or_build(small_config, data, pad, Decoder(model, "early_exit"), tmp_path / "cache")


def test_the_plan_says_sizes_in_units_that_people_read(small_config, tmp_path):
    data, _ = prepare(small_config)
    plan = plan_cache("auto", tmp_path / "cache", small_config, data, runs=20)
    assert re.search(r"teacher states of [\d,]+ rows, [\d.]+ kB of [\d.,]+ [GT]B free", plan.says), plan.says
    assert decimal(plan.bytes) in plan.says


@pytest.mark.parametrize(
    ("setting", "runs", "free", "directory", "says"),
    [
        ("auto", 20, 10**9, "run/teacher_cache", "teacher states of 64 rows"),
        ("auto", 20, 10**4, None, "off, every step runs the teacher: it needs 332.9 kB, 10.0 kB are free"),
        ("auto", 0, 10**9, None, "would be read less than twice each"),
        ("shared", 0, 10**9, "shared", "teacher states of 64 rows"),
        ("off", 20, 10**9, None, "off, every step runs the teacher"),
    ],
)
def test_the_cache_is_planned_by_what_it_takes_and_gives(
    small_config, tmp_path, monkeypatch, setting, runs, free, directory, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    plan = plan_cache(setting, tmp_path / "run" / "teacher_cache", small_config, prepare(small_config)[0], runs)
    assert plan.directory == (directory and tmp_path / directory)
    assert says in plan.says


def test_ranks_that_see_other_directories_are_refused_and_do_not_hang(small_config, tmp_path, monkeypatch):
    """Two ranks, of which the other misses other rows: its digest is added to this one's."""
    data, pad = prepare(small_config)
    monkeypatch.setattr(build.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(build.distributed, "reduce_sum", lambda tensor: tensor + (tensor.numel() == 32) * 3)
    with adapted_model(small_config) as model, pytest.raises(CacheUnavailableError, match="see the same directory"):
        open_or_build(small_config, data, pad, Decoder(model, "early_exit"), tmp_path / "cache")


@pytest.mark.parametrize("setting", ["", "{file}", "{file}/cache"])
def test_a_cache_directory_that_cannot_be_is_refused_beforehand(small_config, tmp_path, setting):
    (tmp_path / "file").write_text("")
    data, _ = prepare(small_config)
    with pytest.raises(InputError, match="--teacher-cache"):
        plan_cache(setting.format(file=tmp_path / "file"), tmp_path, small_config, data, 20)
