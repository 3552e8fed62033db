"""What looks wrong with tokenised data: mistakes that nothing else would tell, as every loss stays finite."""

from collections.abc import Iterator
from statistics import median

from cbtrain.config import flag
from cbtrain.data.dataset import CircuitBreakerData, SideData
from cbtrain.data.formats.rows import SIDES, Side
from cbtrain.data.tokenization import TokenRow

FEW_SCORED = 4
"""Scored tokens a row, in the median, below which a mask has probably missed the answer."""
MANY_TRUNCATED, MANY_CUT_SHORT, MANY_PROMPTS_CUT = 0.2, 0.05, 0.1
MANY_DUPLICATES, MANY_DROPPED, MANY_UNKNOWN = 0.1, 0.2, 0.01
MANY_CALLS_UNSCORED = 0.5
"""Shares of a side's rows above which they are worth a word."""


def description(data: CircuitBreakerData) -> list[str]:
    """Lines for the screen: the split, the scored tokens, what was cut, left out or dropped, and what is odd."""
    pair = (data.harmful, data.benign)
    split = [f"{len(side.train):,} train / {len(side.held_out):,} held out" for side in pair]
    numbers = [("scored tokens", [side.counts.scored_tokens for side in pair])]
    cuts = [
        ("truncated rows", [side.counts.truncated for side in pair]),
        ("prompts cut", [side.counts.prompts_cut for side in pair]),
        ("completions cut", [side.counts.completions_cut for side in pair]),
    ]
    reasons = dict.fromkeys(reason for side in pair for reason in side.counts.left_out_because)
    losses = [
        (f"left out, {reason}", [side.counts.left_out_because.get(reason, 0) for side in pair]) for reason in reasons
    ]
    losses.append(("dropped, no scored token", [side.counts.dropped_unscored for side in pair]))
    lines = [f"harmful {split[0]} · benign {split[1]}"]
    if data.mask_policy == "auto" and any(side.counts.agent_rows for side in pair):
        agents = " / ".join(f"{side.counts.agent_rows:,} of {side.counts.rows:,}" for side in pair)
        lines.append(f"mask policy auto: all assistant turns of agent rows ({agents}), the last turn of the others")
    for group in (numbers, cuts, losses):
        lines.append(" · ".join(f"{what} {a:,} / {b:,}" for what, (a, b) in group if a or b))
    return [line for line in lines if line] + [f"warning: {text}" for text in data_warnings(data)]


def data_warnings(data: CircuitBreakerData) -> list[str]:
    """A sentence for everything that looks wrong, the worst first; nothing for sound data."""
    parts = {"harmful": data.harmful, "benign": data.benign}
    found = list(_between_sides(data))
    for side in SIDES:
        found += _of_side(side, parts[side], chosen=data.mask_policy == "full_sequence")
    return found


def overlapping_prompts(data: CircuitBreakerData) -> int:
    """Prompts that are trained on one side and held out on the same or the other: none, or the split is broken."""
    sides = (data.harmful, data.benign)
    train = {row.prompt for side in sides for row in side.train}
    return len(train & {row.prompt for side in sides for row in side.held_out})


def overlapping_rows(data: CircuitBreakerData) -> int:
    """Held-out rows whose very tokens are in training too, under whatever prompt."""
    sides = (data.harmful, data.benign)
    train = {row.input_ids for side in sides for row in side.train}
    return sum(row.input_ids in train for side in sides for row in side.held_out)


def shared_prompts(data: CircuitBreakerData) -> int:
    """Prompts that both sides have, as runs of one task with and without an attack do."""
    harmful, benign = ({row.prompt for row in side.rows} for side in (data.harmful, data.benign))
    return len(harmful & benign)


def shared_rows(data: CircuitBreakerData) -> list[tuple[TokenRow, TokenRow]]:
    """Harmful rows whose very tokens are a benign row too, each with that one."""
    benign = {row.input_ids: row for row in data.benign.rows}
    return [(row, benign[row.input_ids]) for row in data.harmful.rows if row.input_ids in benign]


def rows_of(count: int) -> str:
    """A number of rows, in words."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _between_sides(data: CircuitBreakerData) -> Iterator[str]:
    if prompts := overlapping_prompts(data):
        yield f"prompts in training that are held out too: {prompts:,}; held-out numbers cannot be trusted"
    if rows := overlapping_rows(data):
        yield (
            f"{rows_of(rows)} held out and, token for token, in training too; remove them, or raise "
            f"{flag('max_length')} where truncation made them alike"
        )
    if pairs := shared_rows(data):
        harmful, benign = pairs[0]
        yield (
            f"{rows_of(len(pairs))} harmful and benign alike, as {harmful.source} and {benign.source}: what is "
            "rerouted is also retained; remove them from one side"
        )


def _of_side(side: Side, data: SideData, chosen: bool) -> Iterator[str]:
    """Of one side; `chosen` is whether every token is meant to be scored."""
    rows = data.rows
    if rows and not chosen and all(all(row.scored) for row in rows):
        yield f"{side}: every token of every row is scored, prompts included; is the mask meant to?"
    if rows and (typical := median(row.scored_tokens for row in rows)) < FEW_SCORED:
        yield f"{side}: {typical:g} scored tokens a row in the median; does the mask miss the answers?"
    yield from (f"{side}: {text}" for text in _shares(data))
    yield from (f"{side}: {remark}" for remark in data.remarks)


def _shares(data: SideData) -> Iterator[str]:
    counts = data.counts
    kept = max(1, counts.rows - counts.dropped_unscored)
    if counts.unknown > MANY_UNKNOWN * counts.scored_tokens:
        share = counts.unknown / counts.scored_tokens
        yield f"{share:.0%} of the scored tokens are unknown to the tokenizer; is it the one for this text?"
    if counts.calls and counts.calls_scored < (1 - MANY_CALLS_UNSCORED) * counts.calls:
        yield (
            f"rows call tools, {counts.calls_scored / counts.calls:.0%} of the calls are scored; "
            f"{flag('mask_policy')} assistant_only scores all of them with what is said, tool_calls_only them alone"
        )
    yield from _cuts(data, kept)
    if counts.duplicates > MANY_DUPLICATES * kept:
        yield f"{counts.duplicates:,} of {kept:,} rows repeat an earlier one; each counts again in every epoch"
    if (dropped := counts.dropped_unscored) > MANY_DROPPED * counts.rows:
        yield f"{dropped:,} of {counts.rows:,} rows are dropped: nothing scored, as {counts.first_dropped}"


def _cuts(data: SideData, kept: int) -> Iterator[str]:
    counts, mend = data.counts, f"raise {flag('max_length')}"
    few_prompts, few_scored = MANY_PROMPTS_CUT * kept, MANY_CUT_SHORT * kept
    if counts.prompts_mostly_cut > few_prompts:
        yield f"{counts.prompts_mostly_cut:,} of {kept:,} rows lost most of their prompt; {mend}"
    if counts.cut_short > few_scored:
        yield f"{counts.cut_short:,} of {kept:,} rows lost scored tokens; {mend}"
    elif counts.prompts_mostly_cut <= few_prompts and counts.truncated > MANY_TRUNCATED * kept:
        yield f"{counts.truncated:,} of {kept:,} rows are truncated, where nothing is scored; {mend}"
