"""The models, rows and settings that `bench_step` measures: random Llamas, or a real model on its own rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from cbtrain.config import CircuitBreakerConfig, get_config
from cbtrain.data.batches import PairedBatch, collate_by_length, step_batches
from cbtrain.data.tokenization import TokenRow
from cbtrain.losses.head_products import cpu_rounds_once
from cbtrain.model.checks import prepare
from cbtrain.model.loading import load_base
from cbtrain.model.lora import add_adapter
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache.retain_norms import with_retain_norms
from tests.benchmarks.peers.step_contestants import CACHED, CACHED_ALIKE, LIVE, LIVE_ALIKE

MOVED = {"lora_dropout": 0.0, "lora_init_std": 0.05}
"""An adapter that has moved, as at LoRA's own start no loss has a gradient; without dropout, so that losses compare."""


@dataclass(frozen=True)
class Setting:
    config: CircuitBreakerConfig
    targets: dict[str, float]
    """Of a contestant: how many times faster than the public pattern it is to be."""

    def __str__(self) -> str:
        lora, target_layers = self.config.lora_layers or (), list(self.config.target_layers)
        return f"LoRA on blocks {lora[0]}-{lora[-1]}, targets {target_layers}"


class Case(Protocol):
    """A model with rows for every round."""

    dtype: torch.dtype
    rounds: int
    pad: int

    def settings(self) -> Iterable[Setting]: ...

    def model(self, config: CircuitBreakerConfig, device: str) -> PeftModel:
        """With its adapter in the model's dtype, as the training engine has it."""

    def batch(self, index: int) -> PairedBatch:
        """The rows of a round, those of like length together."""


@dataclass(frozen=True)
class RandomLlama:
    layers: int
    hidden_size: int
    vocabulary: int
    rows: int
    """A side."""
    lengths: tuple[int, int]
    """Tokens of the shortest and the longest row; the others lie evenly between."""
    dtype: torch.dtype
    rounds: int
    pad: int = 0

    def settings(self) -> Iterator[Setting]:
        """LoRA as published, and on the last third below the highest target."""
        middle, top = (round(self.layers * published / 32) for published in (10, 20))
        for targets, lora, wanted in (
            ((middle, top), range(top + 1), {LIVE: 1.3, CACHED: 1.85}),
            ((top,), range(top - round(top / 3), top), {CACHED: 2.3}),
        ):
            config = CircuitBreakerConfig(target_layers=targets, lora_layers=tuple(lora), **MOVED)  # type: ignore[arg-type]
            yield Setting(config, wanted)

    def model(self, config: CircuitBreakerConfig, device: str) -> PeftModel:
        """Llama 3's proportions: four query heads to a key head, 3.5 H in the MLP."""
        heads = self.hidden_size // (128 if self.hidden_size >= 2048 else 64)
        sizes = {"vocab_size": self.vocabulary, "hidden_size": self.hidden_size, "num_hidden_layers": self.layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
        structure = LlamaConfig(**sizes, intermediate_size=self.hidden_size * 7 // 2)
        torch.manual_seed(0)
        with torch.device(device):
            base = LlamaForCausalLM(structure).to(self.dtype)
        return _in_one_dtype(add_adapter(base.requires_grad_(False).eval(), config))

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

        return PairedBatch(collate_by_length(tuple(rows()), self.pad), collate_by_length(tuple(rows()), self.pad))

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, H {self.hidden_size}, V {self.vocabulary}, {self.rows} rows a side of "
            f"{self.lengths[0]} to {self.lengths[1]} tokens, {_named(self.dtype)}; {self.rounds} rounds"
        )


RANDOM = {
    "quick": RandomLlama(6, 64, 512, 4, (16, 32), torch.float32, 3),
    "cpu": RandomLlama(10, 512, 8192, 8, (128, 256), torch.float32, 7),
    "cuda": RandomLlama(16, 4096, 128_256, 8, (512, 1024), torch.bfloat16, 7),
}


class RealModel:
    """A pretrained model on its own rows, as a preset trains it: its layers, its batch, its order of the rows.

    Args:
        dtype: None is bfloat16 where the device multiplies it, else float32.
    """

    def __init__(
        self, model: str, sides: dict[str, tuple[str, ...]], preset: str, dtype: str | None, device: str, rounds: int
    ) -> None:
        dtype = dtype or ("bfloat16" if device == "cuda" or cpu_rounds_once() else "float32")
        config = get_config(preset, model=model, dtype=dtype, **sides, **MOVED)
        self._data, self.pad = prepare(config)
        self._preset, self.dtype, self.rounds = preset, getattr(torch, dtype), rounds
        decoder = Decoder(self.model(config, device), config.hidden_states)
        self._config = with_retain_norms(config, self._data, self.pad, decoder, None)
        decoder.model.unload()

    def settings(self) -> list[Setting]:
        return [Setting(self._config, {LIVE_ALIKE: 1.6, CACHED_ALIKE: 2.4, CACHED: 3.0})]

    def model(self, config: CircuitBreakerConfig, device: str) -> PeftModel:
        return _in_one_dtype(add_adapter(load_base(config).to(device), config))

    def batch(self, index: int) -> PairedBatch:
        """The rows of training step `index`."""
        one_micro_step = replace(self._config, micro_batch_size=None, gradient_accumulation=None)
        (batch,), _ = step_batches(self._data, one_micro_step, index, self.pad)
        return batch

    def __str__(self) -> str:
        rows = f"{self._config.batch_size} of its rows a side, at most {self._config.max_length} tokens"
        return f"preset {self._preset}, {rows}, {_named(self.dtype)}; {self.rounds} rounds"


def _in_one_dtype(model: PeftModel) -> PeftModel:
    """PEFT keeps an adapter on a bfloat16 model in float32; the training engine casts it."""
    dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
