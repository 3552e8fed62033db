"""What `bench_step` measures: the steps by the public pattern, live teacher and cached one, and their shapes."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import PairedBatch, ScoredCounts, collate_by_length
from cbtrain.data.tokenization import TokenRow
from cbtrain.losses.schedule import Coefficients
from cbtrain.model.lora import add_adapter
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.teacher_cache.wanted_states import WantedStates
from cbtrain.training.step import CircuitBreakerStep

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # which pytest puts there itself
from plain_step import plain_step

PLAIN, LIVE, CACHED = "public pattern", "live teacher", "cached teacher"
WEIGHTS = Coefficients(cs=5.0, cr=5.0, kl_weight=1.5)

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
