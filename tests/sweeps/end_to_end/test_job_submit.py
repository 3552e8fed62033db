"""`ray job submit` to a cluster of two nodes on this machine, with token authentication."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import pytest
from commands import ROOT

from cbtrain.model import tiny

BIN = Path(sys.executable).parent
READY_S, JOB_S = 120, 300
"""Seconds that nodes and a job may take on a busy machine."""


@dataclass
class Cluster:
    """Nodes of Ray, each a process of its own that ends with its handle."""

    temp_dir: str
    environment: dict[str, str]
    gcs: int
    dashboard: int
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def add(self, *options: str) -> None:
        """Start a node of one CPU."""
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", f"--object-store-memory={2**27}", *options]
        self.nodes.append(
            subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def begin(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """`ray job submit` from the repository's root."""
        address = f"http://127.0.0.1:{self.dashboard}"
        submit = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", *command]
        return subprocess.Popen(
            submit,
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *command: str, **environment: str) -> tuple[int, str]:
        """Exit status and output of `ray job submit`."""
        job = self.begin(*command, **environment)
        output, _ = job.communicate(timeout=JOB_S)
        return job.returncode, output

    def lose(self, node: int) -> None:
        """Kill a node, which ends with whatever runs on it."""
        started = psutil.Process(self.nodes[node].pid)
        for process in (*started.children(recursive=True), started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_for(self, nodes: int) -> None:
        """Return when so many nodes are there."""
        look = "import ray; ray.init(log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.gcs}"}
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            assert all(node.poll() is None for node in self.nodes), "a node has ended"
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    [sys.executable, "-c", look],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=30,
                    check=False,
                )
                if done.stdout.strip() == str(nodes):
                    return
            time.sleep(0.5)
        pytest.fail(f"{nodes} nodes were not there after {READY_S} s")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    gcs, dashboard, client, *others = free_ports(9)
    environment = {
        **os.environ,
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"},
        **{"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    }
    environment.pop("RAY_ADDRESS", None)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    head, worker = (
        [f"--{name}={port}" for name, port in zip(names, ports, strict=True)] for ports in (others[:3], others[3:])
    )
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        cluster = Cluster(temp_dir, environment, gcs, dashboard)
        place = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={temp_dir}"]
        try:
            cluster.add("--head", *place, *head, f"--ray-client-server-port={client}")
            cluster.wait_for(1)
            cluster.add(f"--address=127.0.0.1:{gcs}", *worker)
            cluster.wait_for(2)
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                node.terminate()
            for node in cluster.nodes:
                node.wait(60)


def test_a_submitted_job_sweeps_on_two_nodes_of_a_cluster_that_wants_a_token_and_survives_the_loss_of_one(
    tmp_path, cluster
):
    tiny.build()
    settings = ["--num-samples", "6", "--steps", "40", "--eval-every", "0", "--behaviour-prompts", "0"]
    settings += ["--retain-scale", "0.3", "--lora-init-std", "0.05", "--lr", "0.01"]
    sweep = ["python", "sweeps/kl_ablation.py", *settings]
    status, said = cluster.submit(*sweep, RAY_AUTH_TOKEN=secrets.token_hex(16))
    assert status != 0
    assert "uthentication" in said

    # Also the job at which each node unpacks the files. Here both have one place for them, and whoever comes second
    # removes what it finds there, under the feet of a job that runs already.
    status, said = cluster.submit(*sweep)
    assert status != 0
    assert "error: --storage-path: needed in a job on 2 nodes" in said

    (tmp_path / "shared").mkdir()
    kept = ["--storage-path", str(tmp_path / "shared"), "--run-dir", "a", "--copy-to", f"file://{tmp_path}/out"]
    job = cluster.begin(*sweep, *kept)
    second, deadline = tmp_path / "shared" / "a" / "trials" / "t001" / "metrics.jsonl", time.monotonic() + JOB_S
    while not second.is_file():  # two trials run, on a node each
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.lose(1)
    said, _ = job.communicate(timeout=JOB_S)
    assert "2 at a time, a trial on 1 CPU" in said
    record = json.loads((tmp_path / "shared" / "a" / "sweep.json").read_text())
    assert record["status"] == "finished", said[-6000:]
    trials = pd.read_csv(tmp_path / "out" / "a" / "trials.csv")
    assert trials.status.tolist() == ["completed"] * 6, trials.error
    assert trials.failures.fillna(0).sum() == 1, "one trial was on the node that was lost"
    assert "again     t00" in said
    assert job.returncode == 0, said
    for trial_id in trials.trial_id:
        assert (tmp_path / "out" / "a" / "trials" / trial_id / "adapter" / "adapter_model.safetensors").is_file()
        lines = (tmp_path / "out" / "a" / "trials" / trial_id / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, 41)]
