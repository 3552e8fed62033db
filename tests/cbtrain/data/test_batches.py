"""Rows as batches, and the batches of every step."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from chat_tokenizers import bpe_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from masks import prediction_mask, token_mask

from cbtrain.config import InputError, get_config
from cbtrain.data.batches import (
    TeacherStates,
    collate,
    collate_by_length,
    held_out_batches,
    pad_token_id,
    smaller_micro_batches,
    step_batches,
)
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.tokenization import TokenRow


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


def test_padding_is_decided_by_the_attention_mask_where_pad_is_the_end_of_text():
    eos = 7
    ends_on_eos = TokenRow((1, 2, eos), (False, True, True), "p", "f:1")
    longer = TokenRow((1, 2, 3, 4, eos), (False, False, False, True, True), "p", "f:2")
    batch = collate([ends_on_eos, longer], pad_token_id=eos)
    assert batch.input_ids.tolist() == [[1, 2, eos, eos, eos], [1, 2, 3, 4, eos]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert token_mask(batch).tolist() == [[False, True, True, False, False], [False, False, False, True, True]]
    assert prediction_mask(batch).tolist() == [[True, True, False, False, False], [False, False, True, True, False]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.int64)
    assert batch.scored_tokens.tolist() == [1, 2, 8, 9]
    assert batch.scored_predictions.tolist() == [0, 1, 7, 8]


def test_a_first_token_is_scored_but_is_no_prediction():
    row = TokenRow((1, 2, 3), (True, True, True), "p", "f:1")
    assert (row.scored_tokens, row.scored_predictions) == (3, 2)
    assert collate([row], 0).scored_predictions.tolist() == [0, 1]


def test_the_pad_token_is_pad_then_end_of_text_then_zero():
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_a_pad_token_that_the_model_has_no_embedding_for_fills_nothing():
    tokenizer = bpe_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    assert pad_token_id(tokenizer, size) == tokenizer.eos_token_id
    assert pad_token_id(tokenizer, size + 1) == size


def test_batches_depend_on_seed_and_step_alone():
    data, config = data_of(10, 14), get_config("tiny", batch_size=4, seed=3)
    once = [step_batches(data, config, step, 0) for step in range(8)]
    again = [step_batches(data, config, step, 0) for step in reversed(range(8))][::-1]
    for (first, _), (second, _) in zip(once, again, strict=True):
        assert torch.equal(first[0].harmful[0].input_ids, second[0].harmful[0].input_ids)
        assert torch.equal(first[0].benign[0].input_ids, second[0].benign[0].input_ids)
    orders = []
    for seed in range(3):
        config = get_config("tiny", batch_size=4, seed=seed)
        orders.append([numbers(step_batches(data, config, step, 0)[0][0].harmful[0]) for step in range(3)])
    assert orders[0] != orders[1] != orders[2]


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own():
    data, config = data_of(10, 14), get_config("tiny", batch_size=4)
    seen = [number for step in range(5) for number in numbers(step_batches(data, config, step, 0)[0][0].harmful[0])]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11))
    assert seen[:10] != seen[10:]


def test_a_side_with_fewer_rows_than_the_batch_repeats():
    pairs, _ = step_batches(data_of(3, 40), get_config("tiny", batch_size=8), 0, 0)
    counts = Counter(numbers(pairs[0].harmful[0]))
    assert set(counts) == {1, 2, 3}
    assert sum(counts.values()) == 8
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(set(numbers(pairs[0].benign[0]))) == 8


@pytest.mark.parametrize(("world_size", "micro"), [(1, None), (2, None), (4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("step", [0, 5])
def test_ranks_and_micro_steps_partition_the_global_batch(world_size, micro, step):
    data = data_of(10, 14)
    ((whole,), counts) = step_batches(data, get_config("tiny", batch_size=12), step, 0)
    config = get_config("tiny", batch_size=12, micro_batch_size=micro)
    shares = [step_batches(data, config, step, 0, rank, world_size) for rank in range(world_size)]
    for side in ("harmful", "benign"):
        parts = [numbers(getattr(pair, side)[0]) for pairs, _ in shares for pair in pairs]
        assert [number for part in parts for number in part] == numbers(getattr(whole, side)[0])
        assert {len(part) for part in parts} == {micro or 12 // world_size}
    assert all(share_counts == counts for _, share_counts in shares)


def test_counts_are_those_of_the_tensors():
    data, config = data_of(10, 14), get_config("tiny", batch_size=12, micro_batch_size=2)
    for step in range(4):
        pairs, counts = step_batches(data, config, step, 0)
        assert counts.harmful_tokens == sum(len(pair.harmful[0].scored_tokens) for pair in pairs)
        assert counts.benign_tokens == sum(len(pair.benign[0].scored_tokens) for pair in pairs)
        both = [batch for pair in pairs for batch in (*pair.harmful, *pair.benign)]
        assert counts.tokens == sum(int(batch.attention_mask.sum()) for batch in both)
        assert counts.benign_predictions == sum(len(pair.benign[0].scored_predictions) for pair in pairs)


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


def test_a_batch_moves_with_all_its_tensors():
    batch = collate([token_row(1), token_row(2, 6)], 0)
    states = TeacherStates(torch.ones(4, 2, 3), torch.ones(4, 3))
    moved = replace(batch, teacher=states).to("meta")
    tensors = [moved.input_ids, moved.attention_mask, moved.scored_tokens, moved.scored_predictions]
    assert {tensor.device.type for tensor in (*tensors, moved.teacher.hidden, moved.teacher.final)} == {"meta"}
    assert moved.rows == batch.rows
    assert replace(batch, teacher=TeacherStates(states.hidden, None)).to("meta").teacher.final is None


def cost(batches, pass_tokens: int) -> int:
    return sum(batch.input_ids.numel() + pass_tokens for batch in batches)


def test_after_memory_ran_out_half_the_rows_are_taken_at_a_time_until_it_is_one():
    config, seen = get_config("tiny", batch_size=24), []
    smaller = config
    while (smaller := smaller_micro_batches(smaller, world_size=2)) is not None:
        seen.append((smaller.micro_batch_size, smaller.gradient_accumulation))
        assert replace(smaller, micro_batch_size=None, gradient_accumulation=None) == config
    assert seen == [(6, 2), (3, 4), (1, 12)]
    assert smaller_micro_batches(replace(config, gradient_accumulation=3), 1).gradient_accumulation == 6
    assert smaller_micro_batches(replace(config, batch_size=2), 2) is None


def partitions(rows: list) -> Iterator[list[list]]:
    """All ways to cut a list into pieces."""
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        pieces = [[rows[0]]]
        for row, cut in zip(rows[1:], cuts, strict=True):
            if cut:
                pieces.append([])
            pieces[-1].append(row)
        yield pieces


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    pass_tokens=st.integers(0, 60),
)
def test_rows_of_like_length_make_the_cheapest_batches_there_are(lengths, pass_tokens):
    rows = [token_row(i + 1, length) for i, length in enumerate(lengths)]
    batches = collate_by_length(rows, 0, pass_tokens)
    assert sorted(number for batch in batches for number in numbers(batch)) == list(range(1, len(rows) + 1))
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    cheapest = min(cost([collate(piece, 0) for piece in pieces], pass_tokens) for pieces in partitions(by_length))
    assert cost(batches, pass_tokens) == cheapest


def test_rows_of_one_batch_keep_their_order():
    rows = [token_row(1, 9), token_row(2, 3), token_row(3, 6)]
    (batch,) = collate_by_length(rows, 0, pass_tokens=100)
    assert numbers(batch) == [1, 2, 3]


def test_long_and_short_rows_of_a_step_are_apart_but_under_zero_3():
    rows = [token_row(i + 1, 4 if i % 2 else 400) for i in range(16)]
    side = SideData(rows, [], SideCounts(1, 16, *[0] * 5))
    config = get_config("tiny", batch_size=16)
    (pair,), _ = step_batches(CircuitBreakerData(side, side), config, 0, 0)
    assert sorted(batch.input_ids.shape[1] for batch in pair.harmful) == [4, 400]
    (pair,), _ = step_batches(CircuitBreakerData(side, side), replace(config, zero_stage=3), 0, 0)
    assert [tuple(batch.input_ids.shape) for batch in pair.benign] == [(16, 400)]
