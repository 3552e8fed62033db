"""Rows longer than the length, cut so that a question and its answer are left.

The prompt is what stands before the first scored token; the completion is what stands from there to the last one, and
what follows it is cut first. The prompt keeps its end, the completion its beginning. Where both are too long each has
half of the room; what one of them does not need is the other's.

In a row of turns the question is spared, the last user turn of the prompt: an answer without it is an answer to
nothing. So the prompt loses, in this order,

1. what stands before the question, from the start;
2. the texts of the tool results after it;
3. the other turns between question and answer, from the oldest;
4. the question, from its start, and at last the marks that open the answer.

The completion loses the texts of its tool results, which are not scored, and then its end. It loses them for the
question too, where that is longer than half of the room. Of tool results the middle goes, of the longest first, and
the marks around them stay: every call is still followed by a result, a short one stays whole beside a long one, and
all other tokens are those of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cbtrain.data.templates.turns import Turns


@dataclass(frozen=True)
class Lost:
    """What truncation took from a row, in tokens."""

    prompt: int = 0
    completion: int = 0
    """Scored or not."""
    tool_results: int = 0
    """Of both."""
    scored: int = 0
    most_of_prompt: bool = False


def truncate(
    ids: Sequence[int], scored: Sequence[bool], max_length: int, bos_token_id: int | None, turns: Turns | None = None
) -> tuple[Sequence[int], Sequence[bool], Lost]:
    """A row of at most `max_length` (2 or more) tokens, its mask, and what it lost.

    The prompt keeps at least min(its length, max_length // 2) tokens, so never less than one. A row that began with
    `bos_token_id` still does, within the length. Where no `turns` are known, as in rows that were tokenised
    elsewhere, prompt and completion are cut as plain stretches. Where the first token is scored already, as under
    `full_sequence`, there is no prompt, and the row keeps its beginning.
    """
    if len(ids) <= max_length or not any(scored):
        return ids, scored, Lost()
    first, end = scored.index(True), _behind_last(scored, range(len(ids)))
    starts_text = ids[0] == bos_token_id and first > 1 and max_length > 2
    row = _Row(scored, first, int(starts_text), turns or Turns())
    kept = row.kept(end, max_length)
    while (stop := _behind_last(scored, kept)) <= kept[-1]:
        # The cut fell between two scored stretches: what follows the former serves nothing, so its room is shared out.
        kept = row.kept(stop, max_length)
    if starts_text and kept[1] > 1 and ids[kept[1]] == bos_token_id:
        kept = kept[1:]  # some vocabularies start texts and turns with one token: no text has it twice
    return [ids[place] for place in kept], [scored[place] for place in kept], row.lost(kept, end)


@dataclass(frozen=True)
class _Row:
    """A row's places, and the order in which its two parts lose them."""

    scored: Sequence[bool]
    first: int
    """Where the completion begins."""
    fixed: int
    """Places at the start that are never lost."""
    turns: Turns

    def kept(self, end: int, room: int) -> list[int]:
        """The places before `end` that `room` is enough for."""
        if end <= room:
            return list(range(end))
        completion, results = end - self.first, self._results(self.first, end)
        prompt = max(
            max(room // 2, self.fixed + 1),
            room - completion,
            # Tool results of the completion go before the question does, beyond the prompt's half too.
            min(self._question_length(), room - (completion - len(results))),
        )
        prompt = min(prompt, self.first)
        gone = {
            *self._prompt_order()[: self.first - prompt],
            *self._completion_order(results, end)[: completion - (room - prompt)],
        }
        return [place for place in range(end) if place not in gone]

    def lost(self, kept: Sequence[int], end: int) -> Lost:
        """What is missing from the places before `end`."""
        gone = set(range(end)).difference(kept)
        prompt = sum(place < self.first for place in gone)
        return Lost(
            prompt=prompt,
            completion=len(gone) - prompt,
            tool_results=len(gone.intersection(self._results(0, end))),
            scored=sum(self.scored[place] for place in gone),
            most_of_prompt=prompt > self.first / 2,
        )

    def _question_length(self) -> int:
        """What the prompt needs for the question and the marks that open the answer."""
        begin, end, answer = self._landmarks()
        return self.fixed + (end - max(self.fixed, begin)) + (self.first - answer) if end else 0

    def _prompt_order(self) -> list[int]:
        """The places of the prompt, the first to be lost first."""
        begin, end, answer = self._landmarks()
        results = self._results(0, self.first)
        known = set(results)
        turns_between = [place for place in range(end, answer) if place not in known]
        question = range(max(self.fixed, begin), end)
        opening = [place for place in range(max(self.fixed, answer), self.first) if place not in known]
        return [*range(self.fixed, begin), *results, *turns_between, *question, *opening]

    def _landmarks(self) -> tuple[int, int, int]:
        """Where the question begins and ends, and where the answer begins, within the prompt."""
        begin, end = self.turns.question
        return min(begin, self.first), min(end, self.first), min(self.turns.answer, self.first)

    def _completion_order(self, results: Sequence[int], end: int) -> list[int]:
        """The places of the completion, the first to be lost first."""
        known = set(results)
        return [*results, *(place for place in reversed(range(self.first, end)) if place not in known)]

    def _results(self, start: int, stop: int) -> list[int]:
        """The places of tool results from `start` to `stop`, from the middle of the longest outwards."""
        depths = {
            place: min(place - begin, end - 1 - place)
            for begin, end in self.turns.tool_results
            for place in range(max(begin, start), min(end, stop))
            if not self.scored[place]
        }
        return sorted(depths, key=depths.__getitem__, reverse=True)


def _behind_last(scored: Sequence[bool], places: Sequence[int]) -> int:
    """The place behind the last of `places` that is scored."""
    return next(place for place in reversed(places) if scored[place]) + 1
