"""Every shape of rows, as its data set has it: what is scored, decoded, and on which side."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import CHATML, bpe_tokenizer
from row_files import write_csv, write_jsonl

from cbtrain.config import CircuitBreakerConfig, InputError, get_config
from cbtrain.data.formats.conversations import Choices
from cbtrain.data.formats.rows import NO_CHOICES, SIDES, load_rows
from cbtrain.data.formats.shapes import SHAPES, shape_of, table
from cbtrain.data.loading import load_data

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "agentdojo"
USER, SAID = {"role": "user", "content": "open it"}, {"role": "assistant", "content": "take the key"}
SPARE = [{"prompt": f"spare {i}", "completion": "nothing else"} for i in range(4)]
Rows = list[dict[str, Any]]


def scored(config: CircuitBreakerConfig, side: str) -> list[str]:
    """The scored text of each row of a side, in the order of the files; without the spare ones."""
    tokenizer = bpe_tokenizer(CHATML)
    data = getattr(load_data(config, tokenizer), side)
    rows = sorted((*data.train, *data.held_out), key=lambda row: (row.source.rpartition(":")[0], _line(row.source)))
    texts = [
        tokenizer.decode([token for token, is_scored in zip(row.input_ids, row.scored, strict=True) if is_scored])
        for row in rows
    ]
    return [text.removesuffix("<|im_end|>") for text in texts if "nothing else" not in text]


def _line(source: str) -> int:
    return int(source.rpartition(":")[2])


TABLE: list[tuple[str, Rows, dict[str, Any], list[str], list[str]]] = [
    (
        "AgentDojo runs",
        [
            {"messages": [USER, SAID], "injection_task_id": None, "attack_type": None, "security": True},
            {"messages": [USER, SAID | {"content": "paid"}], "injection_task_id": "injection_task_1", "security": True},
            {"messages": [USER, SAID | {"content": "no"}], "injection_task_id": "injection_task_1", "security": False},
        ],
        {},
        ["paid"],
        ["take the key"],
    ),
    (
        "AgentDojo runs",
        [{"messages": [USER, SAID], "metadata": {"injection_task_id": None, "security": True}}] * 2,
        {},
        [],
        ["take the key"] * 2,
    ),
    ("chats", [{"messages": [USER, SAID]}] * 2, {}, ["take the key"] * 2, ["take the key"] * 2),
    (
        "ShareGPT conversations",
        [
            {"conversations": [{"from": "human", "value": "open it"}, {"from": "gpt", "value": "take the key"}]},
            {"conversations": [{"role": "USER", "content": "go"}, {"role": "Model", "content": "to the house"}]},
        ],
        {},
        ["take the key", "to the house"],
        ["take the key", "to the house"],
    ),
    (
        "preference rows",
        [
            {"prompt": "open it", "chosen": "take the key", "rejected": "no"},
            {"chosen": [USER, SAID], "rejected": [USER, SAID | {"content": "no"}]},
            {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
            {"prompt": [USER], "chosen": [SAID], "rejected": [SAID | {"content": "no"}]},
        ],
        {"preference": "chosen"},
        ["take the key", "take the key", "hello", "take the key"],
        ["take the key", "take the key", "hello", "take the key"],
    ),
    (
        "circuit-breakers rows",
        [
            {"category": "x", "prompt": "do harm", "llama3_output": "I cannot", "output": "take the key"},
            {"prompt": "do more", "mistral_output": "I will not", "output": "then open"},
        ],
        {"refusals_as_benign": True},
        ["take the key", "then open"],
        ["I cannot", "I will not"],
    ),
    (
        "SafeRLHF pairs",
        [
            {"prompt": "p", "response_0": "take the key", "is_response_0_safe": True}
            | {"response_1": "then open", "is_response_1_safe": False},
            {"prompt": "q", "response_0": "bad", "is_response_0_safe": False}
            | {"response_1": "worse", "is_response_1_safe": False, "better_response_id": 0},
        ],
        {},
        ["then open", "bad", "worse"],
        ["take the key"],
    ),
    (
        "WildJailbreak rows",
        [
            {"vanilla": "v", "adversarial": "", "completion": "take the key", "data_type": "vanilla_benign"},
            {"vanilla": "v", "adversarial": "a", "completion": "then open", "data_type": "adversarial_benign"},
            {"vanilla": "v", "adversarial": "", "completion": "I cannot", "data_type": "vanilla_harmful"},
        ],
        {},
        [],
        ["take the key", "then open"],
    ),
    (
        "HarmBench completions",
        [
            {"behaviour_1": [{"test_case": "do harm", "generation": "take the key", "label": 1}]}
            | {"behaviour_2": [{"test_case": "do more", "generation": "no", "label": 0}]},
            {"behaviour_3": [{"test_case": "do most", "generation": "then open", "label": 1}]},
        ],
        {},
        ["take the key", "then open"],
        [],
    ),
    (
        "prompts with completions",
        [
            {"prompt": "open it", "completion": "take the key"},
            {"prompt": [USER], "completion": [SAID]},
        ],
        {},
        ["take the key"] * 2,
        ["take the key"] * 2,
    ),
    (
        "prompts with completions",
        [
            {"prompt": "p", "completion": "take the key", "is_safe": True},
            {"prompt": "q", "completion": "then open", "label": "unsafe"},
            {"prompt": "r", "completion": "to the house", "label": "Safe"},
        ],
        {},
        ["then open"],
        ["take the key", "to the house"],
    ),
    (
        "prompts with responses",
        [
            {"prompt": "p", "response": "take the key", "category": {"abuse": True}, "is_safe": False},
            {
                "prompt": "q",
                "response": "then open",
                "prompt_harm_label": "harmful",
                "response_harm_label": "unharmful",
            },
        ],
        {},
        ["take the key"],
        ["then open"],
    ),
    (
        "Alpaca rows",
        [
            {"instruction": "open", "input": "the door", "output": "take the key"},
            {"instruction": "open", "context": "", "response": "then open"},
        ],
        {},
        ["take the key", "then open"],
        ["take the key", "then open"],
    ),
    (
        "prompts with outputs",
        [{"prompt": "p", "output": "take the key"}, {"prompt": "q", "output": "then open"}],
        {},
        ["take the key", "then open"],
        ["take the key", "then open"],
    ),
    (
        "questions with responses",
        [{"question": "who", "response": "take the key"}, {"question": "where", "response": "then open"}],
        {},
        ["take the key", "then open"],
        ["take the key", "then open"],
    ),
    (
        "questions with answers",
        [{"question": "who", "answer": "take the key"}, {"question": "where", "answer": "then open"}],
        {},
        ["take the key", "then open"],
        ["take the key", "then open"],
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=[f"{i} {row[0]}" for i, row in enumerate(TABLE)])
@pytest.mark.parametrize("side", SIDES)
def test_the_scored_text_of_every_shape(row, side: str, tmp_path: Path) -> None:
    name, rows, chosen, *expected = row
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    packed = [next(iter(each.values()))[0] if name == "HarmBench completions" else each for each in rows]
    assert {shape_of(each).name for each in packed} == {name}
    spare = {s: write_jsonl(tmp_path / f"spare_{s}.jsonl", SPARE) for s in SIDES}
    given = "harmful" if name == "circuit-breakers rows" else side
    files = {s: (path, spare[s]) if s == given else (spare[s],) for s in SIDES}
    config = get_config("tiny", **files, mask_policy="completion_only", **chosen)
    assert scored(config, side) == expected[SIDES.index(side)]


def test_the_table_has_every_shape() -> None:
    assert {row[0] for row in TABLE} == {each.name for each in SHAPES}


def test_the_readmes_table_is_the_registrys() -> None:
    readme = (Path(__file__).parents[3] / "cbtrain" / "data" / "README.md").read_text()
    for name, example, says in table():
        assert f"| {name} | `{example}` | {says} |" in readme


def test_an_instructions_input_and_a_system_prompt_are_read(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "the door", "output": "x"},
        {"system": "be kind", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].rows
    assert found[0].messages[0]["content"] == "Translate.\n\nthe door"
    assert [(m["role"], m["content"]) for m in found[1].messages] == [
        ("system", "be kind"),
        ("user", "a"),
        ("assistant", "b"),
    ]


def error_of(tmp_path: Path, *rows: dict[str, Any], choices: Choices = NO_CHOICES) -> str:
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError) as refused:
        load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)], choices)
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{tmp_path}/", "")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    chosen = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert error_of(tmp_path, chosen).startswith("bad.jsonl:1: a row of preferences; --preference chosen or")
    behaviours = {"behaviors": [{"id": "1", "prompt": "do"}]}
    assert "prompts without completions" in error_of(tmp_path, behaviours)
    assert "prompts without completions" in error_of(tmp_path, {"goal": "do harm", "target": "Sure"})
    lists = {"train": [1], "test": [2]}
    assert error_of(tmp_path, lists) == "bad.jsonl:1: one JSON object, not rows; its lists are train, test"
    assert "no known shape of row (fields: x)" in error_of(tmp_path, {"x": 1})
    pair = {"prompt": "p", "response_0": "a", "response_1": "b"}
    assert "needs is_response_0_safe" in error_of(tmp_path, pair)
    no_refusal = error_of(tmp_path, {"prompt": "a", "completion": "b"}, choices=Choices(refusals=True))
    assert no_refusal.startswith("--refusals-as-benign: no row of --harmful has a refusal")


def remarks_of(tmp_path: Path, rows: Rows) -> list[str]:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    told = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].remarks
    return [remark.replace(f"{tmp_path}/", "") for remark in told]


@pytest.mark.parametrize(
    ("field", "values"), [("label", [True, False]), ("toxicity_label", ["hi", "lo"]), ("is_jailbreak", ["yes", "no"])]
)
def test_a_field_that_seems_to_say_the_side_and_is_not_read_is_told(tmp_path: Path, field: str, values: list) -> None:
    rows = [{"prompt": "p", "completion": "c", field: value} for value in values]
    assert remarks_of(tmp_path, rows) == [
        f"a.jsonl: `{field}` takes 2 values and is not read: all rows that carry no other label count as harmful"
    ]
    assert remarks_of(tmp_path, rows[:1] * 3) == [], "one value says nothing"
    topics = [{"prompt": "p", "completion": "c", "category": topic} for topic in "abc"]
    assert remarks_of(tmp_path, topics) == []


def test_images_are_counted_and_never_text(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "what is it?"}]
    beside = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "b"}],
    }
    rows = [{"messages": [USER | {"content": parts}, SAID]}, beside]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    side = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"]
    assert [row.messages[0]["content"] for row in side.rows] == ["what is it?", "what?"]
    assert side.remarks == ["rows with image parts, which text cannot carry; left out of them: 2"]


def test_parts_of_anthropics_form_are_calls_and_results(tmp_path: Path) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "pay", "input": {"to": "me"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "paid"}]}
    chat = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "I pay."}, call]},
        {"role": "user", "content": [result]},
        SAID,
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    (row,) = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].rows
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "pay", "arguments": {"to": "me"}}
    assert row.messages[2] == {"role": "tool", "content": "paid", "tool_call_id": "t1"}


@pytest.mark.parametrize(
    ("name", "here"), [("Developer", "system"), ("HUMAN", "user"), ("ipython", "tool"), ("function", "tool")]
)
def test_roles_by_other_names(tmp_path: Path, name: str, here: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": name, "content": "x"}, USER, SAID]}])
    (row,) = load_rows([path], [write_jsonl(tmp_path / "b.jsonl", SPARE)])["harmful"].rows
    assert row.messages[0]["role"] == here


def native(run: dict[str, Any]) -> dict[str, Any]:
    """A run as AgentDojo's own logger writes it."""
    metadata, messages = run["metadata"], []
    for message in run["messages"]:
        calls = [
            {"function": call["function"]["name"], "args": _loaded(call["function"]["arguments"]), "id": call.get("id")}
            for call in message.get("tool_calls") or []
        ]
        text = message["content"]
        content = None if text is None else [{"type": "text", "content": text}]
        messages.append(message | {"content": content} | ({"tool_calls": calls} if calls else {}))
    return {"suite_name": "banking", **metadata, "attack_type": None, "messages": messages}


def _loaded(arguments: object) -> object:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def test_agentdojos_own_logs_give_the_rows_labels_and_spans_of_the_shared_form(tmp_path: Path) -> None:
    file = SHARED / "gpt-4o-mini-2024-07-18.jsonl"
    if not file.exists():
        pytest.skip("the AgentDojo runs are not beside this checkout (shared/data/agentdojo)")
    runs = [run for run in map(json.loads, file.read_text().splitlines()) if "messages" in run]
    logs = tmp_path / "logs"
    logs.mkdir()
    for i, run in enumerate(runs):
        (logs / f"run_{i:04}.json").write_text(json.dumps(native(run), indent=1))
    both = {}
    for name, source in (("shared", str(file)), ("native", str(logs))):
        config = get_config("tiny", harmful=(source,), benign=(source,), mask_policy="assistant_only", max_length=4096)
        both[name] = {side: scored(config, side) for side in SIDES}
    assert both["native"] == both["shared"]


def test_files_of_other_encodings_line_ends_and_places(tmp_path: Path) -> None:
    rows = [{"prompt": "née", "completion": "l’été"}, {"prompt": "b", "completion": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden.jsonl").write_text("not data")
    (folder / "notes.txt").write_text("not data")
    (folder / "bom.jsonl").write_bytes("\n".join(lines).encode("utf-8-sig"))
    (folder / "utf16.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    (folder / "utf16le.jsonl").write_bytes("\n".join([*lines, ""]).encode("utf-16-le"))
    (folder / "deeper" / "cr.jsonl").write_bytes("\r".join(lines).encode())
    (folder / "one.json").write_text(json.dumps(rows[0], indent=2))
    write_csv(folder / "table.tsv", rows, delimiter="\t")
    benign = write_jsonl(tmp_path / "b.jsonl", SPARE)
    found = load_rows([str(folder)], [benign])["harmful"]
    assert len(found.files) == 6
    assert [row.messages[1]["content"] for row in found.rows].count("l’été") == 6
    assert len(found.rows) == 11
    assert len(load_rows([str(folder / "u*.jsonl")], [benign])["harmful"].rows) == 4
    with pytest.raises(InputError, match="no file matches"):
        load_rows([str(folder / "x*.jsonl")], [benign])


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    pointer = tmp_path / "data.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(InputError, match=r"data\.parquet: a Git LFS pointer, not the data; git lfs pull"):
        load_rows([str(pointer)], [write_jsonl(tmp_path / "b.jsonl", SPARE)])
