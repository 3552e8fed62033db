"""A sweep to resume."""

import dataclasses
from pathlib import Path

import pytest
from simulated import file_storage, measured, next_trial, plan_of

from cbtrain.model.identity import identities
from sweeps.storage.run_directory import RunDirectory


@pytest.fixture
def killed(small_config, small_world, tmp_path, monkeypatch, quick) -> RunDirectory:
    """A sweep of 6 that was killed after its second trial, with two running; its data lie in `data/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("harmful", "benign"):
        (tmp_path / "data" / f"{name}.jsonl").write_text((small_world / f"{name}.jsonl").read_text())
    config = dataclasses.replace(
        small_config,
        harmful=(str(tmp_path / "data" / "harmful.jsonl"),),
        benign=(str(tmp_path / "data" / "benign.jsonl"),),
    )
    run = RunDirectory(Path("run"))
    plan = plan_of(6, baseline_seeds=3)
    with run.locked():
        run.create(
            {
                "preset": "tiny",
                "config_overrides": {},
                "flags": {"teacher_cache": "off", "max_concurrent": None},
                "settings": dataclasses.asdict(plan.settings),
                "plan": dataclasses.asdict(plan.budget),
                "config": dataclasses.asdict(config),
                "inputs": identities(config),
                "concurrency": 2,
            }
        )
        plan = plan_of(6, file_storage(run.path), baseline_seeds=3)
        specs = [next_trial(plan) for _ in range(4)]
        for spec in specs[:2]:
            plan.tell(spec.trial_id, measured(spec))
        run.write_trials(plan.rows())
    return run
