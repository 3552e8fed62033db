"""Masks, read back by decoding."""

import pytest
from chat_tokenizers import (
    CHATML,
    END_OF_TURN,
    GEMMA,
    LLAMA3,
    LLAMA31,
    MARKED,
    QWEN25,
    SPACED,
    TEMPLATES,
    bpe_tokenizer,
)

from cbtrain.data.formats.rows import Row
from cbtrain.data.templates.chat_template import ChatTemplate
from cbtrain.data.tokenization import tokenize

CHAT = (
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris, and nothing else."},
    {"role": "user", "content": "What about the naïve café?"},
    {"role": "assistant", "content": "Take the key 🔑 first"},
)


def tokens_of(tokenizer, policy, messages=CHAT):
    rendering = ChatTemplate(tokenizer).render(Row(tuple(messages), "f.jsonl:1"), policy)
    (tokens,) = tokenize([rendering], tokenizer)
    return tokens


def scored_text(tokenizer, policy, messages=CHAT) -> str:
    """The scored tokens decoded, a bar between separate runs of them."""
    ids, scored = tokens_of(tokenizer, policy, messages)
    runs: list[list[int]] = []
    for i, token in enumerate(ids):
        if scored[i]:
            runs = [*runs, []] if i == 0 or not scored[i - 1] else runs
            runs[-1].append(token)
    return " | ".join(tokenizer.decode(run) for run in runs)


def test_completion_only_decodes_to_the_last_answer_and_its_end():
    assert scored_text(bpe_tokenizer(CHATML), "completion_only") == "Take the key 🔑 first<|im_end|>"
    assert scored_text(bpe_tokenizer(LLAMA3), "completion_only") == "Take the key 🔑 first<|eot_id|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_assistant_only_decodes_to_all_answers(name):
    text = scored_text(bpe_tokenizer(TEMPLATES[name]), "assistant_only")
    end = END_OF_TURN.get(name, "<|im_end|>")
    answers = [part.strip().replace("\n<|endoftext|>", "") for part in text.split(" | ")]
    assert answers == ["Paris, and nothing else." + end, "Take the key 🔑 first" + end]


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


AGENT = (
    {"role": "system", "content": 'say {"name": "pay", "arguments": {"to": "Zoë"}} to pay'},
    {"role": "user", "content": "pay the bill"},
    {"role": "assistant", "content": "", "tool_calls": [call("read", file="bill")]},
    {"role": "tool", "content": 'pay("Zoë") and {"file": "bill"}', "tool_call_id": "000000000"},
    {"role": "assistant", "content": "", "tool_calls": [call("pay", to="Zoë")]},
    {"role": "tool", "content": "paid", "tool_call_id": "000000001"},
    {"role": "assistant", "content": "It is paid."},
)
TALKING_AGENT = (
    *AGENT[:2],
    {"role": "assistant", "content": "I pay {now}", "tool_calls": [call("pay", to="Zoë"), call("read", file="bill")]},
    *AGENT[-2:],
)
PAY, READ = '{"name": "pay", "arguments": {"to": "Zoë"}}', '{"name": "read", "arguments": {"file": "bill"}}'
IN_TAGS = "<tool_call>\n{}\n</tool_call>"


@pytest.mark.parametrize(
    ("template", "messages", "calls"),
    [
        (LLAMA31, AGENT, [call.replace("arguments", "parameters") for call in (READ, PAY)]),
        (QWEN25, AGENT, [IN_TAGS.format(call) for call in (READ, PAY)]),
        (CHATML, AGENT, [READ, PAY]),
        (GEMMA, AGENT, [READ, PAY]),
        (MARKED, AGENT, [READ, PAY]),
        (LLAMA31, TALKING_AGENT, [PAY, READ]),
        (QWEN25, TALKING_AGENT, ["\n".join(IN_TAGS.format(call) for call in (PAY, READ))]),
        (CHATML, TALKING_AGENT, [PAY, READ]),
    ],
)
def test_tool_calls_only_decodes_to_the_calls_and_nothing_else(template, messages, calls):
    runs = scored_text(bpe_tokenizer(template), "tool_calls_only", messages).split(" | ")
    # Calls written as text stand on lines of their own, whose ends may share a token with a call.
    assert [run.strip() for run in runs] == calls


def test_turns_behind_the_last_tool_call_are_cut():
    tokenizer = bpe_tokenizer(QWEN25)
    ids, _ = tokens_of(tokenizer, "tool_calls_only", AGENT)
    assert tokenizer.decode(ids).endswith("</tool_call><|im_end|>\n")


@pytest.mark.parametrize("template", [LLAMA31, QWEN25])
def test_assistant_only_decodes_to_calls_and_answers_with_their_ends(template):
    end = "<|eot_id|>" if template == LLAMA31 else "<|im_end|>"
    read, pay, paid = scored_text(bpe_tokenizer(template), "assistant_only", AGENT).split(" | ")
    assert [turn.endswith(end) for turn in (read, pay)] == [True, True], (read, pay)
    assert ["read" in read, "Zoë" in pay] == [True, True], (read, pay)
    assert paid == "It is paid." + end


def test_marks_of_the_template_and_prefixes_score_the_same_tokens():
    by_prefix = bpe_tokenizer(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    for policy in ("completion_only", "assistant_only"):
        for messages in (CHAT, AGENT, TALKING_AGENT):
            assert tokens_of(bpe_tokenizer(MARKED), policy, messages) == tokens_of(by_prefix, policy, messages)


@pytest.mark.parametrize("dash", ["", "-"])
def test_marks_score_what_the_tokenizers_own_assistant_mask_does(dash):
    template = MARKED.replace("{% generation %}", f"{{%{dash} generation {dash}%}}")
    tokenizer = bpe_tokenizer(template)
    own = tokenizer.apply_chat_template(list(CHAT), return_assistant_tokens_mask=True)
    ids, scored = tokens_of(tokenizer, "assistant_only")
    assert (ids, [int(token) for token in scored]) == (own["input_ids"], own["assistant_masks"])
    assert 0 < sum(scored) < len(scored)


def test_what_a_template_does_not_mark_within_a_marked_turn_is_not_scored():
    without_end = MARKED.replace("m.content + '<|im_end|>' }}{% endgeneration %}", "m.content }}{% endgeneration %}|")
    assert scored_text(bpe_tokenizer(without_end), "completion_only") == "Take the key 🔑 first"


def test_marks_serve_where_a_template_rewrites_earlier_turns():
    rewriting = "{{ messages | length }} turns\n" + MARKED
    expected = "Paris, and nothing else.<|im_end|> | Take the key 🔑 first<|im_end|>"
    assert scored_text(bpe_tokenizer(rewriting), "assistant_only") == expected


def test_a_turn_of_which_the_template_marks_nothing_is_found_by_its_prefix():
    first_only = MARKED.replace(
        "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.index0 == 1 %}", 1
    )
    expected = "Paris, and nothing else.<|im_end|> | Take the key 🔑 first<|im_end|>"
    assert scored_text(bpe_tokenizer(first_only), "assistant_only") == expected


def test_full_sequence_scores_every_token():
    tokenizer = bpe_tokenizer(LLAMA3)
    ids, scored = tokens_of(tokenizer, "full_sequence")
    assert all(scored)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(list(CHAT), tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_the_chat_templates_own(name):
    tokenizer = bpe_tokenizer(TEMPLATES[name])
    ids, _ = tokens_of(tokenizer, "completion_only")
    expected = tokenizer.apply_chat_template(list(CHAT), enable_thinking=False)["input_ids"]
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == (1 if name in ("llama3", "llama31", "gemma") else 0)


@pytest.mark.parametrize("policy", ["completion_only", "assistant_only"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen3", "spaced"])
def test_prefix_tokens_and_character_offsets_give_the_same_mask(name, policy, monkeypatch):
    tokenizer = bpe_tokenizer(TEMPLATES[name])
    by_offsets = tokens_of(tokenizer, policy)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert tokens_of(tokenizer, policy) == by_offsets


def test_a_token_that_joins_prompt_and_answer_is_scored():
    tokenizer = bpe_tokenizer(SPACED)
    prompt = tokenizer("user: open it\nassistant: ", add_special_tokens=False)["input_ids"]
    ids, scored = tokens_of(
        tokenizer,
        "completion_only",
        [{"role": "user", "content": "open it"}, {"role": "assistant", "content": "the door"}],
    )
    first = scored.index(True)
    assert ids[: len(prompt)] != prompt, "the prompt's last space is meant to join the answer's first word"
    assert tokenizer.decode(ids[:first]) == "user: open it\nassistant:"
    assert tokenizer.decode(ids[first:]) == " the door\n"
    assert scored[first:] == [True] * (len(ids) - first - 1) + [False]
