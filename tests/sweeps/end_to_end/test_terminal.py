"""The sweep on a real terminal, which tmux is: what stands there while it runs, is resized and interrupted."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, world

from cbtrain.config import cli
from cbtrain.model import tiny
from sweeps import kl_ablation
from sweeps.reporting.screen import SCREEN

SHORT = (
    *("--num-samples", "2", "--baseline-seeds", "1", "--warmup-steps", "5", "--eval-every", "10"),
    *("--max-concurrent", "1"),  # the second process would be paid for in vain
    *("--retain-scale", "0.3", "--lora-init-std", "0.05", "--lr", "0.01", "--behaviour-prompts", "0"),
)
FIRST_S = 15.0
"""The first line comes within 3 s; a machine that does much else is given more."""


class Tmux:
    """A terminal of 80 × 24 in a server of its own."""

    def __init__(self, cwd: Path) -> None:
        self._socket = f"sweep-{uuid.uuid4().hex[:8]}"
        self("-f", os.devnull, "new-session", "-d", "-x", "80", "-y", "24", "-s", "t", "-c", str(cwd), "sh")
        self.type("PS1='$ '; clear")

    def __call__(self, *words: str) -> str:
        command = ["tmux", "-L", self._socket, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def type(self, text: str) -> None:
        self("send-keys", "-t", "t", text, "Enter")

    def shown(self) -> str:
        """The screen as it stands."""
        return self("capture-pane", "-p", "-t", "t")

    def wait_for(self, what: str | Callable[[str], bool], seconds: float = 120) -> str:
        """The screen as soon as it shows something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            screen = self.shown()
            if what in screen if isinstance(what, str) else what(screen):
                return screen
            time.sleep(0.1)
        pytest.fail(f"not shown in {seconds} s: {what}\n{screen}")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    tiny.build()
    tmux = Tmux(tmp_path)
    yield tmux
    tmux("kill-server")


def command(*arguments: str, environment: str = "") -> str:
    words = [sys.executable, str(ROOT / "sweeps" / "kl_ablation.py"), *SHORT, *arguments]
    return f"{environment} OMP_NUM_THREADS=1 {shlex.join(words)}".strip()


def table_of(screen: str) -> list[str]:
    """The lines of the one table on a screen, from its bar to what is best so far."""
    lines = [line.rstrip() for line in screen.splitlines()]
    (header,) = [index for index, line in enumerate(lines) if line.split()[:3] == ["phase", "beta_kl", "T"]]
    (best,) = [index for index, line in enumerate(lines) if line.startswith(" best so far ")]
    assert not any(lines[best + 1 :]), screen
    return lines[header - 1 : best + 1]


def check_table(screen: str, columns: int) -> None:
    """One table, whole, that lies within 80 columns and whose lines are not torn."""
    bar, header, *trials, _ = table = table_of(screen)
    assert re.search(r" \d/2 done · \d running · \d failed · \d left · 0:\d\d elapsed", bar), screen
    assert header.split() == ["phase", "beta_kl", "T", "seed", "step", "reroute", "drift", "regression"]
    assert trials
    for line in trials:
        assert re.match(r" (baseline|ablation) +[\d.]+ +[\d.–]+ +\d +(starting|\d+/\d+) ", line), screen
    assert max(map(len, table)) <= min(80, columns)


def test_a_table_stays_in_place_through_a_resize_and_a_summary_takes_its_place(terminal):
    terminal.type(command("--steps", "60"))
    began = time.monotonic()
    terminal.wait_for("loading   libraries", FIRST_S)
    print(f"first line after {time.monotonic() - began:.1f} s")
    terminal.wait_for("phase     beta_kl")
    check_table(terminal.wait_for(lambda screen: re.search(r" \d+/60 ", screen)), 80)
    terminal("resize-window", "-t", "t", "-x", "120", "-y", "40")
    time.sleep(1.2)
    check_table(terminal.shown(), 120)
    terminal("resize-window", "-t", "t", "-x", "70", "-y", "24")
    time.sleep(1.2)
    check_table(terminal.shown(), 70)
    terminal("resize-window", "-t", "t", "-x", "80", "-y", "24")
    done = terminal.wait_for("explore   optuna-dashboard")
    assert "finished · 2 of 2 trials in " in done
    assert "best so far" not in done
    assert "started" not in done, "no line an event where there is a table"
    assert not re.search(r"Warning|\(raylet|\(pid=|INFO|deprecat", done), done


def test_ctrl_c_leaves_a_sane_terminal_a_checkpoint_and_the_command_that_goes_on(terminal, tmp_path):
    """It reaches every process of the terminal, those that train too."""
    terminal.type(command("--steps", "100000", "--run-dir", "run", environment="NO_COLOR=1"))
    terminal.wait_for(lambda screen: re.search(r" \d+/100000 ", screen))
    check_table(terminal.shown(), 80)
    coloured = terminal("capture-pane", "-p", "-e", "-t", "t")
    assert not re.search(r"\x1b\[(\d+;)*(3[0-7]|9[0-7]|38)[;m]", coloured), "NO_COLOR is heeded"
    terminal("send-keys", "-t", "t", "C-c")
    screen = terminal.wait_for(lambda screen: screen.rstrip().endswith("interrupted\n$"), 60)
    assert cli.WILL_STOP in screen
    assert (tmp_path / "run" / "trials" / "t000" / "checkpoint" / "manifest.json").is_file()
    assert "stopped   0 of 2 trials ended: run/trials.csv" in screen
    assert "next      python sweeps/kl_ablation.py --resume run" in screen
    assert "best so far" not in screen
    terminal.type("echo $((6 * 7))")
    after = terminal.wait_for(lambda screen: "\n42\n" in screen, 30)
    assert "$ echo $((6 * 7))" in after, "what is typed is shown"
    assert terminal("display-message", "-p", "-t", "t", "#{cursor_flag}").strip() == "1", "the cursor is visible"


def test_piped_output_has_no_escape_codes(tmp_path):
    tiny.build()
    environment = {**os.environ, "FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "sweeps" / "kl_ablation.py"), *SHORT, "--dry-run"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith("loading   libraries\nreading   model and data\nKL ablation")


def test_a_quiet_dry_run_is_its_plan_and_a_quiet_mistake_an_error(small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SCREEN, "quiet", False)
    for flags, status in ((["--dry-run"], 0), (["--num-samples", "2"], 2)):
        words = ["kl_ablation.py", *world(small_world, tmp_path), "--run-dir", "run", "--quiet", *flags]
        monkeypatch.setattr(sys, "argv", words)
        assert cli.run(kl_ablation.main) == status
        said, errors = capsys.readouterr()
        assert said.startswith("plan      20 trials") if status == 0 else said == ""
        assert errors.startswith("error: --num-samples 2") if status else errors == ""
