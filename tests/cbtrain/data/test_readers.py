"""Files to values: every format gives the same rows, and errors name file and line."""

import gzip
import json
import sys

import pytest
from row_files import write_csv, write_jsonl, write_parquet

from cbtrain.config import InputError, get_config
from cbtrain.data.formats import hub
from cbtrain.data.formats.readers import read_rows
from cbtrain.data.formats.rows import load_rows

PAIRS = [
    {"prompt": "first,\nwith a line break", "completion": 'she said "yes"'},
    {"prompt": "second", "completion": ""},
    {"prompt": "third", "completion": "the end"},
]
CALL = {"name": "pay", "arguments": {"to": "me", "amount": 3}}
CHATS = [
    {"messages": [{"role": "user", "content": "pay"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {
        "messages": [
            {"role": "user", "content": "read"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"name": "read", "arguments": {"file": "a.txt"}}],
            },
        ]
    },
]


def error_of(path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_format_gives_the_same_rows(tmp_path):
    as_list = tmp_path / "list.json"
    as_list.write_text(json.dumps(PAIRS, indent=1))
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / write_csv(tmp_path / "c.csv", PAIRS)).read_bytes()))
    files = [
        write_jsonl(tmp_path / "a.jsonl", PAIRS),
        str(as_list),
        str(tmp_path / "c.csv"),
        str(packed),
        write_csv(tmp_path / "semicolons.csv", PAIRS, delimiter=";"),
        write_csv(tmp_path / "tabs.data", PAIRS, delimiter="\t"),
        write_parquet(tmp_path / "p.parquet", PAIRS),
        write_parquet(tmp_path / "parquet.without.its.name", PAIRS),
    ]
    for file in files:
        assert [row for _, row in read_rows(file)] == PAIRS, file


def test_a_csv_row_is_named_by_the_line_that_it_starts_on(tmp_path):
    path = write_csv(tmp_path / "a.csv", PAIRS)
    assert [line for line, _ in read_rows(path)] == [2, 4, 5]


def test_a_csv_cell_may_hold_a_conversation_longer_than_the_librarys_limit(tmp_path):
    chat = [{"role": "user", "content": "word " * 40_000}, {"role": "assistant", "content": "yes"}]
    path = write_csv(tmp_path / "a.csv", [{"messages": json.dumps(chat), "note": "[not json"}])
    assert [row for _, row in read_rows(path)] == [{"messages": chat, "note": "[not json"}]


@pytest.mark.parametrize("field", ["x" * 200_000, ["x", "prompt", "y"]])
def test_a_first_line_of_json_is_no_header(tmp_path, field):
    rows = [{"prompt": "a", "completion": "b", "tags": field}, PAIRS[0]]
    assert [row for _, row in read_rows(write_jsonl(tmp_path / "a.jsonl", rows))] == rows


def test_parquet_columns_give_a_call_only_its_own_arguments(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", CHATS)
    rows = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", PAIRS)])["harmful"].rows
    calls = [row.messages[1]["tool_calls"][0]["function"] for row in rows]
    assert calls == [CALL, {"name": "read", "arguments": {"file": "a.txt"}}]
    assert rows[1].source == f"{path}:2"


def test_a_bad_table_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\nc,d,e\n")
    assert error_of(path) == f"{path}:3: 3 cells in a row, the header names 2 columns"
    path.write_text('prompt,completion\na,b\n"c"d,e\n')
    assert error_of(path).startswith(f"{path}:3: not CSV (")
    path.write_text("prompt,messages\na,[1\n")
    assert error_of(path).startswith(f"{path}:2: not JSON (")
    damaged = tmp_path / "a.parquet"
    damaged.write_bytes(b"PAR1 and nothing that follows from it")
    assert error_of(damaged).startswith(f"{damaged}: a damaged Parquet file (")
    assert error_of(write_parquet(damaged, [{"prompt": "a"}][:0])) == f"{damaged}: the file is empty; expected rows"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", True),
        ("org/name:train[:10%]", True),
        ("org/name.jsonl", False),
        ("org/name.parquet", False),
        ("a/b/c", False),
        ("name", False),
        ("/org/name", False),
        ("./org/name", False),
    ],
)
def test_a_dataset_of_the_hub_is_told_by_its_name(name, expected):
    assert hub.is_dataset(name) is expected


def test_a_name_in_a_folder_that_is_here_is_a_file_and_not_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "harmful.jsonl").write_text("{}")
    assert error_of("data/harmful") == "data/harmful: no such file; did you mean harmful.jsonl?"


def test_without_the_datasets_package_a_dataset_is_one_line_with_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("org/name:train") == (
        "org/name:train: no such file; to read it as a Hugging Face dataset, pip install datasets, or download its "
        "file and name that"
    )


def test_a_dataset_that_cannot_be_had_is_one_line_with_the_mend(monkeypatch, tmp_path):
    pytest.importorskip("datasets", reason="the datasets package is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = error_of("no-such-organisation/no-such-name")
    assert message.startswith("no-such-organisation/no-such-name: no such file, and no dataset to be had from the")
    assert message.endswith("; download its file and name that")


def test_a_loaded_dataset_becomes_a_file_of_the_same_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chats, pairs = datasets.Dataset.from_list(CHATS), datasets.Dataset.from_list(PAIRS)
    path = hub.write_split("org/name", datasets.DatasetDict(test=pairs, train=chats))
    rows = load_rows([str(path)], [str(hub.write_split("org/name:test", pairs))])
    assert rows["harmful"].rows[0].messages[1]["tool_calls"][0]["function"] == CALL
    assert [row.prompt for row in rows["benign"].rows] == [row["prompt"] for row in PAIRS]
    with pytest.raises(InputError, match=r"^org/name: has the splits one, two; name one, as org/name:one$"):
        hub.write_split("org/name", datasets.DatasetDict(one=chats, two=pairs))


def test_a_configuration_of_files_stays_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    config = get_config("tiny", harmful=(path,), benign=(path,))
    assert hub.localise(config) == config
