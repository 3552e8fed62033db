"""`python -m cbtrain.complete`: prompts of any file to rows that training reads, resumed where they were."""

import json
from pathlib import Path

import pytest
from row_files import write_csv, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbtrain.complete import main
from cbtrain.config import InputError
from cbtrain.data.formats.rows import load_rows
from cbtrain.model.auto import derived

PROMPTS = [f"how do i open the {thing} ?" for thing in ("lamp", "gate", "table", "dam", "mirror")]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"goal": prompt, "category": "x"} for prompt in PROMPTS])


def command(model: Path, prompts: str, out: Path, *more: str) -> list[str]:
    fixed = ["--max-new-tokens", "6", "--batch-size", "2"]
    return ["--model", str(model), "--prompts", prompts, "--out", str(out), *fixed, *more]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()][1:]


def test_completions_are_the_models_own_behind_the_prefill_and_are_rows(small_world, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(command(small_world, prompts, out, "--prefill", "sure , ")) == 0
    assert "5 completions in" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(small_world)
    model = AutoModelForCausalLM.from_pretrained(small_world, dtype=derived(str(small_world)).dtype)
    written = rows_of(out)
    assert [row["prompt"] for row in written] == PROMPTS
    assert [row["of_prompt"] for row in written] == [{"category": "x"}] * 5
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat + "sure , ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert written[0]["completion"].startswith("sure , ")
    assert written[0]["completion"].split()[2:] == tokenizer.decode(said, skip_special_tokens=True).split()
    benign = write_jsonl(tmp_path / "benign.jsonl", [{"prompt": "a", "completion": "b"}])
    assert len(load_rows([str(out)], [benign])["harmful"].rows) == 5


def test_a_run_that_was_stopped_goes_on_and_other_settings_are_refused(small_world, prompts, tmp_path, capsys):
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    main(command(small_world, prompts, whole, "--seed", "3"))
    content = whole.read_text()
    half.write_text(content[: content.index("\n", content.index("gate")) + 20])  # two completions, and a piece
    assert main(command(small_world, prompts, half, "--seed", "3")) == 0
    assert "5 completions in" in capsys.readouterr().out
    assert half.read_text() == content
    with pytest.raises(InputError, match="holds something else than these settings write"):
        main(command(small_world, prompts, half))
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "what ?"}])
    with pytest.raises(InputError, match="completions of other prompts"):
        main(command(small_world, other, half, "--seed", "3"))
    assert half.read_text() == content


def test_prompts_are_read_of_tables_texts_behaviours_and_chats(small_world, tmp_path):
    (tmp_path / "a.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    table = write_csv(tmp_path / "b.csv", [{"Behavior": PROMPTS[2], "SemanticCategory": "y"}])
    harm = {"behaviors": [{"id": "1", "prompt": PROMPTS[3]}]}
    chat = {"messages": [{"role": "user", "content": PROMPTS[4]}, {"role": "assistant", "content": "no"}]}
    rows = write_jsonl(tmp_path / "c.jsonl", [harm, chat])
    out = tmp_path / "out.jsonl"
    main(["--model", str(small_world), "--prompts", str(tmp_path / "a.txt"), table, rows, "--out", str(out)])
    assert [row["prompt"] for row in rows_of(out)] == PROMPTS


@pytest.mark.parametrize(
    ("rows", "says"),
    [([{"x": "y"}], r"p\.jsonl:1: no prompt; a row needs one of"), ([3], r"p\.jsonl:1: a row must be a JSON object")],
)
def test_a_row_without_a_prompt_is_refused_with_its_line(small_world, tmp_path, rows, says):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=says):
        main(["--model", str(small_world), "--prompts", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_flags_are_checked(tmp_path, prompts):
    for argv, says in (
        ([], "--model"),
        (["--model", "m"], "--prompts"),
        (["--model", "m", "--prompts", prompts], "--out"),
        (["--modle", "m"], "--modle: no such flag"),
        (["--model", "m", "--prompts", prompts, "--out", "x", "--batch-size", "0"], "--batch-size"),
        (["--model", "m", "--prompts", prompts, "--out", "x", "--template-date", "today"], "--template-date today"),
    ):
        with pytest.raises(InputError, match=says):
            main(argv)
