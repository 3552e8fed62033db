"""What a circuit breaker does to generated text: the student beside its teacher, on held-out prompts.

`measure` gives the held-out metrics and, for both models, greedy completions judged as refusal, degenerate or coherent,
and how likely a harmful completion stays once its first tokens are given. One copy of the weights: the teacher is the
student with its adapter off.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.tokenization import TokenRow
from cbtrain.evaluation.completions import SAMPLES, VIEWS, Completer, Known
from cbtrain.evaluation.generation import complete
from cbtrain.evaluation.held_out import evaluate, held_out, row_nll
from cbtrain.evaluation.judge.judge import JudgeFunction, load_classifier
from cbtrain.evaluation.prompts import Prompt, beyond_prefill, from_rows, from_xstest
from cbtrain.evaluation.rates import rates_by_kind
from cbtrain.evaluation.student import adapter, on_device
from cbtrain.model.checks import prepare
from cbtrain.model.loading import load_tokenizer
from cbtrain.model.partial_forward import Decoder
from cbtrain.utils.files import finite_or_none, shown, write_whole

SCHEMA_VERSION = 3
OWN_JUDGE = "cbtrain"
"""What `settings.judge` says where no classifier was given."""
PREFILL_TOKENS = 5
_PROBED_TOKENS = 4
"""Of each of a batch of completions, to tell how long all take."""


def measure(
    config: CircuitBreakerConfig,
    adapter_dir: Path,
    *,
    prompts: int = 16,
    max_new_tokens: int = 64,
    prefill_tokens: int = PREFILL_TOKENS,
    xstest: Sequence[str] = (),
    judge: str = "",
    output_dir: Path | None = None,
    teacher_said: dict[tuple[int, ...], Known] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Any]:
    """Compare a student (base model and adapter) with its teacher (base model alone); in one process, on one device.

    Args:
        config: how it was trained, with `model` and data files that exist on this machine (`model.resolve`).
        adapter_dir: a PEFT adapter directory for that model.
        prompts: at most so many held-out prompts of each kind.
        max_new_tokens: of each completion.
        prefill_tokens: tokens of a harmful completion that are given before the rest is scored, or generated.
        xstest: files of rows with `prompt`, and `label` or `type` where some are unsafe; for over-refusal.
        judge: `module:function` of a user's classifier in place of the judge of this package.
        teacher_said: the teacher's answers by prompt, of earlier calls with the same model, `max_new_tokens` and
            `judge`; those of this call are added.
        output_dir: where `behaviour.json` and `completions.jsonl` are written, when the work is done.
        progress: called with completions done and in all.

    Returns:
        What `behaviour.json` holds: `held_out` (the metrics of `evaluate`), `prefill`, and for each kind of prompt
        (`harmful`, `benign`, `harmful_prefilled`, `xstest_safe`, `xstest_unsafe`) the number of prompts and measures,
        each for `teacher` and `student`: `refusal_rate`, `degenerate_rate` and `complied_rate` (together 1),
        `degenerate_by` (completions by sign), `perplexity` (geometric mean over completions, under the teacher; None
        where all are empty), `repetition`, `tokens` (means), `empty_rate`, and `unchanged_rate` (the student says what
        the teacher says).

    Raises:
        InputError: the adapter, the data or a file does not fit the model, or the classifier fails.
    """
    # Longer than fifty lines for its signature and docstring.
    classifier = load_classifier(judge)
    with _asked(config, adapter_dir, prompts, prefill_tokens, xstest) as asked:
        decoder, data, pad = asked.decoder, asked.data, asked.pad_token_id
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": shown(config.model),
            "settings": {
                "prompts": prompts,
                "max_new_tokens": max_new_tokens,
                "prefill_tokens": prefill_tokens,
                "judge": judge or OWN_JUDGE,
                "xstest_prompts_left_out_in_training": asked.in_training,
            },
            "held_out": evaluate(decoder, held_out(data, config, pad), config),
            "prefill": _prefill(decoder, data, config, pad, prefill_tokens),
        }
        everything = asked.prompts
        counted = _counted(progress, len(everything) * (2 if classifier else 2 + SAMPLES))
        completer = asked.completer(max_new_tokens, classifier, {} if teacher_said is None else teacher_said, counted)
        completed = completer.completions(everything, asked.held_out)
    rates, lines = rates_by_kind(asked.kinds, completed, asked.tokenizer)
    record |= rates
    if output_dir is not None:
        write_whole(output_dir / "completions.jsonl", "".join(json.dumps(finite_or_none(x)) + "\n" for x in lines))
        write_whole(output_dir / "behaviour.json", json.dumps(finite_or_none(record), indent=1) + "\n")
    return finite_or_none(record)


def teacher_answers(
    config: CircuitBreakerConfig,
    adapter_dir: Path,
    *,
    prompts: int,
    max_new_tokens: int,
    judge: str = "",
    known: Collection[tuple[int, ...]] = (),
    part: tuple[int, int] = (0, 1),
) -> dict[tuple[int, ...], Known]:
    """The teacher's answers, for `measure`'s `teacher_said`: processes that each ask for a part share the work.

    Args:
        known: prompts that are not asked again.
        part: (i, n): every n-th of the others, from the i-th on.

    Raises:
        InputError: as `measure`.
    """
    classifier = load_classifier(judge)
    said: dict[tuple[int, ...], Known] = {}
    with _asked(config, adapter_dir, prompts, PREFILL_TOKENS, ()) as asked:
        unknown = [prompt for prompt in asked.prompts if prompt.tokens not in known]
        completer = asked.completer(max_new_tokens, classifier, said, lambda _more: None)
        completer.ask_teacher(unknown[part[0] :: part[1]], asked.held_out)
    return said


def expected_seconds(
    config: CircuitBreakerConfig,
    models: int,
    prompts: int,
    max_new_tokens: int,
    *,
    teacher_known: Collection[tuple[int, ...]] = (),
    processes: int = 1,
) -> float:
    """At most so many seconds to `measure` trained models, told by some tokens of the one before training.

    Args:
        models: how many.
        teacher_known: prompts that the teacher has answered.
        processes: that share the models, and the teacher's prompts.

    Raises:
        InputError: as `measure`.
    """
    data, pad = prepare(config)
    kinds, _ = _prompts(config, data, load_tokenizer(config), prompts, PREFILL_TOKENS, ())
    asked = [prompt.tokens for of_kind in kinds.values() for prompt in of_kind]
    new = min(_PROBED_TOKENS, max_new_tokens)
    base = on_device(config)
    first = sorted(asked, key=len)[-config.eval_batch_size :]
    complete(base, first[:1], max_new_tokens=1, batch_size=1, pad_token_id=pad)  # what is only paid once
    started = time.perf_counter()
    complete(base, first, max_new_tokens=new, batch_size=config.eval_batch_size, pad_token_id=pad)
    batch_s = (time.perf_counter() - started) / new * max_new_tokens
    unknown = sum(tokens not in teacher_known for tokens in asked)
    teacher = (1 + SAMPLES) * unknown / processes
    return batch_s * (math.ceil(models / processes) * len(asked) + teacher) / len(first)


@dataclass(frozen=True)
class _Asked:
    """A student, and the prompts that it and its teacher are asked."""

    config: CircuitBreakerConfig
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    data: CircuitBreakerData
    pad_token_id: int
    kinds: dict[str, list[Prompt]]
    in_training: int
    """XSTest's prompts that were left out as the model was trained on them."""

    @property
    def prompts(self) -> list[Prompt]:
        """Of all kinds, in their order."""
        return [prompt for asked in self.kinds.values() for prompt in asked]

    @property
    def held_out(self) -> list[TokenRow]:
        """Of both sides."""
        return [*self.data.harmful.held_out, *self.data.benign.held_out]

    def completer(
        self,
        max_new_tokens: int,
        classifier: JudgeFunction | None,
        teacher_said: dict[tuple[int, ...], Known],
        progress: Callable[[int], None],
    ) -> Completer:
        """What asks them."""
        return Completer(
            decoder=self.decoder,
            config=self.config,
            tokenizer=self.tokenizer,
            pad_token_id=self.pad_token_id,
            max_new_tokens=max_new_tokens,
            classifier=classifier,
            teacher_said=teacher_said,
            progress=progress,
        )


@contextlib.contextmanager
def _asked(
    config: CircuitBreakerConfig, adapter_dir: Path, limit: int, prefill_tokens: int, xstest: Sequence[str]
) -> Iterator[_Asked]:
    data, pad = prepare(config)
    tokenizer = load_tokenizer(config)
    kinds, in_training = _prompts(config, data, tokenizer, limit, prefill_tokens, xstest)
    with adapter(config, adapter_dir) as model:
        yield _Asked(config, Decoder(model, config.hidden_states), tokenizer, data, pad, kinds, in_training)


def _counted(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A progress that is told of each step, as one that is told of all so far."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    return advance


def _prompts(
    config: CircuitBreakerConfig,
    data: CircuitBreakerData,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    prefill_tokens: int,
    xstest: Sequence[str],
) -> tuple[dict[str, list[Prompt]], int]:
    """The prompts of each kind, and how many of XSTest's were left out as the model was trained on them."""
    turns = data
    if config.mask_policy == "full_sequence":  # where answers begin, the mask of completions tells
        with contextlib.suppress(InputError):  # rows without an answer
            turns, _ = prepare(dataclasses.replace(config, mask_policy="completion_only"))
    harmful, benign = turns.harmful.held_out, turns.benign.held_out
    kinds = {"harmful": from_rows(harmful, limit), "benign": from_rows(benign, limit)}
    if prefilled := from_rows(beyond_prefill(harmful, prefill_tokens) if prefill_tokens else [], limit):
        kinds["harmful_prefilled"] = prefilled
    trained = {row.prompt for side in (data.harmful, data.benign) for row in side.train}
    safe, unsafe, in_training = from_xstest(
        xstest, tokenizer, trained, limit, datetime.date.fromisoformat(config.template_date)
    )
    return kinds | {name: asked for name, asked in (("xstest_safe", safe), ("xstest_unsafe", unsafe)) if asked}, (
        in_training
    )


def _prefill(
    decoder: Decoder, data: CircuitBreakerData, config: CircuitBreakerConfig, pad: int, tokens: int
) -> dict[str, Any]:
    """NLL of harmful completions beyond their first tokens, nats per token; None where all are shorter."""
    rows = beyond_prefill(data.harmful.held_out, tokens)
    likelihoods = row_nll(decoder, rows, config, pad)
    nll = {view: [value for row in likelihoods for value in getattr(row, view)] for view in VIEWS}
    return {"rows": len(rows), "nll": {view: statistics.fmean(nll[view]) if nll[view] else None for view in VIEWS}}
