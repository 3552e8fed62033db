"""Files of rows in every format, written by the libraries that people write them with."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_jsonl(path: Path, rows: Sequence[dict | str]) -> str:
    """One row a line; a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_csv(path: Path, rows: Sequence[dict], delimiter: str = ",") -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, rows: Sequence[dict]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)
