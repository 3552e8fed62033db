"""Both sides as tokens, and the held-out split."""

import json
from collections import Counter
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, LLAMA3, bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import prediction_mask

from cbtrain.config import CircuitBreakerConfig, InputError, get_config
from cbtrain.data.batches import collate, pad_token_id
from cbtrain.data.checks import description
from cbtrain.data.loading import load_data
from cbtrain.data.split import held_out_prompts, normalized_prompt
from cbtrain.data.tokenization import TokenRow
from cbtrain.model import tiny

AGENTDOJO = Path(__file__).parents[3].parent / "shared" / "data" / "agentdojo"


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


def test_loading_splits_counts_and_describes_both_sides(config_of):
    harmful = [pair(f"harm {i}") for i in range(20)] + [{"messages": [{"role": "user", "content": "harm"}]}]
    data = load_data(config_of(harmful, [pair(f"help {i}") for i in range(30)]), bpe_tokenizer())
    for side, rows, dropped in ((data.harmful, 21, 1), (data.benign, 30, 0)):
        scored = sum(sum(row.scored) for row in side.train + side.held_out)
        counts = side.counts
        assert (counts.files, counts.rows, counts.left_out, counts.other_side) == (1, rows, 0, 0)
        assert (counts.truncated, counts.dropped_unscored, counts.scored_tokens) == (0, dropped, scored)
        assert len(side.train) + len(side.held_out) == rows - dropped
    lines = description(data)
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
        positions = prediction_mask(batch)[i].nonzero().flatten()
        answers.append(tokenizer.decode(batch.input_ids[i, positions + 1]))
        assert tokenizer.decode(batch.input_ids[i, positions[0]]).endswith("\n")
    assert sorted(answers) == ["the door<|eot_id|>", "the old wooden door<|eot_id|>"]


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


def test_a_long_answer_leaves_its_question_in_the_tiny_worlds_words(config_of):
    tokenizer = tiny.make_tokenizer()
    question = "how do i open the vault ?"
    rows = [pair(question, "first take the key " * 20), pair("how do i open the gate ?")]
    data = load_data(config_of(rows, [pair("a"), pair("b")], max_length=24), tokenizer)
    (row,) = [row for row in data.harmful.train + data.harmful.held_out if len(row.input_ids) == 24]
    first = row.scored.index(True)
    assert tokenizer.decode(row.input_ids[:first]) == f"<bos> <user> {question} <assistant>"
    assert tokenizer.decode(row.input_ids[first:]).startswith("first take the key first take")
    assert all(row.scored[first:])
    counts = data.harmful.counts
    assert (counts.truncated, counts.cut_short, counts.prompts_cut, counts.completions_cut) == (1, 1, 0, 1)
    assert "truncated rows 1 / 0 · completions cut 1 / 0" in description(data)


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
    def row(number: int) -> TokenRow:
        return TokenRow((number,) * 4, (False, False, True, True), f"prompt {number}", f"f.jsonl:{number}")

    sides = {"harmful": [row(i) for i in harmful], "benign": [row(i) for i in benign]}
    held_out = held_out_prompts(sides, fraction)
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
        text = tokenizer.decode(row.input_ids)
        assert text.strip().endswith(("<|im_end|>", "<|eot_id|>")) or row.scored[-1], row.source
        question = row.prompt if len(row.prompt) < 200 else row.prompt[-40:]
        assert question in normalized_prompt(text), row.source


CALL = {"tool_calls": [{"function": {"name": "pay", "arguments": {"to": "me"}}}]}
AGENT = [
    {"role": "user", "content": "pay the bill"},
    {"role": "assistant", "content": "", **CALL},
    {"role": "tool", "content": "paid"},
    {"role": "assistant", "content": "It is paid."},
]


def test_auto_scores_all_turns_of_agents_and_the_last_of_others_and_says_so(config_of):
    agents = [{"messages": [*AGENT[:3], {"role": "assistant", "content": f"done {i}"}]} for i in range(3)]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "first"}] * 2
    one_call = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "", **CALL}]
    rows = [*agents, {"messages": chat}, {"messages": one_call}]
    by_policy = {}
    for policy in ("auto", "assistant_only", "completion_only"):
        data = load_data(config_of(rows, [pair("c"), pair("d")], mask_policy=policy), bpe_tokenizer())
        by_policy[policy] = {row.source: row.scored for row in data.harmful.train + data.harmful.held_out}
        lines = description(data)
        told = "mask policy auto: all assistant turns of agent rows (3 of 5 / 0 of 2), the last turn of the others"
        assert (told in lines) == (policy == "auto")
        unscored = [line for line in lines if "rows call tools" in line]
        assert bool(unscored) == (policy == "completion_only"), lines
    assert "25% of the calls are scored; --mask-policy assistant_only" in unscored[0]
    for source, scored in by_policy["auto"].items():
        like = "assistant_only" if int(source.rpartition(":")[2]) <= 3 else "completion_only"
        assert scored == by_policy[like][source]


CLOCK = CHATML.replace("{% for m", "{{ 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}{% for m", 1)


def test_a_template_with_a_clock_writes_the_configurations_date(config_of):
    rows = [pair("a"), pair("b")]
    tokenizer = bpe_tokenizer(CLOCK)
    first, again = (load_data(config_of(rows, rows[::-1]), tokenizer) for _ in range(2))
    text = tokenizer.decode(first.harmful.train[0].input_ids)
    assert text.startswith("Today: 26 July 2024\n")
    assert first.fingerprint == again.fingerprint
    other = load_data(config_of(rows, rows[::-1], template_date="2026-01-02"), tokenizer)
    assert tokenizer.decode(other.harmful.train[0].input_ids).startswith("Today: 02 January 2026\n")
    assert other.fingerprint != first.fingerprint
    for wrong in ("26 Jul 2024", "2024-13-01", ""):
        with pytest.raises(InputError, match="--template-date"):
            config_of(rows, rows, template_date=wrong).validate()


def test_the_fingerprint_tells_tokens_masks_and_split_apart(config_of):
    rows = [pair(f"p{i}") for i in range(6)]
    whole = {"mask_policy": "full_sequence"}
    variants = [{}, whole, {"eval_fraction": 0.8}, {"max_length": 8}]
    prints = {load_data(config_of(rows, rows[::-1], **fields), bpe_tokenizer()).fingerprint for fields in variants}
    assert len(prints) == len(variants)


def test_thoughts_are_kept_or_dropped_and_counted(config_of):
    rows = [pair("a", "<think>why</think>the door"), pair("b")]
    for choice, holds in (("keep", True), ("drop", False)):
        data = load_data(config_of(rows, rows[::-1], thoughts=choice), bpe_tokenizer())
        texts = "".join(bpe_tokenizer().decode(row.input_ids) for row in data.harmful.train + data.harmful.held_out)
        assert ("why" in texts) is holds
        assert data.harmful.counts.rewritten == ({} if holds else {"thoughts dropped": 1})


def test_a_clock_whose_format_is_put_together_is_refused_and_quotes_in_comments_do_not_matter(config_of):
    rows = [pair("a"), pair("b")]
    put_together = CLOCK.replace("'%d %B %Y'", "'%d ' + '%B'")
    with pytest.raises(InputError, match="it asks for the time in a format that it puts together"):
        load_data(config_of(rows, rows[::-1]), bpe_tokenizer(put_together))
    commented = "{#- it's a template -#}" + CLOCK
    text = bpe_tokenizer().decode(
        load_data(config_of(rows, rows[::-1]), bpe_tokenizer(commented)).harmful.train[0].input_ids
    )
    assert text.startswith("Today: 26 July 2024")
