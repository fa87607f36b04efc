"""Rows of published files: read, and checked to be of the schema that they should have."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from limner.records import Choice


class Dropped(NamedTuple):
    """A row that says nothing: where it stands, and why not."""

    where: str
    reason: str


Found = Iterator[Choice | Dropped]


def prompt_id(text: str) -> str:
    """Rows of one text have one id."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choice(name: str, number: int, text: str, kind: str, said: list[float], files: list[str], **more: Any) -> Choice:
    labels = tuple(float(v) if isinstance(v, int | float) else math.nan for v in said)  # `choices.problem` drops what is no number
    return Choice(id=f"{name}-{number:07d}", prompt_id=prompt_id(text), text=text, kind=kind, said=labels, files=tuple(files), **more)


def load_json(source: Path) -> list[Any]:
    """A JSON list."""
    try:
        rows = json.loads(source.read_text())
    except OSError as error:
        raise ValueError(f"source: {source} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{source}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{source}: {type(rows).__name__}; expected a list of rows")
    return rows


def checked(source: Path, rows: list[Any], fields: dict[str, type | tuple[type, ...]]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, place and values of each row, whose fields are there and of their types."""
    for number, row in enumerate(rows):
        where = f"{source.name}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__}; expected an object with {', '.join(fields)}")
        for field, kind in fields.items():
            if field not in row:
                raise ValueError(f"{where}: no {field} (found: {', '.join(row)}); is it another format?")
            if not isinstance(row[field], kind) or isinstance(row[field], bool):
                raise ValueError(f"{where}: {field} is {type(row[field]).__name__}; is it another format?")
        yield number, where, row


def parquet_files(source: Path) -> list[Path]:
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not all(p.is_file() for p in paths):
        raise ValueError(f"source: {source} holds no parquet file")
    return paths


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except Exception as error:  # damaged bytes raise Arrow's kinds and the system's
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error


def parquet_rows(path: Path, needed: list[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row."""
    file, number = open_parquet(path), 0
    there = file.schema_arrow.names
    if missing := [c for c in needed if c not in there]:
        raise ValueError(f"{path}: no column {', '.join(missing)} (found: {', '.join(there)}); is it another format?")
    for batch in file.iter_batches(batch_size=64, columns=needed + [c for c in optional if c in there]):
        for row in batch.to_pylist():
            yield f"{path.name}: row {number}", row
            number += 1
