"""A short form of `bench_faults`: what no other test does to a whole sweep, and nothing of it is lost."""

from tests.benchmarks.bench_faults import disturb, random_model, undisturbed
from tests.benchmarks.faults import kinds
from tests.benchmarks.faults.kinds import FAULTS, TRIALS, Disturbed


def hang_then_lose_the_raylet(at: Disturbed) -> None:
    """The first trial with a KL term hangs; when it has ended in spite of that, Ray is killed below the next one."""
    kinds.by_itself(at)
    at.wait_for(lambda: (at.rows().status == "completed").sum() >= 3)
    at.note()
    for process in at.children("raylet/raylet"):
        process.kill()


def test_a_sweep_whose_trial_hangs_and_whose_ray_dies_ends_as_if_it_had_met_neither(tmp_path, monkeypatch):
    monkeypatch.setitem(FAULTS, "hang", hang_then_lose_the_raylet)
    model = random_model(tmp_path)
    result = disturb("hang", model, (), undisturbed(model, ()), seed=0)
    assert result.met, "the sweep had ended before"
    assert result.good, result
    assert (result.total, result.failed) == (TRIALS, 0)
    assert result.resumes <= 1
