"""`metrics.jsonl`, a JSON object a logged step, as every reader of it takes it."""

import json
from pathlib import Path

from cbtrain.utils.errors import InputError


def read_metrics(path: Path, *, skip_damaged: bool = False) -> list[dict[str, float]]:
    """The metrics of every logged step, in the file's order; none where there is no file.

    A last line that is half written, of a run that goes on or was killed, is left out.

    Args:
        skip_damaged: leave out every other damaged line too, as for a run that will write it again.

    Raises:
        InputError: a line before the last that is not JSON, or one that is no set of numbers with a step.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    read = []
    for number, text in enumerate(lines, start=1):
        try:
            if text.strip():
                read.append(_metrics(text, f"{path}:{number}"))
        except json.JSONDecodeError as error:
            if number < len(lines) and not skip_damaged:
                raise InputError(f"{path}:{number}: not JSON ({error.msg}): remove the line") from None
        except InputError:
            if not skip_damaged:
                raise
    return read


def _metrics(text: str, where: str) -> dict[str, float]:
    record = json.loads(text)
    if not isinstance(record, dict) or "step" not in record:
        raise InputError(f"{where}: no step: a line of metrics has a number under step")
    if not all(isinstance(value, int | float) for value in record.values()):
        raise InputError(f"{where}: holds something that is no number: remove the line")
    return record
