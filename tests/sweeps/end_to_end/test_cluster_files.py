"""What a cluster needs: the upload of a job, the SLURM script, the RayJob."""

import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

CLUSTER = ROOT / "sweeps" / "cluster"
JUNK = ("runs/a", "outputs/cb", "wandb/x", ".venv/lib", ".venv-gpu/lib", ".git/objects", ".mypy_cache/3.11")


def test_a_jobs_upload_holds_the_packages_and_neither_runs_nor_environments(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("cbtrain", "sweeps", "analysis"):
        (checkout / name).mkdir()
        for path in (ROOT / name).rglob("*.*"):
            if "__pycache__" not in path.parts and path.is_file():
                target = checkout / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    (checkout / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    for name in (*JUNK, ".ruff_cache/x", ".pytest_cache/x", ".hypothesis/x", "sweeps/__pycache__"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "large.bin").write_bytes(os.urandom(2**20))
    package = tmp_path / "package.zip"

    def upload(path: str, excludes: list[str]) -> None:
        create_package(path, package, include_gitignore=True, excludes=excludes)

    upload_working_dir_if_needed(
        {"working_dir": str(checkout)}, include_gitignore=True, scratch_dir=str(tmp_path), upload_fn=upload
    )
    names = zipfile.ZipFile(package).namelist()
    assert {"sweeps/kl_ablation.py", "cbtrain/training/loop.py", "analysis/report/report.html.j2"} <= set(names)
    assert not [name for name in names if name.endswith("large.bin")]
    assert package.stat().st_size < 2 * 2**20


@pytest.mark.parametrize("script", ["slurm.sh", "begin_or_resume.sh"])
def test_the_scripts_are_shell(script):
    assert subprocess.run(["bash", "-n", CLUSTER / script], check=False).returncode == 0


STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do echo "srun $1" >> "$LOG"; shift; done; echo "step $*" >> "$LOG"; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "scontrol $*" >> "$LOG"; fi',
    "hostname": "echo 127.0.0.1",
    # What listens where the head of Ray would.
    "ray": """for word; do case $word in --port=*) port=${word#*=};; esac; done
echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE" >> "$LOG"
exec "$REAL" -c "import socket, time; s = socket.create_server(('127.0.0.1', $port)); time.sleep(60)\"""",
    # The interpreter: what makes the token runs, the wait for nodes passes, and the sweep waits to be interrupted.
    "python": """[[ $1 != -c ]] || exec "$REAL" "$@"
[[ $1 != - ]] || exit 0
echo "sweep ${*:2} at $RAY_ADDRESS" >> "$LOG"
[[ $* != *--resume* ]] || exit 0
mkdir -p "$STORAGE/kl_ablation-7"; touch "$STORAGE/kl_ablation-7/sweep.json"
trap 'exit 143' TERM; while true; do sleep 0.1; done""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[[], subprocess.Popen]:
    """Starts the SLURM script where the commands of SLURM and Ray are stand-ins that write down what they are told."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(stat.S_IRWXU)
    environment = {
        **os.environ,
        **{"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": str(commands / "python"), "REAL": sys.executable},
        **{"STORAGE": str(tmp_path / "storage"), "LOG": str(tmp_path / "log")},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "2"},
    }
    arguments = ["bash", "sweeps/cluster/slurm.sh", "--num-samples", "6", "--model", "a b"]
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "sweeps").symlink_to(ROOT / "sweeps")
    return lambda: subprocess.Popen(arguments, cwd=tmp_path / "checkout", env=environment)


def test_a_slurm_job_near_its_limit_is_requeued_and_then_goes_on_with_its_sweep(slurm, tmp_path):
    job, log = slurm(), tmp_path / "log"
    deadline = time.monotonic() + 60
    while not (tmp_path / "storage/kl_ablation-7/sweep.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 143
    begun = log.read_text()
    storage = f"--storage-path {tmp_path / 'storage'}"
    assert f"sweep {storage} --run-dir kl_ablation-7 --num-samples 6 --model a b at 127.0.0.1:20007" in begun
    assert "step ray start --head --node-ip-address=127.0.0.1 --port=20007" in begun
    assert "token 64 token" in begun
    assert begun.endswith("scontrol requeue 7\n")

    log.unlink()
    assert slurm().wait(60) == 0
    resumed = log.read_text()
    assert f"sweep {storage} --resume {tmp_path / 'storage'}/kl_ablation-7 at 127.0.0.1:20007" in resumed
    assert "requeue" not in resumed


def test_the_rayjob_runs_the_sweep_on_shared_storage_with_authentication():
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: claims[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"/shared": "shared"}
        assert pod["containers"][0]["resources"]["limits"] == pod["containers"][0]["resources"]["requests"]
    assert "begin_or_resume.sh /shared/sweeps " in job["spec"]["entrypoint"]


@pytest.mark.parametrize("script", ["sweeps/kl_ablation.py", "analysis/pick_beta.py"])
def test_the_commands_run_from_a_checkout_that_is_not_installed(script, tmp_path):
    """As `ray job submit --working-dir .` starts them: another copy that is installed must not be what runs."""
    path = ROOT / script
    code = (
        "import runpy, sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
        f"sys.path[0], sys.argv = {str(path.parent)!r}, [{path.name!r}, '--help']\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout
