"""The command that trains one model, as a process: the lines that it prints, bad arguments, an interrupt."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from children import heed_interrupts
from commands import TINY

from cbtrain.config import cli

ROOT = Path(__file__).parents[3]


def command(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cbtrain.train", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        **kwargs,
    )


def test_the_command_trains_and_prints_the_line_that_users_know(small_config, tmp_path):
    data = ["--model", small_config.model, "--harmful", *small_config.harmful, "--benign", *small_config.benign]
    done = command(
        "--config", "auto", *data, *TINY, "--steps", "10", "--warmup-steps", "2", "--output-dir", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("Step 10: loss=") and "α=" in line for line in done.stdout.splitlines()), done.stdout
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
    again = command("--preset", "auto", *data, "--output-dir", str(tmp_path / "out"))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "already holds a run" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stps", "4"], "--stps: no such flag; did you mean --steps?"),
        (["--steps", "many"], "--steps"),
        (["--zero-stage", "7"], "--zero-stage"),
        (["--preset", "lama-3.1-8b-instruct"], "did you mean llama-3.1-8b-instruct?"),
        (["--beta_kl", "-1"], "--beta-kl -1.0: must be 0 or more"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, message):
    done = command(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_a_signal_ends_the_command_at_a_checkpoint_which_it_goes_on_from(small_config, tmp_path):
    data = ["--model", small_config.model, "--harmful", *small_config.harmful, "--benign", *small_config.benign]
    train = [sys.executable, "-m", "cbtrain.train", *data, *TINY, "--steps", "100000", "--output-dir", str(tmp_path)]
    stopped_behind = []
    for more, sent, status in (([], signal.SIGINT, 130), (["--resume"], signal.SIGUSR1, 143)):
        process = subprocess.Popen(
            [*train, *more],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )
        try:
            for line in process.stdout:
                if line.startswith("Step"):
                    break
            process.send_signal(sent)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, errors) == (status, "interrupted\n")
        said = re.search(r"^stopped behind step (\d+): the same command with --resume goes on", output, flags=re.M)
        assert said, output
        assert cli.WILL_STOP in output
        stopped_behind.append(int(said[1]))
    assert 0 < stopped_behind[0] < stopped_behind[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, len(steps) + 1)]
