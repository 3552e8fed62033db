"""A model that needs Python code of its own runs it by --trust-remote-code alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from cbtrain.config import CircuitBreakerConfig, InputError, cli
from cbtrain.config.saved import config_of_adapter
from cbtrain.model.auto import derived
from cbtrain.model.checks import check_fit
from cbtrain.model.loading import load_base
from cbtrain.train import TrainSettings
from sweeps.settings import SweepSettings
from sweeps.storage.resume import recorded
from sweeps.storage.run_directory import RunDirectory

OWN = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({mark!r}).touch()

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def own(small_world: Path, tmp_path: Path) -> Path:
    """The small model as one that transformers does not know."""
    place = Path(shutil.copytree(small_world, tmp_path / "own"))
    config = json.loads((place / "config.json").read_text())
    named = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (place / "config.json").write_text(json.dumps(config | named))
    (place / "own.py").write_text(OWN.format(mark=str(tmp_path / "executed")))
    return place


def test_without_the_flag_nothing_of_it_is_run(small_config: CircuitBreakerConfig, own: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config, model=str(own))
    for look in (check_fit, load_base, lambda config: derived(config.model)):
        with pytest.raises(InputError, match="needs Python code of its own, which would run here; read it"):
            look(config)
    assert not (tmp_path / "executed").exists()


def test_with_the_flag_it_is_the_model(small_config: CircuitBreakerConfig, own: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config, model=str(own), trust_remote_code=True)
    assert check_fit(config) == 3
    same = load_base(small_config).state_dict()
    same = {name: tensor.clone() for name, tensor in same.items()}
    assert all(torch.equal(tensor, same[name]) for name, tensor in load_base(config).state_dict().items())
    assert (tmp_path / "executed").exists()
    flags = ["--model", str(own), "--trust_remote_code"]
    settings = cli.parse(TrainSettings, flags, "python -m cbtrain.train", derived=derived)
    assert settings.config.trust_remote_code
    with pytest.raises(InputError, match="read it, then give --trust-remote-code"):
        cli.parse(TrainSettings, [*flags, "--no-trust-remote-code"], "python -m cbtrain.train", derived=derived)


def test_no_file_of_an_earlier_run_lets_code_run(small_config: CircuitBreakerConfig, tmp_path: Path) -> None:
    trusting = dataclasses.asdict(dataclasses.replace(small_config, trust_remote_code=True))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(trusting))
    assert config_of_adapter(tmp_path / "adapter").trust_remote_code is False

    run = RunDirectory(tmp_path / "run")
    run.record = {"config": trusting, "settings": {"num_samples": 6}, "plan": {"baseline": 3}}
    settings = SweepSettings()
    record = {"confidence": 0.95, "reroute_tolerance": 0.05, "sampler": "gp", "seed": 0, "baseline_seeds": 3}
    run.record["settings"] |= record
    assert recorded(run, settings, ["--resume", "run"])[0].config.trust_remote_code is False
    settings.config.trust_remote_code = True
    assert recorded(run, settings, ["--resume", "run", "--trust-remote-code"])[0].config.trust_remote_code is True
