"""Files to rows: read JSONL or a JSON list (also gzipped), recognise each row's shape, give it its side.

Shapes, by their fields:

- `{"messages": [...]}`: a chat; it belongs to the side its file was given to.
- `{"prompt", "completion"}`: the same, as one user and one assistant turn.
- `{"prompt", "output", "llama3_output"}`: the original circuit-breakers rows. `output` is the harmful completion,
  `llama3_output` a refusal that is not used; on the benign side such a row is an error.
- AgentDojo runs, `messages` with `metadata.injection_task_id`, carry their label: null is benign, an attack with
  `metadata.security` true succeeded and is harmful, one with false was resisted and is left out. The line that
  holds only `metadata` is a header.

A file given to both sides must be labelled throughout. Every error names the file and line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cbtrain.config import InputError, flag, nearest

Message = dict[str, Any]
Side = Literal["harmful", "benign"]
SIDES: tuple[Side, ...] = get_args(Side)
ROLES = ("system", "user", "assistant", "tool")
SHAPES = "messages; prompt and completion; prompt, output and llama3_output"


@dataclass(frozen=True)
class Row:
    """A conversation: `content` is always a string, `tool_calls` is present only where there are some."""

    messages: tuple[Message, ...]
    source: str
    """`file:line` of the row."""

    @property
    def prompt(self) -> str:
        """The first user turn, or the first turn of any kind where no user speaks."""
        users = [message for message in self.messages if message["role"] == "user"]
        return (users or self.messages)[0]["content"]


@dataclass
class SideRows:
    """The rows of one side and what its files held besides."""

    files: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    left_out: int = 0
    """Labelled rows that belong to neither side: an attack that was resisted."""
    other_side: int = 0
    """Labelled rows that belong to the other side."""


def read_json_rows(file: str) -> Iterator[tuple[int, object]]:
    """Every JSON value of a JSONL file, or of the list in a JSON file, with the line (from 1) it starts on.

    Raises:
        InputError: a missing, unreadable, empty or undecodable file, or text that is not JSON.
    """
    text = _read_text(file)
    if not text.strip():
        raise InputError(f"{file}: the file is empty; expected a JSON row on every line")
    if text.lstrip()[0] == "[":
        yield from _list_items(file, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _decode(file, number, line)


def load_rows(harmful: Sequence[str], benign: Sequence[str]) -> dict[Side, SideRows]:
    """Read the files of both sides.

    Raises:
        InputError: a side without a file or without a row, a file named twice on a side, an unlabelled row in a
            file that was given to both sides, a row of no known shape, and whatever `read_json_rows` raises.
    """
    given: dict[Side, tuple[str, ...]] = {"harmful": tuple(harmful), "benign": tuple(benign)}
    paths = {side: [Path(file).resolve() for file in files] for side, files in given.items()}
    shared = set(paths["harmful"]) & set(paths["benign"])
    sides: dict[Side, SideRows] = {}
    for side, files in given.items():
        if not files:
            raise InputError(f"{flag(side)}: name at least one file of {side} rows")
        sides[side] = SideRows(files)
        for position, file in enumerate(files):
            if paths[side][position] in paths[side][:position]:
                raise InputError(f"{flag(side)} {file}: the file is named twice")
            _add_file(sides[side], side, file, paths[side][position] in shared)
        _require_rows(sides[side], side)
    return sides


def _add_file(side_rows: SideRows, side: Side, file: str, given_to_both: bool) -> None:
    for number, value in read_json_rows(file):
        source = f"{file}:{number}"
        if not isinstance(value, dict):
            raise InputError(f"{source}: a row must be a JSON object, this is {_kind(value)}")
        if set(value) == {"metadata"}:
            continue
        label = _label(value, source)
        if label is None and given_to_both:
            raise InputError(
                f"{source}: the row carries no label, so its file cannot be given to both --harmful and --benign; "
                "give it to one of them"
            )
        if label == "resisted":
            side_rows.left_out += 1
        elif label not in (None, side):
            side_rows.other_side += 1
        else:
            side_rows.rows.append(Row(tuple(_messages(value, side, source)), source))


def _require_rows(side_rows: SideRows, side: Side) -> None:
    if side_rows.rows:
        return
    other = "benign" if side == "harmful" else "harmful"
    held = [(side_rows.other_side, f"{other} rows"), (side_rows.left_out, "rows whose attack was resisted")]
    found = " and ".join(f"{count:,} {what}" for count, what in held if count) or "no row at all"
    raise InputError(
        f"{flag(side)} {' '.join(side_rows.files)}: no {side} row; found {found}. Name a file with {side} rows"
    )


def _read_text(file: str) -> str:
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{file}: is a directory; name the .jsonl or .json files in it")
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{file}: no such file{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file}: a damaged gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _decode(file: str, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _not_json(file, number, error) from None
    except RecursionError:
        raise InputError(f"{file}:{number}: not a row (JSON nested too deeply)") from None


def _not_json(file: str, number: int, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{file}:{number}: not JSON ({error.msg} at column {error.colno})")


def _list_items(file: str, text: str) -> Iterator[tuple[int, object]]:
    """Items of a JSON list one by one, as only that tells the line each starts on."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(file, error.lineno, error) from None
    except RecursionError:
        raise InputError(f"{file}: not rows (JSON nested too deeply)") from None
    decoder = json.JSONDecoder()
    position, counted, line = text.index("[") + 1, 0, 1
    while True:
        position = _skip(text, position, " \t\r\n,")
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        yield line, value


def _skip(text: str, position: int, characters: str) -> int:
    while text[position] in characters:
        position += 1
    return position


def _label(row: dict[str, Any], source: str) -> Literal["harmful", "benign", "resisted"] | None:
    """The side an AgentDojo run belongs to by its own metadata; None for rows without such a label."""
    metadata = row.get("metadata")
    if "messages" not in row or not isinstance(metadata, dict) or "injection_task_id" not in metadata:
        return None
    if metadata["injection_task_id"] is None:
        return "benign"
    security = metadata.get("security")
    if not isinstance(security, bool):
        raise InputError(f"{source}: an AgentDojo row with an attack needs metadata.security true or false")
    return "harmful" if security else "resisted"


def _messages(row: dict[str, Any], side: Side, source: str) -> list[Message]:
    if "messages" in row:
        if not isinstance(row["messages"], list) or not row["messages"]:
            raise InputError(f"{source}: messages must be a list with at least one message")
        return [_message(message, f"{source}: message {i}") for i, message in enumerate(row["messages"], start=1)]
    if {"prompt", "output", "llama3_output"} <= row.keys():
        if side == "benign":
            raise InputError(
                f"{source}: a circuit-breakers row (output, llama3_output) is harmful; give its file to --harmful only"
            )
        completion = "output"
    elif {"prompt", "completion"} <= row.keys():
        completion = "completion"
    else:
        fields = ", ".join(sorted(row)) or "none"
        raise InputError(f"{source}: no known shape of row (fields: {fields[:80]}); expected {SHAPES}")
    return [
        {"role": "user", "content": _content(row["prompt"], f"{source}: prompt")},
        {"role": "assistant", "content": _content(row[completion], f"{source}: {completion}")},
    ]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise InputError(f"{where}: must be an object whose role is one of {', '.join(ROLES)}")
    message: Message = {"role": value["role"], "content": _content(value.get("content"), f"{where}: content")}
    # Templates test for the key: an empty list of calls would be rendered as a call.
    if value.get("tool_calls"):
        message["tool_calls"] = _tool_calls(value["tool_calls"], f"{where}: tool_calls")
    return message | {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}


def _content(value: object, where: str) -> str:
    """Text of a message: a string, null (nothing said), or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise InputError(f"{where} must be a string, null or a list of text parts, this is {_kind(value)}")


def _tool_calls(value: object, where: str) -> list[Message]:
    calls: list[Message] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where} must be a list of objects with function.name and function.arguments")
        called = {"name": function["name"], "arguments": _arguments(function.get("arguments"))}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(identity | {"type": "function", "function": called})
    return calls


def _arguments(value: object) -> object:
    """Arguments as an object: chat templates expect one, while OpenAI's format writes it as a string."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
