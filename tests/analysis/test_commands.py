"""The commands that a decision ends with: they fit a terminal, and the sweep that they start answers what was open."""

import shlex
from dataclasses import replace

import pytest
from synthetic import MakeRun, Surface, make_trials

from analysis.pick_beta import decided
from analysis.report.commands import folded
from analysis.report.wording import explanation


@pytest.mark.parametrize("width", [64, 78])
def test_a_command_of_many_long_values_folds_within_the_width_and_stays_what_it_was(width: int) -> None:
    files = [f"data/a-directory-with-a-long-name/{name} {i}.jsonl" for i, name in enumerate(("one", "two", "three"))]
    words = [
        "python",
        "sweeps/kl_ablation.py",
        "--harmful",
        *files,
        "--lora-layers",
        "None",
        "--beta-kl-range",
        "1",
        "2",
    ]
    text = folded(shlex.join(words), width)
    assert all(len(line) <= width for line in text.splitlines()), text
    assert shlex.split(text.replace("\\\n", " ")) == words


def test_a_sweep_of_too_few_baseline_seeds_is_followed_by_one_of_enough(make_run: MakeRun) -> None:
    trials = make_trials(Surface(), baselines=2, searched=0, noise=0.05).iloc[:3]
    run = make_run(
        trials, settings={"num_samples": 3, "baseline_seeds": 2, "reroute_tolerance": 0.05, "confidence": 0.95}
    )
    sweep = decided(run)
    assert sweep.decision.verdict == "insufficient_evidence"
    assert sweep.decision.needed is not None
    assert sweep.decision.needed.seeds >= 3
    words = shlex.split(sweep.commands.next)
    given = int(words[words.index("--baseline-seeds") + 1]) if "--baseline-seeds" in words else 3
    assert given >= sweep.decision.needed.seeds, sweep.commands.next


def test_commands_name_the_run_directory_itself_and_never_a_link(make_run: MakeRun) -> None:
    trials = make_trials(Surface(), noise=0.08, shared=0.08, rng_seed=1)
    run = make_run(trials)
    link = run.parent / "latest"
    link.symlink_to(run.name)
    sweep = decided(link)
    assert sweep.decision.verdict == "insufficient_evidence"
    assert f"--resume {run}" in sweep.commands.next
    assert str(link) not in sweep.commands.next
    assert sweep.record["run_dir"] == str(run)


def test_a_running_sweep_is_not_told_that_another_is_needed(make_run: MakeRun) -> None:
    trials = make_trials(Surface(), baselines=2, searched=0, noise=0.05).iloc[:3]
    run = make_run(trials, status="running", settings={"num_samples": 20, "baseline_seeds": 2})
    sweep = decided(run)
    assert sweep.decision.so_far
    assert "takes another sweep" not in explanation(sweep.decision)
    assert "takes another sweep" in explanation(replace(sweep.decision, so_far=""))
    assert sweep.commands.next.startswith("python analysis/pick_beta.py")
