"""The families' table says what happens: every refusal in it, and one family of each build that works."""

import pytest
from family_table import README, group, parse, render
from run_family import Outcome, run
from tiny_configs import MODEL_TYPES, NOT_TRIED

TABLE = parse(README.read_text())
REFUSED = [name for name, what in TABLE.items() if what.startswith("refused")]
WORK = (
    "bamba bart bloom deepseek_v3 falcon falcon_h1 gemma4 gpt2 gpt_oss granitemoehybrid jamba "
    "jetmoe llama4 mamba mpt nemotron_h qwen3_next rwkv xlstm zamba2"
).split()
"""Blocks of every kind: attention, latent attention, convolutions, recurrences, experts; every way to complete."""


def test_every_model_type_of_the_library_is_in_the_table_and_none_fails():
    assert sorted(TABLE) == sorted(MODEL_TYPES)
    assert {what.partition(":")[0] for what in TABLE.values()} == {"works", "refused", "not tried"}
    assert {name for name, what in TABLE.items() if what.startswith("not tried")} == set(NOT_TRIED)


def test_a_table_is_read_as_it_is_written():
    outcomes = {f"family-{i}": Outcome("works") for i in range(40)} | {"other": Outcome("refused", "is (no) decoder")}
    assert parse(f"# Families\n\n{render(outcomes)}") == {name: group(outcome) for name, outcome in outcomes.items()}


@pytest.mark.parametrize("model_type", [*WORK, *REFUSED])
def test_the_table_says_what_becomes_of_a_model_type(model_type, tmp_path):
    assert group(run(model_type, tmp_path)) == TABLE[model_type]
