"""What completions come to: the measures of each kind of prompt, as behaviour.json has them."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbtrain.evaluation.completions import VIEWS, Completion, View
from cbtrain.evaluation.prompts import Prompt


def rates_by_kind(
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
    signs = {view: Counter(sign for a in answers[view] for sign in a.judgement.reasons) for view in VIEWS}
    return {
        "prompts": len(pairs),
        "refusal_rate": each(lambda answer: answer.verdict == "refusal"),
        "degenerate_rate": each(lambda answer: answer.verdict == "degenerate"),
        "complied_rate": each(lambda answer: answer.verdict == "coherent"),
        "degenerate_by": {view: dict(signs[view].most_common()) for view in VIEWS},
        "perplexity": {view: math.exp(statistics.fmean(logs)) if logs else None for view, logs in spoken.items()},
        "repetition": each(lambda answer: answer.generated.repetition),
        "tokens": each(lambda answer: len(answer.tokens)),
        "empty_rate": each(lambda answer: not answer.tokens),
        "unchanged_rate": statistics.fmean(teacher.tokens == student.tokens for teacher, student in pairs),
    }
