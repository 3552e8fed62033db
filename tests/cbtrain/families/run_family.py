"""One model type on the whole way: a tiny model directory, checked, trained, evaluated, and held against plain code.

What a family must bear to count as working is in `run`.
"""

import contextlib
import io
import json
import random
import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from causal_models import with_large_weights
from peft import PeftModel
from plain_step import plain_step
from tiny_configs import NOT_TRIED, VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from cbtrain.config import CircuitBreakerConfig, InputError, get_config
from cbtrain.data.batches import PairedBatch, ScoredCounts, TokenBatch, collate
from cbtrain.evaluation.behaviour import measure
from cbtrain.evaluation.student import adapter
from cbtrain.losses.schedule import Coefficients
from cbtrain.model import tiny
from cbtrain.model.checks import check_fit, prepare
from cbtrain.model.loading import forget_base, load_base
from cbtrain.model.lora import add_adapter
from cbtrain.training.loop import train
from cbtrain.training.memory_estimate import predict_run
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils.environment import say_once

TOLERANCE = 1e-6
"""Largest difference of a loss from that of four plain forwards, in float32, relative to the loss where above 1."""
AFTER_TRAINING = 1e-5
"""The same between metrics of a run with a live teacher and one with a cached teacher: AdamW enlarges rounding."""
WEIGHTS = Coefficients(1.0, 1.0, 1.0)
NEW_TOKENS = 3
COSTS = {
    "every pass runs the whole model": "no early exit",
    "prompts are completed one by one": "completes prompt by prompt",
    "runs the whole prompt again": "completes without a cache",
}
"""What is said of a family that works at a cost, and how the table calls it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a model type."""

    kind: Literal["works", "refused", "not tried", "ends in a traceback"]
    reason: str = ""
    """Why it does not work, without the names and numbers of one model; of one that works, what it costs."""
    deviation: float = 0.0
    """Largest relative difference of a loss from the reference's."""


def run(model_type: str, directory: Path) -> Outcome:
    """Take a model type from its configuration class through everything that a user would do with it.

    Checked, loaded, adapted; losses and gradients of a step with early exit against four plain forwards; trained with a
    live and with a cached teacher; the adapter in plain PEFT, bit for bit; held-out metrics, and completions against
    plain forwards; its memory predicted.

    Args:
        directory: empty.

    Raises:
        Exception: whatever a user would see as a traceback; an `AssertionError` where a result is wrong.
    """
    if model_type in NOT_TRIED:
        return Outcome("not tried", NOT_TRIED[model_type])
    config = saved(model_type, directory)
    say_once.cache_clear()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            check_fit(config)
            deviation = _against_plain_forwards(config)
            _trained_and_evaluated(config, directory / "run")
        with contextlib.suppress(ValueError):  # which is told in words
            predict_run(config, prepare(config)[0])
    except InputError as error:
        return Outcome("refused", _without_names(str(error)))
    finally:
        forget_base()
    return Outcome("works", "; ".join(cost for line, cost in COSTS.items() if line in said.getvalue()), deviation)


def _without_names(refusal: str) -> str:
    """`--model: BertLMHeadModel is no …, as (…)` as `is no …, as`; a refusal of more than one line is a failure."""
    found = re.fullmatch(r"--model(?: \S+)?: [A-Z]\w+ (.*?)(?: \([^)]*\))?", refusal)
    if not found:
        raise AssertionError(f"a refusal that does not name the model: {refusal}")
    return found[1]


def saved(model_type: str, directory: Path) -> CircuitBreakerConfig:
    """A model directory of the type, with a tokenizer and rows; the configuration of two steps on it."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    assert len(tokenizer) <= VOCABULARY
    home = directory / "model"
    structure = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(structure)
    if type(model.config) is not type(
        structure
    ):  # what is published of it is the whole, of which only this part is loaded
        model = AutoModelForImageTextToText.from_config(structure)
    with_large_weights(model).save_pretrained(home)
    tokenizer.save_pretrained(home)
    rng = random.Random(0)
    for name, verbs, objects in (
        ("harmful", tiny.DUAL_USE_VERBS, tiny.GUARDED_OBJECTS),
        ("benign", tiny.PLAIN_VERBS, tiny.PLAIN_OBJECTS),
    ):
        rows = [json.dumps(tiny.chat(pair, rng)) for pair in list(product(verbs, objects))[:12]]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return get_config(
        "tiny",
        model=str(home),
        harmful=(str(directory / "harmful.jsonl"),),
        benign=(str(directory / "benign.jsonl"),),
        target_layers=(1, 3),
        lora_layers=None,
        lora_rank=8,
        lora_init_std=0.1,
        kl_temperature=2.0,
        steps=2,
        warmup_steps=0,
        batch_size=2,
        eval_every=0,
        eval_batch_size=4,
    )


def _against_plain_forwards(config: CircuitBreakerConfig) -> float:
    """Largest deviation of losses, with early exit where the model bears it, from those of four plain forwards."""
    model = add_adapter(load_base(config), config)
    try:
        data, pad = prepare(config)
        harmful, benign = (collate(side.train[:3], pad) for side in (data.harmful, data.benign))
        pair = PairedBatch((harmful,), (benign,))
        counts = ScoredCounts(len(harmful.scored_tokens), len(benign.scored_tokens), len(benign.scored_predictions), 0)
        config = replace(config, retain_norms=(2.0, 4.0))  # of the two target layers, as if measured
        step = CircuitBreakerStep(model, config)
        found = step(pair, counts, WEIGHTS)
        loss, expected = plain_step(model, pair, config, WEIGHTS)
        assert expected.isfinite().all(), expected
        deviation = float(((found.parts - expected).abs() / expected.abs().clamp(min=1)).max())
        gradients = [torch.autograd.grad(of, _trained(model), allow_unused=True) for of in (found.loss, loss)]
        for name, one, other in zip(_names(model), *gradients, strict=True):
            same = one is other or torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
            assert same, f"gradient of {name}"
        assert deviation <= TOLERANCE, (found.parts.tolist(), expected.tolist())
    finally:
        model.unload()
    return deviation


def _trained(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _names(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _trained_and_evaluated(config: CircuitBreakerConfig, output_dir: Path) -> None:
    """Train with a live and a cached teacher, reload in plain PEFT, complete prompts."""
    output_dir.mkdir()
    live, cached = (
        train(config, output_dir / name, lambda _metrics: None, teacher_cache=cache)
        for name, cache in (("live", None), ("cached", output_dir / "cache"))
    )
    for name in ("loss", "eval_loss_reroute", "eval_benign_kl"):
        assert abs(live[name] - cached[name]) <= AFTER_TRAINING * max(1, abs(live[name])), (
            name,
            live[name],
            cached[name],
        )
    home = output_dir / "live" / "adapter"
    record = measure(config, home, prompts=3, max_new_tokens=NEW_TOKENS, prefill_tokens=2, output_dir=output_dir)
    assert record["harmful"]["prompts"] > 1
    base = AutoModelForCausalLM.from_pretrained(config.model)
    plain = PeftModel.from_pretrained(base, home, is_trainable=True).eval()  # torch chooses kernels by that too
    rows = collate(prepare(config)[0].benign.train[:2], 0)
    with adapter(config, home) as own:
        assert torch.equal(_logits(plain, rows), _logits(own, rows))
        own.eval()
    _same_completions(config, output_dir, plain)


def _logits(model: torch.nn.Module, rows: TokenBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits


def _same_completions(config: CircuitBreakerConfig, output_dir: Path, student: PeftModel) -> None:
    """The completions that were written are those of whole forwards, one prompt and one token at a time."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    for line in (output_dir / "completions.jsonl").read_text().splitlines():
        said = json.loads(line)
        for view, off in (("teacher", student.disable_adapter), ("student", contextlib.nullcontext)):
            with off():
                expected = greedy(student, tokenizer(said["prompt"], add_special_tokens=False)["input_ids"])
            assert said[view]["text"] == tokenizer.decode(expected, skip_special_tokens=True), (
                view,
                said["prompt"],
                said[view],
                expected,
            )


def greedy(model: torch.nn.Module, tokens: list[int]) -> list[int]:
    """The likeliest next tokens up to the end of text, without padding and without a cache."""
    ids, said = list(tokens), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        said.append(token)
        ids.append(token)
    return said
