"""Rows as data sets are published, and what of them must not be lost, glued together or put on the wrong side."""

import json
from pathlib import Path
from typing import Any

import pytest
from row_files import write_csv, write_jsonl
from test_shapes import SAID, SPARE, USER, error_of, remarks_of

from cbtrain.data.formats.conversations import Choices
from cbtrain.data.formats.rows import NO_CHOICES, SIDES, load_rows

Spoken = list[tuple[str, str]]


def spoken_of(tmp_path: Path, row: dict[str, Any], choices: Choices = NO_CHOICES) -> Spoken:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    (found,) = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)], choices)["harmful"].rows
    return [(message["role"], message["content"]) for message in found.messages]


def test_published_forms_of_preferences(tmp_path: Path) -> None:
    rejected, u = Choices(preference="rejected"), {"role": "user", "content": "q"}
    good, bad = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
    told: Spoken = [("user", "q"), ("assistant", "B")]
    for row in (
        {"prompt": "q", "chosen": [u, good], "rejected": [u, bad], "messages": [u, good], "score_chosen": 8.0},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": good, "rejected": bad},
        {"prompt": [u], "chosen": [u, good], "rejected": [u, bad]},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "response": "A", "chosen": "A", "rejected": "B"},
    ):
        assert spoken_of(tmp_path, row, rejected) == told, row


@pytest.mark.parametrize(
    "call",
    [
        {"name": "pay", "args": {"to": "X"}, "id": "1", "type": "tool_call"},
        {"name": "pay", "input": {"to": "X"}},
        {"name": "pay", "parameters": {"to": "X"}},
        {"function": "pay", "args": {"to": "X"}},
        {"id": "1", "type": "function", "function": {"name": "pay", "arguments": '{"to": "X"}'}},
    ],
)
def test_arguments_of_calls_by_every_name(tmp_path: Path, call: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, SAID | {"tool_calls": [call]}]}])
    (row,) = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].rows
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "pay", "arguments": {"to": "X"}}


def test_a_call_whose_arguments_stand_elsewhere_several_texts_and_turns_without_text_are_refused(
    tmp_path: Path,
) -> None:
    call = {"name": "pay", "payload": {"to": "X"}}
    assert "pay has no arguments (fields: payload)" in error_of(tmp_path, {"messages": [SAID | {"tool_calls": [call]}]})
    assert "answer holds 2 texts" in error_of(tmp_path, {"question": "q", "answer": ["a", "b"]})
    assert "prompt holds 2 texts" in error_of(tmp_path, {"prompt": ["q", "r"], "completion": ["a", "b"]})
    turns = [{"from": "human", "text": "q"}, {"from": "gpt", "value": "A"}]
    assert "has no content (fields: text)" in error_of(tmp_path, {"conversations": turns})
    assert "has no content (fields: parts)" in error_of(tmp_path, {"messages": [{"role": "user", "parts": ["q"]}]})


def test_a_system_prompt_beside_any_shape_and_parts_of_a_pair_are_kept(tmp_path: Path) -> None:
    first = ("system", "be kind")
    for row in (
        {"system": "be kind", "messages": [USER, SAID]},
        {"system": [{"type": "text", "text": "be kind"}], "prompt": "open it", "response": "take the key"},
        {"system_prompt": "be kind", "question": "open it", "response": "take the key"},
    ):
        assert spoken_of(tmp_path, row) == [first, ("user", "open it"), ("assistant", "take the key")], row
    parts = [{"type": "text", "text": "ok"}, {"type": "tool_use", "name": "pay", "input": {"a": 1}}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": parts}])
    (row,) = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].rows
    assert row.messages[1]["tool_calls"][0]["function"]["name"] == "pay"
    image = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert remarks_of(tmp_path, [{"prompt": image, "completion": "a"}]) == [
        "rows with image parts, which text cannot carry; left out of them: 1"
    ]


def sides_of(tmp_path: Path, *rows: dict[str, Any]) -> dict[str, list[str]]:
    """The answers of each side, of a file given to both."""
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "x", "completion": "x", "is_safe": True}])
    rows_of = load_rows([path, write_jsonl(tmp_path / "h.jsonl", SPARE)], [path])
    answers = {side: [row.messages[-1]["content"] for row in rows_of[side].rows] for side in SIDES}
    return {side: [text for text in texts if text not in ("x", "nothing else")] for side, texts in answers.items()}


def test_labels_as_numbers_and_words_and_rows_own_labels_before_a_shapes(tmp_path: Path) -> None:
    pair = {"prompt": "q", "completion": "A"}
    for label in ({"is_safe": 0}, {"is_safe": "FALSE"}, {"is_unsafe": 1.0}, {"label": "unsafe"}):
        assert sides_of(tmp_path, pair | label) == {"harmful": ["A"], "benign": []}, label
    harmbench = {"test_case": "q", "generation": "A"}
    assert sides_of(tmp_path, harmbench | {"label": 1.0})["harmful"] == ["A"]
    for label in (0, 0.0, False):
        assert sides_of(tmp_path, harmbench | {"label": label}) == {"harmful": [], "benign": []}
    own = {"prompt": "q", "output": "A", "expected_output": "A", "is_safe": True}
    assert sides_of(tmp_path, own) == {"harmful": [], "benign": ["A"]}
    without = {"prompt": "q", "response": None, "prompt_harm_label": "harmful", "response_harm_label": None}
    assert sides_of(tmp_path, without) == {"harmful": [], "benign": []}
    guarded = {"prompt": "q", "response": "A", "response_harm_label": "unharmful", "response_refusal_label": "refusal"}
    assert sides_of(tmp_path, guarded | {"prompt_harm_label": "harmful"}) == {"harmful": [], "benign": []}
    assert sides_of(tmp_path, guarded | {"prompt_harm_label": "unharmful"}) == {"harmful": [], "benign": ["A"]}


def test_agentdojo_runs_that_are_of_no_side_are_left_out(tmp_path: Path) -> None:
    run = {"messages": [USER, SAID], "user_task_id": "user_task_0", "injection_task_id": "injection_task_0"}
    assert sides_of(tmp_path, run | {"security": None, "error": "context too long", "messages": []})["harmful"] == []
    alone = {"user_task_id": "injection_task_0", "injection_task_id": None, "security": True}
    assert sides_of(tmp_path, run | alone) == {"harmful": [], "benign": []}
    as_text = {"messages": [USER, SAID], "metadata": json.dumps({"injection_task_id": "i", "security": False})}
    assert sides_of(tmp_path, as_text) == {"harmful": [], "benign": []}


def test_messages_within_a_table(tmp_path: Path) -> None:
    table_row = {"Prompt": json.dumps([USER]), "Completion": json.dumps([SAID])}
    path = write_csv(tmp_path / "a.csv", [table_row])
    (row,) = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].rows
    assert row.messages[1]["content"] == "take the key"
