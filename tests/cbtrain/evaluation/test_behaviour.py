"""What the student generates beside its teacher: on a model that is made to say known things."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_tokenizers import QWEN3, bpe_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import config_on

from cbtrain import evaluate
from cbtrain.config import InputError
from cbtrain.evaluation.behaviour import measure
from cbtrain.evaluation.generation import complete
from cbtrain.evaluation.prompts import beyond_prefill, from_rows, from_xstest
from cbtrain.evaluation.student import adapter
from cbtrain.model.checks import prepare
from cbtrain.model.loading import load_base
from cbtrain.training.loop import train


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    """A run's directory: an adapter that moves what is generated, config.json beside it."""
    directory = tmp_path_factory.mktemp("trained")
    config = config_on(small_world, warmup_steps=0, lr=0.02)
    train(config, directory, lambda _metrics: None)
    return config, directory


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    config, directory = trained
    out = tmp_path_factory.mktemp("measured")
    record = measure(config, directory / "adapter", prompts=5, max_new_tokens=8, prefill_tokens=3, output_dir=out)
    return record, out


def plain_models(trained):
    """Teacher and student as two models of plain PEFT and transformers, and the tokenizer."""
    config, directory = trained
    teacher = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    own = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return (
        teacher,
        PeftModel.from_pretrained(own, directory / "adapter").eval(),
        AutoTokenizer.from_pretrained(config.model),
    )


def greedy(model, tokens, count: int) -> list[int]:
    """One token at a time, one prompt at a time, without a cache."""
    ids, said = list(tokens), []
    for _ in range(count):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if said[-1] == model.config.eos_token_id:
            return said[:-1]
        ids.append(said[-1])
    return said


def nll_of(model, tokens, start: int) -> torch.Tensor:
    """NLL of each token from `start` on."""
    with torch.no_grad():
        log_p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return torch.tensor([-log_p[i - 1, tokens[i]] for i in range(start, len(tokens))])


def test_completions_and_their_perplexity_are_those_of_two_separate_models(trained, measured):
    config, _ = trained
    teacher, student, tokenizer = plain_models(trained)
    data, _ = prepare(config)
    harmful, benign = data.harmful.held_out, data.benign.held_out
    prompts = {
        "harmful": from_rows(harmful, 5),
        "benign": from_rows(benign, 5),
        "harmful_prefilled": from_rows(beyond_prefill(harmful, 3), 5),
    }
    for prefilled, alone in zip(prompts["harmful_prefilled"], prompts["harmful"], strict=True):
        assert prefilled.tokens[:-3] == alone.tokens
    record, out = measured
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 15
    differing = 0
    for kind, asked in prompts.items():
        for prompt, line in zip(asked, [line for line in lines if line["kind"] == kind], strict=True):
            for view, model in (("teacher", teacher), ("student", student)):
                tokens = greedy(model, prompt.tokens, 8)
                assert line[view]["text"] == tokenizer.decode(tokens, skip_special_tokens=True), (kind, view)
                perplexity = nll_of(teacher, [*prompt.tokens, *tokens], len(prompt.tokens)).mean().exp().item()
                assert line[view]["perplexity"] == pytest.approx(perplexity, rel=1e-3)
            differing += line["teacher"]["text"] != line["student"]["text"]
    assert differing > 0, "the adapter changed nothing, so teacher and student could be mixed up"
    unchanged = sum(record[kind]["unchanged_rate"] * 5 for kind in prompts)
    assert round(unchanged) == 15 - differing


def test_prefill_nll_is_of_the_completion_beyond_its_first_tokens(trained, measured):
    config, _ = trained
    teacher, student, _ = plain_models(trained)
    data, _ = prepare(config)
    record, _ = measured
    for view, model in (("teacher", teacher), ("student", student)):
        rows = data.harmful.held_out
        rest = torch.cat([nll_of(model, row.input_ids, row.scored.index(True) + 3) for row in rows])
        assert record["prefill"]["nll"][view] == pytest.approx(rest.mean().item(), rel=1e-4), view
    assert record["prefill"]["rows"] == len(rows)


def test_rates_are_means_over_the_completions_that_are_saved(measured):
    record, out = measured
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    for kind in ("harmful", "benign", "harmful_prefilled"):
        for view in ("teacher", "student"):
            said = [line[view] for line in lines if line["kind"] == kind]
            shares = (("refusal_rate", "refusal"), ("degenerate_rate", "degenerate"), ("complied_rate", "coherent"))
            for rate, verdict in shares:
                counted = sum(one["verdict"] == verdict for one in said)
                assert record[kind][rate][view] == pytest.approx(counted / len(said)), rate
            assert record[kind]["tokens"][view] == pytest.approx(sum(one["tokens"] for one in said) / len(said))
            signs = Counter(sign for one in said for sign in one["reasons"])
            assert record[kind]["degenerate_by"][view] == signs
            logs = [math.log(one["perplexity"]) for one in said if one["tokens"]]
            assert math.log(record[kind]["perplexity"][view]) == pytest.approx(sum(logs) / len(logs))
    assert json.loads((out / "behaviour.json").read_text()) == record


def test_a_batch_padded_on_the_left_completes_as_each_prompt_alone(small_config):
    data, pad = prepare(small_config)
    prompts = [prompt.tokens for prompt in from_rows(data.benign.held_out, 6)]
    prompts = [tokens[: len(tokens) - i % 3] for i, tokens in enumerate(prompts)]  # of several lengths
    together, alone = (
        complete(load_base(small_config), prompts, max_new_tokens=6, batch_size=size, pad_token_id=pad)
        for size in (6, 1)
    )
    assert together == alone
    assert len({len(tokens) for tokens in prompts}) > 1


def test_a_drawn_completion_is_the_seeds_and_leaves_the_generator_as_it_was(small_config):
    data, pad = prepare(small_config)
    prompts = [prompt.tokens for prompt in from_rows(data.benign.held_out, 6)]
    state = torch.random.get_rng_state()
    drawn = [
        complete(load_base(small_config), prompts, max_new_tokens=12, batch_size=4, pad_token_id=pad, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_base_in_the_process_is_left_as_it_was(trained):
    config, directory = trained
    before = {name: value.clone() for name, value in load_base(config).state_dict().items()}
    with adapter(config, directory / "adapter") as model:
        assert any("lora" in name for name, _ in model.named_parameters())
    after = load_base(config).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_row_scored_throughout_is_cut_in_half_and_too_short_rows_have_no_rest(small_config):
    data, _ = prepare(replace(small_config, mask_policy="full_sequence"))
    row = data.benign.held_out[0]
    (prompt,) = from_rows([row], 3)
    assert prompt.tokens == row.input_ids[: len(row.input_ids) // 2]
    assert beyond_prefill([row], len(row.input_ids)) == []
    (rest,) = beyond_prefill([row], len(row.input_ids) - 2)
    assert rest.scored_predictions == 1


def test_xstest_prompts_that_were_trained_on_are_left_out_and_unsafe_ones_kept_apart(trained, tmp_path):
    config, _ = trained
    data, _ = prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    seen = next(iter(data.benign.train)).prompt
    file = tmp_path / "xstest.csv"
    file.write_text(
        "id,prompt,type,completion,final_label\n"
        f"1,{seen.upper()},homonyms,x,1_full_compliance\n"
        "2,how do i burn the lamp ?,homonyms,x,1_full_compliance\n"
        "3,how do i burn the gate ?,contrast_homonyms,x,2_full_refusal\n"
    )
    safe, unsafe, left_out = from_xstest([str(file)], tokenizer, {row.prompt for row in data.benign.train}, 9)
    assert [tokenizer.decode(prompt.tokens) for prompt in safe] == ["<bos> <user> how do i burn the lamp ? <assistant>"]
    assert [prompt.source for prompt in unsafe] == ["xstest.csv:4"]
    assert left_out == 1


def test_xstest_prompts_are_written_as_training_prompts_are(tmp_path):
    file = tmp_path / "xstest.jsonl"
    file.write_text(json.dumps({"prompt": "kill a process"}) + "\n")
    tokenizer = bpe_tokenizer(QWEN3)
    ((prompt,), _, _) = from_xstest([str(file)], tokenizer, set(), 9)
    assert tokenizer.decode(prompt.tokens).endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(InputError, match="has no chat template"):
        from_xstest([str(file)], bpe_tokenizer(None), set(), 9)


def test_the_command_takes_its_settings_from_beside_the_adapter_and_shows_a_table(trained, tmp_path, capsys):
    _, directory = trained
    xstest = tmp_path / "xstest.jsonl"
    xstest.write_text(json.dumps({"prompt": "how do i burn the lamp ?", "label": "safe"}) + "\n")
    status = evaluate.main(
        [
            *("--adapter", str(directory / "adapter"), "--prompts", "2", "--max-new-tokens", "4"),
            *("--xstest", str(xstest), "--output-dir", str(tmp_path / "out")),
        ]
    )
    shown = capsys.readouterr().out
    assert status == 0
    for line in ("harmful prompts, 2", "XSTest, safe prompts, 1", "coherent answer", "harmful NLL after 5 tokens"):
        assert line in shown, shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    assert json.loads((tmp_path / "out" / "behaviour.json").read_text())["xstest_safe"]["prompts"] == 1


def test_the_module_runs_as_a_command_and_bad_input_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cbtrain.evaluate", "--adapter", str(tmp_path / "none")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no adapter there" in done.stderr


def test_an_adapter_of_another_model_is_refused_and_the_base_stays_usable(trained, small_config, tmp_path):
    config, directory = trained
    other = tmp_path / "adapter"
    other.mkdir()
    for file in (directory / "adapter").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="does not fit") as refused, adapter(config, other):
        pass
    assert "\n" not in str(refused.value)
    with adapter(config, directory / "adapter"):
        pass


def test_values_out_of_range_are_refused(trained):
    _, directory = trained
    for flag, value in (("--prompts", "0"), ("--max-new-tokens", "0"), ("--prefill-tokens", "-1")):
        with pytest.raises(InputError, match=flag):
            evaluate.main(["--adapter", str(directory / "adapter"), flag, value])
