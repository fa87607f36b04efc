"""The rows that steps exchange, and their parquet schemas. A row is data: no methods beyond checks.

Images are encoded bytes (PNG unless the user brought something else). `truth` is JSON that only the embedded world fills.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text with its split; where there is one, the real image that it captions, and what is known to be true of that image."""

    id: str
    text: str
    split: str = "train"
    image: bytes | None = None
    truth: str | None = None


@dataclass(frozen=True, kw_only=True)
class Image:
    """A generated image and where it came from.

    k: which of a prompt's images; seed: of the run; timestep: what a real image was re-noised to, None for plain sampling;
    sampler: JSON of scheduler, steps and guidance; model: its hash.
    """

    id: str
    prompt_id: str
    text: str
    image: bytes
    k: int = 0
    seed: int = 0
    timestep: int | None = None
    sampler: str = ""
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a scorer says of an image for its prompt. `score` is None when there is no answer; `reason` says why."""

    image_id: str
    prompt_id: str
    scorer: str
    score: float | None
    reason: str | None = None
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What one rater said of one image: JSON payload by kind (points, words, ratings, choice)."""

    id: str
    image_id: str
    rater: str
    kind: str
    payload: str
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image in a role for a caption. A pair is the two rows of a group.

    role: winner, loser or target; latents: float32 bytes of shape `shape`, already scaled for the network (None: not yet encoded);
    score: of the scorer that picked it; source: pool, reconstruction, real or a stage's name.
    """

    group: str
    role: str
    image_id: str
    text: str
    image: bytes
    latents: bytes | None = None
    shape: tuple[int, ...] = ()
    weight: float = 1.0
    score: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one rater, or several together, said of K images of a prompt. What a scorer learns from and is judged by.

    kind: choice: `said` holds each image's share of being the chosen one, sum 1 (one-hot: somebody chose; 0.5, 0.5: a tie), and nothing is
    known of those that were not chosen; ranking: `said` holds ranks, lower is better, equal ones are ties.
    files: K names, relative to the folder of images; images: K encoded images, or none where they lie in files; generators: K names of
    what made them, or none; weight: of this row in a loss.
    """

    id: str
    prompt_id: str
    text: str
    kind: str
    said: tuple[float, ...]
    files: tuple[str, ...]
    images: tuple[bytes, ...] = ()
    generators: tuple[str, ...] = ()
    rater: str = ""
    weight: float = 1.0


Row = TypeVar("Row", Prompt, Image, Score, Feedback, Example, Choice)

_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(), "str | None": pa.string(), "bytes": pa.binary(), "bytes | None": pa.binary(), "int": pa.int64(),
    "int | None": pa.int64(), "float": pa.float64(), "float | None": pa.float64(), "tuple[int, ...]": pa.list_(pa.int64()),
    "tuple[float, ...]": pa.list_(pa.float64()), "tuple[str, ...]": pa.list_(pa.string()), "tuple[bytes, ...]": pa.list_(pa.binary()),
}  # fmt: skip


def schema(kind: type) -> pa.Schema:
    """The parquet schema of a record class."""
    return pa.schema([pa.field(f.name, _TYPES[str(f.type)], nullable="None" in str(f.type)) for f in fields(kind)])


def to_table(kind: type[Row], rows: Iterable[Row]) -> pa.Table:
    """Rows to an Arrow table in the record's schema."""
    return pa.Table.from_pylist([asdict(r) for r in rows], schema=schema(kind))


def from_table(kind: type[Row], table: pa.Table, where: str = "") -> list[Row]:
    """An Arrow table to rows; other columns are ignored.

    Raises:
        ValueError: a column is missing or a required value is null; the message names `where`, the row and the field.
    """
    required = {f.name: f for f in fields(kind)}
    missing = [n for n, f in required.items() if n not in table.column_names and not _has_default(f)]
    if missing:
        raise ValueError(f"{where or 'table'}: no column {', '.join(missing)}; a {kind.__name__} row needs {', '.join(required)}")
    names = [n for n in required if n in table.column_names]
    rows = []
    for i, values in enumerate(table.select(names).to_pylist()):
        for name in names:
            if values[name] is None and "None" not in str(required[name].type):
                raise ValueError(f"{where or 'table'}: row {i}: {name} is empty")
        for name in names:
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        rows.append(kind(**values))
    return rows


def _has_default(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is not MISSING or field.default_factory is not MISSING


def by_prompt(images: Sequence[Image]) -> dict[str, list[Image]]:
    """Images grouped by prompt id, in order of first appearance."""
    groups: dict[str, list[Image]] = {}
    for image in images:
        groups.setdefault(image.prompt_id, []).append(image)
    return groups
