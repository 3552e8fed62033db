"""Files to rows: shapes, sides by label, and errors that name file and line."""

import gzip
import json
from pathlib import Path

import pytest
from row_files import write_jsonl, write_parquet

from cbtrain.config import InputError
from cbtrain.data.formats.readers import read_rows
from cbtrain.data.formats.rows import load_rows

AGENTDOJO = Path(__file__).parents[3].parent / "shared" / "data" / "agentdojo"

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]}
PAIR = {"prompt": "hello", "completion": "hi there"}
ORIGINAL = {"category": "x", "prompt": "do harm", "llama3_output": "I cannot", "output": "sure, harm"}


def agentdojo(task: str | None, security: bool, prompt: str = "pay the bill") -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "done"}]
    return {"messages": messages, "metadata": {"injection_task_id": task, "security": security}}


@pytest.fixture
def files(tmp_path):
    """A function that writes rows to a named file and gives its path."""
    return lambda name, rows: write_jsonl(tmp_path / name, rows)


def error_of(harmful: list[str], benign: list[str]) -> str:
    with pytest.raises(InputError) as caught:
        load_rows(harmful, benign)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spoken(row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


def test_chat_and_prompt_completion_rows_are_the_same_conversation(files):
    sides = load_rows([files("a.jsonl", [CHAT])], [files("b.jsonl", [PAIR])])
    assert spoken(sides["harmful"].rows[0]) == [("user", "hello"), ("assistant", "hi there")]
    assert spoken(sides["benign"].rows[0]) == spoken(sides["harmful"].rows[0])


def test_the_original_circuit_breakers_list_gives_its_harmful_output(files):
    path = files("cb.json", [json.dumps([ORIGINAL, ORIGINAL], indent=2)])
    rows = load_rows([path], [files("b.jsonl", [PAIR])])["harmful"].rows
    assert [spoken(row) for row in rows] == [[("user", "do harm"), ("assistant", "sure, harm")]] * 2
    assert [row.source for row in rows] == [f"{path}:2", f"{path}:8"]


def test_an_original_row_on_the_benign_side_is_an_error(files):
    path = files("cb.jsonl", [PAIR, ORIGINAL])
    assert error_of([files("a.jsonl", [CHAT])], [path]).startswith(f"{path}:2: a circuit-breakers row")


def test_gzip_is_known_by_its_content_and_not_by_its_name(files, tmp_path):
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    plain = files("plain.jsonl.gz", [json.dumps([PAIR, PAIR])])
    sides = load_rows([str(packed)], [plain])
    assert (len(sides["harmful"].rows), len(sides["benign"].rows)) == (1, 2)


def test_a_damaged_gzip_is_an_error(files, tmp_path):
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(b"{}" * 100)[:-9])
    assert error_of([str(packed)], [files("b.jsonl", [PAIR])]).startswith(f"{packed}: a damaged gzip file")


def test_labelled_rows_take_their_side_and_resisted_ones_are_counted(files):
    rows = [
        {"metadata": {"benchmark": "agent-dojo"}},
        *[agentdojo(None, True)] * 3,
        *[agentdojo("injection_task_1", True)] * 2,
        *[agentdojo("injection_task_1", False)] * 4,
    ]
    path = files("runs.jsonl", rows)
    sides = load_rows([path], [path])
    found = {side: (len(part.rows), part.left_out.total(), part.other_side) for side, part in sides.items()}
    assert found == {"harmful": (2, 4, 3), "benign": (3, 4, 2)}
    assert [row.source for row in sides["harmful"].rows] == [f"{path}:5", f"{path}:6"]


@pytest.mark.parametrize(
    ("name", "harmful", "left_out"), [("gpt-4o-mini-2024-07-18", 21, 76), ("llama-3-70b-chat", 26, 71)]
)
def test_the_agentdojo_runs_have_the_published_counts(name, harmful, left_out):
    path = AGENTDOJO / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the AgentDojo runs are not beside this checkout (shared/data/agentdojo)")
    sides = load_rows([str(path)], [str(path)])
    found = {side: (len(part.rows), part.left_out.total(), part.other_side) for side, part in sides.items()}
    assert found == {"harmful": (harmful, left_out, 97), "benign": (97, left_out, harmful)}


def test_an_unlabelled_row_in_a_file_given_to_both_sides_is_an_error(files, tmp_path):
    path = files("both.jsonl", [agentdojo(None, True), CHAT])
    roundabout = str(tmp_path / "." / ".." / tmp_path.name / "both.jsonl")
    message = error_of([path], [roundabout])
    assert message.startswith(f"{path}:2: the row carries no label")


def test_null_content_empty_calls_and_text_parts_are_normalised(files):
    call = {"id": "1", "type": "function", "function": {"name": "pay", "arguments": '{"to": "me"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "pay "}, {"type": "text", "text": "me"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "paid", "tool_call_id": "1", "error": None},
        {"role": "assistant", "content": "done", "tool_calls": []},
    ]
    sides = load_rows([files("a.jsonl", [{"messages": messages}])], [files("b.jsonl", [PAIR])])
    row = sides["harmful"].rows[0]
    assert spoken(row) == [("user", "pay me"), ("assistant", ""), ("tool", "paid"), ("assistant", "done")]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "pay", "arguments": {"to": "me"}}
    assert "tool_calls" not in row.messages[3]


def test_openais_first_form_of_a_call_is_a_call_and_fields_that_are_not_read_are_told(files):
    call = {"role": "assistant", "content": None, "function_call": {"name": "pay", "arguments": '{"to": "me"}'}}
    thought = {"role": "assistant", "content": "done", "reasoning_content": "I should", "tool_calls": None}
    chats = [{"messages": [{"role": "user", "content": "pay"}, turn], "tools": []} for turn in (call, thought)]
    side = load_rows([files("a.jsonl", chats)], [files("b.jsonl", [PAIR])])["harmful"]
    assert side.rows[0].messages[1]["tool_calls"][0]["function"] == {"name": "pay", "arguments": {"to": "me"}}
    assert side.remarks == ["rows with reasoning_content of assistant turns, which nothing here reads: 1"]


def test_one_parquet_file_of_runs_and_labelled_chats_gives_each_its_own_side(files, tmp_path):
    chat = [{"role": "user", "content": "task"}, {"role": "assistant", "content": "done"}]
    rows = [
        {"messages": chat, "metadata": {"injection_task_id": None, "security": True}, "label": None},
        {"messages": chat, "metadata": {"injection_task_id": "i", "security": True}, "label": None},
        {"messages": chat, "metadata": {"source": "jailbreaks"}, "label": "harmful"},
    ]
    for path in (files("a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        sides = load_rows([path], [path])
        places = {side: [row.source.rpartition(":")[2] for row in part.rows] for side, part in sides.items()}
        assert places == {"harmful": ["2", "3"], "benign": ["1"]}


def test_line_separators_within_strings_do_not_end_a_line(files):
    path = files("a.jsonl", [json.dumps(PAIR | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False), "", "{"])
    with pytest.raises(InputError, match=r"a\.jsonl:3: not JSON"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a" "b"}\n',
            ":2: not JSON (Expecting ',' delimiter at column 16)",
        ),
        ('[{"prompt": "a"},\n {"prompt" 1}]', ":2: not JSON (Expecting ':' delimiter at column 12)"),
        ("\n\n", ": the file is empty; expected a JSON row on every line"),
        ("\n[1]", ":2: a row must be a JSON object, this is a number"),
        ('{"text": "a"}', ":1: no known shape of row (fields: text)"),
        ('{"prompt": 3, "completion": "a"}', ":1: prompt must be a string, null or a list of text parts"),
        ('{"messages": []}', ":1: messages must be a list with at least one message"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "bot"}]}', ":1: message 2: must be an object whose"),
        ('{"messages": [{"role": "user", "tool_calls": [{"name": 3}]}]}', ":1: message 1: tool_calls must be a list"),
        ('{"messages": [1], "metadata": {"injection_task_id": "x"}}', ":1: an AgentDojo row with an attack needs"),
        ("[" * 100_000, ": not"),
        ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}", ":1: not a row (a number of too many digits)"),
        ("prompt,completion,completion\na,b,c\n", ":1: two columns are named 'completion'"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, files, content, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    message = error_of([str(path)], [files("b.jsonl", [PAIR])])
    assert message.startswith(f"{path}{expected}"), message


def test_a_path_that_is_no_readable_file_is_named(files, tmp_path):
    benign = [files("b.jsonl", [PAIR])]
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    missing = str(tmp_path / "c.jsonl")
    assert error_of([missing], benign) == f"{missing}: no such file; did you mean b.jsonl?"
    (tmp_path / "empty").mkdir()
    assert error_of([str(tmp_path / "empty")], benign).startswith(f"{tmp_path}/empty: no data file in this directory")
    assert error_of([str(latin)], benign).startswith(f"{latin}: not UTF-8 text (byte 12)")
    assert error_of([], benign) == "--harmful: name at least one file of harmful rows"
    assert "cannot be given to both --harmful and --benign" in error_of(benign, benign)
    assert error_of([files("a.jsonl", [CHAT])] * 2, benign).endswith("a.jsonl: the file is named twice")


def test_a_side_without_a_row_is_told_what_its_files_held(files):
    path = files("runs.jsonl", [*[agentdojo(None, True)] * 3, *[agentdojo("injection_task_1", False)] * 4])
    message = error_of([path], [path])
    assert message == (
        f"--harmful {path}: no harmful row; found 3 benign rows and 4 rows left out (attack resisted). "
        "Name a file with harmful rows"
    )
