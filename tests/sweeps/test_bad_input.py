"""Whatever is wrong with flags, files, model, run directory or environment ends the command before anything is trained:
status 2, one line with the thing, its place and the mend, and nothing left behind."""

import contextlib
import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from commands import ROOT, world

from cbtrain.config import cli
from sweeps import kl_ablation

FLAGS = [
    # typos
    ("--num-sample 4", "--num-sample: no such flag; did you mean --num-samples?"),
    ("--stepz=3", "--stepz: no such flag; did you mean --steps?"),
    ("--preset tinny", "--preset tinny: no such preset; did you mean tiny?"),
    ("--sampler annealing", "--sampler annealing: must be one of 'gp', 'tpe', 'random'"),
    ("leftover", "leftover: no such flag"),
    # negative, zero, not a number, infinite
    ("--num-samples 0", "--num-samples 0: 3 baseline seeds + 1 trial to compare = 4 at least; give 4 or more"),
    ("--num-samples -3", "--num-samples -3: 3 baseline seeds + 1 trial to compare = 4 at least"),
    ("--steps 0", "--steps 0: must be more than 0"),
    ("--lr -1", "--lr -1.0: must be more than 0"),
    ("--lr nan", "--lr nan: must be a finite number"),
    ("--lr inf", "--lr inf: must be a finite number"),
    ("--seed -1", "--seed -1: must be 0 or more"),
    ("--max-concurrent 0", "--max-concurrent 0: must be 1 or more"),
    ("--baseline-seeds 0", "--baseline-seeds 0: must be 1 or more"),
    ("--behaviour-prompts -1", "--behaviour-prompts -1: must be 0 or more"),
    ("--gpus-per-worker -1", "--gpus-per-worker -1.0: must be 0 or more"),
    ("--gpus-per-worker nan", "--gpus-per-worker nan: must be 0 or more"),
    ("--gpus-per-worker 1.5", "--gpus-per-worker 1.5: a share of one GPU, or a whole number"),
    ("--reroute-tolerance 1.5", "--reroute-tolerance 1.5: must lie between 0 and 1"),
    ("--confidence nan", "--confidence nan: must lie between 0.5 and 1"),
    ("--max-degenerate-rise nan", "--max-degenerate-rise nan: must be a finite number"),
    ("--beta-kl-range nan 2", "--beta-kl-range nan 2: must be two numbers from 1e-09 to 1e+09"),
    ("--beta-kl-range -1 2", "--beta-kl-range -1 2: must be two numbers"),
    ("--kl-temperature-range 4 1", "--kl-temperature-range 4 1: must be one or two numbers from 1e-09 to 1e+09"),
    # of the wrong type, or without a value
    ("--num-samples 2.5", "--num-samples 2.5: must be a whole number"),
    ("--lr fast", "--lr fast: must be a number"),
    ("--zero-stage 9", "--zero-stage 9: must be one of '0', '1', '2', '3'"),
    ("--template-date today", "--template-date today: must be a date, YYYY-MM-DD"),
    ("--target-layers two", "--target-layers two: must be whole numbers"),
    ("--beta-kl-range low 2", "--beta-kl-range: must be two numbers, not low 2"),
    ("--beta-kl-range 0.3", "--beta-kl-range: must be two numbers, not 0.3"),
    ("--beta-kl-range", "--beta-kl-range: must be two numbers, not none"),
    ("--kl-temperature-range 1 2 3", "--kl-temperature-range: must be one or two numbers, not 1 2 3"),
    ("--judge nocolon", "--judge nocolon: must be module:function"),
    ("--judge nosuch:function", "--judge nosuch:function: cannot be imported from here"),
    ("--num-samples", "--num-samples: give a value behind it"),
    ("--harmful", "--harmful: name at least one"),
    ("--lora-targets", "--lora-targets: name at least one"),
    ("--run-dir=", "--run-dir: name a directory"),
    # contradicting
    ("--num-samples 2", "--num-samples 2: 3 baseline seeds + 1 trial to compare = 4 at least"),
    ("--beta-kl 0.5", "--beta-kl 0.5: the sweep searches it; leave the flag out, or give --beta-kl-range"),
    ("--beta-kl 0.3", "--beta-kl 0.3: the sweep searches it; leave the flag out, or give --beta-kl-range"),
    ("--workers-per-trial 3", "--batch-size 16: not divisible by 3 workers"),
    ("--warmup-steps 81", "--warmup-steps 81: is more than --steps 80"),
    ("--calibrate --calibration x", "--calibrate: --calibration brings a recipe; leave one of them out"),
    ("--early-stop --eval-every 0", "--early-stop: with --eval-every 0 a trial of 80 steps has 1 held-out"),
    ("--early-stop --baseline-seeds 2", "--early-stop: 2 baseline seeds, stopping needs 3"),
    ("--resume {half} --lr 1", "half/sweep.json: not JSON"),
]
PLACES = [
    ("--copy-to nosuch://bucket/x", "--copy-to nosuch://bucket/x: Unrecognized filesystem type"),
    ("--copy-to s3://key:secret@bucket/x", "--copy-to s3://…@bucket/x: credentials do not belong in it"),
    ("--copy-to {file}/x", "file/x: cannot be written to"),
    ("--storage-path {file}", "file: no such directory; make it, where every node sees it"),
    ("--storage-path {folder} --run-dir /elsewhere/run", "/elsewhere/run lies outside of --storage-path"),
    ("--teacher-cache {file}", "file is not a directory that can be written to"),
    ("--calibration {nowhere}", "nowhere: No such file or directory"),
    ("--calibration {file}", "name the calibration.json that cbtrain.calibrate wrote"),
]
FILES = [
    ("--harmful {nowhere}.jsonl", "nowhere.jsonl: no such file"),
    ("--harmful {empty}", "empty: the file is empty; expected a JSON row on every line"),
    ("--harmful {folder}", "folder: no data file in this directory (.jsonl, .json"),
    ("--harmful {binary}", "binary: not UTF-8 text (byte "),
    ("--harmful {cut}", "cut: a damaged gzip file"),
    ("--harmful {line}", "line:2: not JSON"),
    ("--harmful {number}", "number:2: a row must be a JSON object, this is a number"),
    ("--harmful {field}", "field:2: prompts without completions (fields: prompt); python -m cbtrain.complete"),
    ("--harmful {role}", "role:1: message 1: must be an object whose role is one of system, user"),
    ("--harmful {utf8}", "utf8: not UTF-8 text (byte "),
    ("--harmful {large}", "large:1: not JSON"),
    ("--harmful {parquet}", "parquet: a damaged Parquet file"),
    ("--harmful {head}", "head: no harmful row; found no row at all. Name a file with harmful rows"),
    ("--harmful {one}", "--harmful: all 1 scored rows have the same user prompt"),
    ("--harmful {user_only}", "0 of 1 rows have a scored token under completion_only; the rows end on a user turn"),
    ("--harmful {runs} --benign {runs}", "runs: no harmful row"),
    ("--harmful {tokens}", "tokens: 0 of 2 rows have a scored token under auto; the masks that came with them are 0"),
]
MODELS = [
    ("--model {nowhere}", "nowhere: no such directory; give one that save_pretrained wrote, or a hub id"),
    ("--model {file}", "file: no such directory; give one that save_pretrained wrote"),
    ("--model {no_config}", "no_config: no config.json there; give a directory that save_pretrained wrote"),
    ("--model {broken_config}", "config.json' is not a valid JSON file"),
    ("--model {unknown}", "model type `nosuch` but Transformers does not recognize this architecture"),
    ("--model {adapter}", "adapter: an adapter, not a model; give its base model, some/base"),
    ("--model {quantised}", "quantised: is quantised (gptq); give its weights as float32 or bfloat16"),
    ("--model {no_weights}", "no_weights: no weights there; give a directory with its .safetensors"),
    ("--model {cut_weights}", "cut_weights: cannot be loaded"),
    ("--model {pickled}", "pickled: pytorch_model.bin holds no plain weights; give .safetensors"),
    (
        "--model {code}",
        "code: needs Python code of its own, which would run here; read it, then give --trust-remote-code",
    ),
    ("--model {no_tokenizer}", "no_tokenizer: holds no tokenizer; name one with --tokenizer"),
    ("--model {no_template}", "no_template has no chat template: put a chat_template.jinja beside it"),
    ("--tokenizer {folder}", "folder: holds no tokenizer; name one with --tokenizer"),
    ("--target-layers 9", "--target-layers 9: the model has hidden states 0–3"),
    ("--target-layers 0", "layers start at 1 (0 is the embedding, which cannot move)"),
    ("--lora-layers 7", "--lora-layers 7: the model has blocks 0–2"),
    ("--target-layers 1 --lora-layers 2", "no LoRA layer below it (LoRA covers blocks 2–2)"),
    ("--lora-targets c_attn", "--lora-targets c_attn: not a linear module of the blocks; they have down_proj"),
]
RUN_DIRECTORIES = [
    ("--resume {nowhere}", "nowhere: holds no sweep (no sweep.json)"),
    ("--resume {folder}", "folder: holds no sweep (no sweep.json); name the directory of one"),
    ("--resume {file}", "file: holds no sweep (no sweep.json)"),
    ("--resume {half}", "half/sweep.json: not JSON (EOF while parsing a string at line 1 column 15): restore the file"),
    ("--resume {of_another_version}", "sweep.json: config.half_life: no such field; the sweep was begun by another"),
    ("--run-dir {taken}", "taken already holds a sweep: --resume"),
    ("--run-dir {file}", "file is not a directory that can be written to"),
    ("--run-dir {taken}/sweep.json/x", "taken/sweep.json is not a directory that can be written to"),
    ("--run-dir {read_only}/run", "is not a directory that can be written to"),
    ("--run-dir /proc/run", "--run-dir /proc/run: cannot be made"),
]
ENVIRONMENT = [
    ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "", "RAY_ADDRESS http://127.0.0.1:8265: this is what `ray job submit`"),
    ({"RAY_ADDRESS": "ray://head:10001"}, "", "RAY_ADDRESS ray://head:10001: Ray Client runs no sweep; give HOST:PORT"),
    ({"RAY_ADDRESS": "head"}, "", "RAY_ADDRESS head: must be HOST:PORT, auto or local"),
    ({"RAY_ADDRESS": "127.0.0.1:1"}, "", "RAY_ADDRESS 127.0.0.1:1: no Ray cluster answers; unset it"),
    ({"RAY_ADDRESS": "auto", "RAY_TMPDIR": "{folder}"}, "", "RAY_ADDRESS auto: `ray start` has begun no cluster"),
    ({"RAY_ADDRESS": "auto", "RAY_TMPDIR": "{stale}"}, "", "the cluster that `ray start` began, 127.0.0.1:1, is gone"),
    ({"RAY_AUTH_TOKEN_PATH": "{nowhere}"}, "", "nowhere: cannot be read; unset it to have a token made"),
    ({"RAY_TMPDIR": "/dev/null"}, "", "RAY_TMPDIR names a writable directory for its files"),
    ({"HOME": "{file}", "XDG_CACHE_HOME": ""}, "--model tiny", "set XDG_CACHE_HOME to a writable directory"),
    ({"HOME": "{folder}", "WANDB_API_KEY": ""}, "--wandb-project p", "no login to W&B here: run `wandb login`"),
]
CASES = [({}, *case) for case in (*FLAGS, *PLACES, *FILES, *MODELS, *RUN_DIRECTORIES)] + ENVIRONMENT
AS_PROCESSES = [
    ({}, "--num-sample 4", "did you mean --num-samples?"),
    ({}, "--model {code}", "needs Python code of its own, which would run here"),
    ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "", "this is what `ray job submit` takes"),
]


class Ran:
    """A pickle that leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("unpickled",)


@pytest.fixture(scope="module")
def bad(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with everything bad that the cases name."""
    place = tmp_path_factory.mktemp("bad")
    rows = (small_world / "harmful.jsonl").read_text().splitlines()
    asked = [{"role": "user", "content": "how ?"}]
    agent = {"messages": json.loads(rows[0])["messages"], "metadata": {"injection_task_id": None, "security": True}}
    wizard = {"messages": [{"role": "wizard", "content": "x"}]}
    unscored = [{"input_ids": [n, 4, 5, 6], "loss_mask": [0, 0, 0, 0]} for n in (7, 8)]
    files: dict[str, bytes | str] = {
        "file": "x",
        "empty": "",
        "binary": random.Random(0).randbytes(4096),
        "cut": gzip.compress("\n".join(rows).encode())[:-30],
        "line": f"{rows[0]}\n{{not json\n",
        "number": f"{rows[0]}\n3\n",
        "field": f'{rows[0]}\n{{"prompt": "x"}}\n',
        "role": json.dumps(wizard),
        "utf8": rows[0].encode() + b'\n{"prompt": "\xff\xfe", "completion": "b"}\n',
        "large": json.dumps({"prompt": "how ?", "completion": "word " * 2**20})[:-1],
        "parquet": b"PAR1 and no more PAR1",
        "head": "prompt,completion\n",
        "one": rows[0],
        "user_only": json.dumps({"messages": asked}),
        "runs": json.dumps(agent),
        "tokens": "\n".join(map(json.dumps, unscored)),
        "half/sweep.json": '{"preset": "tin',
        "half/study.log": "",
        "taken/sweep.json": "{}",
        "of_another_version/sweep.json": json.dumps(
            {"preset": "tiny", "config": {"half_life": 3}, "settings": {}, "plan": {}}
        ),
        "adapter/adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"}),
        "adapter/adapter_model.safetensors": "",
        "stale/ray/ray_current_cluster": "127.0.0.1:1",
    }
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("folder", "read_only"):
        (place / name).mkdir()
    _bad_models(small_world, place)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place / "read_only"]  # modes do not keep root from writing
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    (place / "read_only").chmod(0o555) if not mounted else None
    yield place
    if mounted:
        subprocess.run(["umount", place / "read_only"], check=True)


def _bad_models(small_world: Path, place: Path) -> None:
    for name, change in {
        "no_config": None,
        "broken_config": None,
        "unknown": {"model_type": "nosuch"},
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "no_weights": {},
        "cut_weights": {},
        "pickled": {},
        "code": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
        "no_tokenizer": {},
        "no_template": {},
    }.items():
        shutil.copytree(small_world, place / name)
        config = json.loads((place / name / "config.json").read_text())
        (place / name / "config.json").write_text("{" if change is None else json.dumps(config | change))
    (place / "no_config" / "config.json").unlink()
    weights = place / "cut_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("no_weights", "pickled"):
        (place / name / "model.safetensors").unlink()
    torch.save({"weight": Ran()}, place / "pickled" / "pytorch_model.bin", pickle_module=pickle)
    (place / "code" / "own.py").write_text("import os\nos.mkdir('executed')\n")
    for file in (place / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    (place / "no_template" / "chat_template.jinja").unlink()


def contents(*places: Path) -> dict[str, object]:
    """Everything below some directories: what of it is a file, with its bytes' length and time."""
    found = [path for place in places for path in place.rglob("*")]
    return {str(path): path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def arguments(small_world: Path, cwd: Path, bad: Path, given: str) -> list[str]:
    """A sweep's command line that is sound but for what is `given`, which comes last."""
    words = [word.format_map(Places(bad)) for word in given.split()]
    if words[:1] == ["--resume"]:
        return words
    run_dir = [] if any(word.startswith(("--run-dir", "--storage-path")) for word in words) else ["--run-dir", "runs/a"]
    base = ["--preset", "tiny"] if "tiny" in words else world(small_world, cwd)
    return [*base, *run_dir, *words]


class Places(dict[str, str]):
    """What a case names in braces, as a path."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __missing__(self, name: str) -> str:
        return str(self._place / name)


def check_refused(status: int, output: str, error: str, message: str) -> None:
    assert status == 2, output + error
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert message in error
    assert "Traceback" not in output + error


@pytest.mark.parametrize(
    ("environment", "given", "message"), CASES, ids=[f"{env or ''}{given}" for env, given, _ in CASES]
)
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(
    small_world, bad, tmp_path, monkeypatch, capsys, environment, given, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format_map(Places(bad)))
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *arguments(small_world, tmp_path, bad, given)])
    before, processes = contents(tmp_path, bad), psutil.Process().children(recursive=True)
    status = cli.run(kl_ablation.main)
    captured = capsys.readouterr()
    check_refused(status, captured.out, captured.err, message)
    assert contents(tmp_path, bad) == before
    _, running = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - set(processes), timeout=10)
    assert running == []


@pytest.mark.parametrize(("environment", "given", "message"), AS_PROCESSES)
def test_the_command_as_a_process_says_the_same(small_world, bad, tmp_path, environment, given, message):
    before = contents(tmp_path, bad)
    done = subprocess.run(
        [sys.executable, str(ROOT / "sweeps" / "kl_ablation.py"), *arguments(small_world, tmp_path, bad, given)],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    check_refused(done.returncode, done.stdout, done.stderr, message)
    assert contents(tmp_path, bad) == before


def test_a_run_directory_in_use_is_named_with_its_process(small_world, tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    holding = (
        "import fcntl,sys; f = open('run/lock','a'); fcntl.flock(f, 2); f.write('host:77'); f.flush(); print(flush=1)"
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", f"{holding}; sys.stdin.read()"], cwd=tmp_path, stdin=-1, stdout=-1
        ) as other,
        contextlib.closing(other.stdin),
    ):
        other.stdout.readline()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *world(small_world, tmp_path), "--run-dir", "run"])
        status = cli.run(kl_ablation.main)
    captured = capsys.readouterr()
    check_refused(status, captured.out, captured.err, "run: its sweep is still running (host:77); wait, or end it")
    assert (tmp_path / "run" / "logs").is_dir()
