"""Ray is started, or joined, wherever a user stands, or one line says what stands in the way."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from commands import ROOT

from cbtrain.config import InputError
from sweeps.runtime.ray_start import SHORT, cluster_address, short_directory, started_ray

START = """
import json, os, psutil, ray
from sweeps.runtime.ray_start import started_ray
with started_ray() as nodes:
    worker = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    processes = psutil.Process().children(recursive=True)
    ports = [port for process in processes for port in process.net_connections() if port.status == "LISTEN"]
    listening = [port.laddr.ip.removeprefix("::ffff:") for port in ports]
    arguments = [p.cmdline() for p in processes]
    told = {"nodes": [node.cpus for node in nodes], "listening": listening, "arguments": arguments}
    told["token"] = [os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"], worker["RAY_AUTH_TOKEN"]]
    print(json.dumps(told))
"""


def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("http://127.0.0.1:8265", "this is what `ray job submit` takes; run `ray job submit --working-dir . -- python"),
        ("https://head:8265", "this is what `ray job submit` takes"),
        ("ray://127.0.0.1:10001", "Ray Client runs no sweep; give HOST:PORT"),
        ("auto", "`ray start` has begun no cluster on this machine; give HOST:PORT, or unset it"),
        ("head", "must be HOST:PORT, auto or local"),
        ("127.0.0.1:port", "no Ray cluster answers"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("127.0.0.1:1", "no Ray cluster answers; unset it to start Ray on this machine for this sweep alone"),
    ],
)
def test_an_address_that_is_no_clusters_is_refused_at_once(monkeypatch, tmp_path, given, message):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(InputError, match=re.escape(message)) as refused, started_ray():
        pass
    assert str(refused.value).startswith(f"RAY_ADDRESS {given}: ")


def test_auto_is_the_cluster_of_ray_start_and_one_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(gone := nobody())
    with pytest.raises(InputError, match=f"{gone}, is gone; `ray stop`, or unset it"):
        cluster_address({"RAY_ADDRESS": "auto"})


def test_a_server_that_is_not_rays_is_told_at_once(monkeypatch):
    """A web server, where Ray would try for minutes."""
    with socket.create_server(("", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(InputError, match="no Ray cluster answers"):
            cluster_address({"RAY_ADDRESS": f"127.0.0.1:{listener.getsockname()[1]}"})
        server.join()


def test_without_an_address_ray_is_the_sweeps_own():
    assert [cluster_address({"RAY_ADDRESS": given}) for given in ("", " ", "local")] == [None] * 3
    assert cluster_address({}) is None


def test_sockets_whose_paths_would_be_too_long_lie_elsewhere():
    assert short_directory({}) is None
    assert short_directory({"TMPDIR": "/scratch/job"}) is None
    assert short_directory({"TMPDIR": "/scratch/" + "j" * 60}) == SHORT
    assert short_directory({"TMPDIR": "/scratch", "RAY_TMPDIR": "/" + "é" * 30}) == SHORT


def test_ray_of_ones_own_is_on_loopback_with_a_token_whatever_home_temporary_directory_and_uv_say(tmp_path):
    """Below `uv run` beside 700 MB, with a HOME that is no directory, a long TMPDIR, and one CPU."""
    (tmp_path / "home").touch()
    (tmp_path / ("t" * 80)).mkdir()
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(700 * 2**20)
    (tmp_path / "start.py").write_text(START)
    (tmp_path / "run").write_text(f'"{sys.executable}" start.py\nexit $?\n')  # no exec: Ray looks for `uv run` above
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / ("t" * 80)), "PYTHONPATH": str(ROOT)}
    cpu = min(os.sched_getaffinity(0))
    done = subprocess.run(
        ["bash", "-c", "exec -a uv bash run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["nodes"] == [1.0]
    assert set(told["listening"]) == {"127.0.0.1"}
    mode, token, workers = told["token"]
    assert (mode, token) == ("token", workers)
    assert len(token) == 64
    assert not any(token in word for words in told["arguments"] for word in words)
    assert (tmp_path / "home").read_bytes() == b""


LEAVES_ONE = """
import subprocess, sys, ray
from sweeps.runtime.ray_start import started_ray
with started_ray():
    command = ["sleep", "600"]
    process = ray.get(ray.remote(lambda: subprocess.Popen(command, start_new_session=True).pid).remote())
    print(process, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_no_process_below_rays_outlives_the_sweep_which_ends_or_is_killed(killed):
    with subprocess.Popen(
        [sys.executable, "-c", LEAVES_ONE],
        cwd=ROOT,
        env={**os.environ, "LEFT_BY": (mark := secrets.token_hex(8))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as sweep:
        left = psutil.Process(int(sweep.stdout.readline()))
        below = [process for process in psutil.process_iter() if mark in _environment(process)]
        assert len(below) >= 5, "two of Ray's servers, two agents, a worker and what it started"
        sweep.kill() if killed else sweep.communicate("\n")
        _, alive = psutil.wait_procs([left, *below], timeout=5)
    assert not alive


def _environment(process: psutil.Process) -> str:
    try:
        return str(process.environ())
    except psutil.Error:
        return ""
