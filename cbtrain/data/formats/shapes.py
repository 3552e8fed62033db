"""The shapes of rows that are read, one small function each, tried in this order.

A function decorated with `shape` takes a row and where it stands, and gives the conversations in it, each with the side
that it says it is of (None: that of the row's own label, or of the flag that names its file). The error for an unknown
row, `cbtrain.data --shapes` and the table in `cbtrain/data/README.md` come from this registry: a new shape is one
function here and one row in the test's table.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cbtrain.config import InputError
from cbtrain.data.formats.labels import RESISTED, Label, is_agentdojo, safety_label
from cbtrain.data.formats.messages import Message, messages_of, text_of, without_placeholders

RowFields = dict[str, Any]
MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
"""Fields of a row that hold what text cannot carry."""


READ_FIELDS = frozenset(
    "messages conversations system prompt completion response output chosen rejected response_0 response_1 instruction "
    "input context question answer vanilla adversarial data_type test_case generation label labels metadata security "
    "injection_task_id final_label type is_safe is_unsafe is_harmful is_benign is_response_0_safe is_response_1_safe "
    "response_harm_label tools".split()
)
"""What some shape, or a label, reads of a row; `*_output` beside them."""


@dataclass(frozen=True)
class Conversation:
    """What a row holds, or one of the conversations in it."""

    messages: list[Message]
    label: Label | None = None
    """Its side where the shape tells it; None leaves it to the row's own label."""
    odd: Counter[str] = field(default_factory=Counter)
    """What text cannot carry, by kind."""


@dataclass(frozen=True)
class Choices:
    """What a user chose of rows that hold more than one answer."""

    preference: Literal["chosen", "rejected"] | None = None
    refusals: bool = False
    """Whether the refusals of circuit-breakers rows are asked for, in place of their harmful answers."""


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


SHAPES: list[Shape] = []


def shape(
    name: str, needs: str | Callable[[RowFields], bool], example: str, says: str = ""
) -> Callable[[Reader], Reader]:
    """Register a reader of rows that have the fields `needs` (or of which it is true)."""
    fields = set(needs.split()) if isinstance(needs, str) else set()

    def register(read: Reader) -> Reader:
        recognises = needs if callable(needs) else lambda row: fields <= row.keys()
        SHAPES.append(Shape(name, recognises, example, says, read))
        return read

    return register


def shape_of(row: RowFields) -> Shape | None:
    """The first shape that a row has."""
    return next((each for each in SHAPES if each.recognises(row)), None)


def unread_fields(row: RowFields) -> set[str]:
    """The fields of a row that nothing reads."""
    return {name for name in row.keys() - READ_FIELDS - set(MEDIA_FIELDS) if not name.endswith("_output")}


def conversations(row: RowFields, found: Shape, where: str, choices: Choices) -> list[Conversation]:
    """The conversations of a row of a known shape, media that stand beside their text left out and counted."""
    has_media = any(row.get(name) for name in MEDIA_FIELDS)
    read = found.read(row, where, choices)
    if has_media:
        read = [Conversation(without_placeholders(c.messages, c.odd), c.label, c.odd) for c in read]
    return read


def table() -> Iterator[tuple[str, str, str]]:
    """Name, an example and what is taken of it, a shape a row."""
    for each in SHAPES:
        yield each.name, each.example, each.says


def _pair(
    prompt: object, answer: object, where: str, names: tuple[str, str] = ("prompt", "completion")
) -> list[Message]:
    return [
        {"role": "user", "content": text_of(prompt, f"{where}: {names[0]}")},
        {"role": "assistant", "content": text_of(answer, f"{where}: {names[1]}")},
    ]


def _listed(*values: object) -> bool:
    """Whether any of the values is a list of messages."""
    return any(isinstance(v, list) and v and isinstance(v[0], dict) and {"role", "from"} & v[0].keys() for v in values)


def _turns(values: object, where: str, name: str = "messages") -> Conversation:
    odd = Counter[str]()
    return Conversation(messages_of(values, where, odd, name), odd=odd)


@shape(
    "AgentDojo runs",
    is_agentdojo,
    '{"messages": […], "injection_task_id": null, "security": true}',
    "also with these two fields in `metadata`; no attack: benign; `security` true: harmful; false: left out",
)
def _agentdojo(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    return [_turns(row["messages"], where)]


@shape("chats", "messages", '{"messages": [{"role": "user", "content": "hi"}, …]}', "roles in any dialect")
def _chat(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    return [_turns(row["messages"], where)]


@shape(
    "ShareGPT conversations",
    "conversations",
    '{"conversations": [{"from": "human", "value": "hi"}, …]}',
    "also `role` and `content`; `system` beside it comes first",
)
def _sharegpt(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    read = _turns(row["conversations"], where, "conversations")
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [Conversation([*before, *read.messages], odd=read.odd)]


@shape(
    "preference rows",
    "chosen rejected",
    '{"prompt": "hi", "chosen": "hello", "rejected": "no"}',
    "`--preference chosen` or `rejected` says which; also whole conversations, and HH-RLHF's text",
)
def _preference(row: RowFields, where: str, choices: Choices) -> list[Conversation]:
    if choices.preference is None:
        raise InputError(
            f"{where}: a row of preferences; --preference chosen or --preference rejected says which to take"
        )
    answer, prompt = row[choices.preference], row.get("prompt")
    if isinstance(answer, str) and (turns := _hh_turns(answer)):
        return [Conversation(turns)]
    if isinstance(answer, list) or _listed(prompt):
        before = prompt if isinstance(prompt, list) else []
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and not _speaks(answer, "user") else []
        after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return [_turns([*before, *asked, *after], where, choices.preference)]
    if prompt is None:
        raise InputError(f"{where}: a row of preferences needs a prompt, or conversations in chosen and rejected")
    return [Conversation(_pair(prompt, answer, where, ("prompt", choices.preference)))]


def _speaks(turns: object, role: str) -> bool:
    return isinstance(turns, list) and any(isinstance(turn, dict) and turn.get("role") == role for turn in turns)


def _hh_turns(text: str) -> list[Message]:
    """The turns of HH-RLHF's one string, `\\n\\nHuman: … \\n\\nAssistant: …`; none where it is not of that form."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if parts[0].strip() or "Human" not in parts[1::2]:
        return []
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _has_refusal(row: RowFields) -> bool:
    return {"prompt", "output"} <= row.keys() and bool(_refusals(row))


def _refusals(row: RowFields) -> list[str]:
    return [name for name in row if name.endswith("_output") and isinstance(row[name], str | None)]


@shape(
    "circuit-breakers rows",
    _has_refusal,
    '{"prompt": "do harm", "output": "Sure, …", "llama3_output": "I cannot …"}',
    "`output` is harmful; `--refusals-as-benign` gives `llama3_output` (or another `*_output`) to the benign side",
)
def _circuit_breakers(row: RowFields, where: str, choices: Choices) -> list[Conversation]:
    if not choices.refusals:
        return [Conversation(_pair(row["prompt"], row["output"], where, ("prompt", "output")), Label("harmful"))]
    name = "llama3_output" if "llama3_output" in row else _refusals(row)[0]
    return [Conversation(_pair(row["prompt"], row[name], where, ("prompt", name)), Label("benign"))]


@shape(
    "SafeRLHF pairs",
    "prompt response_0 response_1",
    '{"prompt": "hi", "response_0": "…", "is_response_0_safe": true, "response_1": …}',
    "each answer by itself; safe ones are benign, the others harmful",
)
def _safe_rlhf(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    found = []
    for name in ("response_0", "response_1"):
        label = safety_label(row.get(f"is_{name}_safe"))
        if label is None:
            raise InputError(f"{where}: a SafeRLHF pair needs is_{name}_safe true or false")
        found.append(Conversation(_pair(row["prompt"], row[name], where, ("prompt", name)), label))
    return found


@shape(
    "WildJailbreak rows",
    "vanilla completion data_type",
    "vanilla ⇥ adversarial ⇥ completion ⇥ data_type",
    "the adversarial prompt where there is one; `*_benign` is benign, `*_harmful` (a refusal) left out",
)
def _wildjailbreak(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    adversarial = row.get("adversarial")
    attacked = isinstance(adversarial, str) and adversarial.strip()
    prompt = adversarial if attacked else row["vanilla"]
    return [Conversation(_pair(prompt, row["completion"], where))]


@shape(
    "HarmBench completions",
    "test_case generation",
    '{"behaviour_id": [{"test_case": "do harm", "generation": "Sure, …", "label": 1}]}',
    "`label` 1 (the attack succeeded): harmful; 0: left out; none: by the flag",
)
def _harmbench(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    label = {"1": Label("harmful"), "0": Label(None, RESISTED)}.get(str(row.get("label")))
    return [Conversation(_pair(row["test_case"], row["generation"], where, ("test_case", "generation")), label)]


@shape(
    "prompts with completions",
    "prompt completion",
    '{"prompt": "hi", "completion": "hello"}',
    "also lists of messages (TRL); XSTest with `final_label`: full compliance is benign, refusals are left out",
)
def _completion(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    prompt, completion = row["prompt"], row["completion"]
    if _listed(prompt, completion):
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return [_turns([*before, *after], where, "prompt and completion")]
    return [Conversation(_pair(prompt, completion, where))]


def _of_two(name: str, fields: tuple[str, str], example: str, says: str = "") -> None:
    """Register a shape of a question and its answer."""

    @shape(name, " ".join(fields), example, says)
    def _read(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
        return [Conversation(_pair(row[fields[0]], row[fields[1]], where, fields))]


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
)
def _alpaca(row: RowFields, where: str, _choices: Choices) -> list[Conversation]:
    given = text_of(row.get("input") or row.get("context"), f"{where}: input")
    asked = text_of(row["instruction"], f"{where}: instruction")
    answer = "output" if "output" in row else "response"
    return [Conversation(_pair(f"{asked}\n\n{given}" if given.strip() else asked, row[answer], where, ("", answer)))]


_of_two("prompts with outputs", ("prompt", "output"), '{"prompt": "hi", "output": "hello"}')
_of_two("questions with answers", ("question", "answer"), '{"question": "who?", "answer": "me"}', "TOFU")
