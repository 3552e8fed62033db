"""How many trials a cluster holds at a time."""

import socket

import pytest

from cbtrain.config import InputError
from sweeps.machine import place, started_ray
from sweeps.trial import Workers

NONE = {"workers": 1, "gpus_per_worker": None, "max_concurrent": None}


@pytest.mark.parametrize(
    ("resources", "asked", "workers", "concurrency"),
    [
        ({"CPU": 2}, {}, Workers(1, 1, 0), 2),
        ({"CPU": 2}, {"max_concurrent": 1}, Workers(1, 2, 0), 1),
        ({"CPU": 2}, {"max_concurrent": 9}, Workers(1, 1, 0), 2),
        ({"CPU": 16}, {}, Workers(1, 4, 0), 4),
        ({"CPU": 5}, {"workers": 2}, Workers(2, 1, 0), 2),
        ({"CPU": 16, "GPU": 2}, {}, Workers(1, 8, 1), 2),
        ({"CPU": 16, "GPU": 4}, {"workers": 4}, Workers(4, 4, 1), 1),
        ({"CPU": 8, "GPU": 1}, {"gpus_per_worker": 0.5}, Workers(1, 4, 0.5), 2),
        ({"CPU": 8, "GPU": 1}, {"gpus_per_worker": 0.0}, Workers(1, 2, 0), 4),
    ],
)
def test_trials_at_a_time_are_what_fits(resources, asked, workers, concurrency):
    assert place(resources, **NONE | asked) == (workers, concurrency)


@pytest.mark.parametrize(
    ("resources", "asked", "message"),
    [
        ({"CPU": 2}, {"workers": 3}, "--workers-per-trial 3: the cluster has 2 CPUs"),
        ({"CPU": 2}, {"gpus_per_worker": 1.0}, "1 workers × 1 GPUs = 1, the cluster has 0"),
        ({"CPU": 2}, {"gpus_per_worker": -1.0}, "--gpus-per-worker -1.0: must be 0 or more"),
        ({"CPU": 2}, {"gpus_per_worker": float("nan")}, "--gpus-per-worker nan"),
        ({"CPU": 9, "GPU": 2}, {"workers": 3}, "3 workers × 1 GPUs = 3, the cluster has 2"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_the_arithmetic(resources, asked, message):
    with pytest.raises(InputError, match=message):
        place(resources, **NONE | asked)


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(InputError, match="no Ray cluster answers; unset it"), started_ray():
            pass


def test_only_a_single_cpu_worker_runs_in_the_trainables_process():
    assert Workers(1, 2, 0).in_process
    assert not Workers(2, 1, 0).in_process
    assert not Workers(1, 1, 1).in_process
    assert Workers(1, 2, 0).tune_resources() == {"CPU": 2}
    assert "CPU" not in Workers(2, 1, 0).tune_resources(), "the trainable must not take a CPU that its workers need"
