"""Files of the formats that `inputs` lists, as rows: where each stands (for messages), and its columns. Prompts are made of them there."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = (
    ".txt, .csv, .tsv, .jsonl, .parquet or .tar; a folder of .parquet or .tar shards; "
    "an image folder with metadata.jsonl or metadata.csv, or with a .txt beside each image"
)
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|validation|test)[-_.]")

Values = tuple[str, dict[str, Any]]  # where a row stands (for messages), and its columns
Find = Callable[[Iterable[str], Path], tuple[Any, Any]]  # a file's columns to those of caption and image


def files(path: Path, split: str) -> list[Path]:
    """What to read in turn: files whose name says their format, or a kohya folder itself.

    Raises:
        ValueError: there is nothing to read, or it is not clear what.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    names = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
    metadata = [p for p in names if p.name in ("metadata.jsonl", "metadata.csv")]
    if len(metadata) > 1:
        raise ValueError(f"{path} has both metadata.jsonl and metadata.csv; remove one, or name the one to read")
    tables = [p for p in names if p.suffix == ".parquet"]
    if (path / "manifest.json").is_file():  # made by a step, which keeps latents and scores beside its images
        tables = [p for p in tables if p.name.startswith("part-")]
    for found in (metadata, tables, [p for p in names if p.suffix == ".tar"]):
        if found:
            return _of_split(path, found, split)
    if any(p.with_suffix(".txt").is_file() for p in images_below(path)):
        return [path]
    raise ValueError(f"{path}: nothing here that can be read as prompts; expected {FORMATS}")


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Published sets keep train-00000.parquet and test-00000.parquet in one folder: reading both as one split ("" = all) would leak."""
    named = {f: match[1] for f in files if (match := SPLIT_NAME.search(f.name))}
    if not named or not split:
        return files
    chosen = [f for f in files if named.get(f) == split]
    if not chosen:
        found = ", ".join(sorted(set(named.values())))
        raise ValueError(f"{folder}: no shards of split {split!r} (names say: {found}); name a file instead")
    return chosen


def images_below(folder: Path) -> list[Path]:
    """Image files at any depth, by path; hidden ones are left out (copying from a Mac makes a ._photo.jpg beside each photo.jpg)."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith(".") and p.is_file())


def rows(file: Path, find: Find) -> Iterator[Values]:
    """The rows of one of the `files`.

    Args:
        find: tells which columns are wanted, so that a parquet file's others are not read.

    Raises:
        ValueError: an unknown format, or what cannot be read; names the file and the row.
    """
    if file.is_dir():
        return _kohya_rows(file)
    match file.suffix.lower():
        case ".txt":
            return ((where, {"text": line}) for where, line in _lines(file))
        case ".jsonl":
            return ((where, _json_object(line, where)) for where, line in _lines(file))
        case ".csv" | ".tsv":
            return _csv_rows(file)
        case ".parquet":
            return _parquet_rows(file, find)
        case ".tar":
            return _tar_rows(file)
    raise ValueError(f"{file}: unknown format {file.suffix!r}; expected {FORMATS}")


def read_bytes(file: Path) -> bytes:
    """A file's bytes; ValueError with the file's name where they cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error


def _bytes_at_end(file: Path, count: int) -> bytes:
    with file.open("rb") as f:
        f.seek(max(0, file.stat().st_size - count))
        return f.read()


def utf8(data: bytes, where: str) -> str:
    """Bytes of UTF-8, with or without a byte order mark, as text; ValueError where they are not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}; expected a JSON object with a caption")
    return value


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, and where they stand. Not `splitlines`: U+2028 may be part of a caption."""
    numbered = enumerate(utf8(read_bytes(file), str(file)).split("\n"), 1)
    return ((f"{file}:{n}", line) for n, line in numbered if line.strip())


def _csv_rows(file: Path) -> Iterator[Values]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(utf8(read_bytes(file), str(file)), newline=""), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            where = f"{file}:{reader.line_num}"
            if None in values:
                raise ValueError(f"{where}: more fields than the header has; put captions that hold the separator in quotes")
            yield where, values
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num + 1}: {error}; is a quote left open in this row?") from error


def _parquet_rows(file: Path, find: Find) -> Iterator[Values]:
    row = 0
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            wanted = {"id", "split", "truth", "prompt_id", *find(names, file)}
            for batch in parquet.iter_batches(64, columns=[n for n in names if n in wanted]):
                for values in batch.to_pylist():
                    yield f"{file}: row {row}", values
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet; truncated or not parquet? ({error})") from error


def _kohya_rows(folder: Path) -> Iterator[Values]:
    for image in images_below(folder):
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"{image}: no caption file {caption.name} beside it")
        text = " ".join(utf8(read_bytes(caption), str(caption)).split())
        if not text:
            raise ValueError(f"{caption} is empty; every image needs a caption")
        yield str(image), {"text": text, "image": read_bytes(image)}


def _tar_rows(file: Path) -> Iterator[Values]:
    """Members of one key stand together; the key is the path up to the first dot of its last part."""
    key, members = "", dict[str, bytes]()
    try:
        if _bytes_at_end(file, 1024) != bytes(1024):  # the end mark; tarfile takes one that was cut between members for whole
            raise ValueError(f"{file} cannot be read as tar; truncated or not a tar? (its end mark is missing)")
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, suffix = name.partition(".")
                if members and f"{folder}/{stem}" != key:
                    yield _sample(file, key, members)
                    members = {}
                key = f"{folder}/{stem}"
                content = tar.extractfile(member)
                members[suffix.lower()] = content.read() if content else b""
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{file} cannot be read as tar ({error})") from error
    if members:
        yield _sample(file, key, members)


def _sample(file: Path, key: str, members: dict[str, bytes]) -> Values:
    where = f"{file}: {key.lstrip('/')}"
    values = _json_object(utf8(members["json"], f"{where}.json"), f"{where}.json") if "json" in members else {}
    if "txt" in members:
        values["text"] = utf8(members["txt"], f"{where}.txt")
    values["image"] = next((members[s[1:]] for s in IMAGES if s[1:] in members), None)
    return where, values
