"""ImageRewardDB (arXiv 2304.05977) in the shapes that it is published in; ranks: 1 is best, equal ones are ties.

JSON      prompt, generations[K], ranking[K]: the repository's test file
          prompt_id, prompt, image_path, image_amount_in_total, rank: an image a row, as in the archives of the dataset
parquet   the same with `image` instead of image_path: the configs 1k to 8k, saved
          prompt_id, prompt, image[K], rank[K]: the configs `_group`
          prompt, img_better, img_worse: the configs `_pair`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from limner.records import Choice
from limner.scorers.rows import Dropped, Found, checked, choice, load_json, open_parquet, parquet_files, parquet_rows, prompt_id

AN_IMAGE = ["prompt_id", "prompt", "image", "image_amount_in_total", "rank"]


def imagereward(source: Path) -> Found:
    if source.is_dir() or source.suffix == ".parquet":
        yield from _parquet(source)
        return
    rows = load_json(source)
    if rows and isinstance(rows[0], dict) and "image_path" in rows[0]:
        fields: dict[str, Any] = {"prompt_id": str, "prompt": str, "image_path": str, "image_amount_in_total": int, "rank": int}
        yield from _images((where, row, row["image_path"], None) for _, where, row in checked(source, rows, fields))
        return
    for n, where, row in checked(source, rows, {"prompt": str, "generations": list, "ranking": list}):
        if len(set(row["generations"])) < len(row["generations"]):
            yield Dropped(where, "an image is there twice")
            continue
        yield choice("imagereward", n, row["prompt"], "ranking", row["ranking"], row["generations"])


def _parquet(source: Path) -> Found:
    for number, path in enumerate(parquet_files(source)):
        there = open_parquet(path).schema_arrow.names
        if "image_amount_in_total" in there:
            shown = enumerate(parquet_rows(path, AN_IMAGE))
            yield from _images(((w, r, *_picture(r["image"], f"{r['prompt_id']}/{n}")) for n, (w, r) in shown), number)
        elif "img_better" in there:
            for n, (where, row) in enumerate(parquet_rows(path, ["prompt", "img_better", "img_worse"])):
                yield _pair(f"imagereward-{number}", n, where, row)
        else:
            for n, (where, row) in enumerate(parquet_rows(path, ["prompt_id", "prompt", "image", "rank"])):
                pictures = [_picture(i, f"{row['prompt_id']}/{k}") for k, i in enumerate(row["image"] or [])]
                yield _row(f"imagereward-{number}", n, where, row["prompt"], "ranking", row["rank"] or [], pictures)


def _pair(name: str, number: int, where: str, row: dict[str, Any]) -> Choice | Dropped:
    """The better one always comes first: whoever reads positions would learn them."""
    said, shown = [1.0, 0.0], [_picture(row[c], f"{name}-{number}/{c}") for c in ("img_better", "img_worse")]
    if int(prompt_id(shown[0][0] + shown[1][0]), 16) % 2:
        said, shown = said[::-1], shown[::-1]
    return _row(name, number, where, row["prompt"], "choice", said, shown)


def _images(rows: Iterable[tuple[str, dict[str, Any], str, bytes | None]], file: int = 0) -> Found:
    """An image a row to a ranking a prompt: neighbours of one prompt_id, image_amount_in_total of them."""
    for number, (_, part) in enumerate(groupby(rows, key=lambda row: row[1]["prompt_id"])):
        found = list(part)
        where, first = found[0][:2]
        if len(found) != first["image_amount_in_total"]:
            yield Dropped(where, "not all images of the prompt are there")
            continue
        ranks, shown = [row["rank"] for _, row, *_ in found], [(name, data) for _, _, name, data in found]
        yield _row(f"imagereward-{file}", number, where, first["prompt"], "ranking", ranks, shown)


def _row(
    name: str, number: int, where: str, text: str, kind: str, said: list[float], shown: Sequence[tuple[str, bytes | None]]
) -> Choice | Dropped:
    if None in said:
        return Dropped(where, "no label")
    pictures = tuple(data for _, data in shown if data)
    if pictures and len(pictures) < len(shown):
        return Dropped(where, "an image is missing")
    return choice(name, number, text or "", kind, said, [file for file, _ in shown], images=pictures)


def _picture(value: Any, name: str) -> tuple[str, bytes | None]:
    """Name and bytes of an image as the package datasets keeps one: {bytes, path}, or a path alone."""
    if isinstance(value, dict):
        return (Path(value.get("path") or name).name, value["bytes"]) if value.get("bytes") else (str(value.get("path") or name), None)
    return str(value or name), None
