"""One circuit-breaker step, forward and backward, against the public pattern: four whole forwards and every logit.

    python -m tests.benchmarks.bench_step [--quick] [--device cpu|cuda]

A random Llama with the published layers in proportion: of 32 blocks, LoRA (rank 16, every linear module) on 0 to 20
and hidden states 10 and 20 as targets; then LoRA on the last third of the blocks below the highest target, which is
the only one, for both sides. No optimizer update on either side. Each round has rows of its own, of the same lengths,
and times every contestant on them; a step with the cache reads its rows' states from it within its time.

Losses and gradients of every timed step are compared with the public pattern's. FLOPs are those of matrix products
and attention (as if it were not causal), "other" is the share of a step's time outside both: on CPU the self time of
mm, addmm, bmm, baddbmm and the fused attention and their backward count as inside, on CUDA that of their kernels.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from cbtrain.batches import PairedBatch, ScoredCounts, TokenBatch, collate
from cbtrain.config import CircuitBreakerConfig
from cbtrain.environment import quiet_libraries
from cbtrain.model import add_adapter
from cbtrain.schedule import Coefficients
from cbtrain.step import CircuitBreakerStep
from cbtrain.teacher import TeacherCache, WantedStates
from cbtrain.tokens import TokenRow

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, which pytest puts there itself
from plain_step import plain_step

PLAIN, LIVE, CACHED = "public pattern", "live teacher", "cached teacher"
WEIGHTS = Coefficients(cs=5.0, cr=5.0, kl_weight=1.5)
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Relative; in bfloat16 the public pattern's own rounding is that large."""
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}
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
        structure = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 7 // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=self.lengths[1],
            dtype=self.dtype,
        )
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

        return PairedBatch(collate(tuple(rows()), 0), collate(tuple(rows()), 0))

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


@dataclass
class Line:
    """What is known of one contestant."""

    seconds: list[float]
    flops: int
    other: float
    """Share of the time outside matrix products and attention."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Deviation:
    """The largest from the public pattern, relative, over all steps."""

    loss: float = 0.0
    """Of any loss."""
    gradient: float = 0.0
    """Of any parameter's gradient, by norms."""

    def add(self, found: "Result", expected: "Result", dtype: torch.dtype) -> None:
        loss = ((found.parts - expected.parts).abs() / expected.parts.abs()).max().item()
        assert found.gradients.keys() == expected.gradients.keys()
        apart = [(g - expected.gradients[name]).norm() / g.norm() for name, g in found.gradients.items()]
        gradient = torch.stack(apart).max().item()
        assert loss <= LOSS_TOLERANCE[dtype], f"a loss is off by {loss:.1e}"
        assert gradient <= GRADIENT_TOLERANCE[dtype], f"a gradient is off by {gradient:.1e}"
        self.loss, self.gradient = max(self.loss, loss), max(self.gradient, gradient)


@dataclass
class Result:
    """Of one step: seconds, losses and gradients."""

    seconds: float
    parts: Tensor
    gradients: dict[str, Tensor]


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
    """The states of every row of the batches, made in the batches that training takes."""
    wanted = [
        WantedStates(row, tuple(layers), final)
        for side, layers, final in (("harmful", step.config.target_layers, False), ("benign", step.retained, True))
        for batch in batches
        for row in getattr(batch, side).rows
    ]

    def teacher(batch: TokenBatch, layers: tuple[int, ...], final: bool):
        return step.decoder.teacher(batch.to(device), layers, final)

    cache.build(wanted, teacher, batch_size=len(batches[0].benign.rows), pad_token_id=0)


def contestants(step: CircuitBreakerStep, cache: TeacherCache, device: str) -> dict[str, Contestant]:
    config = step.config

    def plain(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        return plain_step(step.model, batch.to(device), config, WEIGHTS)

    def live(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        harmful, benign = batch.harmful.scored_tokens, batch.benign
        counts = ScoredCounts(len(harmful), len(benign.scored_tokens), len(benign.scored_predictions), tokens=0)
        return step(batch.to(device), counts, WEIGHTS)

    def cached(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        harmful = cache.attach(batch.harmful, config.target_layers, False)
        return live(PairedBatch(harmful, cache.attach(batch.benign, step.retained, True)))

    return {PLAIN: plain, LIVE: live, CACHED: cached}


def flops(call: Contestant, batch: PairedBatch) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOPS_TORCH_LEAVES_OUT) as counter:
        call(batch)[0].backward()
    return counter.get_total_flops()


def other_share(call: Contestant, batch: PairedBatch) -> float:
    """Share of a profiled step's time that is neither matrix product nor attention."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        start = now()
        call(batch)[0].backward()
        duration = now() - start
    inside = 0.0
    for event in profiler.key_averages():
        if event.key in PRODUCTS or (event.key.startswith("aten::_") and "attention" in event.key):
            inside += event.self_device_time_total if cuda else event.self_cpu_time_total
    return 1 - inside / 1e6 / duration


def measure(shape: Shape, setting: Setting, device: str) -> tuple[dict[str, Line], Deviation]:
    """Each contestant's line from interleaved rounds."""
    dtype = str(shape.dtype).removeprefix("torch.")
    model = shape.model(replace(setting.config, dtype=dtype), device)
    step = CircuitBreakerStep(model, setting.config)
    batches = [shape.batch(index) for index in range(shape.rounds + 1)]
    deviation = Deviation()
    with tempfile.TemporaryDirectory() as directory:
        cache = TeacherCache(Path(directory), "identity")
        fill(cache, step, batches, device)
        calls = contestants(step, cache, device)
        warm_up, *rounds = batches
        lines = {name: Line([], flops(call, warm_up), 0.0) for name, call in calls.items()}
        for batch in rounds:
            results = {name: run(call, model, batch) for name, call in calls.items()}
            for name, result in results.items():
                lines[name].seconds.append(result.seconds)
                deviation.add(result, results[PLAIN], shape.dtype)
        for name, call in calls.items():
            lines[name].other = other_share(call, warm_up)
    return lines, deviation


def show(setting: Setting, lines: dict[str, Line], deviation: Deviation) -> None:
    print(f"\n{setting}; losses off by {deviation.loss:.1e} at most, gradients by {deviation.gradient:.1e}")
    print(f"{'':16}{'seconds':>9}{'min-max':>16}{'GFLOP':>9}{'GFLOP/s':>9}{'other':>8}{'plain/it':>10}{'in FLOP':>9}")
    plain = lines[PLAIN]
    for name, line in lines.items():
        spread = f"{min(line.seconds):.3f}-{max(line.seconds):.3f}"
        amount = f"{line.flops / 1e9:9.1f}{line.flops / 1e9 / line.median:9.0f}"
        ratios = f"{plain.median / line.median:10.2f}{plain.flops / line.flops:9.2f}"
        print(f"{name:16}{line.median:9.3f}{spread:>16}{amount}{line.other:8.0%}{ratios}", flush=True)


def show_targets(setting: Setting, lines: dict[str, Line]) -> None:
    for name, target in setting.targets.items():
        reached = lines[PLAIN].median / lines[name].median
        print(f"{setting}, {name}: x {target} -> x {reached:.2f}")


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
        outcomes.append((setting, *measure(shape, setting, device)))
        show(*outcomes[-1])
    print("\nTarget -> reached")
    for setting, lines, _ in outcomes:
        show_targets(setting, lines)


if __name__ == "__main__":
    main()
