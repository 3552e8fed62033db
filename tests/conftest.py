"""A small random-weight Llama on the embedded world's words, saved as a model directory with its data."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from cbtrain.config import CircuitBreakerConfig
from cbtrain.utils.environment import importing

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of every process here; two share the cores at least
os.environ.setdefault("RAY_worker_niceness", "0")  # else they starve beside other tests, and time limits are met
with importing():
    import torch
    from worlds import build_small_world, config_on

    import cbtrain.training.loop  # noqa: F401  what most tests import

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # how long an example takes says something of the machine alone
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds model, tokenizer, harmful.jsonl and benign.jsonl."""
    directory = tmp_path_factory.mktemp("small_world")
    build_small_world(directory)
    return directory


@pytest.fixture
def small_config(small_world: Path) -> CircuitBreakerConfig:
    """Four steps of eight rows a side."""
    return config_on(small_world, warmup_steps=2, eval_every=2)
