"""Files to rows: both sides as tokens, and the held-out split."""

from collections import Counter
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from cbtrain.config import CircuitBreakerConfig, InputError, MaskPolicy, flag
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.formats.conversations import Choices
from cbtrain.data.formats.pretokenized import TokenisedRow
from cbtrain.data.formats.rows import Row, Side, SideRows, load_rows
from cbtrain.data.loss_mask import is_agent_row, policy_of, scored_turns
from cbtrain.data.split import held_out_prompts, normalized_prompt, tokenised_prompt
from cbtrain.data.templates.chat_template import ChatTemplate, Rendering
from cbtrain.data.templates.parts import scored_parts
from cbtrain.data.templates.spans import without_thoughts
from cbtrain.data.templates.turns import Turns, find_turns
from cbtrain.data.tokenization import TokenRow, tokenize, turns_in_tokens
from cbtrain.data.truncation import Lost, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DROPPED = "thoughts dropped"
PARTS_OF = 100
"""Rows of a side of which it is told how much of each part is scored, evenly spread: each of their turns is rendered
again."""


def load_data(config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase") -> CircuitBreakerData:
    """Read, tokenise, truncate and split both sides as `config` says.

    Raises:
        InputError: bad files or rows (see `formats/rows.py`), a tokenizer whose chat template is missing or refuses a
            row, a mask policy that does not fit the rows, a side without a scored token, one with a single prompt.
    """
    choices = Choices(config.preference, config.refusals_as_benign)
    side_rows = load_rows(config.harmful, config.benign, choices)
    for rows in side_rows.values():
        _check_policy(rows, config, len(tokenizer))
    made = {side: _Tokenised(rows, side, config, tokenizer) for side, rows in side_rows.items()}
    held_out = held_out_prompts({side: tokenised.rows for side, tokenised in made.items()}, config.eval_fraction)
    sides = {
        side: SideData(
            train=[row for row in tokenised.rows if row.prompt not in held_out],
            held_out=[row for row in tokenised.rows if row.prompt in held_out],
            counts=tokenised.counts(side_rows[side]),
            remarks=tuple(side_rows[side].remarks),
        )
        for side, tokenised in made.items()
    }
    return CircuitBreakerData(harmful=sides["harmful"], benign=sides["benign"], mask_policy=config.mask_policy)


def _check_policy(side_rows: SideRows, config: CircuitBreakerConfig, vocabulary: int) -> None:
    """Refuse rows that have not what the mask policy needs, or ids that the tokenizer does not know."""
    policy = f"{flag('mask_policy')} {config.mask_policy}"
    for row in side_rows.rows:
        if isinstance(row, Row):
            if config.mask_policy == "given":
                raise InputError(
                    f"{policy}: {row.source} is text and comes with no mask; name completion_only, assistant_only, "
                    "tool_calls_only or full_sequence"
                )
            continue
        if config.mask_policy not in ("auto", "given", "full_sequence"):
            raise InputError(
                f"{policy}: {row.source} is tokenised already, so its turns are not known; "
                f"{flag('mask_policy')} given takes the mask that came with it, full_sequence scores every token"
            )
        if config.mask_policy != "full_sequence" and row.given is None:
            raise InputError(
                f"{policy}: {row.source} comes with no mask; give the file that holds its loss_mask beside it, or "
                f"{flag('mask_policy')} full_sequence"
            )
        if max(row.input_ids) >= vocabulary:
            raise InputError(
                f"{row.source}: token id {max(row.input_ids):,} is not in the tokenizer's vocabulary of "
                f"{vocabulary:,}; the row was made for another model, whose tokenizer --model or --tokenizer must name"
            )


class _Whole(NamedTuple):
    """A row before it is cut to its length."""

    ids: list[int]
    scored: list[bool]
    prompt: str
    turns: Turns | None


class _Tokenised:
    """The rows of one side that have a scored prediction, in the order of the files, and what happened to them."""

    def __init__(
        self, side_rows: SideRows, side: Side, config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self.rows: list[TokenRow] = []
        self.truncated = self.agent_rows = self.calls = self.calls_scored = 0
        self.lost: list[Lost] = []
        self.rewritten: Counter[str] = Counter()
        self.parts: Counter[tuple[str, bool]] = Counter()
        self._config, self._tokenizer = config, tokenizer
        text = [(index, row) for index, row in enumerate(side_rows.rows) if isinstance(row, Row)]
        ready = self._from_text(text) | self._from_tokens(side_rows)
        self.first_dropped = ""
        for index, row in enumerate(side_rows.rows):
            if index not in ready or not self._add(ready[index], row.source):
                self.first_dropped = self.first_dropped or row.source
        if not self.rows:
            raise _nothing_scored(side_rows, side, config)

    def counts(self, side_rows: SideRows) -> SideCounts:
        return SideCounts(
            files=len(side_rows.files),
            rows=len(side_rows.rows),
            left_out=side_rows.left_out.total(),
            other_side=side_rows.other_side,
            truncated=self.truncated,
            dropped_unscored=len(side_rows.rows) - len(self.rows),
            scored_tokens=sum(row.scored_tokens for row in self.rows),
            tokens=sum(len(row.input_ids) for row in self.rows),
            cut_short=sum(lost.scored > 0 for lost in self.lost),
            prompts_cut=sum(lost.prompt > 0 for lost in self.lost),
            prompt_tokens_cut=sum(lost.prompt for lost in self.lost),
            prompts_mostly_cut=sum(lost.most_of_prompt for lost in self.lost),
            completions_cut=sum(lost.completion > 0 for lost in self.lost),
            completion_tokens_cut=sum(lost.completion for lost in self.lost),
            tool_result_tokens_cut=sum(lost.tool_results for lost in self.lost),
            first_dropped=self.first_dropped,
            unknown=self._unknown(),
            duplicates=len(self.rows) - len({(row.input_ids, row.scored) for row in self.rows}),
            unread={file: tuple(sorted(names)) for file, names in side_rows.unread.items() if names},
            agent_rows=self.agent_rows,
            calls=self.calls,
            calls_scored=self.calls_scored,
            left_out_because=dict(side_rows.left_out),
            parts={part: (self.parts[part, True], self.parts[part, False]) for part, _ in self.parts},
            rewritten=dict(self.rewritten),
            shapes={file: dict(shapes) for file, shapes in side_rows.shapes.items()},
        )

    def _from_text(self, rows: list[tuple[int, Row]]) -> dict[int, _Whole]:
        if not rows:
            return {}
        template = ChatTemplate(self._tokenizer, date.fromisoformat(self._config.template_date))
        if self._config.thoughts == "drop":
            dropped = [(index, row, replace(row, messages=without_thoughts(row.messages))) for index, row in rows]
            if changed := sum(now != was for _, was, now in dropped):
                self.rewritten[DROPPED] = changed
            rows = [(index, now) for index, _, now in dropped]
        policies = {index: policy_of(row.messages, self._config.mask_policy) for index, row in rows}
        for index, row in rows:
            self._count_calls(row, policies[index])
        rendered = [(index, row, template.render(row, policies[index])) for index, row in rows]
        kept = [(index, row, rendering) for index, row, rendering in rendered if rendering is not None]
        self.rewritten.update(change for *_, rendering in kept for change in rendering.rewritten)
        for i in range(min(len(kept), PARTS_OF)):
            self.parts += scored_parts(kept[i * len(kept) // min(len(kept), PARTS_OF)][2], template)
        tokens = tokenize([rendering for *_, rendering in kept], self._tokenizer)
        return {
            index: _Whole(ids, scored, normalized_prompt(row.prompt), self._turns(rendering, ids, template))
            for (index, row, rendering), (ids, scored) in zip(kept, tokens, strict=True)
        }

    def _count_calls(self, row: Row, policy: MaskPolicy) -> None:
        calls = [len(message.get("tool_calls", ())) for message in row.messages]
        scored = range(len(calls)) if policy == "full_sequence" else scored_turns(row.messages, policy)
        self.agent_rows += is_agent_row(row.messages)
        self.calls += sum(calls)
        self.calls_scored += sum(calls[turn] for turn in scored)

    def _turns(self, rendering: Rendering, ids: list[int], template: ChatTemplate) -> Turns | None:
        """Where the turns stand in a row that is to be cut; others are spared the search."""
        if len(ids) <= self._config.max_length:
            return None
        return turns_in_tokens(find_turns(rendering, template), rendering, ids, self._tokenizer)

    def _from_tokens(self, side_rows: SideRows) -> dict[int, _Whole]:
        ready = {}
        for index, row in enumerate(side_rows.rows):
            if isinstance(row, TokenisedRow):
                every = [True] * len(row.input_ids)
                scored = every if self._config.mask_policy == "full_sequence" else list(row.given or ())
                prompt = tokenised_prompt(row.input_ids, row.given, self._special_ids)
                ready[index] = _Whole(list(row.input_ids), scored, prompt, turns=None)
        return ready

    def _unknown(self) -> int:
        unknown, known = self._tokenizer.unk_token_id, self._tokenizer
        if unknown is None or unknown in (known.eos_token_id, known.bos_token_id, known.pad_token_id):
            return 0  # where one stands for several, nothing can be told
        return sum(
            token == unknown
            for row in self.rows
            if unknown in row.input_ids  # hardly any, and every trial reads all rows
            for token, scored in zip(row.input_ids, row.scored, strict=True)
            if scored
        )

    @cached_property
    def _special_ids(self) -> set[int]:
        return set(self._tokenizer.all_special_ids)

    def _add(self, row: _Whole, source: str) -> bool:
        """Keep a row, cut to its length, if there is something to predict in it."""
        length, start_of_text = self._config.max_length, self._tokenizer.bos_token_id
        ids, scored, lost = truncate(row.ids, row.scored, length, start_of_text, row.turns)
        if not any(scored[1:]):
            return False
        self.truncated += len(ids) < len(row.ids)
        self.lost.append(lost)
        self.rows.append(TokenRow(tuple(ids), tuple(scored), row.prompt, source))
        return True


def _nothing_scored(side_rows: SideRows, side: Side, config: CircuitBreakerConfig) -> InputError:
    """What to say of a side without a scored token."""
    chats = [row.messages for row in side_rows.rows if isinstance(row, Row)]
    instead = "full_sequence"
    if len(chats) < len(side_rows.rows):
        why = "the masks that came with them are 0"
    elif not any(message["role"] == "assistant" for messages in chats for message in messages):
        why = f"the rows end on a {min(messages[-1]['role'] for messages in chats)} turn"
    elif config.mask_policy == "tool_calls_only":
        why, instead = "no assistant turn calls a tool", "assistant_only"
    else:
        why = "the assistant turns are empty or answer no user"
    policies = {policy_of(messages, config.mask_policy) for messages in chats} or {config.mask_policy}
    return InputError(
        f"{flag(side)} {' '.join(side_rows.files)}: 0 of {len(side_rows.rows):,} rows have a scored token under "
        f"{' and '.join(sorted(policies))}; {why}. Try {flag('mask_policy')} {instead}"
    )
