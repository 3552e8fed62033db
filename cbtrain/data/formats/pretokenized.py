"""Rows that were tokenised elsewhere: their ids as they are, and the mask that came with them.

A row holds `input_ids`, and may hold `attention_mask` (0 is padding at either end, which is taken off). Its mask of
scored tokens is `loss_mask`, a number per token (more than 0 is scored), in the row itself or in a row of another
file of the same side that names the same `render_id`. A row with `labels` and no `loss_mask` is scored where a label
is not −100. Labels are known to be shifted by one or not by the ids that they repeat.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cbtrain.config import InputError

NO_LABEL = -100


@dataclass(frozen=True)
class TokenisedRow:
    """A row of ids, without padding."""

    input_ids: tuple[int, ...]
    given: tuple[bool, ...] | None
    """Per token, whether the mask that came with the row scores it; None where none came."""
    source: str


@dataclass
class Mask:
    """A row that holds another row's mask."""

    values: list[float]
    labels: list[int] | None
    source: str
    used: bool = False


@dataclass
class Renders:
    """What the files of one side hold of rows and masks, until all of them are read and can be joined."""

    masks: dict[str, Mask] = field(default_factory=dict)
    odd: Counter[str] = field(default_factory=Counter)
    """Things in them that are not followed, and in how many rows."""

    def add_mask(self, row: dict[str, Any], source: str) -> None:
        """Keep a mask for the row that it belongs to.

        Raises:
            InputError: no mask, or another one for the same row.
        """
        mask = Mask(_numbers(row, "loss_mask", source), _labels(row, source), source)
        name = str(row["render_id"])
        other = self.masks.setdefault(name, mask)
        if other.values != mask.values:
            raise InputError(f"{source}: another mask for {name} is at {other.source}; give the file of one policy")
        self._note(row, mask.values)

    def row(self, row: dict[str, Any], source: str) -> TokenisedRow:
        """The row with its own mask, or with the one kept for it.

        Raises:
            InputError: ids that are none, or a mask or labels that do not fit them.
        """
        ids = _ids(row, "input_ids", source)
        mask = self.masks.get(str(row.get("render_id")))
        if "loss_mask" in row:
            mask = Mask(_numbers(row, "loss_mask", source), _labels(row, source), source)
            self._note(row, mask.values)
        given = None
        if mask:
            mask.used = True
            given = _given(ids, mask)
        elif (labels := _labels(row, source)) is not None:
            given = _labelled(ids, labels, source)
        start, stop = _unpadded(row, len(ids), source)
        return TokenisedRow(tuple(ids[start:stop]), given and given[start:stop], source)

    def unjoined(self) -> list[Mask]:
        """Masks that no row has named."""
        return [mask for mask in self.masks.values() if not mask.used]

    def _note(self, row: dict[str, Any], values: Sequence[float]) -> None:
        self.odd["a loss_mask between 0 and 1, which counts as scored"] += any(0 < value != 1 for value in values)
        self.odd["a sample_weight other than 1, which is not used"] += row.get("sample_weight") not in (None, 1)


def is_tokenised(row: dict[str, Any]) -> bool:
    return "input_ids" in row


def is_mask(row: dict[str, Any]) -> bool:
    return "loss_mask" in row and "render_id" in row and "input_ids" not in row


def _given(ids: Sequence[int], mask: Mask) -> tuple[bool, ...]:
    if len(mask.values) != len(ids):
        raise InputError(f"{mask.source}: loss_mask has {len(mask.values)} values for {len(ids)} tokens")
    if mask.labels is not None:
        _shift(ids, mask.labels, mask.source)
    return tuple(value > 0 for value in mask.values)


def _labelled(ids: Sequence[int], labels: Sequence[int], source: str) -> tuple[bool, ...]:
    shift = _shift(ids, labels, source)
    scored = [label != NO_LABEL for label in labels]
    return tuple([False] * shift + scored[: len(ids) - shift])


def _shift(ids: Sequence[int], labels: Sequence[int], source: str) -> int:
    """How many tokens the labels are ahead of the ids: 0 or 1; anything else belongs to other ids."""
    if len(labels) != len(ids):
        raise InputError(f"{source}: labels has {len(labels)} values for {len(ids)} tokens")
    for shift in (0, 1):
        following = [*ids[shift:], *[NO_LABEL] * shift]
        if all(label in (NO_LABEL, token) for label, token in zip(labels, following, strict=True)):
            return shift
    raise InputError(f"{source}: labels repeat other ids than input_ids, shifted by one or not; they belong elsewhere")


def _unpadded(row: dict[str, Any], length: int, source: str) -> tuple[int, int]:
    """Where the row's tokens begin and end within its padding."""
    if row.get("attention_mask") is None:
        return 0, length
    attention = _ids(row, "attention_mask", source)
    if len(attention) != length:
        raise InputError(f"{source}: attention_mask has {len(attention)} values for {length} tokens")
    positions = [position for position, value in enumerate(attention) if value]
    if not positions or len(positions) != positions[-1] + 1 - positions[0]:
        raise InputError(f"{source}: attention_mask must be 1 on one stretch of tokens, and 0 only before and after it")
    return positions[0], positions[-1] + 1


def _ids(row: dict[str, Any], name: str, source: str) -> list[int]:
    values = row[name]
    if not isinstance(values, list) or not values or not all(type(value) is int and value >= 0 for value in values):
        raise InputError(f"{source}: {name} must be a list of whole numbers, 0 or more, with at least one")
    return values


def _labels(row: dict[str, Any], source: str) -> list[int] | None:
    """The labels of a row, where they are ids and not words."""
    values = row.get("labels")
    if not isinstance(values, list) or any(isinstance(value, str) for value in values):
        return None
    if not all(type(value) is int for value in values):
        raise InputError(f"{source}: labels must be token ids, or {NO_LABEL} where a token is not scored")
    return values


def _numbers(row: dict[str, Any], name: str, source: str) -> list[float]:
    values = row[name]
    numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or not all(0 <= value < float("inf") for value in values):
        raise InputError(f"{source}: {name} must be a list of numbers, 0 or more, one per token")
    return values
