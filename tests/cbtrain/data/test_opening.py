"""Templates that do not open an assistant turn when asked to, and what of each part of a conversation is scored."""

import pytest
from chat_tokenizers import CHATML, MARKED, UNOPENED, bpe_tokenizer

from cbtrain.data.formats.messages import Message
from cbtrain.data.formats.rows import Row
from cbtrain.data.templates.chat_template import ChatTemplate
from cbtrain.data.templates.parts import scored_parts

ONLY_AFTER_USERS = UNOPENED + (
    "{% if add_generation_prompt and messages[-1].role == 'user' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + UNOPENED
SPACE_BEFORE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
EMPTY_THOUGHT = UNOPENED.replace(
    "m.content",
    "('<think>\n\n</think>\n\n' if m.role == 'assistant' and '<think>' not in m.content else '') + m.content",
)
CALLS_FIRST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.tool_calls or [] %}"
    "{{ {'arguments': c.function.arguments, 'name': c.function.name} | tojson }}{% endfor %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def scored(template: str, messages: list[Message]) -> list[str]:
    rendering = ChatTemplate(bpe_tokenizer(template)).render(Row(tuple(messages), "f.jsonl:1"), "assistant_only")
    assert rendering is not None
    return [rendering.text[start:stop] for start, stop in rendering.spans or ()]


AGENT = said(("user", "pay"), ("assistant", "One moment."), ("tool", "done"), ("assistant", "Paid."))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (ONLY_AFTER_USERS, AGENT, ["One moment.<|im_end|>\n", "Paid.<|im_end|>\n"]),
        (NEEDS_SYSTEM, said(("system", "s"), ("user", "u"), ("assistant", "Yes.")), ["Yes.<|im_end|>\n"]),
        (SPACE_BEFORE, said(("user", "u"), ("assistant", "Yes.")), [" Yes.<|im_end|>"]),
        (EMPTY_THOUGHT, said(("user", "u"), ("assistant", "Yes.")), ["Yes.<|im_end|>\n"]),
        (
            EMPTY_THOUGHT,
            said(("user", "u"), ("assistant", "<think>\nhm\n</think>\n\nYes.")),
            ["<think>\nhm\n</think>\n\nYes.<|im_end|>\n"],
        ),
    ],
)
def test_no_header_is_scored_and_all_that_is_said_is(template, messages, expected):
    assert scored(template, messages) == expected


def test_a_prompt_ends_where_the_answer_begins_without_the_blank_that_belongs_to_it():
    assert ChatTemplate(bpe_tokenizer(UNOPENED)).prompt("hi", "f") == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(bpe_tokenizer(SPACE_BEFORE)).prompt("hi", "f") == "[INST] hi [/INST]"


CALL = {"type": "function", "function": {"name": "send", "arguments": {"to": "Bob"}}}
CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("template", "messages", "shares"),
    [
        # Words of end marks and headers, and words that others said before.
        (CHATML, said(("user", "end"), ("assistant", "a"), ("user", "end"), ("assistant", "end")), {"user text": 0}),
        (CHATML, said(("user", "user"), ("assistant", "assistant")), {"user text": 0}),
        (MARKED, said(("user", "m"), ("assistant", "m")), {"user text": 0}),
        (
            CALLS_FIRST,
            [*said(("user", "pay")), CALLING, *said(("tool", "Bob send"), ("assistant", "Bob has it."))],
            {"user text": 0, "assistant calls": 1, "tool text": 0},
        ),
        (
            CHATML,
            said(("user", "u"), ("assistant", "<think>hm</think>Yes.")),
            {"user text": 0, "assistant thoughts": 1},
        ),
    ],
)
def test_shares_are_of_the_parts_themselves(template, messages, shares):
    chat = ChatTemplate(bpe_tokenizer(template))
    rendering = chat.render(Row(tuple(messages), "f.jsonl:1"), "assistant_only")
    assert rendering is not None
    counts = scored_parts(rendering, chat)
    parts = {part for part, _ in counts}
    found = {part: counts[part, True] / (counts[part, True] + counts[part, False]) for part in parts}
    assert found == shares | {"assistant text": 1}
