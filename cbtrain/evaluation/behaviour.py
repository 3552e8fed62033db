"""What a circuit breaker does to generated text: the student beside its teacher, on held-out prompts.

`measure` gives the held-out metrics and, for both models, greedy completions judged for refusal and gibberish, and how
likely a harmful completion stays once its first tokens are given. One copy of the weights: the teacher is the student
with its adapter off.
"""

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.config.saved import require_adapter
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.evaluation import text_metrics
from cbtrain.evaluation.generation import complete
from cbtrain.evaluation.held_out import RowNLL, evaluate, held_out, row_nll
from cbtrain.evaluation.prompts import Prompt, beyond_prefill, from_rows, from_xstest
from cbtrain.model.checks import prepare
from cbtrain.model.loading import forget_base, load_base, load_tokenizer
from cbtrain.model.partial_forward import Decoder
from cbtrain.utils import distributed
from cbtrain.utils.errors import first_line
from cbtrain.utils.files import finite_or_none, shown, write_whole

SCHEMA_VERSION = 2
View = Literal["teacher", "student"]
VIEWS: tuple[View, ...] = ("teacher", "student")


@dataclass(frozen=True)
class Completion:
    """What one of the two models made of a prompt."""

    text: str
    tokens: tuple[int, ...]
    refused: bool
    perplexity: float
    """Under the teacher; NaN where there are no tokens."""
    repetition: float

    @property
    def gibberish(self) -> bool:
        return text_metrics.gibberish(self.perplexity, self.repetition)

    @property
    def complied(self) -> bool:
        """It answers: neither empty, nor a refusal, nor gibberish."""
        return bool(self.tokens) and not self.refused and not self.gibberish

    def record(self) -> dict[str, Any]:
        """What `completions.jsonl` says of it."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "refused": self.refused,
            "gibberish": self.gibberish,
            "perplexity": self.perplexity,
            "repetition": self.repetition,
        }


def measure(
    config: CircuitBreakerConfig,
    adapter_dir: Path,
    *,
    prompts: int = 16,
    max_new_tokens: int = 64,
    prefill_tokens: int = 5,
    xstest: Sequence[str] = (),
    output_dir: Path | None = None,
    teacher_said: dict[tuple[int, ...], Completion] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Any]:
    """Compare a student (base model and adapter) with its teacher (base model alone); in one process, on one device.

    Args:
        config: how it was trained, with `model` and data files that exist on this machine (`model.resolve`).
        adapter_dir: a PEFT adapter directory for that model.
        prompts: at most so many held-out prompts of each kind.
        max_new_tokens: of each completion.
        prefill_tokens: tokens of a harmful completion that are given before the rest is scored.
        xstest: files of rows with `prompt`, and `label` or `type` where some are unsafe; for over-refusal.
        teacher_said: the teacher's completions by prompt, of earlier calls with the same model and `max_new_tokens`;
            those of this call are added.
        output_dir: where `behaviour.json` and `completions.jsonl` are written, when the work is done.
        progress: called with completions done and in all.

    Returns:
        What `behaviour.json` holds: `held_out` (the metrics of `evaluate`), `prefill`, and for each kind of prompt
        (`harmful`, `benign`, `xstest_safe`, `xstest_unsafe`) the number of prompts and measures, each for `teacher` and
        `student`: `refusal_rate`, `gibberish_rate`, `complied_rate` (neither of the two, nor empty), `perplexity`
        (geometric mean over completions, under the teacher; None where all are empty), `repetition`, `tokens` (means),
        `empty_rate`, and `unchanged_rate` (the student says what the teacher says).

    Raises:
        InputError: the adapter, the data or a file does not fit the model.
    """
    # Longer than fifty lines for its signature and docstring.
    data, pad = prepare(config)
    tokenizer = load_tokenizer(config)
    kinds, in_training = _prompts(config, data, tokenizer, prompts, xstest)
    with adapter(config, adapter_dir) as model:
        decoder = Decoder(model, config.hidden_states)
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": shown(config.model),
            "settings": {
                "prompts": prompts,
                "max_new_tokens": max_new_tokens,
                "prefill_tokens": prefill_tokens,
                "xstest_prompts_left_out_in_training": in_training,
            },
            "held_out": evaluate(decoder, held_out(data, config, pad), config),
            "prefill": _prefill(decoder, data, config, pad, prefill_tokens),
        }
        everything = [prompt for asked in kinds.values() for prompt in asked]
        known = {} if teacher_said is None else teacher_said
        completed = _completions(decoder, everything, known, config, tokenizer, pad, max_new_tokens, progress)
    rates, lines = _by_kind(kinds, completed, tokenizer)
    record |= rates
    if output_dir is not None:
        write_whole(output_dir / "completions.jsonl", "".join(json.dumps(finite_or_none(x)) + "\n" for x in lines))
        write_whole(output_dir / "behaviour.json", json.dumps(finite_or_none(record), indent=1) + "\n")
    return finite_or_none(record)


@contextlib.contextmanager
def adapter(config: CircuitBreakerConfig, directory: Path) -> Iterator[PeftModel]:
    """The base model with a saved adapter for the body; taken off again.

    Raises:
        InputError: there is no adapter, or it is not one of this model.
    """
    require_adapter(directory)
    base = load_base(config).to(distributed.device())
    try:
        # Trainable, as the decoder tells adapted blocks by that.
        model = PeftModel.from_pretrained(base, directory, is_trainable=True)
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            strange = set(file.keys()) ^ set(get_peft_model_state_dict(model))
        if strange:
            raise ValueError(f"{len(strange)} weights are not those of the model, {min(strange)} for one")
    except Exception as error:  # whatever a strange file makes the libraries raise
        forget_base()
        raise InputError(f"--adapter {directory}: does not fit {config.model} ({first_line(error)})") from error
    try:
        yield model
    finally:
        model.unload()


def _prompts(
    config: CircuitBreakerConfig,
    data: CircuitBreakerData,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    xstest: Sequence[str],
) -> tuple[dict[str, list[Prompt]], int]:
    """The prompts of each kind, and how many of XSTest's were left out as the model was trained on them."""
    turns = data
    if config.mask_policy == "full_sequence":  # where answers begin, the mask of completions tells
        with contextlib.suppress(InputError):  # rows without an answer
            turns, _ = prepare(dataclasses.replace(config, mask_policy="completion_only"))
    kinds = {"harmful": from_rows(turns.harmful.held_out, limit), "benign": from_rows(turns.benign.held_out, limit)}
    trained = {row.prompt for side in (data.harmful, data.benign) for row in side.train}
    safe, unsafe, in_training = from_xstest(xstest, tokenizer, trained, limit)
    return kinds | {name: asked for name, asked in (("xstest_safe", safe), ("xstest_unsafe", unsafe)) if asked}, (
        in_training
    )


def _prefill(
    decoder: Decoder, data: CircuitBreakerData, config: CircuitBreakerConfig, pad: int, tokens: int
) -> dict[str, Any]:
    """NLL of harmful completions beyond their first tokens, nats per token; None where all are shorter."""
    rows = beyond_prefill(data.harmful.held_out, tokens)
    likelihoods = row_nll(decoder, rows, config, pad)
    predictions = sum(row.predictions for row in likelihoods)
    sums = {"teacher": sum(row.teacher for row in likelihoods), "student": sum(row.student for row in likelihoods)}
    return {"rows": len(rows), "nll": {view: sums[view] / predictions if predictions else None for view in VIEWS}}


def _completions(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    teacher_said: dict[tuple[int, ...], Completion],
    config: CircuitBreakerConfig,
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None],
) -> dict[View, list[Completion]]:
    """Both models' completions of each prompt; the teacher's only where they are not known."""
    model, done = decoder.model, 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(done, len(VIEWS) * len(prompts))

    def completed(asked: Sequence[Prompt]) -> list[Completion]:
        texts = complete(
            model.get_base_model(),
            [prompt.tokens for prompt in asked],
            max_new_tokens=max_new_tokens,
            batch_size=config.eval_batch_size,
            pad_token_id=pad,
            progress=advance,
        )
        said = [(prompt.followed_by(text), text) for prompt, text in zip(asked, texts, strict=True)]
        likelihoods = iter(row_nll(decoder, [row for row, text in said if text], config, pad))
        return [_judged(tokens, next(likelihoods) if tokens else None, tokenizer) for _, tokens in said]

    model.eval()
    unknown = [prompt for prompt in prompts if prompt.tokens not in teacher_said]
    advance(len(prompts) - len(unknown))
    with model.disable_adapter():
        of_teacher = completed(unknown)
    teacher_said.update((prompt.tokens, said) for prompt, said in zip(unknown, of_teacher, strict=True))
    return {"teacher": [teacher_said[prompt.tokens] for prompt in prompts], "student": completed(prompts)}


def _judged(tokens: tuple[int, ...], likelihood: RowNLL | None, tokenizer: PreTrainedTokenizerBase) -> Completion:
    """A completion with what is measured of it; `likelihood` None of an empty one."""
    perplexity = math.exp(min(likelihood.teacher / likelihood.predictions, 700.0)) if likelihood else math.nan
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(text, tokens, text_metrics.refuses(text), perplexity, text_metrics.repetition(tokens))


def _by_kind(
    kinds: dict[str, list[Prompt]], completed: dict[View, list[Completion]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The rates of each kind of prompt, and a line for each prompt with both models' completions."""
    rates, lines, start = {}, [], 0
    for kind, asked in kinds.items():
        answers = {view: completed[view][start : start + len(asked)] for view in VIEWS}
        start += len(asked)
        rates[kind] = _rates(answers)
        for prompt, teacher, student in zip(asked, answers["teacher"], answers["student"], strict=True):
            asks = {"kind": kind, "source": prompt.source, "prompt": tokenizer.decode(prompt.tokens)}
            lines.append(asks | {"teacher": teacher.record(), "student": student.record()})
    return rates, lines


def _rates(answers: dict[View, list[Completion]]) -> dict[str, Any]:
    """The measures of one kind of prompt."""
    pairs = list(zip(answers["teacher"], answers["student"], strict=True))

    def each(of: Callable[[Completion], float]) -> dict[str, float]:
        return {view: statistics.fmean(map(of, answers[view])) for view in VIEWS}

    spoken = {view: [math.log(a.perplexity) for a in answers[view] if a.tokens] for view in VIEWS}
    return {
        "prompts": len(pairs),
        "refusal_rate": each(lambda answer: answer.refused),
        "gibberish_rate": each(lambda answer: answer.gibberish),
        "complied_rate": each(lambda answer: answer.complied),
        "perplexity": {view: math.exp(statistics.fmean(logs)) if logs else None for view, logs in spoken.items()},
        "repetition": each(lambda answer: answer.repetition),
        "tokens": each(lambda answer: len(answer.tokens)),
        "empty_rate": each(lambda answer: not answer.tokens),
        "unchanged_rate": statistics.fmean(teacher.tokens == student.tokens for teacher, student in pairs),
    }
