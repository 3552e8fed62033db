"""The batches of a run come in order, on the device, the same with a thread ahead as without."""

import threading
from dataclasses import replace

import pytest
import torch

from cbtrain.data.batches import step_batches
from cbtrain.model.checks import prepare
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.training.dataloader import StepLoader
from cbtrain.training.loop import run_teacher


def tensors_of(steps) -> list[list[torch.Tensor]]:
    found = []
    for given in steps:
        batches = [batch for pair in given.micro_batches for batch in (*pair.harmful, *pair.benign)]
        states = [state for batch in batches if batch.teacher for state in (batch.teacher.hidden, batch.teacher.final)]
        found.append([*(batch.input_ids for batch in batches), *(state for state in states if state is not None)])
    return found


@pytest.fixture
def cache(small_config, tmp_path):
    run_teacher(small_config, tmp_path)
    (identity,) = (path for path in tmp_path.iterdir() if path.is_dir())
    return TeacherCache(tmp_path, identity.name)


@pytest.mark.parametrize("first", [0, 3])
def test_a_thread_ahead_changes_nothing(small_config, cache, first):
    config = replace(small_config, steps=6, micro_batch_size=4)
    data, pad = prepare(config)
    ahead, inline = (tensors_of(StepLoader(data, config, pad, 3, cache, ahead).steps(first)) for ahead in (True, False))
    assert len(inline) == 6 - first
    assert len(inline[0]) == 2 * 5, "two micro-batches of two sides, with states of both and final ones of one"
    for ours, theirs in zip(ahead, inline, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_steps_are_those_of_the_data(small_config):
    data, pad = prepare(small_config)
    for step, given in enumerate(StepLoader(data, small_config, pad, 3).steps(0)):
        pairs, counts = step_batches(data, small_config, step, pad)
        assert given.counts == counts
        assert torch.equal(given.micro_batches[0].benign[0].input_ids, pairs[0].benign[0].input_ids)
        assert given.micro_batches[0].benign[0].teacher is None


def test_a_failure_in_the_thread_ahead_reaches_the_loop(small_config, tmp_path):
    data, pad = prepare(small_config)
    empty = TeacherCache(tmp_path, "nothing")
    with pytest.raises(LookupError, match="not in the teacher cache"):
        next(StepLoader(data, small_config, pad, 3, empty, ahead=True).steps(0))


def test_a_loop_that_stops_early_leaves_no_thread(small_config):
    data, pad = prepare(small_config)
    before = set(threading.enumerate())
    steps = StepLoader(data, small_config, pad, 3, ahead=True).steps(0)
    next(steps)
    assert set(threading.enumerate()) - before
    steps.close()
    assert not set(threading.enumerate()) - before
