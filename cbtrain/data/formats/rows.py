"""Files to rows: recognise each row's shape (`shapes.py`) and give it its side.

A row may carry its own label (`labels.py`): then it belongs to that side whichever flag names its file. A file given to
both sides must be labelled throughout. A line that holds only `metadata` is a header. Rows tokenised elsewhere
(`input_ids`), and their masks in other files of the same side, are read by `pretokenized.py`. Every error names the
file and line.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cbtrain.config import InputError, flag
from cbtrain.data.formats.conversations import Choices
from cbtrain.data.formats.hub import expanded
from cbtrain.data.formats.labels import Label, SideFields, label_of
from cbtrain.data.formats.messages import Message, kind_of, unread_of_messages
from cbtrain.data.formats.pretokenized import Renders, TokenisedRow, is_mask, is_tokenised
from cbtrain.data.formats.readers import read_rows
from cbtrain.data.formats.shapes import SHAPES, Shape, conversations, shape_of, unread_fields

Side = Literal["harmful", "benign"]
SIDES: tuple[Side, ...] = get_args(Side)
MASK_SHAPE, TOKENISED_SHAPE = "masks of tokenised rows", "tokenised rows"
NO_CHOICES = Choices()


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
    unread: dict[str, set[str]] = field(default_factory=dict)
    """For each file the fields of its rows that nothing reads."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Labelled rows that belong to neither side, by the reason."""
    other_side: int = 0
    """Labelled rows that belong to the other side."""
    remarks: list[str] = field(default_factory=list)
    """What a user should know of these files."""


def load_rows(harmful: Sequence[str], benign: Sequence[str], choices: Choices = NO_CHOICES) -> dict[Side, SideRows]:
    """Read the files of both sides.

    Args:
        harmful: files, directories of files or patterns, of harmful rows.
        benign: the same of benign rows.
        choices: of rows that hold more than one answer; with `refusals` the harmful side's circuit-breakers rows give
            theirs to the benign side.

    Raises:
        InputError: a side without a file or without a row, a file named twice on a side, an unlabelled row in a
            file that was given to both sides, a row of no known shape, and whatever `read_rows` raises.
    """
    given: dict[Side, tuple[str, ...]] = {"harmful": expanded(harmful), "benign": expanded(benign)}
    paths = {side: [Path(file).resolve() for file in files] for side, files in given.items()}
    shared = set(paths["harmful"]) & set(paths["benign"])
    sides: dict[Side, SideRows] = {}
    for side, files in given.items():
        if not files:
            raise InputError(f"{flag(side)}: name at least one file of {side} rows")
        for position, file in enumerate(files):
            if paths[side][position] in paths[side][:position]:
                raise InputError(f"{flag(side)} {file}: the file is named twice")
        answers = Choices(choices.preference)
        both = {f for f, path in zip(files, paths[side], strict=True) if path in shared}
        sides[side] = _Reading(side, files, answers).read(both)
    if choices.refusals:
        refusals = list(_refusals(given["harmful"], Choices(refusals=True)))
        if not refusals:
            raise InputError("--refusals-as-benign: no row of --harmful has a refusal (llama3_output, or *_output)")
        sides["benign"].rows += refusals
        sides["benign"].shapes[REFUSALS] = Counter({"circuit-breakers rows": len(refusals)})
    for side, found in sides.items():
        _require_rows(found, side)
    return sides


NO_ANSWER = "prompts without an answer"
REFUSALS = "refusals of the harmful side's rows"


def _refusals(files: Sequence[str], choices: Choices) -> Iterator["Row"]:
    """The refusals that circuit-breakers rows hold beside their harmful answer."""
    for file in files:
        for number, value in read_rows(file):
            if not isinstance(value, dict):
                continue
            found = shape_of(value)
            if found is not None and found.name == "circuit-breakers rows":
                source = f"{file}:{number}"
                for each in conversations(value, found, source, choices):
                    if each.messages[-1]["content"].strip():
                        yield Row(tuple(each.messages), source)


class _Reading:
    """One side's files being read: masks must all be known before the rows that they belong to."""

    def __init__(self, side: Side, files: tuple[str, ...], choices: Choices) -> None:
        self._side: Side = side
        self._choices = choices
        self._found = SideRows(files)
        self._renders = Renders()
        self._unused: Counter[str] = Counter()
        self._odd: Counter[str] = Counter()

    def read(self, given_to_both: set[str]) -> SideRows:
        found: list[Row | tuple[dict[str, Any], str]] = []
        for file in self._found.files:
            self._found.shapes[file] = Counter()
            labelled, unread = Counter[bool](), SideFields()
            for number, packed in read_rows(file):
                source = f"{file}:{number}"
                for value in _unpacked(packed):
                    found += self._of_row(value, source, file in given_to_both, labelled, unread)
            if len(labelled) == 2:
                self._found.remarks.append(
                    f"{file}: rows without a label {labelled[False]:,}, with one {labelled[True]:,}; those without are "
                    f"taken as {self._side}"
                )
            self._found.remarks += unread.remarks(file, self._side)
        for name, count in self._unused.items():
            self._found.remarks.append(f"rows with {name}, which nothing here reads: {count:,}")
        for kind, count in self._odd.items():
            self._found.remarks.append(f"rows with {kind} parts, which text cannot carry; left out of them: {count:,}")
        self._found.rows = [row if isinstance(row, Row) else self._renders.row(*row) for row in found]
        self._remark_masks()
        return self._found

    def _of_row(
        self, value: object, source: str, given_to_both: bool, labelled: Counter[bool], unread: SideFields
    ) -> list["Row | tuple[dict[str, Any], str]"]:
        """What of a value is this side's; the rest is counted."""
        if not isinstance(value, dict):
            raise InputError(f"{source}: a row must be a JSON object, this is {kind_of(value)}")
        if set(value) == {"metadata"}:
            return []
        shapes = self._found.shapes[source.rpartition(":")[0]]
        if is_mask(value):
            shapes[MASK_SHAPE] += 1
            self._renders.add_mask(value, source)
            return []
        if is_tokenised(value):
            shapes[TOKENISED_SHAPE] += 1
            label = label_of(value, source)
            return [(value, source)] if self._belongs(label, value, source, given_to_both, labelled, unread) else []
        shape = _recognised(value, source)
        shapes[_told(shape, value)] += 1
        self._found.unread.setdefault(source.rpartition(":")[0], set()).update(unread_fields(value, shape))
        of_row = label_of(value, source)
        if of_row and of_row.side is None:  # whatever else is in it
            self._belongs(of_row, value, source, given_to_both, labelled, unread)
            return []
        found: list[Row | tuple[dict[str, Any], str]] = []
        for each in conversations(value, shape, source, self._choices):
            circuit_breakers = shape.name == "circuit-breakers rows"
            # Which of two answers a circuit-breakers row has is what tells its side, unless the row says it itself.
            label = (of_row or each.label) if circuit_breakers else (each.label or of_row)
            if label is None and given_to_both and not each.messages[-1]["content"] and len(each.messages) < 3:
                label = Label(None, NO_ANSWER)
            if circuit_breakers and of_row is None and self._side == "benign" and not given_to_both:
                raise InputError(
                    f"{source}: a circuit-breakers row ({', '.join(sorted(value))[:60]}) is harmful; give its file to "
                    "--harmful only (--refusals-as-benign gives its refusals to the benign side)"
                )
            if self._belongs(label, value, source, given_to_both, labelled, unread):
                self._unused.update(unread_of_messages(value))
                self._odd.update(each.odd.keys())
                found.append(Row(tuple(each.messages), source))
        return found

    def _belongs(
        self,
        label: Label | None,
        row: dict[str, Any],
        source: str,
        given_to_both: bool,
        labelled: Counter[bool],
        unread: SideFields,
    ) -> bool:
        """Whether a row is of this side; what is not is counted."""
        labelled[label is not None] += 1
        if label is None:
            unread.add(row)
            if given_to_both:
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


def _told(shape: Shape, row: dict[str, Any]) -> str:
    """A row's shape, in words."""
    return "XSTest rows" if "final_label" in row and shape.name == "prompts with completions" else shape.name


def _recognised(row: dict[str, Any], source: str) -> Shape:
    """A text row's shape.

    Raises:
        InputError: it has none.
    """
    if found := shape_of(row):
        return found
    if "loss_mask" in row:
        raise InputError(
            f"{source}: a loss_mask needs the input_ids it belongs to, or the render_id of a row with them"
        )
    lists = [name for name, value in row.items() if isinstance(value, list)]
    if "behaviors" in lists or (_ASKS & row.keys() and not _ANSWERS & row.keys()):
        raise InputError(
            f"{source}: prompts without completions (fields: {', '.join(sorted(row))[:80]}); python -m "
            "cbtrain.complete writes a model's own"
        )
    if lists and all(isinstance(row[name], list | dict) for name in row):
        raise InputError(f"{source}: one JSON object, not rows; its lists are {', '.join(lists)[:80]}")
    fields = ", ".join(sorted(row)) or "none"
    known = "; ".join(f"{each.name} ({each.example})" if each.name == "chats" else each.name for each in SHAPES)
    raise InputError(f"{source}: no known shape of row (fields: {fields[:80]}); known: {known}; tokenised rows")


def _unpacked(value: object) -> list[object]:
    """The rows of a value: HarmBench keeps lists of completions by behaviour in one object."""
    if isinstance(value, dict) and all(isinstance(items, list) for items in value.values()):
        items = [item for items in value.values() for item in items]
        if items and all(isinstance(item, dict) and {"test_case", "generation"} <= item.keys() for item in items):
            return items
    return [value]


_ASKS = {"prompt", "goal", "behavior", "Behavior", "question", "instruction", "query"}
_ANSWERS = {"completion", "response", "output", "answer", "messages", "input_ids"}
