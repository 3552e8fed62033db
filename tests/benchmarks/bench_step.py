"""One circuit-breaker step, forward and backward, against the public pattern: four whole forwards and every logit.

    python -m tests.benchmarks.bench_step [--quick] [--device cpu|cuda]

A random Llama with the published layers in proportion: of 32 blocks, LoRA (rank 16, every linear module) on 0 to 20
and hidden states 10 and 20 as targets; then LoRA on the last third of the blocks below the highest target, which is
the only one, for both sides. The public pattern pads a side alike; ours runs rows of like length together, as
training does. No optimizer update on either side. Each round has rows of its own, of the same lengths, and times
every contestant on them, another one first; a step with the cache reads its rows' states within its time.

Losses and gradients of every timed step are compared with the public pattern's. FLOPs are those of matrix products
and attention (as if it were not causal), "other" is the share of a step's time outside both: on CPU the self time of
mm, addmm, bmm, baddbmm and the fused attention and their backward count as inside, on CUDA that of their kernels.

Measured on two cores of a shared x86-64 machine (torch 2.13, CPU, 2 threads), 2026-11-22, medians of 7 rounds:

    10 layers, H 512, V 8192, 8 rows a side of 128 to 256 tokens, float32
                      seconds    GFLOP  GFLOP/s  other  plain/it  in FLOP  padded alike
    LoRA on blocks 0-6, targets 3 and 6
    public pattern      7.942    976.9      123    17%      1.00     1.00
    live teacher        4.878    666.4      137    15%      1.63     1.47          1.35
    cached teacher      3.438    462.4      134    16%      2.31     2.11          1.85
    LoRA on blocks 4-5, target 6
    public pattern      6.516    825.0      127    11%      1.00     1.00
    live teacher        3.155    437.2      139    13%      2.07     1.89          1.50
    cached teacher      2.514    335.2      133    14%      2.59     2.46          2.04

The last column is from another run in which our side padded its rows like the public pattern: what early exit, fused
KL and cache give without rows of like length together. Not measured on a GPU.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import PairedBatch, ScoredCounts, collate_by_length
from cbtrain.data.tokenization import TokenRow
from cbtrain.losses.schedule import Coefficients
from cbtrain.model.lora import add_adapter
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.teacher_cache.wanted_states import WantedStates
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils.environment import quiet_libraries

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # which pytest puts there itself
from plain_step import plain_step

PLAIN, LIVE, CACHED = "public pattern", "live teacher", "cached teacher"
WEIGHTS = Coefficients(cs=5.0, cr=5.0, kl_weight=1.5)
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.1, 0.25)}
"""Of losses and of gradients, relative; in bfloat16 the public pattern's own rounding is that large."""
INSIDE = re.compile(r"aten::((add)?mm_?|(badd)?bmm|_\w*attention\w*)")
FLOPS_TORCH_LEAVES_OUT = {
    torch.ops.aten.addmm_: lambda _out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""By the shapes of an operation's arguments."""

Contestant = Callable[[PairedBatch], tuple[Tensor, Tensor]]
"""A batch on the CPU to the loss and [loss, reroute, retain, kl]."""


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden_size: int
    vocabulary: int
    rows: int
    """A side."""
    lengths: tuple[int, int]
    """Tokens of the shortest and the longest row; the others lie evenly between."""
    dtype: torch.dtype
    rounds: int

    def model(self, config: CircuitBreakerConfig, device: str) -> PeftModel:
        """Llama 3's proportions: four query heads to a key head, 3.5 H in the MLP."""
        heads = self.hidden_size // (128 if self.hidden_size >= 2048 else 64)
        sizes = {"vocab_size": self.vocabulary, "hidden_size": self.hidden_size, "num_hidden_layers": self.layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
        structure = LlamaConfig(**sizes, intermediate_size=self.hidden_size * 7 // 2)
        torch.manual_seed(0)
        with torch.device(device):
            base = LlamaForCausalLM(structure).to(self.dtype)
        return add_adapter(base.requires_grad_(False).eval(), config)

    def batch(self, index: int) -> PairedBatch:
        """Random rows whose last 30 to 50 % are scored."""
        generator = torch.Generator().manual_seed(index)
        lengths = torch.linspace(*self.lengths, self.rows).long().tolist()
        shares = torch.linspace(0.3, 0.5, self.rows)[torch.randperm(self.rows, generator=generator)].tolist()

        def rows() -> Iterable[TokenRow]:
            for length, share in zip(lengths, shares, strict=True):
                ids = torch.randint(self.vocabulary, (length,), generator=generator).tolist()
                scored = tuple(place >= length - round(share * length) for place in range(length))
                yield TokenRow(tuple(ids), scored, prompt="", source=f"random:{index}")

        return PairedBatch(collate_by_length(tuple(rows()), 0), collate_by_length(tuple(rows()), 0))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.layers} layers, H {self.hidden_size}, V {self.vocabulary}, {self.rows} rows a side of "
            f"{self.lengths[0]} to {self.lengths[1]} tokens, {dtype}; {self.rounds} rounds"
        )


SHAPES = {
    "quick": Shape(6, 64, 512, 4, (16, 32), torch.float32, 3),
    "cpu": Shape(10, 512, 8192, 8, (128, 256), torch.float32, 7),
    "cuda": Shape(16, 4096, 128_256, 8, (512, 1024), torch.bfloat16, 7),
}


@dataclass(frozen=True)
class Setting:
    target_layers: tuple[int, ...]
    lora_layers: tuple[int, ...]
    targets: dict[str, float]
    """Of a contestant: how many times faster than the public pattern it is to be."""

    @property
    def config(self) -> CircuitBreakerConfig:
        """With an adapter that has moved: at LoRA's own start no loss has a gradient."""
        return CircuitBreakerConfig(
            target_layers=self.target_layers, lora_layers=self.lora_layers, lora_dropout=0.0, lora_init_std=0.05
        )

    def __str__(self) -> str:
        return f"LoRA on blocks {self.lora_layers[0]}-{self.lora_layers[-1]}, targets {list(self.target_layers)}"


def settings(layers: int) -> list[Setting]:
    """LoRA as published, and on the last third below the highest target."""
    middle, top = (round(layers * published / 32) for published in (10, 20))
    return [
        Setting((middle, top), tuple(range(top + 1)), {LIVE: 1.3, CACHED: 1.85}),
        Setting((top,), tuple(range(top - round(top / 3), top)), {CACHED: 2.3}),
    ]


class Result(NamedTuple):
    """Of one step."""

    seconds: float
    parts: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Line:
    """What is known of one contestant."""

    flops: int
    other: float
    """Share of the time outside matrix products and attention."""
    seconds: list[float] = field(default_factory=list)
    off: tuple[float, float] = (0.0, 0.0)
    """The largest deviation of a loss and of a gradient."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def deviation(found: Result, expected: Result, dtype: torch.dtype) -> tuple[float, float]:
    """The largest of a loss, and of a parameter's gradient by norms, relative; within the tolerances."""
    assert found.gradients.keys() == expected.gradients.keys()
    loss = ((found.parts - expected.parts).abs() / expected.parts.abs()).max().item()
    pairs = [(gradient, expected.gradients[name]) for name, gradient in found.gradients.items()]
    gradient = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)
    assert loss <= TOLERANCES[dtype][0], f"a loss is off by {loss:.1e}"
    assert gradient <= TOLERANCES[dtype][1], f"a gradient is off by {gradient:.1e}"
    return loss, gradient


def run(call: Contestant, model: PeftModel, batch: PairedBatch) -> Result:
    """One step, with neither gradients before it nor an update after it."""
    model.zero_grad(set_to_none=True)
    start = now()
    loss, parts = call(batch)
    loss.backward()
    duration = now() - start
    return Result(duration, parts, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fill(cache: TeacherCache, step: CircuitBreakerStep, batches: Sequence[PairedBatch], device: str) -> None:
    """The states of every row of the batches."""
    target, retained = tuple(step.config.target_layers), tuple(step.retained)
    wanted = []
    for batch in batches:
        wanted += [WantedStates(row, target, False) for part in batch.harmful for row in part.rows]
        wanted += [WantedStates(row, retained, True) for part in batch.benign for row in part.rows]
    teacher = step.decoder.teacher
    cache.build(
        wanted,
        lambda batch, layers, final: teacher(batch.to(device), layers, final),
        batch_size=8,
        pad_token_id=0,
    )


def contestants(step: CircuitBreakerStep, cache: TeacherCache, device: str) -> dict[str, Contestant]:
    config = step.config

    def moved(batch: PairedBatch) -> PairedBatch:
        return batch.each(lambda rows: rows.to(device))

    def plain(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        return plain_step(step.model, moved(batch), config, WEIGHTS)

    def live(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        counts = ScoredCounts(
            harmful_tokens=sum(len(rows.scored_tokens) for rows in batch.harmful),
            benign_tokens=sum(len(rows.scored_tokens) for rows in batch.benign),
            benign_predictions=sum(len(rows.scored_predictions) for rows in batch.benign),
            tokens=0,
        )
        return step(moved(batch), counts, WEIGHTS)

    def cached(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        return live(
            batch.each(
                lambda rows: cache.attach(rows, config.target_layers, False),
                lambda rows: cache.attach(rows, step.retained, True),
            )
        )

    return {PLAIN: plain, LIVE: live, CACHED: cached}


def flops(call: Contestant, batch: PairedBatch) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOPS_TORCH_LEAVES_OUT) as counter:
        call(batch)[0].backward()
    return counter.get_total_flops()


def other_share(call: Contestant, batch: PairedBatch, device: str) -> float:
    """Share of a step's time that is neither matrix product nor attention, the median of three profiled ones."""
    cuda, shares = device == "cuda", []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
            start = now()
            call(batch)[0].backward()
            duration = now() - start
        events = [event for event in profiler.key_averages() if INSIDE.fullmatch(event.key)]
        inside = sum(event.self_device_time_total if cuda else event.self_cpu_time_total for event in events)
        shares.append(1 - inside / 1e6 / duration)
    return statistics.median(shares)


def measure(shape: Shape, setting: Setting, device: str) -> dict[str, Line]:
    """Each contestant's line from interleaved rounds."""
    model = shape.model(setting.config, device)
    step = CircuitBreakerStep(model, setting.config)
    batches = [shape.batch(index) for index in range(shape.rounds + 1)]
    with tempfile.TemporaryDirectory() as directory:
        cache = TeacherCache(Path(directory), "identity")
        fill(cache, step, batches, device)
        calls = contestants(step, cache, device)
        warm_up, *rounds = batches
        for call in calls.values():
            run(call, model, warm_up)
        lines = {name: Line(flops(call, warm_up), other_share(call, warm_up, device)) for name, call in calls.items()}
        for index, batch in enumerate(rounds):
            first = index % len(calls)
            order = [*calls, *calls][first : first + len(calls)]
            results = {name: run(calls[name], model, batch) for name in order}
            for name, result in results.items():
                line, off = lines[name], deviation(result, results[PLAIN], shape.dtype)
                line.seconds.append(result.seconds)
                line.off = max(line.off[0], off[0]), max(line.off[1], off[1])
    return lines


def show(setting: Setting, lines: dict[str, Line]) -> None:
    print(f"\n{setting}")
    heads = (("seconds", 9), ("min-max", 16), ("GFLOP", 9), ("GFLOP/s", 9), ("other", 7), ("plain/it", 10))
    heads += (("in FLOP", 9), ("losses off", 12), ("gradients off", 15))
    print(" " * 16 + "".join(f"{head:>{width}}" for head, width in heads))
    plain = lines[PLAIN]
    for name, line in lines.items():
        spread = f"{min(line.seconds):.3f}-{max(line.seconds):.3f}"
        amount = f"{line.flops / 1e9:9.1f}{line.flops / 1e9 / line.median:9.0f}{line.other:7.0%}"
        ratios = f"{plain.median / line.median:10.2f}{plain.flops / line.flops:9.2f}"
        off = f"{line.off[0]:12.1e}{line.off[1]:15.1e}" if name != PLAIN else ""
        print(f"{name:16}{line.median:9.3f}{spread:>16}{amount}{ratios}{off}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes: that everything runs and agrees")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    quiet_libraries()
    device = arguments.device
    shape = SHAPES["quick" if arguments.quick else device]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}\n{shape}")
    outcomes = []
    for setting in settings(shape.layers):
        outcomes.append((setting, measure(shape, setting, device)))
        show(*outcomes[-1])
    print("\nTarget -> reached")
    for setting, lines in outcomes:
        for name, target in setting.targets.items():
            reached = lines[PLAIN].median / lines[name].median
            print(f"{setting}, {name}: x {target} -> x {reached:.2f}")


if __name__ == "__main__":
    main()
