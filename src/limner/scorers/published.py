"""Published sets of choices, each read in the schema it is published in, as `Choice` rows or as what is wrong with a row.

hpd_v1       JSON, arXiv 2303.14420: prompt, file_path[2-4], human_preference (position of the chosen one), user_hash
hpd_v2       JSON, arXiv 2306.09341: train: prompt, file_path[2], human_preference[2], one-hot, user_hash; test: prompt, image_path[K],
             rank[K] of the average, and of each rater in raw_annotations: rank[K], user_hash
hpd_v3       JSON, arXiv 2508.03789: prompt, path1 (the preferred one), path2, choice_dist, confidence, model1, model2
pick_a_pic   parquet, arXiv 2305.01569, v1 and v2, with images or without: caption, label_0, label_1, jpg_0, jpg_1, has_label ...
imagereward  JSON or parquet, arXiv 2304.05977: see `imagereward`
evalmuse     JSON, arXiv 2412.18150: an image a row with ratings of alignment by several people; ranked by their mean within a prompt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from limner.records import Choice
from limner.scorers.imagereward import imagereward
from limner.scorers.rows import Dropped, Found, checked, choice, load_json, parquet_files, parquet_rows, prompt_id


def read_choices(name: str, source: Path, *, min_confidence: float = 0.0, soft_labels: bool = False, each_rater: bool = False) -> Found:
    """The rows of a published set, in its order.

    Args:
        name: a key of `FORMATS`.
        source: a file, or a folder of parquet shards.
        min_confidence: of hpd_v3: rows below it are dropped (HPSv3 trained on 0.95 and more).
        soft_labels: of hpd_v3: shares of choice_dist's votes; else the first image is the chosen one.
        each_rater: of hpd_v2's test.json: a row for each rater's ranks instead of one for their average.

    Raises:
        ValueError: a file that is not there, unreadable or of another schema; names file, row and field.
    """
    if name not in FORMATS:
        raise ValueError(f"format: {name!r}; expected one of {', '.join(FORMATS)}")
    if name == "hpd_v3":
        yield from _hpd_v3(source, min_confidence, soft_labels)
    elif name == "hpd_v2":
        yield from _hpd_v2(source, each_rater)
    else:
        yield from FORMATS[name](source)


def _hpd_v1(source: Path) -> Found:
    for n, where, row in checked(source, load_json(source), {"prompt": str, "file_path": list, "human_preference": int}):
        count, chosen = len(row["file_path"]), row["human_preference"]
        if not 0 <= chosen < count:
            yield Dropped(where, "human_preference points at no image")
            continue
        said = [float(i == chosen) for i in range(count)]
        yield choice("hpd_v1", n, row["prompt"], "choice", said, row["file_path"], rater=str(row.get("user_hash") or ""))


def _hpd_v2(source: Path, each_rater: bool = False) -> Found:
    rows = load_json(source)
    if rows and "rank" in rows[0]:
        for n, where, row in checked(source, rows, {"prompt": str, "image_path": list, "rank": list}):
            if each_rater:
                yield from _raters(n, where, row)
            else:
                yield choice("hpd_v2", n, row["prompt"], "ranking", row["rank"], row["image_path"])
        return
    if each_rater:
        raise ValueError(f"each_rater: {source} is no test.json; only that has several raters a row")
    for n, where, row in checked(source, rows, {"prompt": str, "file_path": list, "human_preference": list}):
        if sorted(row["human_preference"]) != [0, 1]:
            yield Dropped(where, "human_preference is not one-hot")
            continue
        rater = str(row.get("user_hash") or "")
        yield choice("hpd_v2", n, row["prompt"], "choice", row["human_preference"], row["file_path"], rater=rater)


def _raters(number: int, where: str, row: dict[str, Any]) -> Found:
    """A row a rater. The published description does not say that `rank` there means what it means in the average: it is checked."""
    found = row.get("raw_annotations", row.get("raw_annotation"))  # the file's name, and the README's
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}: no raw_annotations (found: {', '.join(row)}); leave each_rater out for the average")
    count = len(row["image_path"])
    ranks = [r["rank"] if isinstance(r, dict) and isinstance(r.get("rank"), list) else [] for r in found]
    if not all(len(r) == count and all(isinstance(v, int | float) for v in r) for r in [*ranks, row["rank"]]):
        yield Dropped(where, "raw_annotations do not rank every image")
        return
    sums = [sum(r[i] for r in ranks) for i in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    if sum((sums[i] - sums[j]) * (row["rank"][i] - row["rank"][j]) for i, j in pairs) <= 0 < len({*row["rank"]}) - 1:
        yield Dropped(where, "raw_annotations contradict the averaged rank")
        return
    for k, (said, r) in enumerate(zip(ranks, found)):
        made = choice("hpd_v2", number, row["prompt"], "ranking", said, row["image_path"], rater=str(r.get("user_hash") or ""))
        yield replace(made, id=f"{made.id}-{k}")


def _hpd_v3(source: Path, min_confidence: float = 0.0, soft_labels: bool = False) -> Found:
    for n, where, row in checked(source, load_json(source), {"prompt": str, "path1": str, "path2": str}):
        confidence = row.get("confidence")
        votes: Any = row.get("choice_dist")
        if row["path1"] == row["path2"]:
            yield Dropped(where, "both images are the same")
            continue
        if min_confidence and (confidence is None or confidence < min_confidence):
            yield Dropped(where, f"confidence below {min_confidence:g}" if confidence is not None else "no confidence")
            continue
        said = [1.0, 0.0]
        if soft_labels:
            counted = isinstance(votes, list) and len(votes) == 2 and all(isinstance(v, int | float) for v in votes)
            if not counted or sum(votes) <= 0 or votes[0] < votes[1]:
                yield Dropped(where, "choice_dist does not hold the votes for path1 and path2")
                continue
            said = [v / sum(votes) for v in votes]
        models = tuple(str(row[m]) for m in ("model1", "model2") if row.get(m))
        # the preferred one always comes first: whoever reads positions would learn them
        turned = int(prompt_id(row["path1"] + row["path2"]), 16) % 2
        files = [row["path1"], row["path2"]]
        if turned:
            said, files, models = said[::-1], files[::-1], models[::-1]
        yield choice("hpd_v3", n, row["prompt"], "choice", said, files, generators=models if len(models) == 2 else ())


def _pick_a_pic(source: Path) -> Found:
    needed = ["caption", "label_0", "label_1", "image_0_uid", "image_1_uid"]
    optional = ("jpg_0", "jpg_1", "has_label", "user_id", "model_0", "model_1")
    rows = (row for path in parquet_files(source) for row in parquet_rows(path, needed, optional))
    for number, (where, row) in enumerate(rows):
        yield _pick_a_pic_row(row, number, where)


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
    return choice(
        "pick_a_pic", number, row["caption"] or "", "choice", labels, [row["image_0_uid"], row["image_1_uid"]],
        images=tuple(p for p in pictures if p), generators=models if len(models) == 2 else (),
        rater="" if row.get("user_id") is None else str(row["user_id"]),
    )  # fmt: skip


def _evalmuse(source: Path) -> Found:
    groups: dict[str, list[tuple[str, float]]] = {}
    for _, where, row in checked(source, load_json(source), {"prompt": str, "img_path": str, "total_score": (list, int, float)}):
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
        yield choice("evalmuse", n, text, "ranking", ranks, files, generators=models)


FORMATS: dict[str, Callable[[Path], Found]] = {
    "hpd_v1": _hpd_v1, "hpd_v2": _hpd_v2, "hpd_v3": _hpd_v3, "pick_a_pic": _pick_a_pic, "imagereward": imagereward, "evalmuse": _evalmuse,
}  # fmt: skip
