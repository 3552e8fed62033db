"""Peak memory of a trial on a CPU: predicted by `cbtrain.training.memory_estimate` and measured, over four model sizes.

    python -m tests.benchmarks.bench_memory
    python -m tests.benchmarks.bench_memory --gpu-table   # predictions for GPUs, nothing measured

Each size is trained in a fresh process: random-weight Llama in float32, 4 rows of 128 tokens a side, all scored, two
steps and a held-out evaluation. Measured is the process's highest resident set (VmHWM) from the start of the trial on,
less its resident set before, when all imports and a trial of a model of no size have been: the first of any size brings
some 200 MB of the libraries' own code and tables into memory. The weights are in it, since a trial reads them.
`MALLOC_MMAP_THRESHOLD_=65536` makes the resident set follow the tensors that live; without it the C library keeps what
was freed in pieces, and the peak was 1.4 times as high. Exit status 1 where a prediction is more than 15 % off.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import Llama4TextConfig, LlamaConfig

from cbtrain.config import CircuitBreakerConfig, get_config
from cbtrain.training.memory_estimate import Prediction, Rows, predict, structure

WITHIN = 0.15
ROWS, LENGTH, VOCABULARY = 4, 128, 8192
WARM = "warm"
SIZES = {WARM: (64, 4), "small": (256, 8), "medium": (512, 8), "large": (768, 12), "largest": (1024, 16)}
"""Hidden size H and blocks; the first is trained beforehand and not measured."""
TERMS = ("weights", "activations", "passing", "teacher", "head", "evaluation", "peak")


def as_gigabytes(prediction: Prediction) -> dict[str, float]:
    """Every term and the peak, in 10⁹ bytes."""
    terms = dataclasses.asdict(prediction) | {"peak": prediction.peak}
    return {name: size / 1e9 for name, size in terms.items()}


def shape(name: str) -> LlamaConfig:
    """The structure of a size."""
    hidden, blocks = SIZES[name]
    heads = max(2, hidden // 64)
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
    )


def configuration(name: str) -> CircuitBreakerConfig:
    """A short trial with early exit at three quarters of the blocks."""
    blocks = SIZES[name][1]
    layers = (blocks // 2, blocks * 3 // 4)
    lora = tuple(range(blocks // 4, blocks * 3 // 4))
    return get_config(
        "tiny",
        **{"target_layers": layers, "lora_layers": lora, "lora_init_std": 0.01, "steps": 2, "warmup_steps": 1},
        **{"batch_size": ROWS, "eval_batch_size": ROWS, "max_length": LENGTH, "eval_every": 0},
    )


def write_world(directory: Path, name: str) -> None:
    """A random-weight model of a size with data that is cut to `LENGTH` scored tokens a row."""
    import torch
    from transformers import LlamaForCausalLM

    from cbtrain.model import tiny

    torch.manual_seed(0)
    LlamaForCausalLM(shape(name)).save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    for side, word in (("harmful", "how"), ("benign", "the")):
        rows = [{"prompt": f"{word} {'a ' * i}", "completion": f"{word} " * 2 * LENGTH} for i in range(1, 17)]
        (directory / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trial_of(directory: Path, name: str) -> CircuitBreakerConfig:
    """The trial of a size whose world was written."""
    files = {side: (str(directory / name / f"{side}.jsonl"),) for side in ("harmful", "benign")}
    return replace(configuration(name), model=str(directory / name), **files)


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(directory: Path, name: str) -> None:
    """In a process of its own: print the trial's peak, in bytes, and its rows' lengths."""
    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    import torch

    from cbtrain.model.loading import forget_base
    from cbtrain.training import loop

    torch.set_num_threads(1)
    loop.train(trial_of(directory, WARM), directory / WARM / "out", lambda _metrics: None)
    forget_base()
    config = trial_of(directory, name)
    data, _ = loop.prepare(config)
    lengths = {len(row.input_ids) for side in (data.harmful, data.benign) for row in (*side.train, *side.held_out)}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    loop.train(config, directory / name / "out", lambda _metrics: None)
    print(json.dumps({"peak": resident("VmHWM") - before, "lengths": sorted(lengths)}))


def predicted(name: str):
    """The same trial's prediction."""
    config, rows = configuration(name), Rows(ROWS, LENGTH, ROWS * LENGTH)
    return predict(config, structure(config, shape(name)), rows, rows, rows)


def compare(name: str) -> float:
    """Print a size's row; the prediction over the measurement, less 1."""
    with tempfile.TemporaryDirectory() as folder:
        for size in (WARM, name):
            write_world(Path(folder) / size, size)
        command = [sys.executable, "-m", "tests.benchmarks.bench_memory", "--measure", name, folder]
        done = subprocess.run(
            command,
            env={
                **os.environ,
                "MALLOC_ARENA_MAX": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lengths"] == [LENGTH], found
    prediction = predicted(name)
    terms = as_gigabytes(prediction)
    off = prediction.peak / found["peak"] - 1
    numbers = "".join(f"{1000 * terms[term]:12,.0f}" for term in TERMS)
    print(f"{name:10}{numbers}{found['peak'] / 1e6:12,.0f}{off:+10.1%}", flush=True)
    return off


def gpu_table() -> None:
    """Print what ranks on GPUs are predicted to need."""
    llama = LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    )
    print(f"{'GB a rank, predicted':60}{'weights':>9}{'adapter':>9}{'graphs':>9}{'other':>9}{'peak':>9}")
    llama_config, scout = get_config("llama-3.1-8b-instruct"), get_config("llama-4-scout")
    cases = [
        (f"Llama-3.1-8B, {count} × 1024, {ranks} GPU{'s' * (ranks > 1)}, ZeRO-2", llama_config, llama, count, ranks, 2)
        for count, ranks in ((16, 1), (2, 8))
    ]
    cases += [(f"Llama-4-Scout, 2 × 1024, 8 GPUs, ZeRO-{n}", scout, Llama4TextConfig(), 2, 8, n) for n in (1, 2, 3)]
    kinds = [(True, "checkpointing"), (False, "graphs kept")]
    cases = [
        (f"{name}, {kind}", replace(config, zero_stage=stage, gradient_checkpointing=on), *rest)
        for name, config, *rest, stage in cases
        for on, kind in kinds
    ]
    for name, config, model, count, ranks in cases:
        rows = Rows(count, 1024, count * 512)
        adapted = structure(config, model)
        p = predict(config, adapted, rows, rows, replace(rows, count=2, scored=1024), world_size=ranks, cuda=True)
        terms = (p.weights, p.adapter + p.optimizer + p.gradients, p.activations)
        figures = [*terms, p.peak - sum(terms), p.peak]
        print(f"{name:60}" + "".join(f"{figure / 1e9:9.1f}" for figure in figures), flush=True)


def main() -> int:
    """Print the table; the exit status."""
    if "--measure" in sys.argv:
        measure(Path(sys.argv[-1]), sys.argv[-2])
        return 0
    if "--gpu-table" in sys.argv:
        gpu_table()
        return 0
    print(f"MB, {platform.machine()}, {ROWS} × {LENGTH} tokens a side, V {VOCABULARY}, float32")
    print(f"{'':10}" + "".join(f"{term:>12}" for term in (*TERMS, "measured")) + f"{'off':>10}")
    off = [compare(name) for name in SIZES if name != WARM]
    return int(max(map(abs, off)) > WITHIN)


if __name__ == "__main__":
    sys.exit(main())
