"""What both models make of prompts: greedy completions, measured and judged."""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.tokenization import TokenRow
from cbtrain.evaluation.generation import complete
from cbtrain.evaluation.held_out import row_nll
from cbtrain.evaluation.judge.degeneration import Generated, Words, words_of
from cbtrain.evaluation.judge.judge import JudgeFunction, Judgement, Verdict, judge
from cbtrain.evaluation.prompts import Prompt
from cbtrain.model.partial_forward import Decoder

View = Literal["teacher", "student"]
VIEWS: tuple[View, ...] = ("teacher", "student")
SAMPLES = 2
"""Answers of the teacher to each prompt, drawn at temperature 1, that completions are judged against."""
_SEED = 0


@dataclass(frozen=True)
class Completion:
    """What one of the two models made of a prompt."""

    generated: Generated
    judgement: Judgement

    @property
    def verdict(self) -> Verdict:
        return self.judgement.verdict

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.generated.tokens

    @property
    def perplexity(self) -> float:
        """Under the teacher; NaN where there are no tokens."""
        return math.exp(min(self.generated.mean_nll, 700.0)) if self.tokens else math.nan

    def record(self) -> dict[str, Any]:
        """What `completions.jsonl` says of it."""
        return {
            "text": self.generated.text,
            "tokens": len(self.tokens),
            "verdict": self.verdict,
            "reasons": list(self.judgement.reasons),
            "perplexity": self.perplexity,
            "repetition": self.generated.repetition,
        }


@dataclass(frozen=True)
class Known:
    """The teacher's answers to a prompt."""

    greedy: Completion
    sampled: tuple[Generated, ...]


@dataclass(frozen=True)
class Completer:
    """Completes prompts with a model that has an adapter, and judges what it says."""

    decoder: Decoder
    config: CircuitBreakerConfig
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    max_new_tokens: int
    classifier: JudgeFunction | None
    teacher_said: dict[tuple[int, ...], Known]
    """By prompt; what is not there is generated and kept."""
    progress: Callable[[int], None]
    """Called with the number of completions just made."""

    def completions(self, prompts: Sequence[Prompt], data: Sequence[TokenRow]) -> dict[View, list[Completion]]:
        """Both models' completions of each prompt.

        Args:
            data: rows whose words are words, and whose scored special tokens may be said.
        """
        self.ask_teacher(prompts, data)
        known = [self.teacher_said[prompt.tokens] for prompt in prompts]
        own = [(each.greedy.generated, *each.sampled) for each in known]
        student = self._judged(prompts, self._generated(prompts, self._special(data)), own, self._words(data))
        return {"teacher": [each.greedy for each in known], "student": student}

    def ask_teacher(self, prompts: Sequence[Prompt], data: Sequence[TokenRow]) -> None:
        """Have the teacher's answers to all prompts in `teacher_said`.

        Args:
            data: as for `completions`.
        """
        unknown = [prompt for prompt in prompts if prompt.tokens not in self.teacher_said]
        self.progress((1 + self._samples) * (len(prompts) - len(unknown)))
        if not unknown:
            return
        special, words = self._special(data), self._words(data)
        with self.decoder.model.disable_adapter():
            greedy = self._generated(unknown, special)
            drawn = self._generated([prompt for prompt in unknown for _ in range(self._samples)], special, _SEED)
        sampled = [tuple(drawn[i * self._samples : (i + 1) * self._samples]) for i in range(len(unknown))]
        for prompt, said, completion in zip(
            unknown, sampled, self._judged(unknown, greedy, sampled, words), strict=True
        ):
            self.teacher_said[prompt.tokens] = Known(completion, said)

    def _special(self, data: Sequence[TokenRow]) -> set[int]:
        """Special tokens that no scored text says; a tool call may begin with one."""
        said_in_data = {
            token for row in data for token, scored in zip(row.input_ids, row.scored, strict=True) if scored
        }
        return set(self.tokenizer.all_special_ids) - said_in_data

    @property
    def _samples(self) -> int:
        """A user's classifier needs none."""
        return SAMPLES if self.classifier is None else 0

    def _generated(self, asked: Sequence[Prompt], special: Set[int], seed: int | None = None) -> list[Generated]:
        self.decoder.model.eval()
        texts = complete(
            self.decoder.model.get_base_model(),
            [prompt.tokens for prompt in asked],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.config.eval_batch_size,
            pad_token_id=self.pad_token_id,
            seed=seed,
            progress=self.progress,
        )
        rows = [prompt.followed_by(text) for prompt, text in zip(asked, texts, strict=True) if text]
        likelihoods = iter(row_nll(self.decoder, rows, self.config, self.pad_token_id))
        return [
            Generated(
                text=self.tokenizer.decode(tokens, skip_special_tokens=True),
                tokens=tokens,
                token_nll=next(likelihoods).teacher if tokens else (),
                ended=len(tokens) < self.max_new_tokens,
                special_tokens=sum(token in special for token in tokens),
            )
            for tokens in texts
        ]

    def _judged(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Generated],
        own: Sequence[Sequence[Generated]],
        words: Words,
    ) -> list[Completion]:
        texts = [self.tokenizer.decode(prompt.tokens, skip_special_tokens=True) for prompt in prompts]
        judgements = judge(texts, answers, own, words, self.classifier)
        return [Completion(*pair) for pair in zip(answers, judgements, strict=True)]

    def _words(self, data: Sequence[TokenRow]) -> Words:
        @cache
        def pieces(word: str) -> int:
            return len(self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"])

        known = {word.lower() for row in data for word in words_of(self.tokenizer.decode(row.input_ids))}
        return Words(known, pieces)
