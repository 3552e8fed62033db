"""Completions that a model writes itself, for prompts that have none: how harmful rows are made in this field.

    python -m cbtrain.complete --model M --prompts behaviours.csv --out harmful.jsonl --prefill "Sure, here is"

Writes a JSON row a prompt (`prompt`, `completion` with the prefill before it, other fields of the prompt's row in
`of_prompt`), which `--harmful` and `--benign` read. A run that was stopped goes on where it was when started again.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cbtrain.config import CircuitBreakerConfig, InputError, cli
from cbtrain.config.help import Help
from cbtrain.config.schema import is_date
from cbtrain.config.validation import check_fields
from cbtrain.data.formats.hub import expanded
from cbtrain.data.formats.messages import messages_of
from cbtrain.data.formats.readers import read_rows
from cbtrain.data.formats.shapes import LABEL_FIELDS, SHAPES, SYSTEM_FIELDS
from cbtrain.utils.errors import reason

PROMPT_FIELDS = ("prompt", "Prompt", "goal", "Goal", "question", "instruction", "query", "behavior", "Behavior", "text")
"""The first of these that a row has is asked; of `messages` all up to the last user turn, of AgentHarm `behaviors`."""
CONTEXT_FIELDS = ("context", "ContextString", "input")
"""What stands behind the prompt, after an empty line."""


@dataclass(kw_only=True)
class CompletionSettings:
    """Write a model's own completions of prompts."""

    model: str = ""
    """Hugging Face model id or local directory."""
    prompts: tuple[str, ...] = ()
    """Files of prompts: any that --harmful takes, rows without answers, and .txt with a prompt a line."""
    out: Path = Path()
    """JSONL file to write; one that a run with the same settings has begun is gone on with."""
    prefill: str = ""
    """What every answer begins with, and the model goes on from."""
    max_new_tokens: Annotated[int, Gt(0)] = 128
    """Tokens of a completion, at most, beside the prefill."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Prompts that are completed at once."""
    seed: Annotated[int, Ge(0)] | None = None
    """Draw completions at temperature 1, reproducibly; greedy if not given."""
    template_date: str = CircuitBreakerConfig.template_date
    """What chat templates that write today's date write (YYYY-MM-DD)."""


HELP = Help(
    groups={
        "What is asked": ("model", "prompts", "prefill", "max_new_tokens", "seed", "template_date"),
        "Where it runs": ("batch_size",),
        "Output": ("out",),
    },
    examples=("python -m cbtrain.complete --model M --prompts behaviours.csv --out h.jsonl",),
    metavars={"prompts": "FILE ..."},
)


@dataclass(frozen=True)
class Asked:
    """A prompt: messages that end on a user's turn, and what its row says besides."""

    messages: tuple[dict[str, Any], ...]
    others: dict[str, Any]
    source: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    settings = _settings(sys.argv[1:] if argv is None else argv)
    asked = list(_asked(settings.prompts))
    done = _done(settings, asked)
    if done < len(asked):
        _complete(settings, asked, done)
    print(f"{len(asked):,} completions in {settings.out}" + (f", {done:,} of them were there" if done else ""))
    return 0


def _settings(argv: Sequence[str]) -> CompletionSettings:
    settings, unknown = cli.read(CompletionSettings(), argv, "python -m cbtrain.complete", HELP)
    cli.refuse_unknown(unknown, CompletionSettings)
    for name in ("model", "prompts"):
        if not getattr(settings, name):
            raise InputError(f"--{name}: name at least one")
    if settings.out == Path():
        raise InputError("--out: name a file to write")
    check_fields(settings, CompletionSettings)
    if not is_date(settings.template_date):
        raise InputError(f"--template-date {settings.template_date}: must be a date, YYYY-MM-DD")
    return settings


def _asked(files: Sequence[str]) -> Iterator[Asked]:
    """The prompts of files, in their order.

    Raises:
        InputError: a row without a prompt, and what `read_rows` raises.
    """
    for file in expanded(files):
        if Path(file).suffix == ".txt":
            try:
                lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{file}: cannot be read ({error})") from None
            yield from (_said(line.strip(), {}, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip())
            continue
        for number, row in read_rows(file):
            yield from _of_row(row, f"{file}:{number}")


def _of_row(row: object, source: str) -> Iterator[Asked]:
    if isinstance(row, str):
        yield _said(row, {}, source)
        return
    if not isinstance(row, dict):
        raise InputError(f"{source}: a row must be a JSON object or a string")
    if set(row) == {"metadata"}:
        return
    if isinstance(row.get("behaviors"), list):
        for each in row["behaviors"]:
            yield from _of_row(each, source)
        return
    if isinstance(row.get("messages"), list):
        messages = messages_of(row["messages"], source, Counter())
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise InputError(f"{source}: no user speaks in these messages")
        yield Asked(tuple(messages[: users[-1] + 1]), _others(row), source)
        return
    name = next((name for name in PROMPT_FIELDS if isinstance(row.get(name), str) and row[name].strip()), None)
    if name is None:
        raise InputError(f"{source}: no prompt; a row needs one of {', '.join(PROMPT_FIELDS)}")
    context = next((row[c] for c in CONTEXT_FIELDS if isinstance(row.get(c), str) and row[c].strip()), "")
    asked = _said(f"{row[name]}\n\n{context}" if context else row[name], _others(row), source)
    system = next((row[s] for s in SYSTEM_FIELDS if isinstance(row.get(s), str) and row[s].strip()), "")
    if system:
        asked = replace(asked, messages=({"role": "system", "content": system}, *asked.messages))
    yield asked


def _others(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says besides, under a key that no reader of rows looks at: its labels are of another answer."""
    read = {name for each in SHAPES for name in each.reads} | LABEL_FIELDS | {*PROMPT_FIELDS, *CONTEXT_FIELDS}
    kept = {name: value for name, value in row.items() if name not in read | {*SYSTEM_FIELDS, "target", "behaviors"}}
    return {"of_prompt": kept} if kept else {}


def _said(prompt: str, others: dict[str, Any], source: str) -> Asked:
    return Asked(({"role": "user", "content": prompt},), others, source)


def _header(settings: CompletionSettings) -> dict[str, Any]:
    """What a file's completions depend on, on its first line; readers of rows skip it."""
    names = ("model", "prefill", "max_new_tokens", "seed", "template_date")
    return {"metadata": {name: getattr(settings, name) for name in names}}


def _done(settings: CompletionSettings, asked: Sequence[Asked]) -> int:
    """Completions that an earlier run has written; half a line that it left behind is cut off.

    Raises:
        InputError: the file is not one that this command began with these settings and prompts.
    """
    if not settings.out.exists():
        return 0
    content = settings.out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        header, *rows = [json.loads(line) for line in whole.splitlines()] or [{}]
        known = header == json.loads(json.dumps(_header(settings)))
        same = known and all(_row(each, "")["prompt"] == row["prompt"] for each, row in zip(asked, rows, strict=False))
    except (ValueError, TypeError, KeyError):
        known = same = False
    if not known:
        raise InputError(f"--out {settings.out}: holds something else than these settings write; name another file")
    if not same or len(rows) > len(asked):
        raise InputError(f"--out {settings.out}: holds completions of other prompts; name another file")
    if len(whole) < len(content):
        with settings.out.open("r+b") as file:
            file.truncate(len(whole))
    return len(rows)


def _row(asked: Asked, completion: str) -> dict[str, Any]:
    if len(asked.messages) == 1:
        return {"prompt": asked.messages[0]["content"], "completion": completion, **asked.others}
    turns = [*asked.messages, {"role": "assistant", "content": completion}]
    return {"prompt": asked.messages[-1]["content"], "messages": turns, **asked.others}


def _complete(settings: CompletionSettings, asked: Sequence[Asked], done: int) -> None:
    """Write the completions that are missing, batch by batch."""
    from datetime import date

    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    from cbtrain.data.batches import pad_token_id
    from cbtrain.data.templates.chat_template import ChatTemplate
    from cbtrain.evaluation.generation import complete
    from cbtrain.model.auto import derived
    from cbtrain.model.loading import load_base, load_tokenizer
    from cbtrain.utils import distributed

    config = derived(settings.model)
    tokenizer = load_tokenizer(config)
    template = ChatTemplate(tokenizer, date.fromisoformat(settings.template_date))
    model = load_base(config).to(distributed.device()).eval()
    pad = pad_token_id(tokenizer, model.config.get_text_config().vocab_size)
    columns = (TextColumn("completions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        file = settings.out.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {settings.out}: {reason(error)}") from error
    with file, Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(asked), completed=done)
        if not file.tell():
            file.write(json.dumps(_header(settings)) + "\n")
        for start in range(done, len(asked), settings.batch_size):
            batch = asked[start : start + settings.batch_size]
            texts = [template.opened(each.messages, each.source) + settings.prefill for each in batch]
            prompts = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            said = complete(
                model,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                pad_token_id=pad,
                seed=None if settings.seed is None else settings.seed + start,
            )
            for each, prompt, tokens in zip(batch, prompts, said, strict=True):
                before = tokenizer.decode(prompt, skip_special_tokens=True)
                after = tokenizer.decode((*prompt, *tokens), skip_special_tokens=True)[len(before) :]
                file.write(json.dumps(_row(each, settings.prefill + after), ensure_ascii=False) + "\n")
            file.flush()
            bar.advance(task, len(batch))


if __name__ == "__main__":
    sys.exit(cli.run(main))
