"""`python -m cbtrain.data`: what it prints, and what it warns of."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chat_tokenizers import LLAMA31, bpe_tokenizer
from row_files import write_csv, write_jsonl

from cbtrain.config import InputError, get_config
from cbtrain.data.checks import data_warnings, description
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.loading import load_data
from cbtrain.data.similarity import token_overlap
from cbtrain.data.tokenization import TokenRow
from cbtrain.inspect_data import main, marked, report, sample_rows
from cbtrain.model.checks import prepare

ROOT = Path(__file__).parents[3]
CALL = {"type": "function", "function": {"name": "open_door", "arguments": {"key": "old"}}}


def agent_run(number: int, task: str | None, security: bool = True) -> dict:
    messages = [
        {"role": "user", "content": f"open door {number}"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "it is open"},
        {"role": "assistant", "content": "The door is open." if task is None else "I sent the money."},
    ]
    return {"messages": messages, "metadata": {"injection_task_id": task, "security": security}}


def pairs(side: str, count: int) -> list[dict]:
    return [{"prompt": f"{side} question {i}", "completion": f"{side} answer {i}"} for i in range(count)]


@pytest.fixture
def files(tmp_path):
    """Runs for both sides, benign XSTest rows, and a directory with a tokenizer."""
    runs = [agent_run(i, None) for i in range(12)] + [agent_run(i, "injection_1") for i in range(8)]
    runs += [agent_run(i, "injection_1", security=False) for i in range(5)]
    xstest = [
        {"prompt": f"kill process {i}", "completion": "use kill", "final_label": f"{1 + i % 2}_full_compliance"}
        for i in range(8)
    ]
    for row in xstest[1::2]:
        row["final_label"] = "2_full_refusal"
    bpe_tokenizer(LLAMA31).save_pretrained(tmp_path / "model")
    return {
        "runs": write_jsonl(tmp_path / "runs.jsonl", runs),
        "xstest": write_csv(tmp_path / "xstest.csv", xstest),
        "model": str(tmp_path / "model"),
    }


@pytest.fixture
def command(files, monkeypatch, capsys):
    """A function: arguments of the command, with the files by their names in braces, to what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["", "--model", files["model"], *(text.format(**files) for text in arguments)])
        assert main() == 0
        return capsys.readouterr().out

    return run


def test_the_command_prints_counts_overlaps_and_rows_with_their_scored_tokens_marked(files, command):
    both = ("--harmful", "{runs}", "--benign", "{runs}", "{xstest}")
    printed = command(*both, "--mask-policy", "assistant_only")
    for line in (
        f"  file        {files['runs']}: 25 AgentDojo runs",
        f"  file        {files['xstest']}: 8 XSTest rows",
        "  rows        8 of this side · 12 of the other side · 5 left out (attack resisted)",
        "  rows        16 of this side · 8 of the other side · 5 left out (attack resisted) · 4 left out "
        "(XSTest: refused)",
        "overlap   training and held out (must be 0): 0 prompts, 0 rows",
        "          harmful and benign: 8 prompts, 0 rows alike",
        f"{files['runs']}:13 · first harmful row",
        "  by part     scored: assistant calls 100% · assistant text 100% · tool text 0% · user text 0%",
    ):
        assert line in printed.splitlines(), (line, printed)
    assert '⟦{"name": "open_door", "parameters": {"key": "old"}}<|eot_id|>⟧' in printed
    assert "⟦I sent the money.<|eot_id|>⟧" in printed
    assert "⟦The door is open.<|eot_id|>⟧" in printed
    assert "warning" not in printed


def test_shares_by_part_follow_the_mask_policy(command):
    both = ("--harmful", "{runs}", "--benign", "{runs}")
    parts = {}
    for policy in ("completion_only", "tool_calls_only", "full_sequence"):
        lines = command(*both, "--mask-policy", policy).splitlines()
        parts[policy] = next(line.split("scored: ")[1] for line in lines if "by part" in line)
    assert parts == {
        "completion_only": "assistant calls 0% · assistant text 100% · tool text 0% · user text 0%",
        "tool_calls_only": "assistant calls 100% · user text 0%",  # what follows the last call is cut
        "full_sequence": "assistant calls 100% · assistant text 100% · tool text 100% · user text 100%",
    }


def test_how_alike_the_sides_states_are_is_told_and_warned_of_where_they_are_one_text(
    small_world, tmp_path, monkeypatch, capsys
):
    rows = [json.loads(line) for line in (small_world / "benign.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    halves = [str(write_jsonl(tmp_path / f"{name}.jsonl", rows[i::2])) for i, name in enumerate("ab")]
    others = [row | {"completion": "no no no no no no"} for row in pairs("other", 16)]

    def layers(harmful: str, benign: str) -> list[str]:
        flags = ["--model", str(small_world), "--harmful", harmful, "--benign", benign, "--target-layers", "1", "2"]
        monkeypatch.setattr(sys, "argv", ["", *flags, "--lora-layers", "0", "1", "--states"])
        assert main() == 0
        return [line for line in capsys.readouterr().out.splitlines() if "cosine" in line]

    of_sides = layers(str(write_jsonl(tmp_path / "others.jsonl", others)), halves[0])
    assert [line.split(":")[0].strip() for line in of_sides] == ["layer 1", "layer 2"]
    assert not any("one text" in line for line in of_sides)
    assert all("one text" in line for line in layers(*halves))


def test_the_module_is_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "cbtrain.data", "--hramful", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --hramful: no such flag; did you mean --harmful?; --help-all lists them\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--harmful", "{runs}"], "^--benign: name at least one file of benign rows$"),
        (["--harmful", "{xstest}", "--benign", "{xstest}"], "no harmful row; found 4 benign rows and 4 rows left out"),
        (["--harmful", "{runs}", "--benign", "{runs}", "--mask-policy", "given"], "is text and comes with no mask"),
    ],
)
def test_bad_input_is_one_line(command, arguments, expected):
    with pytest.raises(InputError, match=expected) as caught:
        command(*arguments)
    assert "\n" not in str(caught.value)


def test_counts_of_the_report_are_those_of_the_rows(files):
    tokenizer = bpe_tokenizer(LLAMA31)
    config = get_config(
        "tiny",
        model="m",
        harmful=(files["runs"],),
        benign=(files["runs"],),
        max_length=40,
        mask_policy="completion_only",
    )
    data = load_data(config, tokenizer)
    rows = data.harmful.train + data.harmful.held_out
    tokens, scored = sum(len(row.input_ids) for row in rows), sum(sum(row.scored) for row in rows)
    lines = report(config, tokenizer, data)
    assert f"  tokens      {tokens:,} · scored {scored:,} ({scored / tokens:.1%}, {scored / 8:,.0f} a row)" in lines
    assert "  truncated   8 rows to 40 tokens; 0 lost scored tokens" in lines
    counts = data.harmful.counts
    assert (counts.prompts_cut, counts.prompts_mostly_cut, counts.completions_cut) == (8, 8, 0)
    assert f"  prompt      cut in 8 rows by {counts.prompt_tokens_cut:,} tokens; 8 lost most of theirs" in lines
    assert f"  results     {counts.tool_result_tokens_cut:,} tokens of this stood in tool results" in lines
    assert counts.tool_result_tokens_cut == 8 * len(tokenizer("it is open", add_special_tokens=False)["input_ids"])
    assert "          tokenizer m (400 ids)" in lines
    assert [why for _, why in sample_rows(data)] == ["first harmful row", "first benign row", "longest harmful row"]


def test_what_the_template_made_be_rewritten_and_what_was_dropped_is_reported(tmp_path):
    silent = agent_run(0, None)["messages"] + [{"role": "user", "content": "and now?"}]
    two_calls = [silent[0], silent[1] | {"tool_calls": [CALL, CALL]}]
    rows = [{"messages": silent[:1]}, {"messages": two_calls}, *pairs("harmful", 4)]
    config = get_config(
        "tiny",
        harmful=(write_jsonl(tmp_path / "a.jsonl", rows),),
        benign=(write_jsonl(tmp_path / "b.jsonl", pairs("benign", 4)),),
    )
    tokenizer = bpe_tokenizer(LLAMA31)
    lines = report(config, tokenizer, load_data(config, tokenizer))
    assert "  rendered    1 row otherwise than given: tool calls as text" in lines
    assert f"  dropped     1 row: nothing scored, as {tmp_path}/a.jsonl:1" in lines


def test_long_stretches_are_shortened_in_their_middle_and_colour_replaces_the_brackets():
    tokenizer = bpe_tokenizer()
    prompt = tokenizer("first take the key " * 50, add_special_tokens=False)["input_ids"]
    answer = tokenizer("open the door", add_special_tokens=False)["input_ids"]
    row = TokenRow((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer), "p", "f.jsonl:1")
    plain, coloured = (marked(row, tokenizer, coloured=coloured) for coloured in (False, True))
    assert plain.plain.endswith("⟦open the door⟧")
    assert f" … {len(prompt) - 80:,} tokens … " in plain.plain
    assert "⟦" not in coloured.plain
    assert coloured.plain[coloured.spans[-1].start :] == "open the door"


def token_row(number: int, scored: int = 6, prompt: str | None = None) -> TokenRow:
    ids = tuple(range(number * 100, number * 100 + 10))
    return TokenRow(ids, tuple(i >= 10 - scored for i in range(10)), prompt or f"prompt {number}", f"f.jsonl:{number}")


def data_of(harmful: SideData, benign: SideData | None = None, **fields) -> CircuitBreakerData:
    sound = SideData([token_row(i) for i in range(80, 86)], [token_row(86)], SideCounts(1, 7, *[0] * 5))
    return CircuitBreakerData(harmful, benign or sound, **fields)


def side_of(train: list[TokenRow], held_out: list[TokenRow] | None = None, **counts) -> SideData:
    held_out = [token_row(70), token_row(71)] if held_out is None else held_out
    none = dict.fromkeys("left_out other_side truncated dropped_unscored scored_tokens".split(), 0)
    rows = {"files": 1, "rows": len(train) + len(held_out)}
    return SideData(train, held_out, SideCounts(**(none | rows | counts)))


SOUND = [token_row(i) for i in range(1, 9)]


def test_sound_data_gives_no_warning():
    assert data_warnings(data_of(side_of(SOUND))) == []


def test_a_tenth_of_the_prompts_cut_is_no_warning():
    assert data_warnings(data_of(side_of(SOUND, truncated=2, prompts_cut=2, prompts_mostly_cut=1))) == []


def test_lost_prompts_and_lost_scored_tokens_are_both_warned_of():
    counts = {"truncated": 5, "prompts_cut": 4, "prompts_mostly_cut": 3, "completions_cut": 2, "cut_short": 2}
    assert data_warnings(data_of(side_of(SOUND, **counts))) == [
        "harmful: 3 of 10 rows lost most of their prompt; raise --max-length",
        "harmful: 2 of 10 rows lost scored tokens; raise --max-length",
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (data_of(side_of(SOUND, [token_row(70, prompt="prompt 1")])), "prompts in training that are held out too: 1"),
        (
            data_of(side_of(SOUND, [token_row(1, prompt="x"), token_row(70)])),
            "1 row held out and, token for token, in training too",
        ),
        (
            data_of(side_of([*SOUND, token_row(80)])),
            "1 row harmful and benign alike, as f.jsonl:80 and f.jsonl:80",
        ),
        (
            data_of(side_of([token_row(i, 10) for i in range(9)], [token_row(9, 10)])),
            "harmful: every token of every row is scored",
        ),
        (data_of(side_of([token_row(i, 2) for i in range(9)])), "harmful: 2 scored tokens a row in the median"),
        (data_of(side_of(SOUND, truncated=3)), "harmful: 3 of 10 rows are truncated, where nothing is scored"),
        (
            data_of(side_of(SOUND, truncated=3, prompts_cut=3, prompts_mostly_cut=2)),
            "harmful: 2 of 10 rows lost most of their prompt; raise --max-length",
        ),
        (data_of(side_of(SOUND, truncated=3, cut_short=1)), "harmful: 1 of 10 rows lost scored tokens"),
        (
            data_of(side_of(SOUND, unknown=30, scored_tokens=60)),
            "harmful: 50% of the scored tokens are unknown to the tokenizer",
        ),
        (data_of(side_of(SOUND, duplicates=2)), "harmful: 2 of 10 rows repeat an earlier one"),
        (
            data_of(side_of(SOUND, rows=20, dropped_unscored=10, first_dropped="f.jsonl:3")),
            "harmful: 10 of 20 rows are dropped: nothing scored, as f.jsonl:3",
        ),
    ],
)
def test_each_suspicious_thing_is_named(data, expected):
    found = data_warnings(data)
    assert len(found) == 1, found
    assert found[0].startswith(expected), found


def test_text_that_the_tokenizer_does_not_know_is_counted(small_world, tmp_path):
    rows = [{"prompt": f"how do i open the door {i}", "completion": "take the zweihänder"} for i in range(8)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    config = get_config("tiny", model=str(small_world), harmful=(file,), benign=(str(small_world / "benign.jsonl"),))
    data, _ = prepare(config)
    assert (data.harmful.counts.unknown, data.benign.counts.unknown) == (8, 0)


def test_full_sequence_is_no_suspicion_where_it_was_asked_for():
    whole = side_of([token_row(i, 10) for i in range(9)], [token_row(9, 10)])
    assert data_warnings(data_of(whole, mask_policy="full_sequence")) == []


def test_duplicates_are_counted_within_a_side_and_warned_of_at_training(tmp_path):
    harmful = write_jsonl(tmp_path / "a.jsonl", [*pairs("harmful", 6), *pairs("harmful", 3)])
    benign = write_jsonl(tmp_path / "b.jsonl", [json.dumps(row) for row in pairs("benign", 6)])
    data = load_data(get_config("tiny", harmful=(harmful,), benign=(benign,)), bpe_tokenizer())
    assert (data.harmful.counts.duplicates, data.benign.counts.duplicates) == (3, 0)
    assert description(data)[-1].startswith("warning: harmful: 3 of 9 rows repeat an earlier one"), description(data)


def test_sides_that_are_alike_but_for_their_writing_are_told_and_the_page_marks_what_is_scored(
    tmp_path, capsys, monkeypatch
):
    bpe_tokenizer().save_pretrained(tmp_path / "m")
    harmful = [{"prompt": "Open <it>!", "completion": "Take the key.", "topic": "x", "id": 1}, *pairs("bad", 3)]
    benign = [{"prompt": "open it", "completion": "take  the key"}, *pairs("good", 3)]
    for side, rows in (("harmful", harmful), ("benign", benign)):
        write_jsonl(tmp_path / f"{side}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "m", "--harmful", "harmful.jsonl", "--benign", "benign.jsonl", "--html", "page.html"]
    monkeypatch.setattr("sys.argv", ["cbtrain.data", *argv])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "1 row harmful and benign alike but for case, punctuation and spaces, as harmful.jsonl:1 and" in shown
    assert "  not read    harmful.jsonl: id, topic" in shown
    assert "of the scored tokens are common to both sides" in shown
    page = (tmp_path / "page.html").read_text()
    assert "<mark>Take the key.&lt;|im_end|&gt;</mark>" in page
    assert "Open &lt;it&gt;!" in page
    assert "<it>" not in page
    assert "harmful: 4 of 4 rows" in page


def test_the_shapes_are_printed_without_any_data(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cbtrain.data", "--shapes"])
    assert main() == 0
    assert "ShareGPT conversations" in capsys.readouterr().out


def test_token_overlap_is_one_of_the_same_text_and_none_of_others():
    def data(harmful: tuple[int, ...], benign: tuple[int, ...]) -> CircuitBreakerData:
        counts = SideCounts(1, 1, 0, 0, 0, 0, 1)
        sides = [
            SideData([TokenRow((9, *ids), (False, *[True] * len(ids)), "p", "f:1")], [], counts)
            for ids in (harmful, benign)
        ]
        return CircuitBreakerData(*sides)

    assert token_overlap(data((1, 2), (2, 1))) == 1
    assert token_overlap(data((1, 1), (2, 2))) == 0
    assert token_overlap(data((1, 1, 1, 2), (1, 2))) == pytest.approx(0.75)
