"""Files to rows: both sides as tokens, and the held-out split."""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbtrain.config import CircuitBreakerConfig, InputError, flag
from cbtrain.render import ChatTemplate
from cbtrain.rows import SIDES, Side, SideRows, load_rows
from cbtrain.tokens import TokenRow, tokenize, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SideCounts:
    """What became of a side's files."""

    files: int
    rows: int
    """Rows of this side in its files, the dropped ones included."""
    left_out: int
    """Labelled rows of neither side (attack resisted)."""
    other_side: int
    """Labelled rows of the other side in this side's files."""
    truncated: int
    dropped_unscored: int
    scored_tokens: int
    """In training and held-out rows together."""


@dataclass(frozen=True)
class SideData:
    train: list[TokenRow]
    held_out: list[TokenRow]
    counts: SideCounts


@dataclass(frozen=True)
class CircuitBreakerData:
    harmful: SideData
    benign: SideData

    def describe(self) -> list[str]:
        """Lines for the screen: the split, the scored tokens, and whatever was cut, left out or dropped."""
        pair = (self.harmful, self.benign)
        split = [f"{len(side.train):,} train / {len(side.held_out):,} held out" for side in pair]
        numbers = [
            ("scored tokens", [side.counts.scored_tokens for side in pair]),
            ("truncated rows", [side.counts.truncated for side in pair]),
        ]
        losses = [
            ("left out, attack resisted", [side.counts.left_out for side in pair]),
            ("dropped, no scored token", [side.counts.dropped_unscored for side in pair]),
        ]
        lines = [f"harmful {split[0]} · benign {split[1]}"]
        for group in (numbers, losses):
            lines.append(" · ".join(f"{what} {a:,} / {b:,}" for what, (a, b) in group if a or b))
        return [line for line in lines if line]


def load_data(config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase") -> CircuitBreakerData:
    """Read, tokenise, truncate and split both sides as `config` says.

    Raises:
        InputError: bad files or rows (see `cbtrain.rows`), a tokenizer whose chat template is missing or refuses a
            row, a side without a scored token, a side with a single user prompt.
    """
    side_rows = load_rows(config.harmful, config.benign)
    template = ChatTemplate(tokenizer)
    tokens = {side: _token_rows(rows, side, config, template, tokenizer) for side, rows in side_rows.items()}
    held_out = _held_out_prompts({side: rows for side, (rows, _) in tokens.items()}, config.eval_fraction)
    sides = {}
    for side, (rows, truncated) in tokens.items():
        read = side_rows[side]
        counts = SideCounts(
            files=len(read.files),
            rows=len(read.rows),
            left_out=read.left_out,
            other_side=read.other_side,
            truncated=truncated,
            dropped_unscored=len(read.rows) - len(rows),
            scored_tokens=sum(row.scored_tokens for row in rows),
        )
        sides[side] = SideData(
            train=[row for row in rows if row.prompt not in held_out],
            held_out=[row for row in rows if row.prompt in held_out],
            counts=counts,
        )
    return CircuitBreakerData(harmful=sides["harmful"], benign=sides["benign"])


def normalized_prompt(prompt: str) -> str:
    """The prompt as the split compares it: Unicode form, case and white space do not make it another one."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _token_rows(
    side_rows: SideRows,
    side: Side,
    config: CircuitBreakerConfig,
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[TokenRow], int]:
    """The rows of a side that have a scored prediction, and how many of them were truncated."""
    rendered = [(row, template.render(row, config.mask_policy)) for row in side_rows.rows]
    kept = [(row, rendering) for row, rendering in rendered if rendering is not None]
    token_rows: list[TokenRow] = []
    truncated = 0
    tokens = tokenize([rendering for _, rendering in kept], tokenizer)
    for (row, _), (all_ids, all_scored) in zip(kept, tokens, strict=True):
        ids, scored = truncate(all_ids, all_scored, config.max_length, tokenizer.bos_token_id)
        if any(scored[1:]):
            truncated += len(ids) < len(all_ids)
            token_rows.append(TokenRow(tuple(ids), tuple(scored), normalized_prompt(row.prompt), row.source))
    if not token_rows:
        raise _nothing_scored(side_rows, side, config)
    return token_rows, truncated


def _nothing_scored(side_rows: SideRows, side: Side, config: CircuitBreakerConfig) -> InputError:
    last_roles = sorted({row.messages[-1]["role"] for row in side_rows.rows})
    spoken = any(message["role"] == "assistant" for row in side_rows.rows for message in row.messages)
    why = "the assistant turns are empty or answer no user" if spoken else f"the rows end on a {last_roles[0]} turn"
    return InputError(
        f"{flag(side)} {' '.join(side_rows.files)}: 0 of {len(side_rows.rows):,} rows have a scored token under "
        f"{config.mask_policy}; {why}. Try --mask-policy full_sequence"
    )


def _held_out_prompts(sides: dict[Side, list[TokenRow]], eval_fraction: float) -> set[str]:
    """Prompts held out on every side: those whose hash, in [0, 1), lies below `eval_fraction`.

    Where that leaves a side without training or held-out rows, its prompt nearest to the threshold changes place on
    both sides, unless the other side would thereby lose its last one.
    """
    prompts = {side: {row.prompt for row in rows} for side, rows in sides.items()}
    for side in SIDES:
        if len(prompts[side]) < 2:
            raise InputError(
                f"{flag(side)}: all {len(sides[side]):,} scored rows have the same user prompt; training and held-out "
                "rows need a prompt each, so give at least two"
            )
    distance = {prompt: _unit_hash(prompt) - eval_fraction for side in SIDES for prompt in prompts[side]}
    held_out = {prompt for prompt in distance if distance[prompt] < 0}
    for side in SIDES:
        own = prompts[side]
        if own & held_out and own - held_out:
            continue
        parts = [part for s in SIDES for part in (prompts[s] & held_out, prompts[s] - held_out)]
        lone = {prompt for part in parts if len(part) == 1 for prompt in part}
        held_out ^= {min(own - lone, key=lambda prompt: (abs(distance[prompt]), prompt))}
    return held_out


def _unit_hash(text: str) -> float:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
