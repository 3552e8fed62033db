"""A loss or gradient that is not finite: the run ends, and the rows that gave it are told."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

from cbtrain.model.checks import prepare
from cbtrain.training.loop import train
from cbtrain.training.non_finite import FILE, NonFiniteLossError
from cbtrain.training.step import CircuitBreakerStep


def ignored(_metrics: dict[str, float]) -> None:
    """A report to nobody."""


@pytest.fixture
def spoil(monkeypatch):
    """A function that has a change made to loss_reroute wherever a harmful row from a place (`file:line`) is seen."""
    losses = CircuitBreakerStep.losses

    def spoil(source, change):
        def spoiled(self, batch, counts, weights):
            found = losses(self, batch, counts, weights)
            if any(row.source == source for rows in batch.harmful for row in rows.rows):
                found[0] = change(found[0])
            return found

        monkeypatch.setattr(CircuitBreakerStep, "losses", spoiled)

    return spoil


def first_seen(directory, source) -> dict:
    record = json.loads((directory / FILE).read_text())
    assert any(source in batch["harmful"] for batch in record["batches"]), (source, record)
    return record


def test_the_micro_batch_whose_loss_was_not_finite_is_saved_with_its_rows(small_config, tmp_path, spoil, monkeypatch):
    config = replace(small_config, micro_batch_size=2, log_every=10, eval_every=0)
    source = prepare(config)[0].harmful.train[7].source
    spoil(source, lambda loss: loss * float("nan"))
    with pytest.raises(NonFiniteLossError) as caught:
        train(config, tmp_path, ignored)
    record = first_seen(tmp_path, source)
    (batch,) = record["batches"]
    assert caught.value.step == record["step"]
    assert str(caught.value).startswith(f"step {record['step']}: a loss is not finite (loss nan, loss_reroute nan, ")
    assert str(caught.value).endswith(f"; lower --lr, or see the rows in {tmp_path / FILE}")
    assert "\n" not in str(caught.value)
    assert (batch["rank"], len(batch["harmful"]), len(batch["benign"])) == (0, 2, 2)
    assert 0 <= batch["micro_step"] < 4
    assert (batch["losses"]["loss_reroute"], record["losses"]["loss_reroute"]) == ("nan", "nan")
    assert batch["losses"]["loss_retain"] >= 0, "the benign side is not to blame"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.step) == (str(caught.value), record["step"])
    monkeypatch.undo()
    train(config, tmp_path, ignored)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "float32"), (1, "bfloat16"), (3, "float32")])
def test_a_gradient_that_is_not_finite_ends_the_run_at_its_step(small_config, tmp_path, spoil, stage, dtype):
    config = replace(small_config, micro_batch_size=4, log_every=10, eval_every=0, zero_stage=stage, dtype=dtype)
    source = prepare(config)[0].harmful.train[7].source
    spoil(source, lambda loss: loss + torch.sqrt(loss * 0))  # √ has an infinite slope at 0
    with pytest.raises(NonFiniteLossError, match=r"step \d: the gradient is not finite \(loss \d"):
        train(config, tmp_path, ignored)
    record = first_seen(tmp_path, source)
    assert [batch["micro_step"] for batch in record["batches"]] == [0, 1]
    assert isinstance(record["grad_norm_total"], str)
    assert all(value >= 0 for value in record["losses"].values())
    assert not (tmp_path / "adapter").exists()
