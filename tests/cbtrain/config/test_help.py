"""What `--help` says of every command: each flag once, in one group, on one screen, in the words of a user."""

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tyro

from analysis import pick_beta
from cbtrain import calibrate, complete, evaluate, inspect_data, train
from cbtrain.config import PRESETS, cli, get_config
from cbtrain.config.help import COLUMN, WIDTH, Help, grouped, page
from cbtrain.config.schema import GROUPS, CircuitBreakerConfig
from sweeps import settings as sweep

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "sweeps/kl_ablation.py": (sweep.SweepSettings, sweep.HELP),
    "-m cbtrain.train": (train.TrainSettings, train.HELP),
    "-m cbtrain.evaluate": (evaluate.EvaluateSettings, evaluate.HELP),
    "-m cbtrain.calibrate": (calibrate.CalibrateSettings, calibrate.HELP),
    "-m cbtrain.data": (inspect_data.InspectionSettings, inspect_data.HELP),
    "-m cbtrain.complete": (complete.CompletionSettings, complete.HELP),
    "analysis/pick_beta.py": (pick_beta.PickSettings, Help()),
}
each_command = pytest.mark.parametrize(("declared", "about"), COMMANDS.values(), ids=COMMANDS)


def text(declared: type, about: Help, *, every: bool) -> str:
    return page(declared(), "command", about, every=every)


def flags_in(shown: str) -> list[str]:
    """What stands where a flag's entry begins."""
    return re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE)


def parsed_flags(declared: type, capsys: Any) -> set[str]:
    """The flags that the parser itself takes, as its own help begins its entries."""
    with pytest.raises(SystemExit):
        tyro.cli(declared, default=declared(), args=["--help"], config=[tyro.conf.OmitArgPrefixes])
    own = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return set(re.findall(r"^\W*(--[a-z][a-z0-9-]+)", own, re.MULTILINE))


@each_command
def test_help_all_names_every_flag_that_the_parser_takes_exactly_once(declared: type, about: Help, capsys: Any) -> None:
    shown = Counter(flags_in(text(declared, about, every=True)))
    assert set(shown.values()) == {1}, shown.most_common(3)
    assert set(shown) == parsed_flags(declared, capsys)


@each_command
def test_every_flag_belongs_to_one_group_that_is_declared(declared: type, about: Help) -> None:
    groups = grouped(declared(), about)
    members = Counter(name for names in groups.values() for name in names)
    names = {each.name for each in dataclasses.fields(declared)} - {"config"}
    if hasattr(declared(), "config"):
        names |= {each.name for each in dataclasses.fields(CircuitBreakerConfig)}
        assert "Flags" not in groups, groups.get("Flags")
    assert members == Counter(names)


def test_the_groups_of_the_configuration_hold_each_of_its_fields_once() -> None:
    members = [name for names in GROUPS.values() for name in names]
    assert sorted(members) == sorted(each.name for each in dataclasses.fields(CircuitBreakerConfig))


@each_command
@pytest.mark.parametrize("every", [False, True])
def test_help_is_80_columns_wide_and_in_the_users_words(declared: type, about: Help, every: bool) -> None:
    shown = text(declared, about, every=every)
    assert max(map(len, shown.splitlines())) <= WIDTH, max(shown.splitlines(), key=len)
    assert "{" not in shown
    assert "None|" not in shown
    assert "|None" not in shown


def test_help_all_is_asked_for_with_underscores_too(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.read(pick_beta.PickSettings(), ["--help_all"], "x")
    assert "--reroute-tolerance" in capsys.readouterr().out


@each_command
def test_help_is_one_screen_that_says_how_to_see_the_rest(declared: type, about: Help) -> None:
    shown = text(declared, about, every=False)
    assert len(shown.splitlines()) <= 50, shown
    if about.first:
        assert set(flags_in(shown)) == {cli.flag(name) for name in about.first}
        assert "--help-all" in shown.splitlines()[-1]


@each_command
def test_every_flag_has_a_meaning(declared: type, about: Help) -> None:
    for entry in re.split(r"^  (?=--)", text(declared, about, every=True), flags=re.MULTILINE)[1:]:
        assert any(line[COLUMN - 2 :].strip() for line in entry.splitlines()[:2]), entry


@pytest.mark.parametrize("name", ["beta_kl", "kl_temperature"])
def test_a_sweep_says_of_what_it_searches_that_it_is_searched(name: str) -> None:
    shown = " ".join(text(sweep.SweepSettings, sweep.HELP, every=True).split())
    says = f"{cli.flag(name)} FLOAT Searched by the sweep, and refused as a flag: give {cli.flag(name)}-range."
    assert says in shown
    with pytest.raises(cli.InputError, match=f"{cli.flag(name)} 0.7: the sweep searches it"):
        sweep.refuse_searched(sweep.SweepSettings(config=get_config("tiny", **{name: 0.7})), [name])


def test_presets_are_those_of_the_table_and_the_defaults_those_of_the_one_that_is_named(capsys: Any) -> None:
    for preset, lr in (("llama-3-8b-instruct", "0.0001"), ("tiny", "0.004"), ("no_such", "0.004")):
        with pytest.raises(SystemExit) as stop:
            cli.parse(train.TrainSettings, ["--preset", preset, "-h"], "x", derived=None, about=train.HELP)
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"One of {', '.join(PRESETS)} (default" in shown
        assert f"Peak learning rate of AdamW (default {lr})" in shown


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("asked", ["--help", "--help-all"])
def test_help_is_printed_without_torch_or_ray(command: str, asked: str) -> None:
    run = [sys.executable, "-X", "importtime", *command.split(), asked]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"torch", "ray", "transformers", "optuna", "wandb"}
    if "pick_beta" not in command:
        assert not imported & {"scipy", "pandas", "matplotlib", "pydantic"}
