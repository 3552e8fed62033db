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
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cbtrain.data.batches import PairedBatch
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils.environment import quiet_libraries
from tests.benchmarks.peers.step_contestants import (
    PLAIN,
    SHAPES,
    Contestant,
    Setting,
    Shape,
    contestants,
    fill,
    settings,
)

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
