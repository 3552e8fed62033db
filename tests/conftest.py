"""A small random-weight Llama on the embedded world's words, saved as a model directory with its data."""

import json
import random
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from worlds import config_on, save_llama

from cbtrain.config import CircuitBreakerConfig
from cbtrain.model import tiny

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # how long an example takes says something of the machine alone
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds model, tokenizer, harmful.jsonl and benign.jsonl."""
    directory = tmp_path_factory.mktemp("small_world")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.2}
    save_llama(directory, tiny.make_tokenizer(), tie_word_embeddings=True, **shape)
    rng = random.Random(0)
    for name, verbs, objects in (
        ("harmful", tiny.DUAL_USE_VERBS, tiny.GUARDED_OBJECTS),
        ("benign", tiny.PLAIN_VERBS, tiny.PLAIN_OBJECTS),
    ):
        pairs = list(product(verbs, objects))[:32]
        rows = [json.dumps(tiny.chat(pair, rng)) for pair in pairs]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return directory


@pytest.fixture
def small_config(small_world: Path) -> CircuitBreakerConfig:
    """Four steps of eight rows a side."""
    return config_on(small_world, warmup_steps=2, eval_every=2)
