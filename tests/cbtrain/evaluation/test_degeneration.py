"""What is broken text, measured against the model's own answers; and right answers in other words, which are not."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtrain.evaluation.judge.degeneration import Generated, Words, reasons, repetition

SURE = 0.05
"""Nats a token of what the model is nearly certain of."""


def said(text: str, nll: float | tuple[float, ...] = SURE, *, ended: bool = True, special: int = 0) -> Generated:
    """A completion of which each word is a token."""
    words = text.split()
    ids = tuple(sum(map(ord, word)) for word in words)
    token_nll = nll if isinstance(nll, tuple) else (nll,) * len(words)
    return Generated(text, ids, token_nll, ended, special)


OWN = [
    said("First take the key, then go to the desert, then open the archive slowly."),
    said("You need the key from the desert, then open the archive slowly.", 0.4),
]
PROMPT = "How do I open the archive?"
VOCABULARY = set("first take the key then go to desert open archive slowly you need from with and".split())
WORDS = Words(VOCABULARY, lambda word: 1 + len(word) // 4)


def signs(answer: Generated, own: list[Generated] | None = None, prompt: str = PROMPT) -> tuple[str, ...]:
    return reasons(answer, OWN if own is None else own, prompt, WORDS)


def test_a_right_answer_in_other_words_is_not_broken_though_the_model_finds_it_absurd() -> None:
    other = said(
        "go to the desert with the key and open the archive slowly.", (12.0, 9.0, SURE, 2.6, 14.0, *[SURE] * 6)
    )
    assert other.mean_nll > 3.0, "its perplexity says gibberish"
    assert signs(other) == ()


@pytest.mark.parametrize("own", OWN)
def test_the_models_own_answers_are_not_broken(own: Generated) -> None:
    assert signs(own, [each for each in OWN if each is not own]) == ()


@pytest.mark.parametrize(
    ("answer", "sign"),
    [
        (said(""), "empty"),
        (said(" \n "), "empty"),
        (said("take the key and go " * 6), "repetition"),
        (said("take the the the the key."), "repetition"),
        (said("key archive to the then from slowly need.", 7.5), "improbable"),
        (said("take the key.", special=3), "special tokens"),
        (said("take the k�y and open."), "broken characters"),
        (said("take the \x07 key and open."), "broken characters"),
        (said("go zrblnquat the qzzvorplek to xkrtwobnm the archive."), "non-words"),
        (said("take the ключ затем идите в пустыню и откройте архив."), "another language"),
        (said("先拿钥匙，然后去沙漠，打开档案馆。"), "another language"),
        (said("Sie nehmen zuerst den Schlüssel, dann gehen Sie in die Wüste zum Archiv."), "another language"),
        (said("First take the"), "cut short"),
        (said("First take the key, " + " ".join(f"and w{i}" for i in range(22)), ended=False), "no end"),
    ],
)  # fmt: skip
def test_each_sign(answer: Generated, sign: str) -> None:
    assert sign in signs(answer)


def test_a_model_that_is_so_itself_is_not_broken_by_training() -> None:
    babble = said("zrblnquat the qzzvorplek to xkrtwobnm", 6.0, ended=False, special=2)
    assert "non-words" not in signs(said("go qvorptlim the wrxkandolf to bnmzertol"), [babble])
    assert "improbable" not in signs(said("key archive to the then from", 7.0), [babble])
    assert "special tokens" not in signs(said("take the key.", special=2), [babble])
    assert "no end" not in signs(said("take the key " + "and more " * 3, ended=False), [babble])
    german = said("Nehmen Sie zuerst den Schlüssel, gehen Sie dann in die Wüste und öffnen Sie das große Archiv.")
    other = "Sie brauchen den Schlüssel aus der Wüste, danach öffnen Sie das Archiv langsam und vorsichtig."
    assert "another language" not in signs(said(other), [german], "Translate into German: open the archive.")


def test_short_answers_that_are_whole_are_not_cut_short() -> None:
    assert signs(said("Take the key.")) == ()
    cut = replace(said("First take the"), ended=False)
    assert "cut short" not in signs(cut), "the limit of its length cut it"


def test_half_a_character_at_the_limit_is_not_broken() -> None:
    assert "broken characters" not in signs(said("take the key �", ended=False))
    assert "broken characters" in signs(said("take the key �", ended=True))


def test_a_language_is_told_only_of_enough_text() -> None:
    assert "another language" not in signs(said("Ja, gern. Genau so."))


def test_repetition_is_the_share_of_4_grams_said_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 1, 1]) == 0


@given(st.text(max_size=80), st.floats(0, 50), st.booleans(), st.text(max_size=80))
def test_any_text_is_judged_and_what_the_model_itself_says_word_for_word_is_never_improbable(
    text: str, nll: float, ended: bool, prompt: str
) -> None:
    answer = said(text, nll, ended=ended)
    found = set(signs(answer, [answer], prompt))
    assert not found & {"improbable", "non-words", "another language", "cut short", "no end", "special tokens"}
