"""RichHF-18K: what several raters together said of an image, in the format in which that data set is published.

Its TFRecords (github.com/google-research-datasets/richhf-18k) hold neither images nor prompts; both come from Pick-a-Pic v1 by image id.
Three of its names mislead: `artifact_score` and `misalignment_score` are high when there is little of either (here they are called
plausibility and alignment, as in the paper, arXiv 2312.10240), and of `prompt_misalignment_label` 0 is misaligned, 1 aligned.
A different number of labels than of words is reported; other readers cut the longer list.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image as PillowImage

from limner import records
from limner.feedback import payloads
from limner.feedback.tfrecord import Value, encode_example, parse_example, read_records, write_records
from limner.images import decode, image_size

SCORES = {"plausibility": "artifact_score", "alignment": "misalignment_score", "aesthetics": "aesthetics_score", "overall": "overall_score"}
MAPS = ("artifact_map", "misalignment_map")
LABELS = "prompt_misalignment_label"
SIDE = 512  # pixels of the published maps, whatever the shape of the image
PICK_A_PIC = ("image_0_uid", "image_1_uid", "caption", "jpg_0", "jpg_1")


@dataclass(frozen=True, kw_only=True)
class RichFeedback:
    """What all raters of an image said, consolidated.

    prompt: None until joined with the images; labels: one a token of the prompt, 0 = misaligned, 1 = aligned, empty: not known;
    plausibility ... overall: 0 (worst) to 1; maps: encoded grey images, 255 = all raters marked it; filename: as published.
    """

    image_id: str
    prompt: str | None = None
    labels: tuple[int, ...] = ()
    plausibility: float | None = None
    alignment: float | None = None
    aesthetics: float | None = None
    overall: float | None = None
    artifact_map: bytes | None = None
    misalignment_map: bytes | None = None
    filename: str = ""


def tokens(prompt: str) -> list[str]:
    """The words that RichHF-18K labels: split at space , . ? ! " : ; and nothing else (not at hyphens, brackets, line breaks)."""
    return [t for t in re.split(r'[ ,.?!":;]', prompt) if t]


def read(path: Path, expected: int | None = None) -> tuple[list[RichFeedback], dict[str, Any]]:
    """Rows of a RichHF-18K TFRecord file, and a report.

    Scores come in 0-1; a file with any score above 1 is taken to be in 1-5 as a whole, and mapped by (s - 1) / 4.

    Args:
        expected: how many rows there should be: 15,810 train, 995 dev, 955 test as published.

    Returns:
        rows in file order; and {"file", "rows", "scale": "0-1" | "1-5" | None (no scores), "missing": [[image id, feature]],
        "unreadable": [[image id, feature, why]] (left out of the row), "other_size": [[image id, map, width, height]] of maps that are
        not 512x512 (kept), "repeated": image ids that occur more than once, "constant": scores that are equal in all of several rows}.

    Raises:
        ValueError: as `read_records`; a record that is no Example, has no filename, or a score of neither scale.
    """
    rows, report = list[RichFeedback](), _report(path, missing=[], unreadable=[], other_size=[])
    for i, data in enumerate(read_records(path, expected)):
        where = f"{path}: record {i}"
        features = parse_example(data, where)
        rows.append(_row(features, where, report))
    scored = {name: [v for r in rows if (v := getattr(r, name)) is not None] for name in SCORES}
    flat = [v for values in scored.values() for v in values]
    if flat:
        report["scale"] = "1-5" if max(flat) > 1 else "0-1"
    if report["scale"] == "1-5":
        if min(flat) < 1:
            raise ValueError(f"{path}: scores from {min(flat):g} to {max(flat):g}; expected all in 0-1 or all in 1-5")
        rows = [replace(r, **{n: (v - 1) / 4 for n in SCORES if (v := getattr(r, n)) is not None}) for r in rows]
    report["rows"] = len(rows)
    report["repeated"] = [i for i, n in Counter(r.image_id for r in rows).items() if n > 1]
    report["constant"] = [name for name, values in scored.items() if len(values) > 1 and len(set(values)) == 1]
    return rows, report


def _report(path: Path, **lists: list) -> dict[str, Any]:
    return {"file": path.name, "rows": 0, "scale": None, **lists, "repeated": [], "constant": []}


def _row(features: Mapping[str, Value], where: str, report: dict[str, Any]) -> RichFeedback:
    name = _first(features, "filename", bytes)
    if not name:
        raise ValueError(f"{where}: no feature filename; found {', '.join(sorted(features)) or 'none'}")
    filename = name.decode(errors="replace")
    image_id = filename.split("/")[-1].split(".")[0]
    values: dict[str, Any] = {}
    for ours, theirs in SCORES.items():
        score = _first(features, theirs, float)
        if score is not None and not (math.isfinite(score) and 0 <= score <= 5):
            raise ValueError(f"{where} ({image_id}): {theirs} is {score:g}; expected 0-1 or 1-5")
        values[ours] = score
    for name_of_map in MAPS:
        values[name_of_map] = data = _first(features, name_of_map, bytes)
        if data is not None:
            try:
                size = image_size(data, name_of_map)
                if size != (SIDE, SIDE):
                    report["other_size"].append([image_id, name_of_map, *size])
            except ValueError as error:
                report["unreadable"].append([image_id, name_of_map, str(error)])
                values[name_of_map] = None
    text = _first(features, LABELS, bytes)
    labels = (text or b"").decode(errors="replace").split()
    if not all(label in ("0", "1") for label in labels):
        report["unreadable"].append([image_id, LABELS, f"{next(v for v in labels if v not in ('0', '1'))!r}; expected 0 or 1"])
        labels = []
    present = {"filename": name, **{SCORES[n]: values[n] for n in SCORES}, **{n: _first(features, n, bytes) for n in MAPS}, LABELS: text}
    report["missing"] += [[image_id, feature] for feature, value in present.items() if value is None]
    return RichFeedback(image_id=image_id, labels=tuple(int(v) for v in labels), filename=filename, **values)


def _first(features: Mapping[str, Value], name: str, kind: type) -> Any:
    """The first value of a feature, None if there is none or it is of another kind."""
    values = features.get(name, [])
    return values[0] if values and isinstance(values[0], kind) else None


def write(path: Path, rows: Iterable[RichFeedback]) -> dict[str, Any]:
    """Rows to a TFRecord file with the published feature names; scores in 0-1, what a row lacks is left out.

    Returns:
        {"rows", "other_size": [[image id, map, width, height]]}: maps that are not 512x512 are written as they are.

    Raises:
        ValueError: labels that do not fit the prompt, an image id with / or . in it (it would not come back), or a map that is no image.
    """
    other_size = list[list]()

    def encoded() -> Iterator[bytes]:
        for row in rows:
            filename = row.filename or f"{row.image_id}.png"
            if filename.split("/")[-1].split(".")[0] != row.image_id:
                raise ValueError(f"image {row.image_id}: file name {filename} does not give its id back (it ends at the first dot)")
            if row.prompt is not None and row.labels and len(row.labels) != len(tokens(row.prompt)):
                raise ValueError(f"image {row.image_id}: {len(row.labels)} labels for {len(tokens(row.prompt))} words of {row.prompt!r}")
            features: dict[str, list] = {"filename": [filename.encode()]}
            features |= {theirs: [float(v)] for ours, theirs in SCORES.items() if (v := getattr(row, ours)) is not None}
            for name in MAPS:
                if (data := getattr(row, name)) is not None:
                    features[name] = [data]
                    size = image_size(data, f"image {row.image_id}: {name}")
                    other_size.extend([[row.image_id, name, *size]] if size != (SIDE, SIDE) else [])
            if row.labels or (row.prompt is not None and not tokens(row.prompt)):
                features[LABELS] = [" ".join(map(str, row.labels)).encode()]
            yield encode_example(features)

    return {"rows": write_records(path, encoded()), "other_size": other_size}


def join(rows: Iterable[RichFeedback], prompts: Mapping[str, str]) -> tuple[list[RichFeedback], dict[str, Any]]:
    """Rows with their prompts, by image id, and a report.

    Where the labels are not as many as the prompt's words, nobody knows which belongs to which: the row is kept without labels.

    Returns:
        all rows in order; and {"rows", "joined", "without_prompt": image ids, "mismatched": [[image id, words, labels]]}.
    """
    joined, absent, mismatched = list[RichFeedback](), list[str](), list[list]()
    for row in rows:
        prompt = prompts.get(row.image_id)
        if prompt is None:
            absent.append(row.image_id)
            joined.append(row)
            continue
        words = len(tokens(prompt))
        fits = not row.labels or len(row.labels) == words
        if not fits:
            mismatched.append([row.image_id, words, len(row.labels)])
        joined.append(replace(row, prompt=prompt, labels=row.labels if fits else ()))
    return joined, {"rows": len(joined), "joined": len(joined) - len(absent), "without_prompt": absent, "mismatched": mismatched}


def pick_a_pic(paths: Iterable[Path], ids: Collection[str]) -> Iterator[records.Image]:
    """The images of Pick-a-Pic v1 with these ids, each once though several comparisons show it; `text` is its caption.

    The images are some 190 GB: ids are read first, images only from row groups that hold one that is wanted.

    Raises:
        ValueError: not parquet, or without the published columns; names the file.
    """
    wanted = set(ids)
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet ({error})") from error
        if missing := [c for c in PICK_A_PIC if c not in file.schema_arrow.names]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; expected Pick-a-Pic v1 with {', '.join(PICK_A_PIC)}")
        for group in range(file.num_row_groups):
            uids = file.read_row_group(group, list(PICK_A_PIC[:2])).to_pydict()
            if wanted.isdisjoint(uids["image_0_uid"]) and wanted.isdisjoint(uids["image_1_uid"]):
                continue
            for pair in file.read_row_group(group, list(PICK_A_PIC)).to_pylist():
                for side in (0, 1):
                    uid, data = pair[f"image_{side}_uid"], pair[f"jpg_{side}"]
                    if uid in wanted and data:
                        wanted.discard(uid)
                        yield records.Image(id=uid, prompt_id=uid, text=pair["caption"] or "", image=data)


def to_feedback(row: RichFeedback, rater: str = "richhf") -> list[records.Feedback]:
    """What a row says as that of one rater: ratings (mapped back to 1-5) and words. Maps are not points, and are left out."""
    ratings = {n: 1 + 4 * v for n in SCORES if (v := getattr(row, n)) is not None}
    found = [payloads.make(row.image_id, rater, "ratings", ratings)] if ratings else []
    if row.prompt is not None and row.labels:
        words = {"tokens": tokens(row.prompt), "misaligned": [i for i, label in enumerate(row.labels) if label == 0]}
        found.append(payloads.make(row.image_id, rater, "words", words))
    return found


def to_table(rows: Iterable[RichFeedback]) -> pa.Table:
    """Rows as an Arrow table, for a step's shards."""
    return pa.Table.from_pylist([asdict(r) for r in rows], schema=records.schema(RichFeedback))


def from_table(table: pa.Table) -> list[RichFeedback]:
    """Rows of a table that `to_table` made."""
    names = records.schema(RichFeedback).names
    return [RichFeedback(**{**values, "labels": tuple(values["labels"])}) for values in table.select(names).to_pylist()]


def map_values(data: bytes, where: str = "map") -> NDArray[np.float32]:
    """An encoded map to (H, W) in [0, 1].

    Raises:
        ValueError: not an image.
    """
    grey = decode(data, where).convert("L")  # of grey made RGB: the same values
    return np.asarray(grey, dtype=np.float32) / np.float32(255)


def encode_map(values: ArrayLike) -> bytes:
    """A map (H, W) in [0, 1] to a grey PNG of 8 bits; of three raters the levels are 0, 85, 170 and 255.

    Raises:
        ValueError: another shape or range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"a map of shape {array.shape}; expected (H, W) in [0, 1]")
    buffer = io.BytesIO()
    PillowImage.fromarray((array * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
