"""Published sets of choices, each read in the schema it is published in, as `Choice` rows or as what is wrong with a row.

hpd_v1       JSON, arXiv 2303.14420: prompt, file_path[2-4], human_preference (position of the chosen one), user_hash
hpd_v2       JSON, arXiv 2306.09341: train: prompt, file_path[2], human_preference[2], one-hot; test: prompt, image_path[K], rank[K]
hpd_v3       JSON, arXiv 2508.03789: prompt, path1 (the preferred one), path2, choice_dist, confidence, model1, model2
pick_a_pic   parquet, arXiv 2305.01569, v1 and v2, with images or without: caption, label_0, label_1, jpg_0, jpg_1, has_label ...
imagereward  JSON, arXiv 2304.05977: prompt, generations[K], ranking[K]; 1 is best, equal ranks are ties
evalmuse     JSON, arXiv 2412.18150: an image a row with ratings of alignment by several people; ranked by their mean within a prompt
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from limner.records import Choice


class Dropped(NamedTuple):
    """A row that says nothing: where it stands, and why not."""

    where: str
    reason: str


Found = Iterator[Choice | Dropped]


def read_choices(name: str, source: Path, *, min_confidence: float = 0.0, soft_labels: bool = False) -> Found:
    """The rows of a published set, in its order.

    Args:
        name: a key of `FORMATS`.
        source: a file, or a folder of parquet shards.
        min_confidence: of hpd_v3: rows below it are dropped (HPSv3 trained on 0.95 and more).
        soft_labels: of hpd_v3: shares of choice_dist's votes; else the first image is the chosen one.

    Raises:
        ValueError: a file that is not there, unreadable or of another schema; names file, row and field.
    """
    if name not in FORMATS:
        raise ValueError(f"format: {name!r}; expected one of {', '.join(FORMATS)}")
    if name == "hpd_v3":
        yield from _hpd_v3(source, min_confidence, soft_labels)
    else:
        yield from FORMATS[name](source)


def prompt_id(text: str) -> str:
    """Rows of one text have one id."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _choice(name: str, number: int, text: str, kind: str, said: list[float], files: list[str], **more: Any) -> Choice:
    return Choice(
        id=f"{name}-{number:07d}", prompt_id=prompt_id(text), text=text, kind=kind, said=tuple(map(float, said)), files=tuple(files), **more
    )


def _load(source: Path) -> list[Any]:
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


def _checked(source: Path, rows: list[Any], fields: dict[str, type | tuple[type, ...]]) -> Iterator[tuple[int, str, dict[str, Any]]]:
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


def _hpd_v1(source: Path) -> Found:
    for n, where, row in _checked(source, _load(source), {"prompt": str, "file_path": list, "human_preference": int}):
        count, chosen = len(row["file_path"]), row["human_preference"]
        if not 0 <= chosen < count:
            yield Dropped(where, "human_preference points at no image")
            continue
        said = [float(i == chosen) for i in range(count)]
        yield _choice("hpd_v1", n, row["prompt"], "choice", said, row["file_path"], rater=str(row.get("user_hash") or ""))


def _hpd_v2(source: Path) -> Found:
    rows = _load(source)
    if rows and "rank" in rows[0]:
        for n, _, row in _checked(source, rows, {"prompt": str, "image_path": list, "rank": list}):
            yield _choice("hpd_v2", n, row["prompt"], "ranking", row["rank"], row["image_path"])
        return
    for n, where, row in _checked(source, rows, {"prompt": str, "file_path": list, "human_preference": list}):
        if sorted(row["human_preference"]) != [0, 1]:
            yield Dropped(where, "human_preference is not one-hot")
            continue
        yield _choice("hpd_v2", n, row["prompt"], "choice", row["human_preference"], row["file_path"])


def _hpd_v3(source: Path, min_confidence: float = 0.0, soft_labels: bool = False) -> Found:
    for n, where, row in _checked(source, _load(source), {"prompt": str, "path1": str, "path2": str}):
        confidence, votes = row.get("confidence"), row.get("choice_dist")
        if row["path1"] == row["path2"]:
            yield Dropped(where, "both images are the same")
            continue
        if min_confidence and (confidence is None or confidence < min_confidence):
            yield Dropped(where, f"confidence below {min_confidence:g}" if confidence is not None else "no confidence")
            continue
        said = [1.0, 0.0]
        if soft_labels:
            if not isinstance(votes, list) or len(votes) != 2 or sum(votes) <= 0 or votes[0] < votes[1]:
                yield Dropped(where, "choice_dist does not hold the votes for path1 and path2")
                continue
            said = [v / sum(votes) for v in votes]
        models = tuple(str(row[m]) for m in ("model1", "model2") if row.get(m))
        # the preferred one always comes first: whoever reads positions would learn them
        turned = int(prompt_id(row["path1"] + row["path2"]), 16) % 2
        files = [row["path1"], row["path2"]]
        if turned:
            said, files, models = said[::-1], files[::-1], models[::-1]
        yield _choice("hpd_v3", n, row["prompt"], "choice", said, files, generators=models if len(models) == 2 else ())


def _pick_a_pic(source: Path) -> Found:
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not all(p.is_file() for p in paths):
        raise ValueError(f"source: {source} holds no parquet file")
    needed, optional = ["caption", "label_0", "label_1", "image_0_uid", "image_1_uid"], ["jpg_0", "jpg_1", "has_label", "user_id"]
    number = 0
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as parquet ({error})") from error
        there = file.schema_arrow.names
        if missing := [c for c in needed if c not in there]:
            raise ValueError(f"{path}: no column {', '.join(missing)} (found: {', '.join(there)}); is it another format?")
        columns = needed + [c for c in (*optional, "model_0", "model_1") if c in there]
        begun = number
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                yield _pick_a_pic_row(row, number, f"{path.name}: row {number - begun}")
                number += 1


def _pick_a_pic_row(row: dict[str, Any], number: int, where: str) -> Choice | Dropped:
    if row.get("has_label") is False:
        return Dropped(where, "has_label is false")
    labels = [row["label_0"], row["label_1"]]
    if None in labels:
        return Dropped(where, "no label")
    pictures = (row.get("jpg_0"), row.get("jpg_1"))
    if "jpg_0" in row and not all(pictures):
        return Dropped(where, "an image is missing")
    models = tuple(str(row[m]) for m in ("model_0", "model_1") if row.get(m))
    return _choice(
        "pick_a_pic", number, row["caption"] or "", "choice", labels, [row["image_0_uid"], row["image_1_uid"]],
        images=tuple(p for p in pictures if p), generators=models if len(models) == 2 else (),
        rater="" if row.get("user_id") is None else str(row["user_id"]),
    )  # fmt: skip


def _imagereward(source: Path) -> Found:
    for n, where, row in _checked(source, _load(source), {"prompt": str, "generations": list, "ranking": list}):
        if len(set(row["generations"])) < len(row["generations"]):
            yield Dropped(where, "an image is there twice")
            continue
        yield _choice("imagereward", n, row["prompt"], "ranking", row["ranking"], row["generations"])


def _evalmuse(source: Path) -> Found:
    groups: dict[str, list[tuple[str, float]]] = {}
    for _, where, row in _checked(source, _load(source), {"prompt": str, "img_path": str, "total_score": (list, int, float)}):
        scores = row["total_score"] if isinstance(row["total_score"], list) else [row["total_score"]]
        useless = row.get("promt_meaningless") or 0  # so spelled there: each rater's yes or no, or their mean
        if (sum(useless) / len(useless) if isinstance(useless, list) else useless) > 0.5:
            yield Dropped(where, "most raters call the prompt meaningless")
        elif not scores or not all(isinstance(s, int | float) for s in scores):
            yield Dropped(where, "no rating")
        else:
            groups.setdefault(row["prompt"], []).append((row["img_path"], sum(scores) / len(scores)))
    for n, (text, images) in enumerate(groups.items()):
        means = [round(mean, 6) for _, mean in images]
        ranks = [1.0 + sum(other > mean for other in means) for mean in means]
        files = [file for file, _ in images]
        # images lie in a folder a model
        models = tuple(Path(f).parts[0] for f in files) if all(len(Path(f).parts) > 1 for f in files) else ()
        yield _choice("evalmuse", n, text, "ranking", ranks, files, generators=models)


FORMATS: dict[str, Callable[[Path], Found]] = {
    "hpd_v1": _hpd_v1, "hpd_v2": _hpd_v2, "hpd_v3": _hpd_v3, "pick_a_pic": _pick_a_pic, "imagereward": _imagereward, "evalmuse": _evalmuse,
}  # fmt: skip
