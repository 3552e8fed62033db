"""What a model is asked to complete: held-out rows cut where their scored part begins, and XSTest's prompts."""

import datetime
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cbtrain.config import InputError
from cbtrain.data.formats.labels import is_unsafe
from cbtrain.data.formats.readers import read_rows
from cbtrain.data.loading import normalized_prompt
from cbtrain.data.templates.chat_template import DATE, ChatTemplate
from cbtrain.data.tokenization import TokenRow


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where an answer begins."""

    tokens: tuple[int, ...]
    source: str
    """`file:line`, without the file's directory."""

    def followed_by(self, completion: tuple[int, ...]) -> TokenRow:
        """Prompt and completion as a row of which the completion is scored."""
        scored = (False,) * len(self.tokens) + (True,) * len(completion)
        return TokenRow(self.tokens + completion, scored, "", self.source)


def from_rows(rows: Sequence[TokenRow], limit: int) -> list[Prompt]:
    """At most `limit` distinct prompts, spread evenly over the rows.

    A row that is scored from its first token on has no prompt of its own; its first half is taken.
    """
    prompts: dict[tuple[int, ...], Prompt] = {}
    for row in rows:
        end = row.scored.index(True)
        tokens = row.input_ids[: end if end > 0 else max(1, len(row.input_ids) // 2)]
        prompts.setdefault(tokens, Prompt(tokens, Path(row.source).name))
    return _spread(list(prompts.values()), limit)


def beyond_prefill(rows: Sequence[TokenRow], tokens: int) -> list[TokenRow]:
    """The rows scored only after their first `tokens` scored tokens; those with no more are left out."""
    narrowed = []
    for row in rows:
        positions = [position for position, scored in enumerate(row.scored) if scored and position > 0][tokens:]
        if positions:
            scored = set(positions)
            narrowed.append(replace(row, scored=tuple(position in scored for position in range(len(row.input_ids)))))
    return narrowed


def from_xstest(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    trained: Collection[str],
    limit: int,
    date: datetime.date = DATE,
) -> tuple[list[Prompt], list[Prompt], int]:
    """Prompts of XSTest-shaped files: at most `limit` safe ones, as many unsafe ones, and how many were trained on.

    Args:
        date: what a chat template writes for today.
        trained: normalised prompts of the training rows, which say nothing here and are left out.

    Raises:
        InputError: a row without a prompt, or no prompt that is safe and was not trained on.
    """
    safe: dict[str, Prompt] = {}
    unsafe: dict[str, Prompt] = {}
    left_out: set[str] = set()
    if not files:
        return [], [], 0
    template = ChatTemplate(tokenizer, date)
    for file in files:
        for number, row in read_rows(file):
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise InputError(f"{file}:{number}: an XSTest row needs the field prompt; it may have label or type")
            key = normalized_prompt(row["prompt"])
            if key in trained:
                left_out.add(key)
                continue
            text = template.prompt(row["prompt"], f"{file}:{number}")
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            kind = unsafe if is_unsafe(row) else safe
            kind.setdefault(key, Prompt(tuple(tokens), f"{Path(file).name}:{number}"))
    if not safe:
        raise InputError(
            f"--xstest {' '.join(files)}: no safe prompt that the model was not trained on ({len(left_out)} were)"
        )
    return _spread(list(safe.values()), limit), _spread(list(unsafe.values()), limit), len(left_out)


def _spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    count = min(limit, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]
