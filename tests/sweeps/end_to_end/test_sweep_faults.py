"""A short form of `bench_faults`: what no other test does to a whole sweep, and nothing of it is lost."""

import pytest

from tests.benchmarks.bench_faults import TRIALS, disturb, random_model, undisturbed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> list[str]:
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model) -> dict[str, dict[str, float]]:
    return undisturbed(model, ())


@pytest.mark.parametrize(("fault", "resumes"), [("raylet killed", 1), ("hang", 0)])
def test_a_sweep_that_meets_a_fault_ends_with_all_its_trials_as_if_it_had_met_none(model, reference, fault, resumes):
    result = disturb(fault, model, (), reference, seed=0)
    assert result.met, "the sweep had ended before"
    assert result.good, result
    assert (result.total, result.failed) == (TRIALS, 0)
    assert result.resumes <= resumes
