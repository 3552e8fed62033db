"""The decision and its report go by what the sweep searched, and say where the pick sits at an end of it."""

import re

import pandas as pd
import pytest
from decisions import decision_and_commands
from synthetic import BASELINE_LOSS, MakeRun, Surface, make_trials

from analysis.decide import decide, decide_with_model
from analysis.pick_beta import main, write_report
from analysis.report import wording
from analysis.report.figures import by_setting
from analysis.report.figures.settings_map import prepare_map
from analysis.surrogate.search_space import SearchSpace

SETTINGS = {"num_samples": 18, "reroute_tolerance": 0.05, "confidence": 0.95}
HARMLESS = Surface(threshold=40.0)


def one_temperature(surface: Surface, heat: float) -> pd.DataFrame:
    """A sweep at a single temperature; the baseline's row has 1.0, where it is inert."""
    trials = make_trials(surface, searched=12)
    with_kl = trials["beta_kl"] > 0
    trials.loc[with_kl, "kl_temperature"] = heat
    beta, heats = trials["beta_kl"].to_numpy(), trials["kl_temperature"].to_numpy()
    loss = BASELINE_LOSS + surface.lost(beta, heats) + 0.001 * (trials["seed"] - 1)
    return trials.assign(eval_loss_reroute=loss, eval_benign_kl=surface.drift(beta, heats))


def test_over_a_single_temperature_the_choice_is_between_weights() -> None:
    searched = SearchSpace(kl_temperature=(2.0, 2.0))
    decision = decide(one_temperature(Surface(), 2.0), searched=searched)
    assert (decision.verdict, decision.kl_temperature, decision.searched) == ("choose", 2.0, searched)
    limit = decision.tolerance
    lost = Surface().lost(decision.beta_kl, 2.0)
    assert 0.1 * limit < lost <= limit, f"{lost} of {limit} lost at {decision.beta_kl}"
    assert [rule.evidence for rule in decision.rules_of_thumb[2:]] == [
        "(0.3, T 1) is not searched",
        "(0.5, T 1) is not searched",
    ]
    assert decision.wider is None


def test_no_candidate_qualifies_names_the_range_that_it_speaks_of() -> None:
    trials = make_trials(Surface(always_lost=0.2), searched=14)
    default = decide(trials)
    assert default.reason == (
        "Every beta_kl from 0.001 to 2 costs more rerouting than the limit allows, at kl_temperature 1–4. Without KL "
        "benign drift is 9.63 nats/token."
    )
    assert wording.headline(default) == "Use beta_kl = 0: no KL weight qualifies, all from 0.001 to 2 lose too much."
    assert (default.wider, default.range_warning) == (None, "")
    (warning,) = default.warnings
    assert re.match(r"Even beta_kl 0\.00\d+ loses \+0\.[12]\d\d, about as much as ten times it", warning)
    vanishing = decide(make_trials(Surface(threshold=2e-4, slope=0.05), searched=14))
    assert (vanishing.verdict, vanishing.warnings) == ("no_candidate_qualifies", ()), "it does vanish with the weight"
    trials = trials[(trials["beta_kl"] == 0) | (trials["beta_kl"] >= 0.2)]
    above = decide(trials, searched=SearchSpace((0.2, 2.0)))
    assert above.verdict == "no_candidate_qualifies"
    assert "all from 0.2 to 2 lose" in wording.headline(above)
    end = "None qualifies down to the lower end of the beta_kl range 0.2–2: what lies below was not searched."
    assert (above.range_warning, above.warnings) == (end, (end,))
    assert above.wider == SearchSpace((0.02, 2.0))


def test_the_map_covers_the_range_and_not_what_lies_beyond() -> None:
    trials = make_trials(Surface(threshold=0.03, slope=0.3), searched=12)
    high = trials[(trials["beta_kl"] == 0) | (trials["beta_kl"] >= 0.2)]
    assert decide(high).verdict == "insufficient_evidence", "small weights are untried"
    assert decide(high, searched=SearchSpace((0.2, 2.0))).verdict == "no_candidate_qualifies"


def test_trials_outside_the_ranges_count_and_may_be_recommended(trials: pd.DataFrame) -> None:
    decision = decide(trials, searched=SearchSpace((0.001, 0.05)))
    assert len(decision.settings) == len(decide(trials).settings)
    assert decision.verdict == "choose"
    assert decision.beta_kl > 0.05
    assert decision.wider is None, "a pick outside sits at no end"


def test_a_pick_at_an_end_is_said_in_every_report_with_the_command_that_goes_on(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = one_temperature(HARMLESS, 1.0)
    trials.loc[4, "beta_kl"] = 2.0
    trials.loc[4, "eval_benign_kl"] = HARMLESS.drift(2.0, 1.0)
    ranges = {"beta_kl_range": [0.001, 2.0], "kl_temperature_range": [1.0, 1.0], "seed": 7}
    overrides = {"model": "my model", "steps": 90}
    run = make_run(trials, settings=SETTINGS | ranges, config_overrides=overrides, preset="qwen3-8b")
    assert main([str(run), "--reroute-tolerance", "0.06"]) == 0
    printed = capsys.readouterr().out
    said = "The pick sits at the upper end of the beta_kl range 0.001–2: what lies above was not searched."
    command = (
        "python sweeps/kl_ablation.py --preset qwen3-8b --num-samples 18 --reroute-tolerance 0.06 --seed 7 "
        "--beta-kl-range 0.001 20.0 --kl-temperature-range 1.0 1.0 --model 'my model' --steps 90"
    )
    texts = [printed, *((run / "report" / name).read_text() for name in ("report.md", "report.html"))]
    for text in texts:
        flat = " ".join(text.replace("\\\n", " ").replace("&#39;", "'").split())
        assert said in flat, text
        assert command in flat, text
    lines = printed.splitlines()
    assert max(len(line) for line in lines if str(run) not in line) <= 80, lines
    assert any(line.startswith("wider   python sweeps/kl_ablation.py") for line in lines)
    decision, commands = decision_and_commands(run, reroute_tolerance=0.06)
    assert (decision.range_warning, commands.wider) == (said, command)
    written = (run / "report" / "decision.json").read_text()
    assert '"wider_command": "python sweeps' in written
    assert "| searched | beta_kl 0.001–2, kl_temperature 1 |" in texts[1]


def test_a_pick_inside_its_ranges_says_nothing_of_ends(make_run: MakeRun, trials: pd.DataFrame) -> None:
    trials.loc[trials["beta_kl"] == 0.5, "kl_temperature"] = 0.8
    run = make_run(trials, settings=SETTINGS | {"kl_temperature_range": [0.5, 4.0]})
    decision, commands = write_report(run)
    assert (decision.verdict, decision.range_warning, decision.wider, commands.wider) == ("choose", "", None, None)
    assert "beyond these ranges" not in (run / "report" / "report.html").read_text()


def test_a_further_sweep_searches_what_this_one_did(make_run: MakeRun) -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=6)
    run = make_run(trials, settings=SETTINGS | {"beta_kl_range": [0.05, 3], "kl_temperature_range": [1, 2]})
    decision, commands = decision_and_commands(run)
    assert decision.verdict == "insufficient_evidence"
    assert "--beta-kl-range 0.05 3.0 --kl-temperature-range 1.0 2.0" in commands.next


def test_a_further_sweep_takes_a_recipe_that_was_found_and_looks_for_none(make_run: MakeRun) -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=6)
    spent = {"reason": "Converged.", "runs": 3, "steps_spent": 90, "max_steps": 300, "wall_s": 60.0}
    found = {"converged": True, "settings": {"lr": 1e-3, "retain_scale": 10.0, "steps": 150}} | spent
    run = make_run(trials, settings=SETTINGS, preset="auto", config_overrides=found["settings"], calibration=found)
    _, commands = decision_and_commands(run)
    assert "--no-calibrate --preset auto" in commands.next
    assert "--lr 0.001 --retain-scale 10.0 --steps 150" in commands.next


@pytest.mark.parametrize(("value", "flag"), [(True, "--cpu-offload"), (False, "--no-cpu-offload")])
def test_a_field_that_is_on_or_off_is_repeated_as_the_sweep_takes_it(make_run: MakeRun, value: bool, flag: str) -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=6)
    _, commands = decision_and_commands(make_run(trials, settings=SETTINGS, config_overrides={"cpu_offload": value}))
    assert flag in str(commands.next).split()
    assert str(value) not in str(commands.next)


def test_a_run_directory_without_ranges_was_searched_over_the_defaults(make_run: MakeRun, trials: pd.DataFrame) -> None:
    decision, _ = decision_and_commands(make_run(trials))
    assert decision.searched == SearchSpace()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"beta_kl_range": [2.0, 0.1]}, "--beta-kl-range 2 0.1: must be two numbers"),
        ({"beta_kl_range": [2.0]}, "settings.beta_kl_range"),
        ({"kl_temperature_range": "1 4"}, "settings.kl_temperature_range"),
    ],
)
def test_ranges_that_no_sweep_has_are_refused_with_the_file(
    make_run: MakeRun, trials: pd.DataFrame, capsys: pytest.CaptureFixture[str], ranges: dict, message: str
) -> None:
    run = make_run(trials, settings=SETTINGS | ranges)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run}/sweep.json: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_single_temperature_has_one_line_and_no_map(trials: pd.DataFrame) -> None:
    searched = SearchSpace(kl_temperature=(2.0, 2.0))
    alone = one_temperature(Surface(), 2.0)
    decision, model = decide_with_model(alone, searched=searched)
    data = by_setting.prepare_by_setting(alone, decision, model)
    assert [band.label for band in data.bands] == ["T 2.0"]
    assert prepare_map(decision, model) is None
    decision, model = decide_with_model(trials)
    several = by_setting.prepare_by_setting(trials, decision, model)
    assert len(several.bands) == 3
    assert sum(len(band.beta_kl) for band in several.bands) == (trials["beta_kl"] > 0).sum()
