"""A sweep on a cluster of two nodes, each too small for a trial by itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pandas as pd
import pytest
import ray
from children import heed_interrupts
from commands import QUICK, ROOT, world
from ray.cluster_utils import Cluster

from cbtrain.config import get_config
from cbtrain.training.loop import train


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes of one CPU each, on this machine."""
    settings = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        yield cluster.address
    finally:
        cluster.shutdown()
        ray.shutdown()


def test_a_trials_workers_on_two_nodes_run_the_loop_that_one_process_runs(small_world, two_nodes, tmp_path):
    # An adapter that starts far from 0 has rerouted at once, so that the sweep goes on after its baseline.
    arguments = ["--num-samples", "2", "--baseline-seeds", "1", "--steps", "3", "--lora-init-std", "0.3", *QUICK]
    arguments += ["--run-dir", "run"]
    arguments += ["--zero-stage", "2", "--workers-per-trial", "2", "--checkpoint-every", "0", "--teacher-cache", "off"]
    sweep = subprocess.Popen(
        [sys.executable, str(ROOT / "sweeps" / "kl_ablation.py"), *world(small_world, tmp_path), *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": two_nodes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    output, errors = finished(sweep)
    assert sweep.returncode in (0, 3), output + errors  # 3: nothing of so small a model is to be shipped
    record = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert record["workers"] == {"count": 2, "cpus": 1, "gpus": 0.0}
    assert record["concurrency"] == 1
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert list(trials.status) == ["completed"] * 2, (trials.error.tolist(), output)
    for row in trials.itertuples():
        for rank in (0, 1):
            assert "Step 3: loss=" in (tmp_path / "run" / "logs" / f"{row.trial_id}-rank{rank}.log").read_text()
        fields = json.loads((tmp_path / "run" / "trials" / row.trial_id / "config.json").read_text())
        alone = train(get_config("tiny", **fields), tmp_path / "alone" / row.trial_id, lambda _metrics: None)
        for name in ("loss_reroute", "loss_kl", "eval_loss_reroute", "eval_benign_kl"):
            assert getattr(row, name) == pytest.approx(alone[name], rel=1e-4), (row.trial_id, name)


def finished(process: subprocess.Popen) -> tuple[str, str]:
    """Output and errors; whatever hangs is killed by its own handle."""
    try:
        return process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
