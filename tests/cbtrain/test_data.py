"""Both sides as tokens, the held-out split, and the batches of a step."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from chat_tokenizers import CHATML, LLAMA3, bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtrain.config import CircuitBreakerConfig, InputError, get_config
from cbtrain.data import (
    CircuitBreakerData,
    SideCounts,
    SideData,
    TokenBatch,
    TokenRow,
    _held_out_prompts,
    collate,
    held_out_batches,
    load_data,
    normalized_prompt,
    pad_token_id,
    step_batches,
)

AGENTDOJO = Path(__file__).parents[2].parent / "shared" / "data" / "agentdojo"


def pair(prompt: str, completion: str = "first take the key") -> dict:
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def config_of(tmp_path):
    """A function: rows of both sides, written to files, to a configuration that reads them."""

    def build(harmful: list[dict], benign: list[dict], **overrides) -> CircuitBreakerConfig:
        files = {}
        for side, rows in (("harmful", harmful), ("benign", benign)):
            path = tmp_path / f"{side}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[side] = (str(path),)
        return get_config("tiny", **files, **overrides)

    return build


def token_row(number: int, length: int = 4, scored: int = 2) -> TokenRow:
    """A row of `length` tokens `number`, the last `scored` of them scored."""
    mask = tuple(i >= length - scored for i in range(length))
    return TokenRow((number,) * length, mask, f"prompt {number}", f"f.jsonl:{number}")


def data_of(harmful: int, benign: int) -> CircuitBreakerData:
    """`harmful` rows numbered from 1 and `benign` rows numbered from 1001, of different lengths."""
    sides = [
        SideData([token_row(first + i, 4 + i % 3, 2 + i % 2) for i in range(count)], [], SideCounts(1, count, *[0] * 5))
        for first, count in ((1, harmful), (1001, benign))
    ]
    return CircuitBreakerData(*sides)


def numbers(batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def test_loading_splits_counts_and_describes_both_sides(config_of):
    harmful = [pair(f"harm {i}") for i in range(20)] + [{"messages": [{"role": "user", "content": "harm"}]}]
    data = load_data(config_of(harmful, [pair(f"help {i}") for i in range(30)]), bpe_tokenizer())
    for side, rows, dropped in ((data.harmful, 21, 1), (data.benign, 30, 0)):
        scored = sum(sum(row.scored) for row in side.train + side.held_out)
        assert side.counts == SideCounts(1, rows, 0, 0, 0, dropped, scored)
        assert len(side.train) + len(side.held_out) == rows - dropped
    lines = data.describe()
    assert lines[0] == (
        f"harmful {len(data.harmful.train)} train / {len(data.harmful.held_out)} held out · "
        f"benign {len(data.benign.train)} train / {len(data.benign.held_out)} held out"
    )
    assert lines[1] == f"scored tokens {data.harmful.counts.scored_tokens} / {data.benign.counts.scored_tokens}"
    assert lines[2] == "dropped, no scored token 1 / 0"


def test_the_prediction_mask_points_at_the_position_before_each_scored_token(config_of):
    tokenizer = bpe_tokenizer(LLAMA3)
    answers_of = [pair("a", "the door"), pair("b", "the old wooden door")]
    data = load_data(config_of(answers_of, [pair("c"), pair("d")]), tokenizer)
    batch = collate(data.harmful.train + data.harmful.held_out, pad_token_id(tokenizer))
    answers = []
    for i in range(2):
        positions = batch.prediction_mask[i].nonzero().flatten()
        answers.append(tokenizer.decode(batch.input_ids[i, positions + 1]))
        assert tokenizer.decode(batch.input_ids[i, positions[0]]).endswith("\n")
    assert sorted(answers) == ["the door<|eot_id|>", "the old wooden door<|eot_id|>"]


def test_padding_is_decided_by_the_attention_mask_where_pad_is_the_end_of_text():
    eos = 7
    ends_on_eos = TokenRow((1, 2, eos), (False, True, True), "p", "f:1")
    longer = TokenRow((1, 2, 3, 4, eos), (False, False, False, True, True), "p", "f:2")
    batch = collate([ends_on_eos, longer], pad_token_id=eos)
    assert batch.input_ids.tolist() == [[1, 2, eos, eos, eos], [1, 2, 3, 4, eos]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.loss_mask.tolist() == [[False, True, True, False, False], [False, False, False, True, True]]
    assert batch.prediction_mask.tolist() == [[True, True, False, False, False], [False, False, True, True, False]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.int64)
    assert batch.loss_mask.dtype == batch.prediction_mask.dtype == torch.bool


def test_a_mask_over_padding_predicts_nothing():
    batch = TokenBatch(torch.ones(1, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 0]]), torch.ones(1, 4).bool())
    assert batch.prediction_mask.tolist() == [[True, True, False, False]]


def test_a_first_token_is_scored_but_is_no_prediction():
    row = TokenRow((1, 2, 3), (True, True, True), "p", "f:1")
    assert (row.scored_tokens, row.scored_predictions) == (3, 2)
    assert int(collate([row], 0).prediction_mask.sum()) == 2


def test_the_pad_token_is_pad_then_end_of_text_then_zero():
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_truncation_is_counted_and_keeps_the_answer(config_of):
    tokenizer = bpe_tokenizer(LLAMA3)
    long = pair("word " * 300, "open the door")
    config = config_of([long, pair("a")], [pair("b"), pair("c")], max_length=24)
    data = load_data(config, tokenizer)
    (row,) = [row for row in data.harmful.train + data.harmful.held_out if row.prompt.startswith("word")]
    assert (data.harmful.counts.truncated, data.benign.counts.truncated) == (1, 0)
    assert len(row.input_ids) == 24
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode([t for t, scored in zip(row.input_ids, row.scored, strict=True) if scored]) == (
        "open the door<|eot_id|>"
    )


def test_one_prompt_is_never_in_training_on_one_side_and_held_out_on_the_other(config_of):
    variants = [("Open  the DOOR", "open the door"), ("ｆｉｎｄ\nit", "find it")]
    harmful = [pair(f"question {i}") for i in range(40)] + [pair(a) for a, _ in variants]
    benign = [pair(f"Question   {i}", "no") for i in range(20, 60)] + [pair(b) for _, b in variants]
    data = load_data(config_of(harmful, benign), bpe_tokenizer())
    train = {row.prompt for side in (data.harmful, data.benign) for row in side.train}
    held_out = {row.prompt for side in (data.harmful, data.benign) for row in side.held_out}
    assert train.isdisjoint(held_out), train & held_out
    assert len(train | held_out) == 62
    assert normalized_prompt("ｆｉｎｄ\nit") in train | held_out


def test_a_row_keeps_its_part_when_rows_are_added(config_of):
    rows = [pair(f"question {i}") for i in range(40)]
    benign = [pair("x"), pair("y"), pair("z")]
    few = load_data(config_of(rows[:20], benign), bpe_tokenizer()).harmful
    many = load_data(config_of(rows[::-1], benign), bpe_tokenizer()).harmful
    assert {row.prompt for row in few.held_out} <= {row.prompt for row in many.held_out}
    assert {row.prompt for row in few.train} <= {row.prompt for row in many.train}
    assert 5 <= len(many.held_out) <= 35, len(many.held_out)


prompts = st.sets(st.integers(0, 12), min_size=2, max_size=6)


@settings(max_examples=300)
@given(harmful=prompts, benign=prompts, fraction=st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.99]))
def test_every_side_has_both_parts_whatever_the_prompts(harmful, benign, fraction):
    sides = {"harmful": [token_row(i) for i in harmful], "benign": [token_row(i) for i in benign]}
    held_out = _held_out_prompts(sides, fraction)
    for side, rows in sides.items():
        parts = Counter(row.prompt in held_out for row in rows)
        assert parts[True] > 0, (side, harmful, benign, held_out)
        assert parts[False] > 0, (side, harmful, benign, held_out)


def test_a_side_with_a_single_prompt_is_an_error(config_of):
    config = config_of([pair("same"), pair("SAME ")], [pair("a"), pair("b")])
    with pytest.raises(InputError, match="--harmful: all 2 scored rows have the same user prompt"):
        load_data(config, bpe_tokenizer())


def test_a_side_without_a_scored_token_names_file_and_policy(config_of):
    config = config_of([pair("a"), pair("b")], [{"messages": [{"role": "user", "content": "hello"}]}] * 3)
    with pytest.raises(InputError) as caught:
        load_data(config, bpe_tokenizer())
    assert str(caught.value) == (
        f"--benign {config.benign[0]}: 0 of 3 rows have a scored token under completion_only; "
        "the rows end on a user turn. Try --mask-policy full_sequence"
    )


def test_batches_depend_on_seed_and_step_alone():
    data, config = data_of(10, 14), get_config("tiny", batch_size=4, seed=3)
    once = [step_batches(data, config, step, 0) for step in range(8)]
    again = [step_batches(data, config, step, 0) for step in reversed(range(8))][::-1]
    for (first, _), (second, _) in zip(once, again, strict=True):
        assert torch.equal(first[0].harmful.input_ids, second[0].harmful.input_ids)
        assert torch.equal(first[0].benign.input_ids, second[0].benign.input_ids)
    orders = []
    for seed in range(3):
        config = get_config("tiny", batch_size=4, seed=seed)
        orders.append([numbers(step_batches(data, config, step, 0)[0][0].harmful) for step in range(3)])
    assert orders[0] != orders[1] != orders[2]


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own():
    data, config = data_of(10, 14), get_config("tiny", batch_size=4)
    seen = [number for step in range(5) for number in numbers(step_batches(data, config, step, 0)[0][0].harmful)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11))
    assert seen[:10] != seen[10:]


def test_a_side_with_fewer_rows_than_the_batch_repeats():
    pairs, _ = step_batches(data_of(3, 40), get_config("tiny", batch_size=8), 0, 0)
    counts = Counter(numbers(pairs[0].harmful))
    assert set(counts) == {1, 2, 3}
    assert sum(counts.values()) == 8
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(set(numbers(pairs[0].benign))) == 8


@pytest.mark.parametrize(("world_size", "micro"), [(1, None), (2, None), (4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("step", [0, 5])
def test_ranks_and_micro_steps_partition_the_global_batch(world_size, micro, step):
    data = data_of(10, 14)
    ((whole,), counts) = step_batches(data, get_config("tiny", batch_size=12), step, 0)
    config = get_config("tiny", batch_size=12, micro_batch_size=micro)
    shares = [step_batches(data, config, step, 0, rank, world_size) for rank in range(world_size)]
    for side in ("harmful", "benign"):
        parts = [numbers(getattr(pair, side)) for pairs, _ in shares for pair in pairs]
        assert [number for part in parts for number in part] == numbers(getattr(whole, side))
        assert {len(part) for part in parts} == {micro or 12 // world_size}
    assert all(share_counts == counts for _, share_counts in shares)


def test_counts_are_those_of_the_tensors():
    data, config = data_of(10, 14), get_config("tiny", batch_size=12, micro_batch_size=2)
    for step in range(4):
        pairs, counts = step_batches(data, config, step, 0)
        assert counts.harmful_tokens == sum(int(pair.harmful.loss_mask.sum()) for pair in pairs)
        assert counts.benign_tokens == sum(int(pair.benign.loss_mask.sum()) for pair in pairs)
        assert counts.benign_predictions == sum(int(pair.benign.prediction_mask.sum()) for pair in pairs)


@pytest.mark.parametrize(("world_size", "micro"), [(5, None), (3, 4), (16, None)])
def test_a_batch_that_does_not_divide_is_an_error(world_size, micro):
    config = get_config("tiny", batch_size=8, micro_batch_size=micro)
    with pytest.raises(InputError, match=f"--batch-size 8: not divisible by {world_size} workers"):
        step_batches(data_of(4, 4), config, 0, 0, 0, world_size)


def test_held_out_batches_hold_every_row_once_by_length():
    rows = [token_row(i, 3 + i * 7 % 5) for i in range(11)]
    batches = held_out_batches(rows, 4, 0)
    assert [len(batch.input_ids) for batch in batches] == [4, 4, 3]
    assert sorted(number for batch in batches for number in numbers(batch)) == list(range(11))
    lengths = [length for batch in batches for length in batch.attention_mask.sum(1).tolist()]
    assert lengths == sorted(lengths)
    shuffled = held_out_batches(rows[::-1], 4, 0)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, shuffled, strict=True))


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize(("name", "harmful"), [("gpt-4o-mini-2024-07-18", 21), ("llama-3-70b-chat", 26)])
def test_agentdojo_runs_given_to_both_sides_load(name, harmful, template):
    path = AGENTDOJO / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the AgentDojo runs are not beside this checkout (shared/data/agentdojo)")
    tokenizer = bpe_tokenizer(template)
    config = get_config("tiny", harmful=(str(path),), benign=(str(path),), eval_fraction=0.2, max_length=512)
    data = load_data(config, tokenizer)
    assert (data.harmful.counts.rows, data.benign.counts.rows) == (harmful, 97)
    train = {row.prompt for side in (data.harmful, data.benign) for row in side.train}
    rows = [row for side in (data.harmful, data.benign) for row in side.train + side.held_out]
    assert train.isdisjoint({row.prompt for side in (data.harmful, data.benign) for row in side.held_out})
    for row in rows:
        assert len(row.input_ids) <= 512
        assert row.scored_predictions > 0, row.source
        ends_with_its_turn = tokenizer.decode(row.input_ids[-2:]).strip().endswith(("<|im_end|>", "<|eot_id|>"))
        assert ends_with_its_turn or all(row.scored[2:]), row.source
