"""What was understood of the data: counts, overlaps, and rows with their scored tokens marked.

    python -m cbtrain.data --preset llama-3.1-8b-instruct --harmful harmful.jsonl --benign benign.jsonl

Reads the files as training does and needs the tokenizer; the model's weights for `--states` alone. On a terminal scored
tokens are shown in colour, elsewhere between ⟦ and ⟧.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from cbtrain.config import CircuitBreakerConfig, InputError, cli, get_config
from cbtrain.config.help import Help
from cbtrain.data.checks import (
    data_warnings,
    overlapping_prompts,
    overlapping_rows,
    rows_of,
    shared_prompts,
    shared_rows,
)
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.formats.rows import SIDES, Side
from cbtrain.data.formats.shapes import table
from cbtrain.data.html_page import html_page
from cbtrain.data.similarity import near_duplicates, token_overlap
from cbtrain.data.tokenization import TokenRow
from cbtrain.model.auto import derived
from cbtrain.utils.errors import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ENDS = 40
"""Tokens shown at either end of a stretch that is too long to be shown whole."""
_SCORED_STYLE = "bold green"
_WARNS = ": to this layer they are one text, and rerouting one will move the other"


@dataclass(kw_only=True)
class InspectionSettings:
    """Print what is understood of the data, and train nothing."""

    preset: str = "tiny"
    """Where the defaults of all other flags come from; python -m cbtrain.config lists them."""
    shapes: bool = False
    """Print the shapes of rows that are read, with an example of each, and nothing else."""
    html: Path | None = None
    """File to write the first 50 rows of each side to, as a page with the scored tokens marked."""
    states: bool = False
    """Load the model and print how alike the sides' hidden states are at the target layers."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


HELP = Help(
    groups={"What is shown": ("preset", "shapes", "html", "states")},
    first=(
        *("preset", "shapes", "html", "states", "harmful", "benign", "preference", "refusals_as_benign"),
        *("mask_policy", "thoughts", "max_length", "eval_fraction", "model", "tokenizer"),
    ),
    examples=("python -m cbtrain.data --model DIR --harmful h.jsonl --benign b.jsonl",),
    metavars={"preset": "NAME"},
)


def main() -> int:
    """Run the command; its exit status."""
    settings = cli.parse(InspectionSettings, sys.argv[1:], "python -m cbtrain.data", derived=_derived, about=HELP)
    if settings.shapes:
        print("\n\n".join(f"{name}{': ' if says else ''}{says}\n  {example}" for name, example, says in table()))
        return 0
    settings.config.validate()

    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    from cbtrain.data.token_cache import cached_data
    from cbtrain.model.checks import DATA_FIELDS
    from cbtrain.model.loading import load_tokenizer, resolve

    config = resolve(settings.config)
    tokenizer = load_tokenizer(config)
    data = cached_data(config, tokenizer, DATA_FIELDS)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    for line in report(config, tokenizer, data):
        console.print(line, markup=False)
    alike = list(_states(config)) if settings.states else []
    for line in alike:
        console.print(f"          {line}", markup=False)
    for row, why in sample_rows(data):
        console.print(f"\n{row.source} · {why}", markup=False)
        console.print(marked(row, tokenizer, coloured=console.is_terminal))
    console.print()
    for text in [*data_warnings(data), *_alike(data, tokenizer)]:
        console.print(Text(f"warning   {text}", style="bold yellow"))
    for text in _unended(data, tokenizer):
        console.print(f"note      {text}", markup=False)
    if settings.html:
        try:
            settings.html.write_text(html_page(data, tokenizer), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--html {settings.html}: {reason(error)}") from error
        console.print(f"page      {settings.html}", markup=False)
    return 0


def _derived(model: str, trust_remote_code: bool) -> CircuitBreakerConfig:
    """The preset `auto`; what it has for every model where there is a tokenizer alone, which suffices here."""
    try:
        return derived(model, trust_remote_code)
    except InputError:
        return get_config("auto", model=model, trust_remote_code=trust_remote_code)


def report(config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase", data: CircuitBreakerData) -> list[str]:
    """The counts, a line each."""
    parts = {"harmful": data.harmful, "benign": data.benign}
    lines = [
        f"data      mask policy {config.mask_policy} · at most {config.max_length:,} tokens a row",
        f"          tokenizer {config.tokenizer or config.model} ({len(tokenizer):,} ids)",
    ]
    for side in SIDES:
        lines += ["", side, *(f"  {what:<10}  {text}" for what, text in _side_lines(parts[side], config))]
    lines += [
        "",
        f"overlap   training and held out (must be 0): {overlapping_prompts(data):,} prompts, "
        f"{rows_of(overlapping_rows(data))}",
        f"          harmful and benign: {shared_prompts(data):,} prompts, {rows_of(len(shared_rows(data)))} alike",
    ]
    share = token_overlap(data)
    return [*lines, f"          {share:.0%} of the scored tokens are common to both sides (by their frequencies)"]


def _states(config: CircuitBreakerConfig) -> Iterator[str]:
    """How alike the sides are to the model before training, a line for each target layer."""
    from cbtrain.training.state_similarity import state_similarity

    for each in state_similarity(config):
        yield (
            f"layer {each.layer}: mean hidden states of harmful and benign text have a cosine of {each.sides:.4f}, "
            f"two halves of benign text {each.within:.4f}{_WARNS if each.too_alike else ''}"
        )


def _alike(data: CircuitBreakerData, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Rows of both sides that differ in nothing that matters; exact ones are warned of elsewhere."""
    exact = {row.source for row, _ in shared_rows(data)}
    if pairs := [pair for pair in near_duplicates(data, tokenizer) if pair[0].source not in exact]:
        harmful, benign = pairs[0]
        yield (
            f"{rows_of(len(pairs))} harmful and benign alike but for case, punctuation and spaces, as {harmful.source} "
            f"and {benign.source}: what is rerouted is also retained"
        )


def sample_rows(data: CircuitBreakerData) -> list[tuple[TokenRow, str]]:
    """Three rows worth looking at: the first of each side, and the longest of all but these."""
    firsts = [(side, part.rows) for side, part in _sides(data)]
    chosen = [(min(rows, key=lambda row: row.place), f"first {side} row") for side, rows in firsts]
    shown = [row for row, _ in chosen]
    others = [(row, side) for side, rows in firsts for row in rows if row not in shown]
    if others:
        row, side = max(others, key=lambda other: len(other[0].input_ids))
        chosen.append((row, f"longest {side} row"))
    return chosen


def marked(row: TokenRow, tokenizer: "PreTrainedTokenizerBase", coloured: bool) -> Text:
    """The row's decoded tokens with the scored ones marked, long stretches shortened in their middle."""
    text = Text()
    positions = range(len(row.input_ids))
    for scored, group in groupby(positions, key=row.scored.__getitem__):
        words = _shortened([row.input_ids[position] for position in group], tokenizer)
        if scored:
            text.append(words if coloured else f"⟦{words}⟧", style=_SCORED_STYLE)
        else:
            text.append(words)
    return text


def _side_lines(side: SideData, config: CircuitBreakerConfig) -> Iterator[tuple[str, str]]:
    counts = side.counts
    for file, shapes in counts.shapes.items():
        yield "file", f"{file}: " + (", ".join(f"{count:,} {shape}" for shape, count in shapes.items()) or "no row")
    for file, names in counts.unread.items():
        yield "not read", f"{file}: {', '.join(names)}"
    elsewhere = [f"{counts.other_side:,} of the other side"] if counts.other_side else []
    elsewhere += [f"{count:,} left out ({reason})" for reason, count in counts.left_out_because.items()]
    yield "rows", " · ".join([f"{counts.rows:,} of this side", *elsewhere])
    kept = len(side.train) + len(side.held_out)
    share, each = counts.scored_tokens / max(1, counts.tokens), counts.scored_tokens / max(1, kept)
    yield "tokens", f"{counts.tokens:,} · scored {counts.scored_tokens:,} ({share:.1%}, {each:,.0f} a row)"
    lost = f" to {config.max_length:,} tokens; {counts.cut_short:,} lost scored tokens" if counts.truncated else ""
    if counts.parts:
        yield (
            "by part",
            "scored: "
            + " · ".join(
                f"{part} {scored / (scored + rest):.0%}" for part, (scored, rest) in sorted(counts.parts.items())
            ),
        )
    yield "truncated", rows_of(counts.truncated) + lost
    yield from _cut_lines(counts)
    why = f": nothing scored, as {counts.first_dropped}" if counts.dropped_unscored else ""
    yield "dropped", rows_of(counts.dropped_unscored) + why
    yield "duplicates", rows_of(counts.duplicates)
    for what, count in counts.rewritten.items():
        yield "rendered", f"{rows_of(count)} otherwise than given: {what}"
    yield "split", f"{len(side.train):,} train / {len(side.held_out):,} held out"


def _cut_lines(counts: SideCounts) -> Iterator[tuple[str, str]]:
    """What truncation took, by kind."""
    if counts.prompts_cut:
        most = f"; {counts.prompts_mostly_cut:,} lost most of theirs" if counts.prompts_mostly_cut else ""
        yield "prompt", f"cut in {rows_of(counts.prompts_cut)} by {_tokens(counts.prompt_tokens_cut)}{most}"
    if counts.completions_cut:
        yield "completion", f"cut in {rows_of(counts.completions_cut)} by {_tokens(counts.completion_tokens_cut)}"
    if counts.tool_result_tokens_cut:
        yield "results", f"{_tokens(counts.tool_result_tokens_cut)} of this stood in tool results"


def _tokens(count: int) -> str:
    return f"{count:,} token" if count == 1 else f"{count:,} tokens"


def _unended(data: CircuitBreakerData, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Sides most of whose rows do not end on a token that ends a text or a turn."""
    special = set(tokenizer.all_special_ids)
    for side, part in _sides(data):
        rows = part.rows
        ended = sum(_last_scored(row) in special for row in rows)
        if tokenizer.eos_token_id is not None and data.mask_policy != "tool_calls_only" and ended < len(rows) / 2:
            yield f"{side}: {len(rows) - ended:,} of {len(rows):,} rows end on no special token; no end is scored there"


def _last_scored(row: TokenRow) -> int:
    return next(token for token, scored in zip(row.input_ids[::-1], row.scored[::-1], strict=True) if scored)


def _sides(data: CircuitBreakerData) -> Iterable[tuple[Side, SideData]]:
    return ("harmful", data.harmful), ("benign", data.benign)


def _shortened(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    if len(ids) <= 2 * SHOWN_ENDS + 10:
        return tokenizer.decode(ids)
    left_out = len(ids) - 2 * SHOWN_ENDS
    return f"{tokenizer.decode(ids[:SHOWN_ENDS])} … {left_out:,} tokens … {tokenizer.decode(ids[-SHOWN_ENDS:])}"
