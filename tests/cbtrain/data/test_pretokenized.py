"""Rows that were tokenised elsewhere, with their masks inline or in a file beside them."""

from pathlib import Path

import pytest
from chat_tokenizers import bpe_tokenizer
from row_files import write_jsonl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cbtrain.config import InputError, get_config
from cbtrain.data.checks import description
from cbtrain.data.loading import load_data

PRETOKENISED = Path(__file__).parents[3].parent / "shared" / "data" / "pretokenised"
LENGTH = 12


def render(number: int, **fields) -> dict:
    ids = [0, *range(number * 20 + 11, number * 20 + 11 + LENGTH - 1)]
    return {"render_id": f"r{number}", "input_ids": ids, "attention_mask": [1] * LENGTH} | fields


def shifted(row: dict) -> list[int]:
    return [*row["input_ids"][1:], -100]


def mask(number: int, first: int = 8, **fields) -> dict:
    values = [0.0] * first + [1.0] * (LENGTH - first)
    return {"lossmask_id": f"m{number}", "render_id": f"r{number}", "loss_mask": values} | fields


@pytest.fixture
def load(tmp_path):
    """A function: rows of the harmful side's files, to the data under a policy; the benign side is two renders."""

    def build(*files: list[dict], policy: str = "given", **overrides):
        harmful = tuple(write_jsonl(tmp_path / f"harmful{i}.jsonl", rows) for i, rows in enumerate(files))
        benign = [render(i, loss_mask=mask(i)["loss_mask"]) for i in (8, 9)]
        benign_files = (write_jsonl(tmp_path / "benign.jsonl", benign),)
        config = get_config("tiny", harmful=harmful, benign=benign_files, mask_policy=policy, **overrides)
        return load_data(config, bpe_tokenizer(template=None))

    return build


def rows_of(data) -> list:
    rows = data.harmful.train + data.harmful.held_out
    return sorted(rows, key=lambda row: row.input_ids)


def error_of(load, *files, **settings) -> str:
    with pytest.raises(InputError) as caught:
        load(*files, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_masks_in_a_file_beside_are_joined_by_render_id_in_whatever_order(load):
    renders, masks = [render(0), render(1), render(2)], [mask(2, 5), mask(0, 7), mask(1, 9)]
    for files in ((renders, masks), (masks, renders)):
        rows = rows_of(load(*files))
        assert [row.scored.index(True) for row in rows] == [7, 9, 5]
        assert [list(row.input_ids) for row in rows] == [row["input_ids"] for row in renders]


def test_masks_inline_and_masks_beside_give_the_same_rows(load):
    beside = rows_of(load([render(0), render(1)], [mask(0, labels=shifted(render(0))), mask(1)]))
    inline = rows_of(load([render(i, loss_mask=mask(i)["loss_mask"]) for i in (0, 1)]))
    assert [(row.input_ids, row.scored, row.prompt) for row in beside] == [
        (row.input_ids, row.scored, row.prompt) for row in inline
    ]


@pytest.mark.parametrize("shift", [0, 1])
def test_labels_alone_tell_what_is_scored_shifted_by_one_or_not(load, shift):
    rows = []
    for number in (0, 1):
        row = render(number)
        labels = [token if i >= 8 else -100 for i, token in enumerate(row["input_ids"])]
        rows.append(row | {"labels": [*labels[shift:], *[-100] * shift]})
    for row in rows_of(load(rows)):
        assert row.scored == tuple(i >= 8 for i in range(LENGTH))


def test_padding_is_taken_off_at_either_end_with_its_part_of_the_mask(load):
    rows = []
    for number, attention in ((0, [0, 0] + [1] * 10), (1, [1] * 9 + [0] * 3)):
        rows.append(render(number, attention_mask=attention, loss_mask=mask(number, 6)["loss_mask"]))
    left, right = rows_of(load(rows))[1], rows_of(load(rows))[0]
    assert (list(left.input_ids), left.scored.index(True)) == (rows[0]["input_ids"][2:], 4)
    assert (list(right.input_ids), right.scored.index(True)) == (rows[1]["input_ids"][:9], 6)


def test_full_sequence_scores_every_token_and_needs_no_mask(load):
    data = load([render(0), render(1)], policy="full_sequence")
    assert all(all(row.scored) for row in rows_of(data))
    assert not [text for text in description(data) if "warning" in text]


def test_masks_that_cover_whole_rows_are_warned_of(load):
    lines = description(load([render(0), render(1)], [mask(0, 0), mask(1, 0)]))
    assert any(line.startswith("warning: harmful: every token of every row is scored") for line in lines), lines


def test_rows_with_the_same_tokens_before_the_first_scored_one_stay_together(load):
    same = [render(0) | {"input_ids": [*render(0)["input_ids"][:8], 60 + i, 61, 62, 63]} for i in range(6)]
    masked = [row | {"loss_mask": mask(0)["loss_mask"]} for row in same]
    other = [render(i, loss_mask=mask(i)["loss_mask"]) for i in (1, 2)]
    data = load(masked + other)
    parts = [{row.input_ids[:8] for row in part} for part in (data.harmful.train, data.harmful.held_out)]
    assert parts[0].isdisjoint(parts[1]), parts


def test_a_row_keeps_its_part_under_another_mask_policy(load):
    rows = [render(i, loss_mask=mask(i)["loss_mask"]) for i in range(7)]
    given, whole = load(rows).harmful, load(rows, policy="full_sequence").harmful
    assert {row.input_ids for row in given.held_out} == {row.input_ids for row in whole.held_out}


def test_a_long_row_keeps_the_end_of_its_prompt_and_the_beginning_of_its_completion(load):
    rows = rows_of(load([render(0), render(1)], [mask(0), mask(1)], max_length=6))
    first = mask(0)["loss_mask"].index(1)
    kept = [[0, *render(i)["input_ids"][first - 2 : first + 3]] for i in (0, 1)]
    assert [list(row.input_ids) for row in rows] == kept


def test_what_masks_hold_besides_and_is_not_followed_is_remarked_on(load):
    half = [mask(0), mask(1) | {"loss_mask": [0.5] * LENGTH, "sample_weight": 2.0}, mask(5)]
    remarks = " ".join(load([render(0), render(1)], half).harmful.remarks)
    assert "rows with a loss_mask between 0 and 1, which counts as scored: 1" in remarks
    assert "rows with a sample_weight other than 1, which is not used: 1" in remarks
    assert "masks that belong to no row: 1" in remarks


TWO = [render(0), render(1)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([TWO], "{0}:1 comes with no mask; give the file that holds its loss_mask beside it, or"),
        ([TWO, [mask(5)]], "{1}:1: no row of --harmful has the render_id of any of the 1 masks"),
        ([TWO, [mask(0), mask(0, 3)]], "{1}:2: another mask for r0 is at {1}:1; give the file of one policy"),
        ([TWO, [mask(0) | {"loss_mask": [1.0]}]], "{1}:1: loss_mask has 1 values for 12 tokens"),
        ([TWO, [mask(0) | {"loss_mask": ["a"]}]], "{1}:1: loss_mask must be a list of numbers, 0 or more"),
        ([TWO, [mask(0, labels=shifted(render(1)))]], "{1}:1: labels repeat other ids than input_ids"),
        ([[render(0, input_ids=[])]], "{0}:1: input_ids must be a list of whole numbers"),
        ([[render(0, attention_mask=[1, 0] * 6)]], "{0}:1: attention_mask must be 1 on one stretch of tokens"),
        ([[{"loss_mask": [1.0], "text": "a"}]], "{0}:1: a loss_mask needs the input_ids it belongs to"),
        ([[render(0, loss_mask=[0] * 12), render(1, loss_mask=[0] * 12)]], "the masks that came with them are 0. Try"),
        (
            [[render(0, input_ids=[*range(LENGTH - 1), 128_009]), render(1)], [mask(0), mask(1)]],
            "{0}:1: token id 128,009 is not in the tokenizer's vocabulary of 400; the row was made for another model",
        ),
    ],
)
def test_a_bad_row_or_mask_is_named(load, tmp_path, files, expected):
    message = error_of(load, *files)
    assert expected.format(tmp_path / "harmful0.jsonl", tmp_path / "harmful1.jsonl") in message, message


def test_a_policy_that_needs_turns_is_refused_with_the_mend(load):
    for policy in ("completion_only", "assistant_only", "tool_calls_only"):
        message = error_of(load, TWO, [mask(0), mask(1)], policy=policy)
        assert message.startswith(f"--mask-policy {policy}: "), message
        assert "--mask-policy given takes the mask that came with it" in message


def test_given_is_refused_where_a_row_is_text(load):
    message = error_of(load, [{"prompt": "a", "completion": "b"}])
    assert "harmful0.jsonl:1 is text and comes with no mask; name completion_only" in message


def test_rows_made_for_llama_load_with_their_masks_and_its_vocabulary():
    if not PRETOKENISED.exists():
        pytest.skip("the tokenised rows are not beside this checkout (shared/data/pretokenised)")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128_256)}, unk_token="w0"))
    files = {
        side: tuple(str(PRETOKENISED / f"{kind}_{name}.jsonl") for kind in ("renders", "lossmasks"))
        for side, name in (("harmful", "cb"), ("benign", "retain"))
    }
    config = get_config("tiny", **files, mask_policy="given")
    data = load_data(config, PreTrainedTokenizerFast(tokenizer_object=words))
    assert (data.harmful.counts.rows, data.benign.counts.rows) == (12, 12)
    assert all(all(row.scored) for side in (data.harmful, data.benign) for row in side.train + side.held_out)
