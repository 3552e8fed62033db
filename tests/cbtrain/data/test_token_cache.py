"""Tokens that are kept are those that would be made, and nothing stale is taken for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, LLAMA3, bpe_tokenizer

from cbtrain.config import CircuitBreakerConfig, get_config
from cbtrain.data import token_cache
from cbtrain.data.loading import load_data
from cbtrain.data.token_cache import cached_data
from cbtrain.model.checks import DATA_FIELDS


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CircuitBreakerConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "WORTH_BYTES", 1)
    for side in ("harmful", "benign"):
        rows = [{"prompt": f"{side} {i}", "completion": "é🔑 " * i + "x", "topic": i} for i in range(9)]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    sides = {side: (str(tmp_path / f"{side}.jsonl"),) for side in ("harmful", "benign")}
    return get_config("tiny", **sides, max_length=20, eval_fraction=0.3)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.npz"))


def test_what_is_kept_is_what_is_made_in_every_field(config: CircuitBreakerConfig, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    first = cached_data(config, tokenizer, DATA_FIELDS)
    assert len(kept(tmp_path)) == 1
    again = cached_data(config, tokenizer, DATA_FIELDS)
    assert again is not first
    assert again == first == load_data(config, tokenizer)
    assert again.fingerprint == first.fingerprint
    assert isinstance(again.harmful.train[0].input_ids[0], int)


def test_anything_that_the_tokens_depend_on_makes_others(config: CircuitBreakerConfig, tmp_path: Path) -> None:
    cached_data(config, bpe_tokenizer(), DATA_FIELDS)
    for other in (
        replace(config, max_length=16),
        replace(config, mask_policy="full_sequence"),
        replace(config, template_date="2026-01-01"),
    ):
        assert cached_data(other, bpe_tokenizer(), DATA_FIELDS) == load_data(other, bpe_tokenizer())
    llama = bpe_tokenizer(LLAMA3)
    assert cached_data(config, llama, DATA_FIELDS) == load_data(config, llama)
    path = Path(config.harmful[0])
    path.write_text(path.read_text().replace("x", "y"))
    assert cached_data(config, bpe_tokenizer(CHATML), DATA_FIELDS) == load_data(config, bpe_tokenizer())
    assert len(kept(tmp_path)) == 6


def test_a_damaged_file_is_made_again_and_old_ones_go(config: CircuitBreakerConfig, tmp_path: Path) -> None:
    expected = cached_data(config, bpe_tokenizer(), DATA_FIELDS)
    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    assert cached_data(config, bpe_tokenizer(), DATA_FIELDS) == expected
    assert path.stat().st_size > 200
    for length in range(10, 20):
        cached_data(replace(config, max_length=length), bpe_tokenizer(), DATA_FIELDS)
    assert len(kept(tmp_path)) == token_cache.KEPT


def test_small_files_are_not_kept_and_a_cache_that_cannot_be_written_is_none(
    config: CircuitBreakerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, where a directory should be")
    expected = load_data(config, bpe_tokenizer())
    assert cached_data(config, bpe_tokenizer(), DATA_FIELDS) == expected
    (tmp_path / "cache").unlink()
    monkeypatch.setattr(token_cache, "WORTH_BYTES", 2**20)
    assert cached_data(config, bpe_tokenizer(), DATA_FIELDS) == expected
    assert kept(tmp_path) == []
