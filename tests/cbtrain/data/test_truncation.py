"""Which tokens of a long row are left: by hand, and for any row."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtrain.data.templates.turns import Turns
from cbtrain.data.truncation import Lost, truncate

START_OF_TEXT = 100


def marked(length: int, first: int, last: int) -> tuple[list[int], list[bool]]:
    """Ids that name their places, from 100 on, scored from `first` to `last`."""
    return list(range(100, 100 + length)), [first <= i <= last for i in range(length)]


def drawn(text: str) -> tuple[list[int], list[bool], Turns]:
    """A row drawn as characters, one a token, with its turns.

    h stands before the question, q in it, digits in tool results, a in assistant turns, dots are marks; A is scored.
    """
    question = (text.index("q"), text.rindex("q") + 1)
    results = tuple(match.span() for match in re.finditer("[0-9]+", text) if match.start() > question[0])
    scored = [character == "A" for character in text]
    return list(range(len(text))), scored, Turns(question, text.index("A") - 1, results)


def left(text: str, max_length: int, known: bool = True) -> str:
    """What truncation leaves of a drawn row, whose turns are known or not."""
    ids, scored, turns = drawn(text)
    kept, mask, _ = truncate(ids, scored, max_length, None, turns if known else None)
    assert mask == [scored[place] for place in kept]
    return "".join(text[place] for place in kept)


def test_a_long_prompt_keeps_its_end_and_the_start_of_text():
    ids, scored = marked(20, 15, 18)
    assert truncate(ids, scored, 8, None)[0] == list(range(111, 119))
    cut, kept, lost = truncate(ids, scored, 8, START_OF_TEXT)
    assert cut == [100, *range(112, 119)]
    assert kept == [False] * 4 + [True] * 4
    assert lost == Lost(prompt=11, most_of_prompt=True)


def test_a_long_completion_keeps_its_beginning_and_the_prompt_is_whole():
    ids, scored = marked(20, 3, 19)
    cut, kept, lost = truncate(ids, scored, 8, None)
    assert (cut, kept) == (ids[:8], [False] * 3 + [True] * 5)
    assert lost == Lost(completion=12, scored=12)


def test_where_both_are_long_each_has_half_of_the_room():
    ids, scored = marked(40, 20, 39)
    assert truncate(ids, scored, 8, None)[0] == [*range(116, 120), *range(120, 124)]
    cut, _, lost = truncate(ids, scored, 8, START_OF_TEXT)
    assert cut == [100, *range(117, 120), *range(120, 124)]
    assert lost == Lost(prompt=16, completion=16, scored=16, most_of_prompt=True)


def test_what_follows_the_last_scored_token_goes_first_and_is_no_loss():
    ids, scored = marked(20, 4, 7)
    assert truncate(ids, scored, 8, None) == (ids[:8], scored[:8], Lost())


@pytest.mark.parametrize("first", [0, 1])
def test_a_row_without_a_prompt_keeps_its_beginning(first):
    ids, scored = marked(20, first, 19)
    cut, _, lost = truncate(ids, scored, 8, START_OF_TEXT)
    assert cut == ids[:8]
    assert lost == Lost(completion=12, scored=12)


def test_the_shortest_rows_keep_a_token_to_predict_from():
    ids, scored = marked(20, 10, 19)
    assert truncate(ids, scored, 2, START_OF_TEXT)[0] == [109, 110]
    assert truncate(ids, scored, 3, START_OF_TEXT)[0] == [100, 109, 110]


def test_a_vocabulary_that_starts_texts_and_turns_alike_gives_one_start():
    ids, scored = [7, 1, 2, 7, 3, 4, 5, 6], [False] * 5 + [True] * 3
    assert truncate(ids, scored, 6, 7)[0] == [7, 3, 4, 5, 6]


AGENT = "hhhhqqqq.aa.0123.aa.0123456789..AAAA"
"""The last assistant turn is scored."""
SCORED_AGENT = "hhqqqq.AA.0123.AA.0123456789.AAAA"
"""All assistant turns are."""


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (36, AGENT),
        (33, "hqqqq.aa.0123.aa.0123456789..AAAA"),
        (32, "qqqq.aa.0123.aa.0123456789..AAAA"),
        (27, "qqqq.aa.0123.aa.01789..AAAA"),  # of the longer result the middle
        (22, "qqqq.aa.03.aa.09..AAAA"),  # until both are as long
        (18, "qqqq.aa..aa...AAAA"),
        (15, "qqqq..aa...AAAA"),
        (9, "qqqq.AAAA"),
        (7, "qq.AAAA"),
        (4, "q.AA"),
    ],
)
def test_a_prompt_loses_its_start_then_tool_results_then_other_turns_and_the_question_last(room, expected):
    assert left(AGENT, room) == expected


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (33, SCORED_AGENT),
        (28, "hhqqqq.AA.0123.AA.01789.AAAA"),
        (23, "hhqqqq.AA.03.AA.09.AAAA"),
        (19, "hhqqqq.AA..AA..AAAA"),
        (17, "hhqqqq.AA..AA..AA"),
        (15, "hhqqqq.AA.03.AA"),  # the last turn is out, and its room goes to what the others rest on
        (11, "qqqq.AA..AA"),
        (8, "hqqqq.AA"),
        (4, "q.AA"),
    ],
)
def test_a_completion_of_several_turns_loses_tool_results_and_then_its_end(room, expected):
    assert left(SCORED_AGENT, room) == expected


def test_tool_results_between_scored_turns_go_before_a_question_longer_than_half_the_room():
    assert left("hhqqqqqqqqqqqq.AA.0123456789.AA", 20) == "qqqqqqqqqqqq.AA.9.AA"


def test_without_known_turns_the_prompt_is_a_plain_stretch():
    assert left(AGENT, 18, known=False) == AGENT[-18:]
    assert left(SCORED_AGENT, 16, known=False) == "hhqqqq.AA.0123.A"


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[bool], Turns | None]:
    """The mask of a row, and its turns where they are known: question, results and answers in any lengths."""
    lengths = st.integers(0, 8)
    begin = draw(lengths)
    scored = [False] * (begin + draw(st.integers(1, 12)))
    question, results, answer = (begin, len(scored)), [], None
    for is_result in draw(st.lists(st.booleans(), max_size=6)):
        start, length = len(scored) + draw(st.integers(0, 2)), draw(lengths)
        scored += [False] * (start - len(scored))
        if is_result:
            results += [(start, start + length)] if length else []
        scored += [not is_result and draw(st.booleans())] * length
    answer = scored.index(True) if any(scored) else None
    if answer is None:
        answer = len(scored)
        scored += [True] * draw(st.integers(1, 12))
    turns = Turns(question, draw(st.integers(question[1], answer)), tuple(results))
    return scored + [False] * draw(st.integers(0, 2)), draw(st.sampled_from([turns, None]))


@settings(max_examples=500)
@given(row=rows(), max_length=st.integers(2, 40), starts_text=st.booleans())
def test_what_holds_for_every_row(row, max_length, starts_text):
    scored, turns = row
    ids = list(range(100, 100 + len(scored)))
    cut, kept, lost = truncate(ids, scored, max_length, START_OF_TEXT if starts_text else None, turns)
    places = [token - 100 for token in cut]
    first, end = scored.index(True), len(scored) - scored[::-1].index(True)
    if len(scored) <= max_length:
        assert (cut, kept, lost) == (ids, scored, Lost())
        return
    assert len(cut) <= max_length
    assert places == sorted(set(places)), "the tokens of the row, in their order"
    assert kept == [scored[place] for place in places]
    assert len(cut) == max_length or places == list(range(len(cut))), "room is left only where nothing was cut before"
    prompt = [place for place in places if place < first]
    assert len(prompt) >= min(first, max_length // 2)
    assert prompt or first == 0
    assert any(kept)
    assert not starts_text or max_length < 3 or cut[0] == START_OF_TEXT
    said = [place for place in places if scored[place]]
    assert said == [place for place in range(len(scored)) if scored[place]][: len(said)], "the first scored tokens"
    assert lost.prompt == first - len(prompt)
    assert lost.completion == end - first - (len(cut) - len(prompt))
    assert lost.scored == sum(scored) - len(said)
    if turns is None:
        assert places[1:] == list(range(places[1], places[-1] + 1)), "one stretch, but for the start of text"
        return
    begin, behind = turns.question
    results = {place for start, stop in turns.tool_results for place in range(start, stop)}
    if not set(range(max(1, begin), behind)) <= set(places):
        assert results.isdisjoint(places), "tool results go before the question"
        assert set(range(1, begin)).isdisjoint(places), "and what stands before it"
