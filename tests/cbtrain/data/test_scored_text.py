"""Random chats, every chat template of the suite, every mask policy: what is scored is what the assistant said."""

import json
import re

import pytest
from chat_tokenizers import END_OF_TURN, TEMPLATES, bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtrain.config import MaskPolicy
from cbtrain.data.formats.messages import Message
from cbtrain.data.formats.rows import Row
from cbtrain.data.loss_mask import policy_of, scored_turns
from cbtrain.data.templates.chat_template import ChatTemplate
from cbtrain.data.templates.spans import THOUGHTS
from cbtrain.data.tokenization import tokenize

POLICIES: tuple[MaskPolicy, ...] = ("auto", "completion_only", "assistant_only", "tool_calls_only")
HEADER = re.compile(r"<\|(im_start|start_header_id|end_header_id|user|system|tool|begin_of_text)\|>|<\|assistant\|>")
NAMES = ["send_money", "read_file"]
TOKENIZERS = {name: bpe_tokenizer(template) for name, template in TEMPLATES.items()}
words = st.text(alphabet="abcdef ghi,.é🔑", min_size=1, max_size=12).map(str.strip).filter(bool)
calls = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from("ab"), words, max_size=2)), max_size=1
)


@st.composite
def chats(draw) -> list[Message]:
    """A user and an assistant by turns, some of its turns with a call that a tool answers; numbered, so all differ."""
    messages: list[Message] = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"u{i} {draw(words)}"})
        for name, given_arguments in draw(calls):
            call = {"id": f"{i:09}", "type": "function", "function": {"name": name, "arguments": given_arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"t{i} {draw(words)}", "tool_call_id": f"{i:09}"})
        thought = f"<think>h{i} {draw(words)}</think>" if draw(st.integers(0, 4)) == 0 else ""
        messages.append({"role": "assistant", "content": f"{thought}a{i} {draw(words)}"})
    return messages


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=chats())
@settings(max_examples=25, deadline=None)
def test_what_is_scored_is_what_the_assistant_said(name: str, policy: MaskPolicy, messages: list[Message]) -> None:
    chosen = policy_of(messages, policy)
    turns = scored_turns(messages, chosen)
    tokenizer = TOKENIZERS[name]
    rendering = ChatTemplate(tokenizer).render(Row(tuple(messages), "f.jsonl:1"), chosen)
    if not turns:
        assert rendering is None
        return
    ((ids, scored),) = tokenize([rendering], tokenizer)
    text = tokenizer.decode([token for token, is_scored in zip(ids, scored, strict=True) if is_scored])
    found = squeezed(text)
    for i in range(3):
        assert f"u{i}" not in found, "a user's text is scored"
        assert f"t{i}" not in re.sub(r"<tool_call>|parameters|content|result", "", found), "a tool's text is scored"
    assert not HEADER.search(text), text
    for turn in turns:
        content = messages[turn]["content"]
        if chosen != "tool_calls_only":
            thought, _, said = content.rpartition("</think>")
            assert squeezed(said) in found
            if thought and squeezed(thought.removeprefix("<think>")) not in found:
                assert THOUGHTS in rendering.rewritten
        for call in messages[turn].get("tool_calls", ()):
            assert call["function"]["name"] in found
            for value in call["function"]["arguments"].values():
                assert squeezed(value) in found or squeezed(json.dumps(value)[1:-1]) in found
    said_elsewhere = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in turns]
    for turn in said_elsewhere:
        if messages[turn]["content"]:
            assert squeezed(messages[turn]["content"].rpartition("</think>")[2]) not in found
    assert END_OF_TURN.get(name) is None or name == "spaced" or END_OF_TURN[name] in text or chosen == "tool_calls_only"
