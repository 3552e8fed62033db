"""Which side a row belongs to by its own label, for files that hold both.

- An AgentDojo run (`messages` with `injection_task_id`, at the top level as AgentDojo writes it or in `metadata`): null
  is benign; set, with `security` true, the attack succeeded and the run is harmful; with false it was resisted and
  belongs to neither side.
- XSTest (`final_label`): `1_full_compliance` is benign. `2_full_refusal` and `3_partial_refusal` are neither: retaining
  them would teach over-refusal, rerouting them would punish a refusal. So is a compliance whose `type` says
  `contrast_…`, as those prompts are unsafe.
- WildJailbreak (`data_type`): `*_benign` is benign; the completions of `*_harmful` are refusals, which are neither.
- WildGuard (`response_refusal_label` and `prompt_harm_label`): the refusal of a harmful prompt is neither.
- A field that says it of the answer: `label`, `labels` or `labels.category` with harmful, unsafe, benign, safe,
  unharmful or resisted, in any case (of a list of words the one that is among them); `response_harm_label` with harmful
  or unharmful; `is_safe`, `is_unsafe`, `is_harmful` or `is_benign` true or false (1 or 0). Any other value is no
  label, since fields of that name mean many things: token ids, for one. `SideFields` tells of what looks like it.

The first of these that a row has counts; a field that says otherwise is an error.
"""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cbtrain.config import InputError

RESISTED = "attack resisted"
ENDED = "AgentDojo: ended in an error"
INJECTION_ALONE = "AgentDojo: an injection task by itself"
REFUSED = "XSTest: refused"
UNSAFE = "XSTest: answers an unsafe prompt"
WILDJAILBREAK = "WildJailbreak: a refusal"
WILDGUARD = "WildGuard: refuses a harmful prompt"
_TRACE_LABELS = {word: word for word in ("harmful", "benign", "resisted")}
_SIDE_WORDS = _TRACE_LABELS | {"unsafe": "harmful", "safe": "benign", "unharmful": "benign"}
_SAFE_IF_TRUE = ("is_safe", "is_benign")
_SAFE_IF_FALSE = ("is_unsafe", "is_harmful")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_SAYS_SIDE = re.compile(
    r"(?:^|_)(?:un)?(?:safe|safety|harm|harmful|harmfulness|toxic|toxicity|benign|malicious|jailbreak|jailbroken|"
    r"label|labels|refusal|refused|security|resisted|attacked)(?:_|$)"
)
_MOST_VALUES = 8
"""Of a field that says the side; one with more is a score, or a text."""
_XSTEST_LABELS = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")


@dataclass(frozen=True)
class Label:
    """The side of a row, or why it belongs to neither."""

    side: Literal["harmful", "benign"] | None
    left_out: str = ""


def label_of(row: dict[str, Any], source: str) -> Label | None:
    """The label that a row carries itself; None where it carries none.

    Raises:
        InputError: a label that contradicts itself or lacks a part, with the row's place.
    """
    if is_agentdojo(row):
        return _agreeing(_agentdojo(row, source), _trace(row, source, _TRACE_LABELS), "an AgentDojo run", source)
    if row.get("final_label") is not None:  # beside it `label` is of the prompt
        return _agreeing(_xstest(row, source), _trace(row, source, _TRACE_LABELS), "an XSTest row", source)
    if isinstance(row.get("data_type"), str) and "vanilla" in row:
        benign = row["data_type"].strip().endswith("benign")
        return Label("benign") if benign else Label(None, WILDJAILBREAK)
    if _words(row.get("response_refusal_label")) == ["refusal"] and _words(row.get("prompt_harm_label")) == ["harmful"]:
        return Label(None, WILDGUARD)
    return _trace(row, source, _SIDE_WORDS)


def is_agentdojo(row: dict[str, Any]) -> bool:
    """Whether a row is an AgentDojo run; where a column of structs gives every row all fields, by their values."""
    if "messages" not in row:
        return False
    return any(
        "injection_task_id" in told
        and not (
            told["injection_task_id"] is None
            and told.get("security", "absent") is None
            and told.get("user_task_id") is None
        )
        for told in _run_facts(row)
    )


def safety_label(value: object) -> Label | None:
    """The side of an answer that a field calls safe or not; None where it says neither."""
    safe = boolean(value)
    return None if safe is None else Label("benign" if safe else "harmful")


class SideFields:
    """The fields of a file's rows that look as if they said the side, and are not read: their values."""

    def __init__(self) -> None:
        self._values: dict[str, set[object]] = defaultdict(set)

    def add(self, row: Mapping[str, Any]) -> None:
        """Note a row that carries no label that is read."""
        for name, value in row.items():
            plain = isinstance(value, bool | int | str) and len(str(value)) <= 40
            if plain and _SAYS_SIDE.search(name.casefold()):
                values = self._values[name]
                if len(values) <= _MOST_VALUES:
                    values.add(value.strip().casefold() if isinstance(value, str) else value)

    def remarks(self, file: str, side: str) -> list[str]:
        """A sentence for each field that takes several values."""
        return [
            f"{file}: `{name}` takes {len(values)} values and is not read: all rows that carry no other label count "
            f"as {side}"
            for name, values in self._values.items()
            if 2 <= len(values) <= _MOST_VALUES
        ]


def _agreeing(label: Label, trace: Label | None, kind: str, source: str) -> Label:
    if trace and trace.side and trace.side != label.side:
        says = label.side or label.left_out
        raise InputError(f"{source}: is {kind} ({says}) labelled {trace.side}; a row belongs to one side")
    return label


def _run_facts(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a run's attack and outcome may stand; a table may hold the metadata as text."""
    metadata = row.get("metadata")
    if isinstance(metadata, str) and metadata.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            metadata = json.loads(metadata)
    return [told for told in (row, metadata) if isinstance(told, dict)]


def _agentdojo(row: dict[str, Any], source: str) -> Label:
    told = next(told for told in _run_facts(row) if "injection_task_id" in told)
    if told.get("error") and told.get("security") is None:
        return Label(None, ENDED)
    if told["injection_task_id"] is None:
        alone = str(told.get("user_task_id") or "").startswith("injection_task")
        return Label(None, INJECTION_ALONE) if alone else Label("benign")
    security = told.get("security")
    if not isinstance(security, bool):
        field = "security" if told is row else "metadata.security"
        raise InputError(f"{source}: an AgentDojo row with an attack needs {field} true or false")
    return Label("harmful") if security else Label(None, RESISTED)


def _xstest(row: dict[str, Any], source: str) -> Label:
    label = row["final_label"]
    if label not in _XSTEST_LABELS:
        raise InputError(f"{source}: final_label is {label!r}; XSTest's are {', '.join(_XSTEST_LABELS)}")
    if label != "1_full_compliance":
        return Label(None, REFUSED)
    return Label(None, UNSAFE) if is_unsafe(row) else Label("benign")


def is_unsafe(row: dict[str, Any]) -> bool:
    """XSTest marks the contrasts to its safe prompts by `label`, in its first release by `type`."""
    return row.get("label") == "unsafe" or str(row.get("type", "")).startswith("contrast")


def _trace(row: dict[str, Any], source: str, words: Mapping[str, str]) -> Label | None:
    found = {words[word] for name in ("label", "labels") for word in _words(row.get(name)) if word in words}
    if words is _SIDE_WORDS:
        found |= {words[word] for word in _words(row.get("response_harm_label")) if word in words}
        for names, if_true, if_false in ((_SAFE_IF_TRUE, "benign", "harmful"), (_SAFE_IF_FALSE, "harmful", "benign")):
            for value in filter(lambda value: value is not None, (boolean(row.get(name)) for name in names)):
                found.add(if_true if value else if_false)
    if len(found) > 1:
        raise InputError(f"{source}: is labelled {' and '.join(sorted(found))}; a row belongs to one side")
    if not found:
        return None
    if "resisted" in found:
        return Label(None, RESISTED)
    return Label("harmful" if "harmful" in found else "benign")


def boolean(value: object) -> bool | None:
    """True or false, also as tables write them: as words, or as 1 and 0."""
    return _BOOLEANS.get(str(value).strip().casefold()) if isinstance(value, bool | str | int | float) else None


def _words(value: object) -> list[str]:
    if isinstance(value, dict):
        value = value.get("category")
    words = value if isinstance(value, list) else [value]
    return [word.strip().casefold() for word in words if isinstance(word, str)]
