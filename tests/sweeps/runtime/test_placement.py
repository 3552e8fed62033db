"""How many trials a cluster holds at a time."""

import re

import pytest

from cbtrain.config import InputError
from sweeps.runtime.placement import TUNE_RESOURCES, Node, Workers, place, placement_line

NONE = {"workers": 1, "gpus_per_worker": None, "max_concurrent": None}


ONE_GPU, TWO_CPUS = Node(8, 1), Node(2)


@pytest.mark.parametrize(
    ("nodes", "asked", "workers", "concurrency"),
    [
        ([Node(2)], {}, Workers(1, 1, 0), 2),
        ([Node(2)], {"max_concurrent": 1}, Workers(1, 2, 0), 1),
        ([Node(2)], {"max_concurrent": 9}, Workers(1, 1, 0), 2),
        ([Node(16)], {}, Workers(1, 4, 0), 4),
        ([Node(5)], {"workers": 2}, Workers(2, 1, 0), 2),
        ([Node(16, 2)], {}, Workers(1, 8, 1), 2),
        ([Node(16, 4)], {"workers": 4}, Workers(4, 4, 1), 1),
        ([ONE_GPU], {"gpus_per_worker": 0.5}, Workers(1, 4, 0.5), 2),
        ([ONE_GPU], {"gpus_per_worker": 0.0}, Workers(1, 2, 0), 4),
        # A quarter of a GPU fits four times on one, two fifths twice, whatever two GPUs have left over together.
        ([ONE_GPU], {"gpus_per_worker": 0.25}, Workers(1, 2, 0.25), 4),
        ([Node(8, 2)], {"gpus_per_worker": 0.4}, Workers(1, 2, 0.4), 4),
        ([Node(16, 1)], {"gpus_per_worker": 0.1, "max_concurrent": 99}, Workers(1, 1, 0.1), 10),
        # A trial's workers may lie on several nodes, a worker on one.
        ([Node(1), Node(1)], {"workers": 2}, Workers(2, 1, 0), 1),
        ([Node(3), Node(3)], {"workers": 2}, Workers(2, 1, 0), 3),
        ([Node(3), Node(3)], {"max_concurrent": 2}, Workers(1, 3, 0), 2),
        ([Node(5), Node(3)], {"workers": 2, "max_concurrent": 1}, Workers(2, 3, 0), 1),
        ([Node(16, 8), Node(64)], {"workers": 8}, Workers(8, 2, 1), 1),
        ([Node(0), Node(4, 1), Node(4, 1)], {"workers": 2}, Workers(2, 4, 1), 1),
        ([Node(8, 3), Node(8, 3)], {"gpus_per_worker": 2.0}, Workers(1, 8, 2), 2),
        # What others have taken is not ours.
        ([Node(4, taken_cpus=3), TWO_CPUS], {}, Workers(1, 1, 0), 3),
    ],
)
def test_trials_at_a_time_are_what_finds_room_together(nodes, asked, workers, concurrency):
    assert place(nodes, **NONE | asked) == (workers, concurrency)


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        (
            [Node(2)],
            {"workers": 3},
            "--workers-per-trial 3: a worker needs 1 CPU, and there is room for 2 (2 on 2 CPUs)",
        ),
        (
            [Node(2)],
            {"gpus_per_worker": 1.0},
            "--workers-per-trial 1 --gpus-per-worker 1: a worker needs 1 CPU + 1 GPU, and there is room for 0 (0 on",
        ),
        ([Node(9, 2)], {"workers": 3}, "room for 2 (2 on 9 CPUs + 2 GPUs)"),
        ([ONE_GPU, ONE_GPU], {"gpus_per_worker": 2.0}, "room for 0 (2 × 0 on 8 CPUs + 1 GPU)"),
        ([Node(16), Node(0, 2)], {"gpus_per_worker": 1.0}, "room for 0 (0 on 16 CPUs, 0 on 0 CPUs + 2 GPUs)"),
        (
            [Node(2, taken_cpus=2), Node(1)],
            {"workers": 2},
            "1 (0 on 0 CPUs, 1 on 1 CPU), what others have taken left out",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused_with_the_arithmetic(nodes, asked, message):
    with pytest.raises(InputError, match=re.escape(message)):
        place(nodes, **NONE | asked)


def test_one_line_says_why_so_many_trials_run_at_a_time():
    nodes = [Node(3), Node(3), Node(1)]
    workers, concurrency = place(nodes, workers=2, gpus_per_worker=None, max_concurrent=None)
    line = placement_line(nodes, workers, concurrency)
    assert line == "3 at a time, a trial on 2 workers of 1 CPU · room for 7 (2 × 3 on 3 CPUs, 1 on 1 CPU)"
    assert placement_line([Node(2)], Workers(1, 1, 0), 2) == "2 at a time, a trial on 1 CPU · room for 2 (2 on 2 CPUs)"


def test_only_a_single_cpu_worker_runs_in_the_trainables_process():
    assert Workers(1, 2, 0).in_process
    assert not Workers(2, 1, 0).in_process
    assert not Workers(1, 1, 1).in_process
    assert "CPU" not in TUNE_RESOURCES, "Tune's own process must not take a CPU that what trains needs"
