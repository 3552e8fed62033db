"""A model's identity changes with its content, and with nothing else."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from cbtrain.teacher_cache import fingerprint
from cbtrain.teacher_cache.fingerprint import weights_fingerprint


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Weights in two files, unchanged for a minute."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 16}')
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    for i in (1, 2):
        path = directory / f"model-0000{i}-of-00002.safetensors"
        path.write_bytes(bytes([i]) * 1000)
        os.utime(path, (time.time() - 60,) * 2)
    return directory


def shift_a_byte(path: Path) -> None:
    """Another content of the same size and modification time."""
    stat = path.stat()
    time.sleep(0.02)  # the clock of the file system is a coarse one
    flip_a_bit(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES = {
    "byte of a weight file": lambda model: shift_a_byte(model / "model-00002-of-00002.safetensors"),
    "config": lambda model: (model / "config.json").write_text('{"hidden_size": 16 }'),
    "index": lambda model: (model / "model.safetensors.index.json").write_text("{}"),
    "weight file more": lambda model: (model / "extra.safetensors").write_bytes(b"x"),
    "weight file less": lambda model: (model / "model-00002-of-00002.safetensors").unlink(),
    "names exchanged": lambda model: [
        (model / old).rename(model / new)
        for old, new in (
            ("model-00001-of-00002.safetensors", "a"),
            ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"),
            ("a", "model-00002-of-00002.safetensors"),
        )
    ],
    "adapter": lambda model: (model / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_another_identity(tmp_path, model, change):
    before = weights_fingerprint(model, "float32", tmp_path)
    CHANGES[change](model)
    assert weights_fingerprint(model, "float32", tmp_path) != before


def test_another_dtype_or_library_is_another_identity(tmp_path, model, monkeypatch):
    seen = [weights_fingerprint(model, dtype, tmp_path) for dtype in ("float32", "bfloat16")]
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint.metadata, "version", lambda name: "99.0")
        seen.append(weights_fingerprint(model, "float32", tmp_path))
    assert len(set(seen)) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", identity) for identity in seen)


def test_weights_that_are_touched_copied_or_linked_keep_their_identity(tmp_path, model):
    before = weights_fingerprint(model, "float32", tmp_path)
    copy, links = tmp_path / "copy", tmp_path / "links"
    copy.mkdir()
    links.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
        (links / path.name).symlink_to(path)
        path.touch()
    assert {weights_fingerprint(place, "float32", tmp_path) for place in (model, copy, links)} == {before}


def test_weights_as_bin_files_count_only_where_there_are_no_safetensors(tmp_path, model):
    before = weights_fingerprint(model, "float32", tmp_path)
    (model / "pytorch_model.bin").write_bytes(b"1")
    assert weights_fingerprint(model, "float32", tmp_path) == before
    for path in model.glob("*.safetensors"):
        path.unlink()
    first = weights_fingerprint(model, "float32", tmp_path)
    (model / "pytorch_model.bin").write_bytes(b"2")
    assert weights_fingerprint(model, "float32", tmp_path) != first


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files hashed from now on."""
    real, names = fingerprint.checksum, []
    monkeypatch.setattr(fingerprint, "checksum", lambda path: names.append(path.name) or real(path))
    return names


def test_unchanged_weights_are_hashed_once_and_a_changed_file_again(tmp_path, model, monkeypatch):
    memo, names = tmp_path / "memo", read_files(monkeypatch)
    identity = weights_fingerprint(model, "float32", memo)
    del names[:]
    assert weights_fingerprint(model, "float32", memo) == identity
    assert sorted(names) == ["config.json", "model.safetensors.index.json"]
    assert [path.name for path in memo.iterdir()] == ["weights.json"]
    del names[:]
    shift_a_byte(model / "model-00001-of-00002.safetensors")
    weights_fingerprint(model, "float32", memo)
    assert [name for name in names if name.endswith("safetensors")] == ["model-00001-of-00002.safetensors"]


def test_weights_written_a_moment_ago_are_not_remembered(tmp_path, model):
    for path in model.glob("*.safetensors"):
        path.touch()
    weights_fingerprint(model, "float32", tmp_path / "memo")
    assert not (tmp_path / "memo").exists()


@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b"{", b"[]", b"7", b'{"a": 3}', b"null"])
def test_a_damaged_memo_is_ignored_and_replaced(tmp_path, model, damaged):
    memo = tmp_path / "memo"
    identity = weights_fingerprint(model, "float32", memo)
    whole = (memo / "weights.json").read_bytes()
    (memo / "weights.json").write_bytes(damaged)
    assert weights_fingerprint(model, "float32", memo) == identity
    assert (memo / "weights.json").read_bytes() == whole
    entries = json.loads(whole)
    (memo / "weights.json").write_text(json.dumps(dict.fromkeys(entries, "not a checksum")))
    assert weights_fingerprint(model, "float32", memo) == identity


def test_a_memo_that_cannot_be_written_costs_time_alone(tmp_path, model):
    identity = weights_fingerprint(model, "float32", tmp_path / "memo")
    (tmp_path / "file").touch()
    assert weights_fingerprint(model, "float32", tmp_path / "file" / "memo") == identity


def test_a_directory_without_weights_or_configuration_is_named(tmp_path, model):
    with pytest.raises(OSError, match=f"{tmp_path}/nowhere: no weights"):
        weights_fingerprint(tmp_path / "nowhere", "float32", tmp_path)
    (model / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        weights_fingerprint(model, "float32", tmp_path)
