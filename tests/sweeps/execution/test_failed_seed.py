"""A sweep of real training runs, one of which cannot reroute: its learning rate is next to 0."""

from dataclasses import replace
from pathlib import Path

from analysis.decide import decide
from cbtrain.config import get_config
from cbtrain.model.loading import resolve
from cbtrain.training.loop import run_teacher, train
from sweeps.execution.searcher import outcome_of
from sweeps.plan.budget import PlanSettings
from sweeps.plan.journal import TrialSpec, trial_config
from sweeps.plan.plan import SweepPlan

FAILS = "t005"


def test_a_trial_that_cannot_reroute_is_named_and_repeated_and_turns_no_pick(tmp_path: Path) -> None:
    # By this recipe all seeds settle, at a third of the default's cost.
    config = get_config("tiny", lr=8e-3, batch_size=8, steps=50, eval_every=0, checkpoint_every=0)
    config = resolve(config)
    cache = tmp_path / "teacher_cache"
    config = replace(config, retain_norms=run_teacher(config, cache).retain_norms)
    plan, asked = SweepPlan(PlanSettings(num_samples=10)), list[TrialSpec]()
    while (spec := plan.ask()) is not None:
        asked.append(spec)
        of_trial = trial_config(config, spec)
        if spec.trial_id == FAILS:
            of_trial = replace(of_trial, lr=1e-12)
        metrics = train(of_trial, tmp_path / spec.trial_id, lambda _metrics: None, teacher_cache=cache)
        plan.tell(spec.trial_id, outcome_of({**metrics, "steps": config.steps, "status": "completed"}, crashed=False))
    decision = decide(plan.table())
    assert [each.trial_id for each in decision.suspects] == [FAILS]
    assert "layer 2 at cosine 1.00 and layer 3 at cosine 1.00" in decision.suspects[0].evidence
    table = plan.table()
    without = decide(table[table["trial_id"] != FAILS])
    assert decision.verdict == without.verdict, decision.reason
    assert (decision.beta_kl, decision.kl_temperature) == (without.beta_kl, without.kl_temperature)
    failed = next(spec for spec in asked if spec.trial_id == FAILS)
    again = [spec for spec in asked if (spec.beta_kl, spec.kl_temperature) == (failed.beta_kl, failed.kl_temperature)]
    assert len(again) == 2
    assert again[1].seed != failed.seed
