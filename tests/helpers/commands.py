"""The sweep's command as a process."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil
from children import heed_interrupts

from cbtrain.config import CircuitBreakerConfig, flag, get_config

ROOT = Path(__file__).parents[2]


def recipe(config: CircuitBreakerConfig) -> list[str]:
    """Flags that train a small model by these numbers, whatever the preset derives for it."""
    words, auto = [], get_config("auto")
    derived = ("dtype", "target_layers", "lora_layers", "max_length", "gradient_checkpointing")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        same = value == getattr(auto, field.name) and field.name not in derived
        if same or field.name in ("model", "tokenizer", "harmful", "benign", "beta_kl", "kl_temperature"):
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag("no_" + field.name))
        else:
            words += [flag(field.name), *map(str, value if isinstance(value, tuple) else [value])]
    return words


OF_SMALL_WORLD = {"target_layers": (1, 2), "lora_layers": None, "lora_rank": 8, "lora_init_std": 0.01}
TINY = recipe(get_config("tiny", lr=1.5e-3, lr_schedule="linear", retain_norm="absolute", **OF_SMALL_WORLD))
"""Numbers for the random model of three blocks on which commands are tried."""
QUICK = ("--warmup-steps", "2", "--batch-size", "8", "--eval-every", "0", "--behaviour-prompts", "0")


class Sweep:
    """The command as a process, and what of it is left when it has ended."""

    def __init__(
        self,
        cwd: Path,
        *arguments: str,
        installed: Path | None = None,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        """Start it from the repository, or as the module of packages that were `installed` elsewhere.

        Args:
            output: a file for what it prints, where nobody waits for it; else `wait` gives it.
        """
        self.mark = uuid.uuid4().hex
        self._shared_memory = set(os.listdir("/dev/shm"))
        given = {**os.environ, "OMP_NUM_THREADS": "1", "SWEEP_TEST_MARK": self.mark, **(environment or {})}
        given.pop("RAY_ADDRESS", None)
        command = [str(ROOT / "sweeps" / "kl_ablation.py")]
        if installed:
            given["PYTHONPATH"], command = str(installed), ["-m", "sweeps.kl_ablation"]
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(output.open("w")) if output else subprocess.PIPE
            self.process = subprocess.Popen(
                [sys.executable, *command, *arguments],
                cwd=cwd,
                env=given,
                stdout=place,
                stderr=place,
                text=True,
                preexec_fn=heed_interrupts,
            )

    def wait(self, timeout: float = 300) -> tuple[int, str, str]:
        """Exit status, output and errors; whatever hangs is killed by its own handle."""
        try:
            output, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, output, errors

    def processes(self) -> list[psutil.Process]:
        """Processes that inherited this command's environment."""
        found = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.environ().get("SWEEP_TEST_MARK") == self.mark:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End the driver, then everything that it has started, with no warning."""
        self.process.kill()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()

    def left_behind(self) -> list[str]:
        """What is still there of them a little later, and new files in shared memory."""
        _, alive = psutil.wait_procs(self.processes(), timeout=10)
        return [str(process) for process in alive] + sorted(set(os.listdir("/dev/shm")) - self._shared_memory)


def install(directory: Path) -> Path:
    """Build a wheel of the packages from a copy of the sources, and install it below `directory`; where it is."""
    source, target = directory / "source", directory / "installed"
    for name in ("cbtrain", "sweeps", "analysis"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", str(directory), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def world(directory: Path, cwd: Path) -> list[str]:
    """Flags for model and data, relative to where the command starts, and how to train it."""
    directory = Path(os.path.relpath(directory, cwd))
    return [
        *("--model", str(directory)),
        *("--harmful", str(directory / "harmful.jsonl")),
        *("--benign", str(directory / "benign.jsonl")),
        *TINY,
        "--no-calibrate",
    ]
