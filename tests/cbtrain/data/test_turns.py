"""Where question, answer and tool results are found, and what truncation leaves of agent runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from chat_tokenizers import CHATML, GEMMA, LLAMA3, LLAMA31, MARKED, PHI, QWEN3, QWEN25, bpe_tokenizer
from transformers import PreTrainedTokenizerFast

from cbtrain.config import MaskPolicy
from cbtrain.data.formats.messages import Message
from cbtrain.data.formats.rows import Row
from cbtrain.data.templates.chat_template import ChatTemplate
from cbtrain.data.templates.turns import Turns, find_turns
from cbtrain.data.tokenization import tokenize, turns_in_tokens
from cbtrain.data.truncation import truncate

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "llama31": LLAMA31, "gemma": GEMMA, "qwen25": QWEN25, "qwen3": QWEN3,
    "marked": MARKED, "phi": PHI,
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "read", "arguments": {"file": "bill"}}}
BILL, NOTE = 'The "bill" of Zoë:\n' + "car 98.70\n" * 20, "no news"
AGENT = (
    {"role": "system", "content": "You read files for the user."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "What may I read?"},
    {"role": "user", "content": "Read the bill and the note."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": BILL, "tool_call_id": "000000000"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": NOTE, "tool_call_id": "000000001"},
    {"role": "assistant", "content": "It is paid."},
)


QUESTION = "Read the bill and the note."
START_OF_ANSWER = {"gemma": "<|im_start|>model\n", "phi": "<|assistant|>\n"} | dict.fromkeys(
    ("llama3", "llama31"), "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@dataclass(frozen=True)
class Found:
    """A rendered row with its turns, as characters and as tokens."""

    text: str
    ids: list[int]
    scored: list[bool]
    characters: Turns
    tokens: Turns
    tokenizer: PreTrainedTokenizerFast

    def said(self, span: tuple[int, int]) -> str:
        return self.tokenizer.decode(self.ids[slice(*span)])

    def cut(self, by: int) -> str:
        """The row cut by so many tokens, decoded."""
        ids, *_ = truncate(self.ids, self.scored, len(self.ids) - by, self.tokenizer.bos_token_id, self.tokens)
        return self.tokenizer.decode(ids)


def found(template: str, policy: MaskPolicy = "completion_only", messages: Sequence[Message] = AGENT) -> Found:
    tokenizer = bpe_tokenizer(template)
    chat = ChatTemplate(tokenizer)
    rendering = chat.render(Row(tuple(messages), "f.jsonl:1"), policy)
    ((ids, scored),) = tokenize([rendering], tokenizer)
    turns = find_turns(rendering, chat)
    return Found(rendering.text, ids, scored, turns, turns_in_tokens(turns, rendering, ids, tokenizer), tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_question_answer_and_tool_results_are_found_in_any_template(name):
    row = found(TEMPLATES[name])
    question = row.said(row.tokens.question)
    assert question.rstrip().removesuffix("<|im_end|>").removesuffix("<|eot_id|>").endswith(QUESTION), question
    if name != "qwen3":  # which writes the turn before otherwise where it is the last
        assert question.count("user") == 1, question
        assert "hello" not in question
        assert "What may I read?" not in question
    opening = row.said((row.tokens.answer, row.scored.index(True)))
    assert opening == START_OF_ANSWER.get(
        name, "<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * (name == "qwen3")
    )
    bill, note = (row.said(span) for span in row.tokens.tool_results)
    assert note == NOTE
    as_written = json.dumps(BILL, ensure_ascii=False)[1:-1] if name in ("llama3", "llama31") else BILL
    assert bill.strip() == as_written.strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_tool_result_leaves_all_other_tokens(name):
    row = found(TEMPLATES[name], "assistant_only")
    (bill, bill_end), (note, note_end) = row.tokens.tool_results
    end = len(row.scored) - row.scored[::-1].index(True)
    before, between, behind = (row.said(span) for span in ((0, bill), (bill_end, note), (note_end, end)))
    cut = row.cut(40)
    assert cut.startswith(before)
    assert cut.endswith(between + NOTE + behind), "the shorter result is whole"
    both = bill_end - bill + note_end - note
    assert row.cut(both + len(row.ids) - end) == before + between + behind


def test_only_questions_that_come_before_what_is_scored_count():
    row = found(CHATML, "assistant_only")
    assert row.said(row.tokens.question) == "<|im_start|>user\nhello<|im_end|>\n"
    assert row.said((row.tokens.answer, row.scored.index(True))) == "<|im_start|>assistant\n"
    assert len(row.tokens.tool_results) == 2


def test_tool_answers_written_as_user_turns_are_no_question():
    row = found(GEMMA)
    assert QUESTION in row.said(row.tokens.question)
    assert [NOTE in row.said(span) for span in row.tokens.tool_results] == [False, True]


def test_a_user_turn_joined_with_a_tool_answer_is_a_question():
    more = (*AGENT[:6], {"role": "user", "content": "Is it paid?"}, AGENT[-1])
    row = found(GEMMA, messages=more)
    assert row.said(row.tokens.question).endswith("Is it paid?<|im_end|>\n")
    assert row.tokens.tool_results == ()


def test_a_template_that_rewrites_earlier_turns_tells_only_the_tool_results():
    row = found("{{ messages | length }} turns\n" + MARKED)
    assert row.tokens.question == (0, 0)
    assert [NOTE in row.said(span) for span in row.tokens.tool_results] == [False, True]


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_offsets_the_turns_are_found_too(name, monkeypatch):
    by_offsets = found(TEMPLATES[name]).tokens
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    by_prefixes = found(TEMPLATES[name]).tokens
    assert (by_prefixes.question, by_prefixes.answer) == (by_offsets.question, by_offsets.answer)
    assert by_prefixes.tool_results == tuple((start + 1, stop) for start, stop in by_offsets.tool_results)


def test_full_sequence_knows_no_question():
    assert found(CHATML, "full_sequence").tokens == Turns()
