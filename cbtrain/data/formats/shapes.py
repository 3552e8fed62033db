"""The shapes of rows that are read, one small function each, tried in this order.

A function decorated with `shape` takes a row and where it stands, and gives the conversations in it, each with the side
that it says it is of (None: that of the row's own label, or of the flag that names its file). The error for an unknown
row, `cbtrain.data --shapes` and the table in `cbtrain/data/README.md` come from this registry: a new shape is one
function here and one row in the test's table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cbtrain.config import InputError
from cbtrain.data.formats.conversations import (
    Choices,
    Conversation,
    a_user_asks,
    dialogue,
    holds_messages,
    pair,
    turns_of,
)
from cbtrain.data.formats.labels import RESISTED, Label, boolean, is_agentdojo, safety_label
from cbtrain.data.formats.messages import Message, text_of, without_placeholders

RowFields = dict[str, Any]
MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
"""Fields of a row that hold what text cannot carry."""
SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields of a row that hold a system prompt."""


LABEL_FIELDS = frozenset(
    "label labels metadata security injection_task_id user_task_id final_label type data_type is_safe is_unsafe "
    "is_harmful is_benign response_harm_label".split()
)
"""What tells a row's side; read of every shape."""


Reader = Callable[[RowFields, str, Choices], list[Conversation]]


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    name: str
    recognises: Callable[[RowFields], bool]
    example: str
    """A row of it, shortened."""
    says: str
    """What is taken of it and which side it is of, for the table."""
    read: Reader
    reads: frozenset[str] = frozenset()
    """The fields of a row that it takes something of."""


SHAPES: list[Shape] = []


def shape(
    name: str, needs: str | Callable[[RowFields], bool], example: str, says: str = "", *, reads: str = ""
) -> Callable[[Reader], Reader]:
    """Register a reader of rows that have the fields `needs` (or of which it is true), and takes those and `reads`."""
    fields = set(needs.split()) if isinstance(needs, str) else set()

    def register(read: Reader) -> Reader:
        recognises = needs if callable(needs) else lambda row: fields <= row.keys()
        SHAPES.append(Shape(name, recognises, example, says, read, frozenset(fields | set(reads.split()))))
        return read

    return register


def shape_of(row: RowFields) -> Shape | None:
    """The first shape that a row has; fields that are null count only where no other makes one, as columns of a table
    give every row all fields."""
    there = {name: value for name, value in row.items() if value is not None or name == "injection_task_id"}
    return next((each for fields in (there, row) for each in SHAPES if each.recognises(fields)), None)


def unread_fields(row: RowFields, found: Shape) -> set[str]:
    """The fields of a row of a shape that nothing reads."""
    known = found.reads | LABEL_FIELDS | set(MEDIA_FIELDS) | set(SYSTEM_FIELDS) | {"tools"}
    if found.name == "circuit-breakers rows":
        known |= {name for name in row if name.endswith("_output")}
    return {name for name in row.keys() - known if row[name] not in (None, "", [], {})}


def conversations(row: RowFields, found: Shape, where: str, choices: Choices) -> list[Conversation]:
    """The conversations of a row of a known shape, a system prompt that stands beside them first, media that stand
    beside their text left out and counted."""
    read = found.read(row, where, choices)
    system = next((row[name] for name in SYSTEM_FIELDS if row.get(name)), None)
    text = "" if system is None else text_of(system, f"{where}: system")
    if text.strip():
        first: Message = {"role": "system", "content": text}
        read = [
            c if any(m["role"] == "system" for m in c.messages) else Conversation([first, *c.messages], c.label, c.odd)
            for c in read
        ]
    if any(row.get(name) for name in MEDIA_FIELDS):
        read = [Conversation(without_placeholders(c.messages, c.odd), c.label, c.odd) for c in read]
    return read


def table() -> Iterator[tuple[str, str, str]]:
    """Name, an example and what is taken of it, a shape a row."""
    for each in SHAPES:
        yield each.name, each.example, each.says


@shape(
    "preference rows",
    "chosen rejected",
    '{"prompt": "hi", "chosen": "hello", "rejected": "no"}',
    "`--preference chosen` or `rejected` says which; also messages, whole conversations, and HH-RLHF's text",
    reads="prompt messages conversations",
)
def _preference(row: RowFields, where: str, choices: Choices) -> list[Conversation]:
    if choices.preference is None:
        raise InputError(f"{where}: a row of preferences; --preference chosen or --preference rejected says which")
    answer = row[choices.preference]
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("conversations")
    if isinstance(answer, str) and (turns := dialogue(answer)):
        return [Conversation(turns)]
    if isinstance(answer, dict):
        answer = [answer]
    if holds_messages(answer) or holds_messages(prompt):
        after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if prompt is None or a_user_asks(after):
            before = []  # a whole conversation
        return [turns_of([*before, *after], where, choices.preference)]
    if prompt is None:
        raise InputError(f"{where}: a row of preferences needs a prompt, or conversations in chosen and rejected")
    return [pair(prompt, answer, where, ("prompt", choices.preference))]


@shape(
    "AgentDojo runs",
    is_agentdojo,
    '{"messages": […], "injection_task_id": null, "security": true}',
    "also with these two fields in `metadata`; no attack: benign; `security` true: harmful; false: left out",
    reads="messages",
)
def _agentdojo(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    return [turns_of(row["messages"], where)]


@shape("chats", "messages", '{"messages": [{"role": "user", "content": "hi"}, …]}', "roles in any dialect")
def _chat(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    return [turns_of(row["messages"], where)]


@shape(
    "ShareGPT conversations",
    "conversations",
    '{"conversations": [{"from": "human", "value": "hi"}, …]}',
    "also `role` and `content`; `system` beside it comes first",
)
def _sharegpt(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    return [turns_of(row["conversations"], where, "conversations")]


def _has_refusal(row: RowFields) -> bool:
    return {"prompt", "output"} <= row.keys() and bool(_refusals(row))


def _refusals(row: RowFields) -> list[str]:
    return [name for name in row if name.endswith("_output") and isinstance(row[name], str | None)]


@shape(
    "circuit-breakers rows",
    _has_refusal,
    '{"prompt": "do harm", "output": "Sure, …", "llama3_output": "I cannot …"}',
    "`output` is harmful; `--refusals-as-benign` gives `llama3_output` (or another `*_output`) to the benign side",
    reads="prompt output",
)
def _circuit_breakers(row: RowFields, where: str, choices: Choices) -> list[Conversation]:
    if not choices.refusals:
        return [pair(row["prompt"], row["output"], where, ("prompt", "output"), Label("harmful"))]
    name = "llama3_output" if "llama3_output" in row else _refusals(row)[0]
    return [pair(row["prompt"], row[name], where, ("prompt", name), Label("benign"))]


@shape(
    "SafeRLHF pairs",
    "prompt response_0 response_1",
    '{"prompt": "hi", "response_0": "…", "is_response_0_safe": true, "response_1": …}',
    "each answer by itself; safe ones are benign, the others harmful",
    reads="is_response_0_safe is_response_1_safe",
)
def _safe_rlhf(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    found = []
    for name in ("response_0", "response_1"):
        label = safety_label(row.get(f"is_{name}_safe"))
        if label is None:
            raise InputError(f"{where}: a SafeRLHF pair needs is_{name}_safe true or false")
        found.append(pair(row["prompt"], row[name], where, ("prompt", name), label))
    return found


@shape(
    "WildJailbreak rows",
    "vanilla completion data_type",
    "vanilla ⇥ adversarial ⇥ completion ⇥ data_type",
    "the adversarial prompt where there is one; `*_benign` is benign, `*_harmful` (a refusal) left out",
    reads="adversarial",
)
def _wildjailbreak(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    adversarial = row.get("adversarial")
    attacked = isinstance(adversarial, str) and adversarial.strip()
    prompt = adversarial if attacked else row["vanilla"]
    return [pair(prompt, row["completion"], where)]


@shape(
    "HarmBench completions",
    "test_case generation",
    '{"behaviour_id": [{"test_case": "do harm", "generation": "Sure, …", "label": 1}]}',
    "`label` 1 (the attack succeeded): harmful; 0: left out; none: by the flag",
)
def _harmbench(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    succeeded = boolean(row.get("label"))
    label = None if succeeded is None else Label("harmful") if succeeded else Label(None, RESISTED)
    return [pair(row["test_case"], row["generation"], where, ("test_case", "generation"), label)]


@shape(
    "prompts with completions",
    "prompt completion",
    '{"prompt": "hi", "completion": "hello"}',
    "also lists of messages (TRL); XSTest with `final_label`: full compliance is benign, refusals are left out",
)
def _completion(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    prompt, completion = row["prompt"], row["completion"]
    if holds_messages(prompt, completion):
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return [turns_of([*before, *after], where, "prompt and completion")]
    return [pair(prompt, completion, where)]


def _of_two(name: str, fields: tuple[str, str], example: str, says: str = "") -> None:
    """Register a shape of a question and its answer."""

    @shape(name, " ".join(fields), example, says)
    def _read(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
        return [pair(row[fields[0]], row[fields[1]], where, fields)]


_of_two(
    "prompts with responses",
    ("prompt", "response"),
    '{"prompt": "hi", "response": "hello", "is_safe": true}',
    "BeaverTails' `is_safe`, WildGuard's `response_harm_label`",
)


@shape(
    "Alpaca rows",
    lambda row: "instruction" in row and bool({"output", "response"} & row.keys()),
    '{"instruction": "Translate.", "input": "hi", "output": "hallo"}',
    "`input` (Dolly: `context`) follows the instruction after an empty line; `response` for `output`",
    reads="instruction input context output response",
)
def _alpaca(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    given = text_of(row.get("input") or row.get("context"), f"{where}: input")
    asked = text_of(row["instruction"], f"{where}: instruction")
    answer = "output" if "output" in row else "response"
    return [pair(f"{asked}\n\n{given}" if given.strip() else asked, row[answer], where, ("", answer))]


_of_two("prompts with outputs", ("prompt", "output"), '{"prompt": "hi", "output": "hello"}')
_of_two("questions with answers", ("question", "answer"), '{"question": "who?", "answer": "me"}', "TOFU")
_of_two("questions with responses", ("question", "response"), '{"question": "who?", "response": "me"}', "OpenOrca")
