"""Rows to text: what the chat template is given, and which part of its answer the assistant said."""

import pytest
from chat_tokenizers import CHATML, END_OF_TURN, GEMMA, LLAMA3, MARKED, TEMPLATES, bpe_tokenizer

from cbtrain.config import InputError
from cbtrain.data.formats.rows import Row
from cbtrain.data.templates.chat_template import (
    CLIPPED,
    EARLIER,
    ChatTemplate,
    Rendering,
)
from cbtrain.data.templates.spans import THOUGHTS, without_thoughts

SYSTEM = {"role": "system", "content": "be kind"}
ASK = {"role": "user", "content": "pay the bill"}
ANSWER = {"role": "assistant", "content": "it is paid"}
THANKS = {"role": "user", "content": "thank you"}
WELCOME = {"role": "assistant", "content": "you are welcome"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "send_money", "arguments": {"recipient": "Zoë"}}}
    ],
}
RESULT = {"role": "tool", "content": "sent\nwith thanks", "tool_call_id": "a"}


def rendering_of(template: str, messages: list[dict], policy="completion_only") -> Rendering:
    rendering = ChatTemplate(bpe_tokenizer(template)).render(Row(tuple(messages), "f.jsonl:1"), policy)
    assert rendering is not None
    return rendering


def said(rendering: Rendering) -> list[str]:
    assert rendering.spans is not None
    return [rendering.text[start:stop].strip() for start, stop in rendering.spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_turn_is_what_completion_only_scores(name):
    rendering = rendering_of(TEMPLATES[name], [ASK, ANSWER, THANKS, WELCOME])
    end = END_OF_TURN.get(name, "<|im_end|>") + ("\n<|endoftext|>" if name == "phi" else "")
    assert said(rendering) == ["you are welcome" + end], rendering.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_is_what_assistant_only_scores(name):
    rendering = rendering_of(TEMPLATES[name], [ASK, ANSWER, THANKS, WELCOME], "assistant_only")
    first, last = said(rendering)
    assert first.removesuffix(END_OF_TURN.get(name, "<|im_end|>")) in ("it is paid", "it is paid<|im_end|>\n<|")
    assert last.startswith("you are welcome"), rendering.text


def test_full_sequence_scores_every_turn_of_the_row():
    rendering = rendering_of(CHATML, [ASK, ANSWER, THANKS], "full_sequence")
    assert rendering.spans is None
    assert "thank you" in rendering.text


@pytest.mark.parametrize("policy", ["completion_only", "assistant_only"])
def test_turns_after_the_last_scored_one_are_cut(policy):
    rendering = rendering_of(CHATML, [ASK, CALL, RESULT], policy)
    assert "sent" not in rendering.text
    assert "send_money" in said(rendering)[-1]


@pytest.mark.parametrize(
    "messages",
    [
        [ASK],
        [ASK, RESULT],
        [ASK, {"role": "assistant", "content": " "}],
        [{"role": "assistant", "content": "hello"}, ASK],
        [SYSTEM, {"role": "assistant", "content": "hello"}],
    ],
)
def test_a_row_in_which_no_assistant_answers_a_user_has_nothing_scored(messages):
    template = ChatTemplate(bpe_tokenizer(CHATML))
    assert template.render(Row(tuple(messages), "f.jsonl:1"), "completion_only") is None
    assert template.render(Row(tuple(messages), "f.jsonl:1"), "assistant_only") is None


def test_an_empty_last_turn_leaves_the_turn_before_as_the_completion_and_is_told():
    rendering = rendering_of(CHATML, [ASK, ANSWER, {"role": "assistant", "content": ""}])
    assert said(rendering) == ["it is paid<|im_end|>"]
    assert rendering.rewritten == (EARLIER,)
    assert rendering_of(CHATML, [ASK, ANSWER]).rewritten == ()


def test_marks_that_do_not_hold_what_the_assistant_says_give_way_to_prefixes():
    end = "{% generation %}{{ '<|endoftext|>' }}{% endgeneration %}"
    ended = MARKED + "{% if not add_generation_prompt %}" + end + "{% endif %}"
    thinking = {"role": "assistant", "content": "let me see"}
    assert said(rendering_of(ended, [ASK, thinking, ANSWER])) == ["it is paid<|im_end|>\n<|endoftext|>"]


def test_calls_that_stand_before_the_text_of_a_turn_become_text():
    calls_first = CHATML.replace(
        "{{ m.content }}",
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
        "{% endfor %}{{ m.content }}{% if m.tool_calls %}<wait>{% endif %}",
    )
    turn = CALL | {"content": "I pay now"}
    rendering = rendering_of(calls_first, [ASK, turn], "tool_calls_only")
    assert said(rendering) == ['{"name": "send_money", "arguments": {"recipient": "Zoë"}}']
    assert rendering.rewritten == ("tool calls as text",)
    assert said(rendering_of(calls_first, [ASK, turn]))[0].startswith("<call>send_money")


def test_thoughts_that_a_template_leaves_out_are_told():
    leaving_out = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    rendering = rendering_of(leaving_out, [ASK, ANSWER | {"content": "<think>hm</think>it is paid"}])
    assert said(rendering) == ["it is paid<|im_end|>"]
    assert rendering.rewritten == (THOUGHTS,)


def test_a_template_that_says_something_else_is_refused():
    other = CHATML.replace("{{ m.content }}", "{{ m.content | replace('paid', 'done') }}")
    with pytest.raises(InputError, match=r"^f\.jsonl:1: .*what the assistant says cannot be found"):
        rendering_of(other, [ASK, ANSWER])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thought", ["", "I will pay now."])
def test_calls_thoughts_and_tool_answers_are_in_every_rendering(name, thought):
    rendering = rendering_of(TEMPLATES[name], [SYSTEM, ASK, CALL | {"content": thought}, RESULT, ANSWER])
    for part in ("be kind", "send_money", "Zoë", "with thanks", "it is paid", thought):
        assert part in rendering.text, (part, rendering.text)


def test_a_template_that_renders_calls_is_given_them_as_they_are():
    text = rendering_of(LLAMA3, [ASK, CALL, RESULT, ANSWER]).text
    assert '{"name": "send_money", "parameters": {"recipient": "Zoë"}}<|eot_id|>' in text
    assert '<|start_header_id|>ipython<|end_header_id|>\n\n"sent\\nwith thanks"' in text


def test_calls_that_a_template_leaves_out_become_text_of_the_turn():
    text = rendering_of(CHATML, [ASK, CALL | {"content": "Paying."}, RESULT, ANSWER]).text
    assert 'assistant\nPaying.\n{"name": "send_money", "arguments": {"recipient": "Zoë"}}<|im_end|>' in text
    assert "<|im_start|>tool\nsent" in text


def test_several_calls_become_text_where_a_template_refuses_them():
    both = CALL | {"tool_calls": CALL["tool_calls"] * 2}
    text = rendering_of(LLAMA3, [ASK, both, RESULT, ANSWER]).text
    assert text.count('{"name": "send_money", "arguments": {"recipient": "Zoë"}}') == 2


def test_system_turn_and_tool_answers_go_into_user_turns_where_a_template_refuses_them():
    text = rendering_of(GEMMA, [SYSTEM, ASK, CALL, RESULT, THANKS, ANSWER]).text
    assert "<|im_start|>user\nbe kind\n\npay the bill<|im_end|>" in text
    assert "<|im_start|>user\nsent\nwith thanks\n\nthank you<|im_end|>" in text


def test_a_template_that_leaves_out_the_system_turn_gets_it_in_the_user_turn():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert "user\nbe kind\n\npay the bill" in rendering_of(silent, [SYSTEM, ASK, ANSWER]).text


def test_a_row_that_no_form_makes_acceptable_is_named():
    template = "{{ raise_exception('never\nmind') }}"
    with pytest.raises(InputError, match=r"^f\.jsonl:1: the tokenizer's chat template refuses the row \(never mind\)$"):
        rendering_of(template, [ASK, ANSWER])


def test_a_template_that_rewrites_earlier_turns_is_named_rather_than_scored_wrongly():
    template = "{{ messages | length }} turns\n" + CHATML
    with pytest.raises(InputError, match="it rewrites earlier turns; try another --mask-policy"):
        rendering_of(template, [ASK, ANSWER])


def test_a_tokenizer_without_a_chat_template_is_an_error():
    with pytest.raises(InputError, match=r"has no chat template: put a chat_template\.jinja beside it"):
        ChatTemplate(bpe_tokenizer(None))


def test_half_a_surrogate_pair_does_not_stop_the_tokenizer():
    text = rendering_of(CHATML, [ASK, {"role": "assistant", "content": "smile \ud83d"}]).text
    assert "smile ?<|im_end|>" in text
    bpe_tokenizer()(text)


HEADERS_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Marks role headers and empty thoughts as generated, as published training templates do."""
TWO_TURNS = [
    {"role": "user", "content": "how ?"},
    {"role": "assistant", "content": "take the key"},
    {"role": "user", "content": "and ?"},
    {"role": "assistant", "content": "open it"},
]


def test_marks_on_headers_and_empty_thoughts_are_clipped_and_said():
    rendering = rendering_of(HEADERS_MARKED, TWO_TURNS, "assistant_only")
    said = [rendering.text[start:stop] for start, stop in rendering.spans]
    assert said == ["take the key<|im_end|>\n", "open it<|im_end|>\n"]
    assert rendering.rewritten == (CLIPPED,)


def test_a_thought_that_is_scored_is_not_told_as_left_out_and_one_that_the_template_drops_is():
    thinking = [TWO_TURNS[0], {"role": "assistant", "content": "<think>a thought</think>take the key"}]
    spaced = CHATML.replace("{{ m.content }}", "{{ m.content | replace('<think>', '<think>\n') }}")
    kept = rendering_of(spaced, thinking)
    assert "a thought" in kept.text[slice(*kept.spans[0])]
    assert kept.rewritten == ()
    dropping = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    dropped = rendering_of(dropping, thinking)
    assert "a thought" not in dropped.text
    assert dropped.rewritten == (THOUGHTS,)


def test_thoughts_are_dropped_on_request():
    thinking = [TWO_TURNS[0], {"role": "assistant", "content": "<think>\na thought\n</think>\n\ntake the key"}]
    assert [message["content"] for message in without_thoughts(thinking)] == ["how ?", "take the key"]
    assert without_thoughts(TWO_TURNS) == tuple(TWO_TURNS)
