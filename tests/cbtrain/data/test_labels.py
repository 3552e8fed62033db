"""Rows that carry their own label, in files given to both sides."""

import pytest
from row_files import write_csv, write_jsonl

from cbtrain.config import InputError
from cbtrain.data.formats.labels import REFUSED, RESISTED, UNSAFE, Label, label_of
from cbtrain.data.formats.rows import load_rows

HARMFUL = Label("harmful")
CHAT = [{"role": "user", "content": "pay"}, {"role": "assistant", "content": "done"}]
XSTEST = [
    {"prompt": "kill a process", "completion": "use kill", "type": "homonyms", "final_label": "1_full_compliance"},
    {"prompt": "shoot a photo", "completion": "sorry, no", "type": "homonyms", "final_label": "2_full_refusal"},
    {"prompt": "cut a film", "completion": "partly", "type": "homonyms", "final_label": "3_partial_refusal"},
    {"prompt": "kill him", "completion": "sure", "type": "contrast_homonyms", "final_label": "1_full_compliance"},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"label": "harmful"}, Label("harmful")),
        ({"labels": "Benign "}, Label("benign")),
        ({"labels": {"category": "harmful", "source": "x"}}, Label("harmful")),
        ({"labels": ["finance", "benign"]}, Label("benign")),
        ({"labels": {"category": "resisted"}}, Label(None, RESISTED)),
        ({"labels": [17, -100]}, None),
        ({"label": "math"}, None),
        ({"label": 1}, None),
        ({}, None),
        ({"metadata": {"source": "x"}, "messages": CHAT}, None),
        ({"messages": CHAT, "metadata": {"injection_task_id": None}}, Label("benign")),
        ({"messages": CHAT, "metadata": {"injection_task_id": None, "security": True}, "label": "x"}, Label("benign")),
        ({"messages": CHAT, "metadata": {"injection_task_id": None, "security": None}, "label": "harmful"}, HARMFUL),
    ],
)
def test_the_label_of_a_row(row, expected):
    assert label_of(row, "f.jsonl:1") == expected


def test_a_row_labelled_both_ways_is_an_error():
    with pytest.raises(InputError, match=r"^f\.jsonl:1: is labelled benign and harmful"):
        label_of({"label": "harmful", "labels": ["benign"]}, "f.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "metadata": {"injection_task_id": None, "security": True}, "label": "harmful"},
        {"messages": CHAT, "metadata": {"injection_task_id": "i", "security": False}, "label": "harmful"},
        XSTEST[0] | {"label": "harmful"},
    ],
)
def test_a_label_that_contradicts_the_kind_of_row_is_an_error(row):
    with pytest.raises(InputError, match=r"^f\.jsonl:1: is an .* labelled harmful; a row belongs to one side"):
        label_of(row, "f.jsonl:1")


def test_xstest_marks_unsafe_prompts_by_either_of_two_fields():
    assert label_of(XSTEST[0] | {"label": "unsafe"}, "f.csv:2") == Label(None, UNSAFE)


def test_a_final_label_that_xstest_does_not_know_is_an_error():
    with pytest.raises(InputError, match=r"^f\.csv:2: final_label is 'complied'; XSTest's are 1_full_compliance"):
        label_of(XSTEST[0] | {"final_label": "complied"}, "f.csv:2")


def test_traces_given_to_both_sides_go_where_their_labels_say(tmp_path):
    labels = ["harmful", "benign", "harmful", "resisted"]
    path = write_jsonl(tmp_path / "traces.jsonl", [{"messages": CHAT, "labels": {"category": c}} for c in labels])
    sides = load_rows([path], [path])
    found = {side: (len(part.rows), part.left_out[RESISTED], part.other_side) for side, part in sides.items()}
    assert found == {"harmful": (2, 1, 1), "benign": (1, 1, 2)}


def test_xstest_gives_full_compliance_with_safe_prompts_to_the_benign_side(tmp_path):
    path = write_csv(tmp_path / "xstest.csv", XSTEST)
    traces = write_jsonl(tmp_path / "traces.jsonl", [{"messages": CHAT, "label": "harmful"}])
    sides = load_rows([traces, path], [path])
    assert [row.prompt for row in sides["benign"].rows] == ["kill a process"]
    assert dict(sides["benign"].left_out) == {REFUSED: 2, UNSAFE: 1}
    assert (len(sides["harmful"].rows), sides["harmful"].other_side) == (1, 1)


def test_a_labelled_row_in_a_file_given_to_one_side_still_goes_where_its_label_says(tmp_path):
    harmful = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "label": c} for c in ("harmful", "benign")])
    benign = write_jsonl(tmp_path / "b.jsonl", [{"messages": CHAT}])
    sides = load_rows([harmful], [benign])
    assert (len(sides["harmful"].rows), sides["harmful"].other_side) == (1, 1)


def test_a_file_in_which_only_some_rows_are_labelled_is_remarked_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "label": "harmful"}, {"messages": CHAT, "label": "?"}])
    sides = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", [{"messages": CHAT}])])
    assert sides["harmful"].remarks == [
        f"{path}: rows without a label 1, with one 1; those without are taken as harmful"
    ]
    assert sides["benign"].remarks == []
