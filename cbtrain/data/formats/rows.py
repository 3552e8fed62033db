"""Files to rows: recognise each row's shape and give it its side.

Shapes, by their fields:

- `{"input_ids", ...}`: tokenised elsewhere, and `{"render_id", "loss_mask", ...}`: the mask of such a row, given in
  another file of the same side (see `cbtrain.data.formats.pretokenized`).
- `{"messages": [...]}`: a chat; it belongs to the side its file was given to.
- `{"prompt", "output", "llama3_output"}`: the original circuit-breakers rows. `output` is the harmful completion,
  `llama3_output` a refusal that is not used; on the benign side such a row is an error.
- `{"prompt", "completion"}`: as one user and one assistant turn.

A row may carry its own label (see `labels.py`): then it belongs to that side whichever flag names its file. A
file given to both sides must be labelled throughout. A line that holds only `metadata` is a header. Every error
names the file and line.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cbtrain.config import InputError, flag
from cbtrain.data.formats.labels import is_agentdojo, label_of
from cbtrain.data.formats.pretokenized import Renders, TokenisedRow, is_mask, is_tokenised
from cbtrain.data.formats.readers import read_rows

Message = dict[str, Any]
Side = Literal["harmful", "benign"]
SIDES: tuple[Side, ...] = get_args(Side)
ROLES = ("system", "user", "assistant", "tool")
_READ = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name")
"""Fields of a message."""
SHAPES = "messages; prompt and completion; prompt, output and llama3_output; input_ids"
MASK_SHAPE = "masks of tokenised rows"


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
    rows: list[Row | TokenisedRow] = field(default_factory=list)
    shapes: dict[str, Counter[str]] = field(default_factory=dict)
    """For each file how many rows of which shape it holds, those of the other side included."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Labelled rows that belong to neither side, by the reason."""
    other_side: int = 0
    """Labelled rows that belong to the other side."""
    remarks: list[str] = field(default_factory=list)
    """What a user should know of these files."""


def load_rows(harmful: Sequence[str], benign: Sequence[str]) -> dict[Side, SideRows]:
    """Read the files of both sides.

    Raises:
        InputError: a side without a file or without a row, a file named twice on a side, an unlabelled row in a
            file that was given to both sides, a row of no known shape, and whatever `read_rows` raises.
    """
    given: dict[Side, tuple[str, ...]] = {"harmful": tuple(harmful), "benign": tuple(benign)}
    paths = {side: [Path(file).resolve() for file in files] for side, files in given.items()}
    shared = set(paths["harmful"]) & set(paths["benign"])
    sides: dict[Side, SideRows] = {}
    for side, files in given.items():
        if not files:
            raise InputError(f"{flag(side)}: name at least one file of {side} rows")
        for position, file in enumerate(files):
            if paths[side][position] in paths[side][:position]:
                raise InputError(f"{flag(side)} {file}: the file is named twice")
        sides[side] = _Reading(side, files).read(
            {f for f, path in zip(files, paths[side], strict=True) if path in shared}
        )
        _require_rows(sides[side], side)
    return sides


class _Reading:
    """One side's files being read: masks must all be known before the rows that they belong to."""

    def __init__(self, side: Side, files: tuple[str, ...]) -> None:
        self._side: Side = side
        self._found = SideRows(files)
        self._renders = Renders()
        self._unused: Counter[str] = Counter()

    def read(self, given_to_both: set[str]) -> SideRows:
        found: list[Row | tuple[dict[str, Any], str]] = []
        for file in self._found.files:
            self._found.shapes[file] = Counter()
            labelled = Counter[bool]()
            for number, value in read_rows(file):
                source = f"{file}:{number}"
                if not isinstance(value, dict):
                    raise InputError(f"{source}: a row must be a JSON object, this is {_kind(value)}")
                if set(value) == {"metadata"}:
                    continue
                self._found.shapes[file][_shape(value, source)] += 1
                if is_mask(value):
                    self._renders.add_mask(value, source)
                    continue
                belongs = self._belongs(value, source, file in given_to_both, labelled)
                if belongs and is_tokenised(value):
                    found.append((value, source))
                elif belongs:
                    self._unused.update(_unused(value))
                    found.append(Row(tuple(_messages(value, self._side, source)), source))
            if len(labelled) == 2:
                self._found.remarks.append(
                    f"{file}: rows without a label {labelled[False]:,}, with one {labelled[True]:,}; those without are "
                    f"taken as {self._side}"
                )
        for name, count in self._unused.items():
            self._found.remarks.append(f"rows with {name}, which nothing here reads: {count:,}")
        self._found.rows = [row if isinstance(row, Row) else self._renders.row(*row) for row in found]
        self._remark_masks()
        return self._found

    def _belongs(self, row: dict[str, Any], source: str, given_to_both: bool, labelled: Counter[bool]) -> bool:
        """Whether a row is of this side; what is not is counted."""
        label = label_of(row, source)
        labelled[label is not None] += 1
        if label is None and given_to_both:
            raise InputError(
                f"{source}: the row carries no label, so its file cannot be given to both --harmful and --benign; "
                "give it to one of them"
            )
        if label and label.side is None:
            self._found.left_out[label.left_out] += 1
        elif label and label.side != self._side:
            self._found.other_side += 1
        else:
            return True
        return False

    def _remark_masks(self) -> None:
        masks, alone = self._renders.masks, self._renders.unjoined()
        if masks and len(alone) == len(masks):
            raise InputError(
                f"{alone[0].source}: no row of {flag(self._side)} has the render_id of any of the {len(masks):,} "
                "masks; give the file with their input_ids beside it"
            )
        if alone:
            self._found.remarks.append(f"masks that belong to no row: {len(alone):,}, as {alone[0].source}")
        for what, count in self._renders.odd.items():
            if count:
                self._found.remarks.append(f"rows with {what}: {count:,}")


def _require_rows(side_rows: SideRows, side: Side) -> None:
    if side_rows.rows:
        return
    other = "benign" if side == "harmful" else "harmful"
    held = [(side_rows.other_side, f"{other} rows")]
    held += [(count, f"rows left out ({reason})") for reason, count in side_rows.left_out.items()]
    found = " and ".join(f"{count:,} {what}" for count, what in held if count) or "no row at all"
    raise InputError(
        f"{flag(side)} {' '.join(side_rows.files)}: no {side} row; found {found}. Name a file with {side} rows"
    )


def _shape(row: dict[str, Any], source: str) -> str:
    """What a row is, in words."""
    if is_mask(row):
        return MASK_SHAPE
    if is_tokenised(row):
        return "tokenised rows"
    if "messages" in row:
        return "AgentDojo runs" if is_agentdojo(row) else "chats"
    if {"prompt", "output", "llama3_output"} <= row.keys():
        return "circuit-breakers rows"
    if {"prompt", "completion"} <= row.keys():
        return "XSTest rows" if "final_label" in row else "prompts with completions"
    if "loss_mask" in row:
        raise InputError(
            f"{source}: a loss_mask needs the input_ids it belongs to, or the render_id of a row with them"
        )
    fields = ", ".join(sorted(row)) or "none"
    raise InputError(f"{source}: no known shape of row (fields: {fields[:80]}); expected {SHAPES}")


def _messages(row: dict[str, Any], side: Side, source: str) -> list[Message]:
    if "messages" in row:
        if not isinstance(row["messages"], list) or not row["messages"]:
            raise InputError(f"{source}: messages must be a list with at least one message")
        return [_message(message, f"{source}: message {i}") for i, message in enumerate(row["messages"], start=1)]
    original = {"output", "llama3_output"} <= row.keys()
    if original and side == "benign":
        raise InputError(
            f"{source}: a circuit-breakers row (output, llama3_output) is harmful; give its file to --harmful only"
        )
    completion = "output" if original else "completion"
    return [
        {"role": "user", "content": _content(row["prompt"], f"{source}: prompt")},
        {"role": "assistant", "content": _content(row[completion], f"{source}: {completion}")},
    ]


def _unused(row: dict[str, Any]) -> set[str]:
    """What a conversation says in fields that are not read."""
    turns = row["messages"] if isinstance(row.get("messages"), list) else []
    assistant = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
    told = {f"{name} of assistant turns" for turn in assistant for name in turn if turn[name] and name not in _READ}
    return told | ({"tools"} if row.get("tools") else set())


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise InputError(f"{where}: must be an object whose role is one of {', '.join(ROLES)}")
    message: Message = {"role": value["role"], "content": _content(value.get("content"), f"{where}: content")}
    # Templates test for the key: an empty list of calls would be rendered as a call. OpenAI's first form had one call.
    if calls := value.get("tool_calls") or value.get("function_call"):
        message["tool_calls"] = _tool_calls(calls, f"{where}: tool_calls")
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
