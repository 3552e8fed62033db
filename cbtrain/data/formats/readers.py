"""Files to values: JSONL, a JSON list, CSV or Parquet, told apart by content, the first three also gzipped.

Every value comes with the place it stands at: the line that it starts on, in Parquet the row, both from 1. A name
that is no file but looks like a Hugging Face dataset is fetched from the hub (see `cbtrain.data.formats.hub`).
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbtrain.config import InputError, nearest
from cbtrain.data.formats import hub
from cbtrain.utils.errors import first_line, reason

_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_KNOWN_COLUMNS = {"prompt", "messages", "conversations", "instruction", "question", "vanilla", "input_ids", "loss_mask"}
_NESTED_COLUMNS = {
    *("messages", "conversations", "metadata", "labels", "label", "input_ids", "attention_mask", "loss_mask")
}
"""Columns of a CSV file whose cells may hold JSON."""
_MESSAGE_COLUMNS = {"prompt", "completion", "chosen", "rejected"}
"""Columns whose cells are text, or messages written as JSON."""
_LONGEST_CELL = 2**31 - 1


def read_rows(file: str) -> Iterator[tuple[int, object]]:
    """Every value of a file with the place it stands at.

    Raises:
        InputError: a missing, unreadable, empty or undecodable file, with the place where that is known.
    """
    content = _content(file)
    if content.startswith(_PARQUET):
        yield from _parquet_rows(file, content)
        return
    text = _text(file, content)
    if not text.strip():
        raise InputError(f"{file}: the file is empty; expected a JSON row on every line")
    if text.lstrip()[0] == "[":
        yield from _list_items(file, text)
    elif _is_csv(file, text):
        yield from _csv_rows(file, text)
    else:
        yield from _lines(file, text)


def _content(file: str) -> bytes:
    path = Path(file)
    if not path.exists() and hub.is_dataset(file):
        path = hub.downloaded(file)
    try:
        content = path.read_bytes()
        if content.startswith(_LFS_POINTER):
            raise InputError(f"{file}: a Git LFS pointer, not the data; git lfs pull fetches it")
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{file}: no such file{nearest(path.name, siblings)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file}: a damaged gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({reason(error)})") from None


def _text(file: str, content: bytes) -> str:
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in content[:2] and len(content) % 2 == 0:  # UTF-16 of a tool that writes no mark
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    if "\r" in text and "\n" not in text:  # lines as they ended on old Macs
        text = text.replace("\r", "\n")
    return text


def _lines(file: str, text: str) -> Iterator[tuple[int, object]]:
    """A row a line; or one object over several, which is one row."""
    first = True
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _decode(file, number, line)
        except InputError:
            if not first or line.strip()[0] != "{":
                raise
            try:
                whole = json.loads(text)
            except (ValueError, RecursionError):
                whole = None
            if whole is None:
                raise
            yield number, whole
            return
        first = False
        yield number, value


def _decode(file: str, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _not_json(file, number, error) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{file}:{number}: not a row ({_beyond(error)})") from None


def _beyond(error: Exception) -> str:
    """What valid JSON has too much of."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _not_json(file: str, number: int, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{file}:{number}: not JSON ({error.msg} at column {error.colno})")


def _list_items(file: str, text: str) -> Iterator[tuple[int, object]]:
    """Items of a JSON list one by one, as only that tells the line each starts on."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(file, error.lineno, error) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{file}: not rows ({_beyond(error)})") from None
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


def _is_csv(file: str, text: str) -> bool:
    """Whether a file is CSV by its name, or by a first line that names columns known here."""
    names = Path(file).name.lower().removesuffix(".gz")
    if text.lstrip()[0] == "{":
        return False
    return names.endswith((".csv", ".tsv")) or bool(_KNOWN_COLUMNS & set(_header(text)))


def _header(text: str) -> list[str]:
    first = text.lstrip().split("\n", 1)[0]
    return next(csv.reader([first], delimiter=_delimiter(text)), [])


def _delimiter(text: str) -> str:
    """What separates the columns: of comma, semicolon and tab the one that the first line has most of."""
    return max(",;\t", key=text.lstrip().split("\n", 1)[0].count)


def _csv_rows(file: str, text: str) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(_LONGEST_CELL)  # the library's own limit is 128 KiB, less than a long conversation
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    columns: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if columns is None:
                columns = [_named_as_known(cell.strip()) for cell in cells]
                if twice := [name for name in columns if columns.count(name) > 1]:
                    raise InputError(f"{file}:{line}: two columns are named {twice[0]!r}")
                continue
            if len(cells) != len(columns):
                raise InputError(f"{file}:{line}: {len(cells)} cells in a row, the header names {len(columns)} columns")
            yield line, {name: _cell(file, line, name, cell) for name, cell in zip(columns, cells, strict=True)}
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: not CSV ({error})") from None


def _cell(file: str, line: int, column: str, cell: str) -> object:
    """A cell's text, or what it holds where the column is known to hold JSON."""
    if column in _NESTED_COLUMNS and cell.lstrip()[:1] in ("[", "{"):
        return _decode(file, line, cell)
    if column in _MESSAGE_COLUMNS and cell.lstrip().startswith("[{"):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        messages = all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)
        return value if messages else cell
    return cell


def _named_as_known(column: str) -> str:
    """A column's name, `Prompt` as `prompt`."""
    lower = column.casefold()
    return lower if lower in _KNOWN_COLUMNS | _NESTED_COLUMNS | _MESSAGE_COLUMNS | {"response", "output"} else column


def _parquet_rows(file: str, content: bytes) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        if not parquet.metadata.num_rows:
            raise InputError(f"{file}: the file is empty; expected rows")
        number = 0
        for batch in parquet.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield number, _without_absent_arguments(value)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: a damaged Parquet file ({first_line(error)})") from None


def _without_absent_arguments(value: Any) -> Any:
    """A value without the arguments that other rows' tool calls have: a column's structs all have the same fields."""
    if isinstance(value, list):
        return [_without_absent_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: _without_absent_arguments(item) for name, item in value.items()}
    for name in ("arguments", "args", "input"):
        if isinstance(kept.get(name), dict):
            kept[name] = {key: item for key, item in kept[name].items() if item is not None}
    return kept
