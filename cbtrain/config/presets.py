"""The models that the method is known for, each with the numbers published for it, and where they come from.

`get_config("llama-3.1-8b-instruct", beta_kl=1.0)` gives a preset with fields replaced.
"""

from dataclasses import dataclass
from typing import Literal

from cbtrain.config.schema import CircuitBreakerConfig, Dtype
from cbtrain.config.validation import nearest
from cbtrain.utils.errors import InputError


@dataclass(kw_only=True)
class CircuitBreakerConfigTiny(CircuitBreakerConfig):
    """The embedded default: a 0.2 M parameter Llama and a small world of questions, for a laptop's CPU.

    Two adapted blocks lie below the first target layer: one can gather verb and object of the question, the next can
    tell from both whether it is harmful. The retain term is weak (`retain_scale`), so that the KL has something to add;
    the schedule goes most of its way, since in so few steps benign text needs the weight at their end to come back.
    The rank is high for its size: with 8, what A draws at its start decides when a layer collapses, and seeds differ.
    """

    model: str = "tiny"
    dtype: Dtype = "float32"
    max_length: int = 256
    eval_fraction: float = 0.5
    target_layers: tuple[int, ...] = (2, 3)
    retain_norm: Literal["absolute", "relative"] = "relative"
    retain_scale: float = 1.5
    lora_rank: int = 32
    lora_dropout: float = 0.0
    lora_layers: tuple[int, ...] | None = (0, 1, 2)
    lora_init_std: float = 0.02
    schedule_horizon: float = 1.3
    steps: int = 80
    lr: float = 4e-3
    lr_schedule: Literal["constant", "linear"] = "linear"
    warmup_steps: int = 15
    log_every: int = 1
    eval_every: int = 16
    eval_batch_size: int = 48


@dataclass(kw_only=True)
class CircuitBreakerConfigAuto(CircuitBreakerConfig):
    """Any model, by the rule that the published numbers follow; the default where `--model` is given alone.

    Layers, dtype and length are derived from the model (`cbtrain.model.auto`). Distances of the retain term are
    relative, since hidden states of other models are longer than the published one's by up to two orders.
    """

    retain_norm: Literal["absolute", "relative"] = "relative"
    eval_every: int = 30


@dataclass(kw_only=True)
class CircuitBreakerConfigSmolLM2(CircuitBreakerConfigAuto):
    """SmolLM2-135M-Instruct, 30 blocks: a pretrained chat model on which a sweep takes a laptop's CPU under an hour.

    Measured, not published: with an absolute retain term nothing reroutes, as hidden states have norms of 139 and 224
    at the target layers. With a relative one at scale 3 and this learning rate both layers collapse within 60 steps;
    the steps that follow are for slower seeds and let benign text come back.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    max_length: int = 80
    eval_fraction: float = 0.25
    target_layers: tuple[int, ...] = (10, 20)
    lora_layers: tuple[int, ...] | None = tuple(range(20))
    retain_scale: float = 3.0
    steps: int = 90
    batch_size: int = 4
    lr: float = 2e-3
    log_every: int = 5


@dataclass(kw_only=True)
class CircuitBreakerConfigLlama3(CircuitBreakerConfig):
    """Llama-3-8B-Instruct, 32 blocks, as the method was published for it.

    Source: Zou et al. 2024, "Improving Alignment and Robustness with Circuit Breakers" (arXiv:2406.04313), appendix,
    and `scripts/lorra_circuit_breaker_llama3_8b.sh` of its code. Where they disagree:
    - The paper's Algorithm 1 has the reroute coefficient rise; appendix and code let it fall, which is taken.
    - The script asks for rows of 8192 tokens; the code cuts them to 1024 whatever is asked, which is taken.
    - The code retains every hidden state, the paper speaks of the layers that are rerouted: `retain_layers` is
      `target`, and `through_target` gives the code's.
    - The code gives the adapter blocks 0–20 and drops the rest while it trains. A KL needs the whole model, so block
      20, which no target layer sees, learns from the KL alone.
    """

    model: str = "meta-llama/Meta-Llama-3-8B-Instruct"
    lora_layers: tuple[int, ...] | None = tuple(range(21))
    gradient_checkpointing: bool = True


@dataclass(kw_only=True)
class CircuitBreakerConfigLlama31(CircuitBreakerConfigLlama3):
    """Llama-3.1-8B-Instruct, with the numbers published for Llama-3-8B-Instruct.

    Of replications some halve the learning rate to 5e-5 and double lora_alpha to 32; the authors' are taken.
    """

    model: str = "meta-llama/Llama-3.1-8B-Instruct"


@dataclass(kw_only=True)
class CircuitBreakerConfigMistral(CircuitBreakerConfigLlama3):
    """Mistral-7B-Instruct-v0.2, 32 blocks: Llama-3's numbers with half its alpha.

    Source: the same paper and `scripts/lorra_circuit_breaker_mistral_7b.sh`. The paper says "Mistral-7B-Instruct-v2",
    the script v0.2, replications v0.3 with a learning rate of 5e-5: the script is taken.
    """

    model: str = "mistralai/Mistral-7B-Instruct-v0.2"
    alpha: float = 5.0


@dataclass(kw_only=True)
class CircuitBreakerConfigQwen3(CircuitBreakerConfigAuto):
    """Qwen3-8B, 36 blocks, by the rule of `auto`, since nothing is published for it: the published shares of the depth.

    Untested at this size: give a recipe that `python -m cbtrain.calibrate` has found.
    """

    model: str = "Qwen/Qwen3-8B"
    target_layers: tuple[int, ...] = (11, 22)
    lora_layers: tuple[int, ...] | None = tuple(range(22))
    gradient_checkpointing: bool = True


@dataclass(kw_only=True)
class CircuitBreakerConfigLlama4Scout(CircuitBreakerConfig):
    """Llama-4-Scout-17B-16E-Instruct, 48 blocks, 109 B parameters, 218 GB in bfloat16. Untested at this size.

    Source: a public replication's configuration; the method's authors published none. Its versions adapt blocks 0–29,
    which leaves layer 36 to the blocks below it; blocks 0–35 reach up to it and are taken. Its 128 rows an update on
    eight GPUs are the method's 16 here, its lora_alpha of 32 the method's 16.

    LoRA reaches attention and the shared expert of each block. The sixteen routed experts are fused parameters and the
    router is no plain linear map: both stay as they are. The workers of a node map the files of the weights, which are
    in this dtype, and hold no copies of their own; ZeRO-3 gives each worker its part.
    """

    model: str = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    alpha: float = 8.0
    target_layers: tuple[int, ...] = (12, 24, 36)
    lora_layers: tuple[int, ...] | None = tuple(range(36))
    steps: int = 300
    warmup_steps: int = 30
    lr: float = 2e-5
    zero_stage: Literal[0, 1, 2, 3] = 3
    gradient_checkpointing: bool = True


PRESETS: dict[str, type[CircuitBreakerConfig]] = {
    "tiny": CircuitBreakerConfigTiny,
    "auto": CircuitBreakerConfigAuto,
    "smollm2-135m-instruct": CircuitBreakerConfigSmolLM2,
    "llama-3-8b-instruct": CircuitBreakerConfigLlama3,
    "llama-3.1-8b-instruct": CircuitBreakerConfigLlama31,
    "mistral-7b-instruct": CircuitBreakerConfigMistral,
    "qwen3-8b": CircuitBreakerConfigQwen3,
    "llama-4-scout": CircuitBreakerConfigLlama4Scout,
}


UNMEASURED = ("auto", "qwen3-8b")
"""Presets by a rule, whose recipe was neither published nor measured: a sweep calibrates first."""


def canonical(name: str) -> str:
    """A preset's name as the table has it: underscores read as hyphens, capitals as small letters."""
    return name.replace("_", "-").lower()


def get_config(name: str, **overrides: object) -> CircuitBreakerConfig:
    """The preset `name` with fields replaced; underscores in the name are read as hyphens.

    `auto` has here what it has for every model; `cbtrain.model.auto.derived` adds what a model's structure tells.

    Raises:
        InputError: no such preset or field, with the nearest one.
    """
    key = canonical(name)
    if key not in PRESETS:
        raise InputError(
            f"--preset {name}: no such preset{nearest(key, list(PRESETS)) or '; one of ' + ', '.join(PRESETS)}"
        )
    config = PRESETS[key]()
    for field_name, value in overrides.items():
        setattr(config, field_name, value)
    return config
