"""The model card of a trained adapter: the `README.md` that Hugging Face shows, with what made it and its limits.

Names are relative or a hub's: where files lie on one machine says nothing to who gets the adapter.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.dataset import CircuitBreakerData, SideData
from cbtrain.utils.files import known_checksum, shown, write_whole

PACKAGES = ("torch", "transformers", "peft", "deepspeed")
METRICS = {
    "eval_loss_reroute": "rerouting loss on held-out harmful rows (1 before training)",
    "eval_harmful_nll": "harmful completions' NLL, nats per token",
    "base_harmful_nll": "the same of the base model",
    "eval_loss_retain": "L2 distance of hidden states on held-out benign rows",
    "eval_benign_kl": "KL(teacher ‖ student) on held-out benign rows, nats per token",
    "eval_benign_top1_agreement": "share of benign tokens where both find the same one likeliest",
    "eval_benign_nll": "benign completions' NLL, nats per token",
    "base_benign_nll": "the same of the base model",
}
_ELSEWHERE = ("model", "tokenizer", "harmful", "benign")
"""Fields that the card gives in words of its own."""


def write_card(
    directory: Path, config: CircuitBreakerConfig, data: CircuitBreakerData, metrics: Mapping[str, float]
) -> None:
    """Write `directory/README.md` in place of the empty one that PEFT leaves there.

    Args:
        metrics: the last line of the run, with the held-out ones.
    """
    base = shown(config.model)
    header = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "circuit-breaker", "representation-rerouting"],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        _what(base, config),
        "## Use\n\n" + _usage(base),
        "## Held-out metrics\n\n" + _table(("metric", "value"), _metric_rows(metrics)),
        "## Data\n\n" + _data(config, data),
        "## Settings\n\n" + _table(("field", "value"), _settings(config)),
        "## Limits\n\n" + _limits(config),
        "## Software\n\n" + " · ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
    ]
    write_whole(directory / "README.md", "\n\n".join(sections) + "\n")


def _what(base: str, config: CircuitBreakerConfig) -> str:
    kl = (
        f"A KL term to the frozen base (weight {config.beta_kl:g}, temperature {config.kl_temperature:g}) holds its "
        "benign behaviour."
        if config.beta_kl
        else "No KL term was used (`beta_kl` 0)."
    )
    return (
        f"# Circuit breaker for {base}\n\n"
        f"A LoRA adapter (rank {config.lora_rank}) trained by representation rerouting (Zou et al. 2024, “Improving "
        "Alignment and Robustness with Circuit Breakers”): hidden states on harmful text turn away from the base "
        f"model's, those on benign text stay. {kl}"
    )


def _usage(base: str) -> str:
    return (
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")\n'
        "```"
    )


def _metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = [("steps", f"{metrics['step']:g}")] if "step" in metrics else []
    return rows + [(f"{what} (`{name}`)", f"{metrics[name]:.4g}") for name, what in METRICS.items() if name in metrics]


def _data(config: CircuitBreakerConfig, data: CircuitBreakerData) -> str:
    rows = [
        (side, shown(file), str(count), _sha256(file))
        for side, files in (("harmful", config.harmful), ("benign", config.benign))
        for file, count in _rows_by_file(getattr(data, side), files)
    ]
    split = [f"{len(side.train):,} train, {len(side.held_out):,} held out" for side in (data.harmful, data.benign)]
    return (
        _table(("side", "file", "rows used", "sha256"), rows)
        + f"\n\nHarmful: {split[0]}. Benign: {split[1]}. Held out by a hash of the prompt; scored tokens by the mask "
        f"policy `{config.mask_policy}`."
    )


def _rows_by_file(side: SideData, files: Sequence[str]) -> list[tuple[str, int]]:
    counts = Counter(row.source.rpartition(":")[0] for row in (*side.train, *side.held_out))
    return [(file, counts[file]) for file in files]


def _sha256(file: str) -> str:
    known = known_checksum(Path(file))
    return f"`{known}`" if known else "not a file"


def _settings(config: CircuitBreakerConfig) -> list[tuple[str, str]]:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _ELSEWHERE}
    return [(f"`{name}`", _written(value)) for name, value in fields.items()]


def _written(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _limits(config: CircuitBreakerConfig) -> str:
    return (
        "- A circuit breaker breaks off harmful completions of the kinds it was trained on; it is no filter of prompts "
        "and no guarantee against others.\n"
        "- Where it triggers, the text may be broken rather than a refusal.\n"
        f"- The metrics above are of rows held out from the same files, of at most {config.max_length} tokens; they "
        "say nothing of other languages, domains or adaptive attacks.\n"
        "- A cosine can look rerouted while harmful completions are likely again: look at their NLL beside it, and at "
        "generated text."
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(names), " | ".join("---" for _ in names), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
