"""What users bring: captions, alone or with their images, in the usual formats, as `Prompt` rows.

    prompts.txt                        one prompt a line
    .csv .tsv .jsonl .parquet          a caption column; an image column of bytes, of {bytes, path}, or of paths relative to the file
    folder/*.parquet, folder/*.tar     shards; with names such as train-00000.parquet only those of the split are read
    folder/metadata.jsonl or .csv      an image folder as `datasets` reads it: file_name and a caption column
    folder/a.jpg, folder/a.txt         an image folder with a caption file beside each image (kohya)
    .tar                               WebDataset: members of one key, image and .txt or .json

Columns `id`, `split` and `truth` are used where they are; others are ignored. Rows are counted as an editor does in text files
(file:line), from 0 in parquet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from limner.formats import IMAGES, Find, Values, files, images_below, read_bytes, rows, utf8
from limner.images import image_size
from limner.records import Image, Prompt

CAPTIONS, IMAGE_COLUMNS = ("text", "caption", "prompt"), ("image", "file_name")  # names of columns, in this order


def read_prompts(
    path: str | Path, split: str, *, caption_column: str = "", image_column: str = "", limit: int = 0, need_images: bool = False
) -> list[Prompt]:
    """All prompts of a split, in the order of the file. Arguments and errors as for `iter_prompts`."""
    return list(iter_prompts(path, split, caption_column=caption_column, image_column=image_column, limit=limit, need_images=need_images))


def iter_prompts(
    path: str | Path, split: str, *, caption_column: str = "", image_column: str = "", limit: int = 0, need_images: bool = False
) -> Iterator[Prompt]:
    """The prompts of a split, one at a time, so that shards stream.

    An image is the bytes of its file as they were; with `need_images` its header is checked, the pixels when they are decoded.
    Ids come from a column `id`, or are the split and the position in it (train-000000), whatever the limit.

    Args:
        path: a file or folder of one of the formats above.
        split: given to every prompt; where there is a column `split`, only its rows are read.
        caption_column: "" = text, caption or prompt, whichever there is first.
        image_column: "" = image or file_name.
        limit: stop after so many prompts (0 = all).
        need_images: every prompt must have an image; without it, a table's images that are not there are left out.

    Raises:
        ValueError: anything that cannot be read or makes no sense; names the file, the row and the field.
    """
    for _, prompt in _located(Path(path), split, caption_column, image_column, limit, need_images):
        yield prompt


def locate(path: str | Path, split: str, id: str, *, caption_column: str = "", image_column: str = "") -> str:
    """Where a prompt of `iter_prompts` stands, for messages: file, row, and the name of its image if it has one."""
    for where, prompt in _located(Path(path), split, caption_column, image_column, 0, False):
        if prompt.id == id:
            return where
    return f"{path}: {id}"


def _located(path: Path, split: str, caption_column: str, image_column: str, limit: int, need_images: bool) -> Iterator[tuple[str, Prompt]]:
    """Prompts, and where each stands."""
    if limit < 0:
        raise ValueError(f"limit: {limit}; expected 0 (all) or more")
    find, images = partial(_find, caption_column, image_column, need_images), (image_column,) if image_column else IMAGE_COLUMNS
    seen: dict[str, str] = {}
    other_splits: Counter[str] = Counter()
    for file in files(path, split):
        chosen: tuple[str, str | None] | None = None
        for where, values in rows(file, find):
            chosen = chosen or find(values, file)
            if chosen[1] is None:  # of .jsonl and .tar a later row may be the first to have an image
                chosen = chosen[0], _first(images, values)
            if values.get("split", split) != split:
                other_splits[str(values["split"])] += 1
                continue
            truth = values.get("truth") or None
            prompt = Prompt(
                id=_id(values["id"], where) if "id" in values else f"{split}-{len(seen):06d}",
                text=_caption(values.get(chosen[0]), chosen[0], where),
                split=split,
                image=_image(values.get(chosen[1]), chosen[1], file, where, need_images) if chosen[1] else None,
                truth=truth if truth is None or isinstance(truth, str) else json.dumps(truth, ensure_ascii=False),
            )
            _note(seen, prompt.id, where)
            name = values.get(chosen[1]) if chosen[1] else None
            yield f"{where}: {chosen[1]} {name}" if isinstance(name, str) else where, prompt
            if len(seen) == limit:
                return
    if not seen:
        others = ", ".join(f"{name}: {n}" for name, n in other_splits.items())
        raise ValueError(f"{path}: no prompts" + (f" of split {split!r} (the column split has {others})" if others else ""))


def iter_images(
    path: str | Path, *, caption_column: str = "", image_column: str = "", read: Callable[[int], bool] | None = lambda position: True
) -> Iterator[Image]:
    """The images of any split, with their captions where there are any ("" elsewhere), one at a time; images are not looked into.

    Reads what `iter_prompts` does, folders of images alone, and a single image; of the positions that `read` names (None = none: to count,
    and to find bad rows). Ids come from a column `id`, or are the image's name in the table or its path in the folder, or its position;
    `prompt_id` from such a column, or it is a hash of the caption. Errors as for `iter_prompts`; a caption or an image may be missing.
    """
    columns: dict[Path, tuple[str | None, str]] = {}

    def find(names: Iterable[str], file: Path) -> tuple[str | None, str]:
        if file not in columns:
            columns[file] = _find_image(caption_column, image_column, read is not None, names, file)
        return columns[file]

    seen: dict[str, str] = {}
    for file in _image_files(Path(path)):
        for where, values in _image_rows(file, find):
            caption, column = find(values, file)
            caption = caption or _first(CAPTIONS, values)  # as above
            text = values.get(caption) if caption else ""
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{where}: {caption} is {type(text).__name__}; expected text")
            text, value = (text or "").strip(), values.get(column)
            name, wanted = f"{len(seen):06d}", read is not None and read(len(seen))
            if isinstance(value, str) and value:
                name, value = value, _target(value, column, file, where, True)
            if isinstance(value, Path):
                value = read_bytes(value) if wanted else None
            elif wanted:
                value = _image(value, column, file, where, False)
            row = _id(values["id"], where) if "id" in values else name
            _note(seen, row, where)
            prompt = str(values.get("prompt_id") or (hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""))
            yield Image(id=row, prompt_id=prompt, text=text, image=value if wanted and isinstance(value, bytes) else b"")
    if not seen:
        raise ValueError(f"{path}: no images")


def _find_image(caption_column: str, image_column: str, pixels: bool, names: Iterable[str], file: Path) -> tuple[str | None, str]:
    """Columns of the caption, if there is one, and of the image ("" of a parquet file whose images are not wanted)."""
    if file.is_dir() or file.suffix.lower() in IMAGES:
        return "text", "image"
    found, images = list(names), (image_column,) if image_column else IMAGE_COLUMNS
    captions = (caption_column,) if caption_column else CAPTIONS
    caption, image = _first(captions, found), _first(images, found)
    if image is None:
        raise ValueError(f"{file}: no image column {' or '.join(images)} (found: {', '.join(found)}); set --image_column")
    if caption is None and caption_column:
        raise ValueError(f"{file}: no caption column {caption_column} (found: {', '.join(found)}); set --caption_column")
    return caption, image if pixels or file.suffix != ".parquet" else ""


def _image_files(path: Path) -> list[Path]:
    alone = path.is_dir() and not any(f.suffix in (".parquet", ".tar") or f.stem == "metadata" for f in path.iterdir())
    return [path] if alone and images_below(path) else files(path, "")


def _image_rows(file: Path, find: Find) -> Iterator[Values]:
    """As `rows`; images of a folder need no caption beside them, and are named, not read."""
    if not file.is_dir() and file.suffix.lower() not in IMAGES:
        yield from rows(file, find)
        return
    for image in images_below(file) if file.is_dir() else [file]:
        caption = image.with_suffix(".txt")
        text = " ".join(utf8(read_bytes(caption), str(caption)).split()) if caption.is_file() else ""
        name = image.relative_to(file).as_posix() if file.is_dir() else image.name
        yield str(image), {"id": name, "text": text, "image": image}


def _find(caption_column: str, image_column: str, need_images: bool, names: Iterable[str], file: Path) -> tuple[str, str | None]:
    if file.is_dir() or file.suffix.lower() == ".txt":  # nothing to name: the options are for the other splits' tables
        return "text", "image"
    captions = (caption_column,) if caption_column else CAPTIONS
    images = (image_column,) if image_column else IMAGE_COLUMNS
    found = list(names)
    listed = f"found: {', '.join(found)}"
    caption, image = _first(captions, found), _first(images, found)
    if caption is None:
        raise ValueError(f"{file}: no caption column {' or '.join(captions)} ({listed}); set --data.caption_column")
    if image is None and need_images:
        raise ValueError(f"{file}: no image column {' or '.join(images)} ({listed}); set --data.image_column")
    return caption, image


def _first(wanted: Iterable[str], there: Container[str]) -> str | None:
    return next((name for name in wanted if name in there), None)


def _caption(value: Any, column: str, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {column} is {type(value).__name__}; expected text")
    if not (text := (value or "").strip()):
        raise ValueError(f"{where}: {column} is empty; every row needs a caption")
    return text


def _id(value: Any, where: str) -> str:
    if not (text := "" if value is None else str(value).strip()):
        raise ValueError(f"{where}: id is empty; give every row one or leave the column out")
    return text


def _note(seen: dict[str, str], row: str, where: str) -> None:
    if row in seen:
        raise ValueError(f"{where}: id {row!r} was used before, at {seen[row]}; ids must differ")
    seen[row] = where


def _image(value: Any, column: str, file: Path, where: str, needed: bool) -> bytes | None:
    """An image column's value (bytes, {bytes, path}, or a path) to a file's bytes."""
    label = f"{where}: {column}"
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        label, value = f"{label} {value}", _linked(value, column, file, where, needed)
    if not value:
        if needed:
            raise ValueError(f"{label} is empty; every row needs an image here")
        return None
    if not isinstance(value, bytes):
        raise ValueError(f"{label} is {type(value).__name__}; expected an image's bytes or its path")
    if needed:
        image_size(value, label)
    return value


def _linked(name: str, column: str, file: Path, where: str, needed: bool) -> bytes | None:
    """The bytes of an image that a table names."""
    target = _target(name, column, file, where, needed)
    return read_bytes(target) if target else None


def _target(name: str, column: str, file: Path, where: str, needed: bool) -> Path | None:
    """The file that a table names. Metadata of an image folder may only name files in that folder."""
    is_folder = file.stem == "metadata"
    if is_folder and (os.path.isabs(name) or ".." in re.split(r"[/\\]", name)):
        raise ValueError(f"{where}: {column} {name} leads out of the folder; expected a path inside {file.parent}")
    target = file.parent / name
    if os.path.isfile(target):  # unlike Path.is_file also takes a name that is too long, such as an address
        return target
    if is_folder or needed:
        raise ValueError(f"{where}: {column} names {name}, which does not exist in {file.parent}")
    return None
