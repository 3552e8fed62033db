"""Which side a row belongs to by its own label, for files that hold both.

- An AgentDojo run (`messages` with `metadata.injection_task_id`): null is benign; set, with `metadata.security` true,
  the attack succeeded and the run is harmful; with false it was resisted and belongs to neither side.
- XSTest (`final_label`): `1_full_compliance` is benign. `2_full_refusal` and `3_partial_refusal` are neither: retaining
  them would teach over-refusal, rerouting them would punish a refusal. So is a compliance whose `type` says
  `contrast_…`, as those prompts are unsafe.
- A trace (`label`, or `labels`, or `labels.category`): `harmful`, `benign` or `resisted`, in any case; of a list of
  words the one that is among them. Any other value is no label, since fields of that name mean many things: token ids,
  for one.

The first of these that a row has counts; a trace's label that says otherwise is an error.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cbtrain.config import InputError

RESISTED = "attack resisted"
REFUSED = "XSTest: refused"
UNSAFE = "XSTest: answers an unsafe prompt"
_TRACE_LABELS = ("harmful", "benign", "resisted")
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
    trace = _trace(row, source)
    if is_agentdojo(row):
        return _agreeing(_agentdojo(row["metadata"], source), trace, "an AgentDojo run", source)
    if row.get("final_label") is not None:
        return _agreeing(_xstest(row, source), trace, "an XSTest row", source)
    return trace


def is_agentdojo(row: dict[str, Any]) -> bool:
    """Whether a row is an AgentDojo run; where a column of structs gives every row all fields, by their values."""
    metadata = row.get("metadata")
    if "messages" not in row or not isinstance(metadata, dict):
        return False
    task, security = metadata.get("injection_task_id"), metadata.get("security", "absent")
    return "injection_task_id" in metadata and not (task is None and security is None)


def _agreeing(label: Label, trace: Label | None, kind: str, source: str) -> Label:
    if trace and trace.side and trace.side != label.side:
        says = label.side or label.left_out
        raise InputError(f"{source}: is {kind} ({says}) labelled {trace.side}; a row belongs to one side")
    return label


def _agentdojo(metadata: dict[str, Any], source: str) -> Label:
    if metadata["injection_task_id"] is None:
        return Label("benign")
    security = metadata.get("security")
    if not isinstance(security, bool):
        raise InputError(f"{source}: an AgentDojo row with an attack needs metadata.security true or false")
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


def _trace(row: dict[str, Any], source: str) -> Label | None:
    found = {word for name in ("label", "labels") for word in _words(row.get(name)) if word in _TRACE_LABELS}
    if len(found) > 1:
        raise InputError(f"{source}: is labelled {' and '.join(sorted(found))}; a row belongs to one side")
    if not found:
        return None
    if "resisted" in found:
        return Label(None, RESISTED)
    return Label("harmful" if "harmful" in found else "benign")


def _words(value: object) -> list[str]:
    if isinstance(value, dict):
        value = value.get("category")
    words = value if isinstance(value, list) else [value]
    return [word.strip().casefold() for word in words if isinstance(word, str)]
