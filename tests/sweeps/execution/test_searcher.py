"""The Ray Tune adapter: what it gives and takes, that failures are heard of, and one real run."""

import errno
import json
from pathlib import Path

import pytest
import ray
import torch
from ray import tune
from ray.tune.search.searcher import Searcher
from simulated import failed, plan_of, use_quick_models, world

from cbtrain.training.non_finite import NonFiniteLossError
from sweeps.execution.searcher import PlanSearcher, outcome_of
from sweeps.plan.journal import TrialOutcome, TrialSpec
from sweeps.runtime.failures import kind_of

FINAL = {"status": "completed", "error": "", "eval_benign_kl": 0.5, "eval_loss_reroute": 0.02, "eval_harmful_nll": 8.0}


def test_a_suggestion_is_the_trial_and_nothing_else() -> None:
    searcher = PlanSearcher(plan_of(10))
    assert searcher.suggest("ray-1") == {
        "trial_id": "t000",
        "phase": "baseline",
        "beta_kl": 0.0,
        "kl_temperature": 1.0,
        "seed": 0,
    }


def test_nothing_is_suggested_while_running_trials_hold_the_budget_and_finished_comes_at_the_end() -> None:
    searcher = PlanSearcher(plan_of(4))
    assert all(isinstance(searcher.suggest(f"ray-{index}"), dict) for index in range(4))
    for index in (2, 0, 3, 1):
        assert searcher.suggest("ray-more") is None
        searcher.on_trial_complete(f"ray-{index}", {**FINAL, "trial_id": f"ray-{index}"})
    assert searcher.suggest("ray-more") == Searcher.FINISHED
    assert [row["status"] for row in searcher.plan.rows()] == ["completed"] * 4
    assert searcher.failure is None


def test_the_hook_is_called_after_every_trial_given_and_every_outcome() -> None:
    seen: list[list[str]] = []
    plan = plan_of(4)
    searcher = PlanSearcher(plan, on_change=lambda: seen.append([str(row["status"]) for row in plan.rows()]))
    searcher.suggest("a")
    searcher.suggest("b")
    searcher.on_trial_complete("b", FINAL)
    assert seen == [["running"], ["running", "running"], ["running", "completed"]]


def test_an_outcome_is_what_the_trial_reported_without_what_ray_added() -> None:
    added = {"trial_id": "ray-1", "pid": 7, "config/seed": 3, "time_total_s": 1.0, "done": True, "date": "today"}
    outcome = outcome_of({**FINAL, **added, "steps": 70, "eval_top1_agreement": 0.9}, crashed=False)
    reported = {"steps": 70, "eval_top1_agreement": 0.9}
    assert outcome == TrialOutcome("completed", 0.5, 0.02, 8.0, reported)


@pytest.mark.parametrize(
    ("result", "crashed", "error"),
    [
        (None, True, "its process was lost (killed, or out of memory)"),
        ({"eval_loss_reroute": 0.3, "steps": 14}, True, "its process was lost (killed, or out of memory)"),
        ({"status": "completed", "error": "CUDA\n  out of memory"}, True, "CUDA out of memory"),
        ({"status": "failed", "error": "non-finite loss at step 3"}, False, "non-finite loss at step 3"),
        ({"eval_loss_reroute": 0.3}, False, "ended without reporting how (status None)"),
        (None, False, "ended without reporting how (status None)"),
    ],
)
def test_a_trial_that_did_not_end_well_is_failed_with_its_reason_on_one_line(
    result: dict[str, object] | None, crashed: bool, error: str
) -> None:
    outcome = outcome_of(result, crashed=crashed)
    assert outcome.status == "failed"
    assert outcome.error.startswith(error), outcome.error
    assert "\n" not in outcome.error


def test_a_failure_is_kept_and_ends_the_sweep_instead_of_being_swallowed() -> None:
    def full() -> None:
        raise OSError("no space left")

    searcher = PlanSearcher(plan_of(10), on_change=full)
    assert searcher.suggest("a") == Searcher.FINISHED
    assert str(searcher.failure) == "no space left"

    searcher = PlanSearcher(plan_of(10))
    searcher.suggest("a")
    searcher.on_trial_complete("unknown", FINAL)
    first = searcher.failure
    assert isinstance(first, KeyError)
    searcher.on_trial_complete("a", FINAL)
    searcher.on_trial_complete("a", FINAL)
    assert searcher.failure is first
    assert searcher.plan.rows()[0]["status"] == "completed"
    assert searcher.suggest("b") == Searcher.FINISHED


def test_tune_cannot_restore_it() -> None:
    with pytest.raises(RuntimeError, match="journal"):
        PlanSearcher(plan_of(10)).restore("anywhere")


def train(config: dict[str, object]) -> None:
    """A Tune trial: reports once on the way and once at its end; two of them do not get there."""
    spec = TrialSpec(**config)
    tune.report({"eval_loss_reroute": 1.0, "steps": 1})
    if spec.trial_id == "t001":
        raise RuntimeError("broken")
    outcome = failed("non-finite loss") if spec.trial_id == "t005" else world(spec)
    required = {name: getattr(outcome, name) for name in ("eval_benign_kl", "eval_loss_reroute", "eval_harmful_nll")}
    tune.report({"status": outcome.status, "error": outcome.error, "steps": 2, **required, **outcome.metrics})


def test_a_real_tune_run_spends_the_budget_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_quick_models(monkeypatch)
    plan = plan_of(8)
    table = tmp_path / "rows.json"
    searcher = PlanSearcher(plan, on_change=lambda: table.write_text(json.dumps(plan.rows())))
    here, root = Path(__file__).parent, Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{here}:{root / 'tests' / 'helpers'}:{root}")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        tune.Tuner(
            train,
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
            ),
            run_config=tune.RunConfig(storage_path=str(tmp_path / "ray"), name="sweep", verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    assert searcher.failure is None
    rows = json.loads(table.read_text())
    assert rows == plan.rows()
    statuses = {row["trial_id"]: row["status"] for row in rows}
    unwell = {trial_id for trial_id, status in statuses.items() if status != "completed"}
    assert (len(rows), unwell) == (8, {"t001", "t005"}), statuses
    assert rows[5]["error"] == "non-finite loss"
    assert {row["steps"] for row in rows if row["status"] == "completed"} == {2}


@pytest.mark.parametrize(("failure", "attempts"), [("raised", 3), ("lost", 3), ("out_of_memory", 3), ("non_finite", 1)])
def test_a_trial_that_fails_is_given_again_before_any_other_unless_the_same_step_would_fail_again(
    failure: str, attempts: int
) -> None:
    plan, told = plan_of(8), list[tuple[str, str]]()
    searcher = PlanSearcher(plan, max_failures=2, on_retry=lambda *said: told.append(said))
    for attempt in range(attempts):
        given = searcher.suggest(f"ray{attempt}")
        assert isinstance(given, dict)
        assert given["trial_id"] == "t000"
        assert given.get("halvings", 0) == (attempt if failure == "out_of_memory" else 0)
        assert plan.rows()[0]["status"] == "running"
        searcher.on_trial_complete(f"ray{attempt}", {"status": "failed", "error": "broken", "failure": failure})
    assert searcher.failure is None
    row = plan.rows()[0]
    assert (row["status"], row["error"], row.get("failures")) == ("failed", "broken", attempts - 1 or None)
    assert [name for name, _ in told] == ["t000"] * (attempts - 1)
    assert all(("half the rows" in why) == (failure == "out_of_memory") for _, why in told)


def test_a_trial_that_fails_once_and_completes_says_so() -> None:
    plan = plan_of(8)
    searcher = PlanSearcher(plan, max_failures=1)
    searcher.suggest("first")
    searcher.on_trial_complete("first", {"eval_loss_reroute": 0.5}, error=True)  # its process died between two reports
    searcher.suggest("second")
    required = dict.fromkeys(("eval_benign_kl", "eval_loss_reroute", "eval_harmful_nll"), 0.5)
    searcher.on_trial_complete("second", {"status": "completed", "error": "", **required})
    assert [(row["trial_id"], row["status"], row["failures"]) for row in plan.rows()] == [("t000", "completed", 1)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), "out_of_memory"),
        (ray.exceptions.ActorDiedError(), "lost"),
        (NonFiniteLossError("loss nan at step 3"), "non_finite"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "no_room"),
        (OSError(errno.EFBIG, "File too large", "a.pt"), "no_room"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "no_room"),
        (OSError(errno.EACCES, "Permission denied", "a.pt"), "raised"),
        (ValueError("memory of an elephant"), "raised"),
    ],
)
def test_what_kind_of_failure_an_exception_is(error: Exception, kind: str) -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert [kind_of(error), kind_of(wrapped)] == [kind, kind]
