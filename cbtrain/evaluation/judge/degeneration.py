"""Whether a completion is broken, by what broken text is, measured against what the model before training writes.

Its perplexity under that model does not tell it: a right answer in other words is absurd to a model that is nearly
certain of its own. The words that differ are improbable there and the others are not; in broken text most are. So the
median token is judged, and each other sign against the model's own answers to the same prompt, one greedy and some
sampled: a model that itself goes in circles, answers in another language or never ends is not broken by training.
"""

import itertools
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

REPETITION_ORDER = 4
REPETITION_LIMIT = 0.5
RUN_LIMIT = 4
"""So many times one word in a row is a loop; short texts have too few 4-grams to tell."""
IMPROBABLE_NLL = 3.0
"""Nats of the median token, at least; fluent text lies below 1.5 even where it is not what the model would say."""
IMPROBABLE_MARGIN = 1.5
"""Nats above the most improbable of the model's own answers, whose medians are of tokens drawn at temperature 1."""
NON_WORD_MARGIN = 0.25
"""Share of words above the model's own answers; names and rare words are non-words too."""
NON_WORDS = 3
OTHER_SCRIPT = 0.3
"""Share of letters of scripts that neither the prompt nor the model's own answers use."""
NO_END = 3
"""Times the model's longest answer, without an end: answers to one prompt differ in length by a factor of two."""
LANGUAGE_CERTAINTY = 0.99
LANGUAGE_LETTERS = 60
"""Letters below which a language is not told."""
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_END = tuple(".!?。！？؟।…\"'”’»」』)]}`:;|")


@dataclass(frozen=True)
class Generated:
    """A completion with what is measured of it."""

    text: str
    tokens: tuple[int, ...]
    token_nll: tuple[float, ...]
    """Of each token under the teacher, nats."""
    ended: bool
    """By itself, not by the limit of its length."""
    special_tokens: int = 0
    """Among its tokens: those that mark turns and text, which are no text."""

    @property
    def repetition(self) -> float:
        return repetition(self.tokens)

    @property
    def mean_nll(self) -> float:
        """Nats a token; NaN of an empty one."""
        return statistics.fmean(self.token_nll) if self.token_nll else float("nan")


@dataclass(frozen=True)
class Words:
    """Tells words from strings of word pieces: what the data or the tokenizer's vocabulary has, or two pieces make."""

    known: Collection[str]
    """In lower case."""
    pieces: Callable[[str], int]
    """Tokens that the tokenizer makes of a word in running text."""

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are none."""
        return [word for word in words_of(text) if word.lower() not in self.known and self.pieces(word) > 2]


def reasons(answer: Generated, own: Sequence[Generated], prompt: str, words: Words) -> tuple[str, ...]:
    """What is broken about a completion; empty where nothing is.

    Args:
        answer: to be judged.
        own: other answers of the model before training to the same prompt; at least one.
        prompt: its text.
        words: of the tokenizer and the data.

    Returns:
        Some of `empty`, `repetition`, `improbable`, `special tokens`, `broken characters`, `non-words`,
        `another language`, `cut short`, `no end`.
    """
    if not answer.text.strip():
        return ("empty",)
    signs = {
        "repetition": repetition(answer.tokens) > REPETITION_LIMIT or _longest_run(answer.text) >= RUN_LIMIT,
        "improbable": _improbable(answer, own),
        "special tokens": answer.special_tokens > max((each.special_tokens for each in own), default=0),
        "broken characters": _broken(answer),
        "non-words": _non_words(answer, own, words),
        "another language": _other_script(answer.text, [prompt, *(each.text for each in own)])
        or _other_language(answer.text, [each.text for each in own]),
        "cut short": _cut_short(answer, own),
        "no end": not answer.ended
        and all(each.ended and NO_END * len(each.tokens) <= len(answer.tokens) for each in own),
    }
    return tuple(name for name, shown in signs.items() if shown)


def words_of(text: str) -> list[str]:
    """Its runs of letters."""
    return _WORD.findall(text)


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the completion: 0 where all differ, near 1 where it loops.

    seq-rep-4 of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training". 0 for fewer than 4 tokens.
    """
    starts = range(len(tokens) - REPETITION_ORDER + 1)
    if not starts:
        return 0.0
    return 1 - len({tuple(tokens[start : start + REPETITION_ORDER]) for start in starts}) / len(starts)


def _longest_run(text: str) -> int:
    """How often one word stands in a row, at most."""
    return max((len(list(run)) for _, run in itertools.groupby(words_of(text.lower()))), default=0)


def _improbable(answer: Generated, own: Sequence[Generated]) -> bool:
    of_own = max((statistics.median(each.token_nll) for each in own if each.token_nll), default=0.0)
    return statistics.median(answer.token_nll) > max(IMPROBABLE_NLL, of_own + IMPROBABLE_MARGIN)


def _broken(answer: Generated) -> bool:
    """Replacement, control or unassigned characters; where the limit cut a character in two, its half is none."""
    text = answer.text if answer.ended else answer.text.rstrip("�")
    return any(
        character == "�" or (unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and not character.isspace())
        for character in text
    )


def _non_words(answer: Generated, own: Sequence[Generated], words: Words) -> bool:
    def share(text: str) -> float:
        return len(words.unknown(text)) / max(len(words_of(text)), 1)

    of_own = max((share(each.text) for each in own), default=0.0)
    return len(words.unknown(answer.text)) >= NON_WORDS and share(answer.text) > of_own + NON_WORD_MARGIN


def _other_script(text: str, usual: Sequence[str]) -> bool:
    here, there = _scripts(text), [_scripts(each) for each in usual]
    known = {script for scripts in there for script, number in scripts.items() if number >= 0.05 * scripts.total()}
    strange = sum(number for script, number in here.items() if script not in known)
    return bool(known) and strange > OTHER_SCRIPT * here.total()


def _scripts(text: str) -> Counter[str]:
    """Letters by script, the first word of their Unicode names; Japanese is written in three."""
    names = (unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha())
    return Counter("CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC") else name for name in names)


def _other_language(text: str, own: Sequence[str]) -> bool:
    """Whether a text is surely in a language that all of the model's own answers are surely not in."""
    here = _language(text)
    there = [_language(each) for each in own]
    return bool(here) and bool(there) and all(language and language != here for language in there)


def _language(text: str) -> str:
    """Code of a text's language, after Lui and Baldwin 2012, "langid.py"; empty where it is too short or not sure."""
    letters = " ".join(words_of(text))
    if len(letters) < LANGUAGE_LETTERS:
        return ""
    language, certainty = _identifier().classify(letters)
    return str(language) if certainty >= LANGUAGE_CERTAINTY else ""


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _cut_short(answer: Generated, own: Sequence[Generated]) -> bool:
    """It ends by itself, in half the length of the model's shortest, and not as a sentence does where theirs do."""
    if not answer.ended or 2 * len(answer.tokens) >= min((len(each.tokens) for each in own), default=0):
        return False
    ends = [each.text.rstrip().endswith(_SENTENCE_END) for each in own if each.ended]
    return not answer.text.rstrip().endswith(_SENTENCE_END) or (bool(ends) and not any(ends))
