"""The steps that take choices in and out: a published set to a folder of `Choice` rows, and a folder to Pick-a-Pic's columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from limner.images import image_size
from limner.records import Choice, to_table
from limner.scorers.choices import Choices, pairs, problem
from limner.scorers.published import read_choices
from limner.scorers.rows import Dropped
from limner.store import Step, input_hash, open_step, write_atomic

SHOWN = 5  # places that the report names for each reason


@dataclass(frozen=True, kw_only=True)
class Import:
    """`limner scorer import`: a published set of choices to the common record.

    Args:
        format: hpd_v1, hpd_v2 (train.json or test.json), hpd_v3, pick_a_pic (v1 or v2), imagereward, evalmuse, or feedback (of our own).
        source: the JSON file; for pick_a_pic and imagereward also a parquet file or a folder of them; for feedback JSONL or parquet of
            Feedback rows.
        images: the folder that the source names its images from ("" = they are not at hand: rankings alone); for feedback the step's folder
            of the images that were shown, such as a pool.
        output_dir: where the rows are written.
        embed: copy the images into the rows (pick_a_pic brings them along anyway).
        min_confidence: of hpd_v3: rows below it are dropped.
        soft_labels: of hpd_v3: labels are shares of the votes, not 1 and 0.
        each_rater: of hpd_v2's test.json: a row for each rater instead of one for their average.
        limit: use the first so many rows of the source (0 = all).
        rows_per_shard: how often work is saved.
    """

    format: Literal["hpd_v1", "hpd_v2", "hpd_v3", "pick_a_pic", "imagereward", "evalmuse", "feedback"] = "hpd_v1"
    source: str = ""
    images: str = ""
    output_dir: str = ""
    embed: bool = False
    min_confidence: float = 0.0
    soft_labels: bool = False
    each_rater: bool = False
    limit: int = 0
    rows_per_shard: int = 256


@dataclass(frozen=True, kw_only=True)
class Export:
    """`limner scorer export`: choices to parquet in Pick-a-Pic's columns.

    Args:
        choices: a folder that `limner scorer import` wrote.
        images: where its files lie, if elsewhere than at import.
        output_dir: where the parquet files are written.
        rows_per_shard: choices a file.
    """

    choices: str = ""
    images: str = ""
    output_dir: str = ""
    rows_per_shard: int = 256


def import_choices(config: Import, found: Iterable[Choice | Dropped] | None = None) -> dict[str, Any]:
    """Write the rows of a published set and `report.json`: how many rows, images, ties, and what was dropped, why and where.

    Args:
        found: the source's rows, where they are not of a published set.

    Raises:
        ValueError: another schema than the format's, or not one row left; names file, row and field.
    """
    if not config.source or not config.output_dir:
        raise ValueError(f"{'source' if not config.source else 'output_dir'}: not set")
    source, root, folder = Path(config.source), Path(config.images), Path(config.output_dir)
    if config.images and not root.is_dir():
        raise ValueError(f"images: there is no folder {root}")
    names = ("format", "images", "embed", "min_confidence", "soft_labels", "limit", "rows_per_shard", *["each_rater"] * config.each_rater)
    decides = {k: getattr(config, k) for k in names}
    step = open_step(folder, "choices", decides, {"source": _identity(source)})
    if found is None:
        found = read_choices(
            config.format, source, min_confidence=config.min_confidence, soft_labels=config.soft_labels, each_rater=config.each_rater
        )
    if config.limit:
        found = (row for row, _ in zip(found, range(config.limit)))
    dropped: dict[str, list[str]] = {}
    report = write_choices(step, _kept(found, root if config.images else None, config.embed, dropped), config.rows_per_shard)
    report["dropped"] = {reason: {"rows": len(places), "first": places[:SHOWN]} for reason, places in sorted(dropped.items())}
    if not report["rows"]:
        reasons = ", ".join(f"{reason}: {len(places)}" for reason, places in dropped.items())
        raise ValueError(f"{source}: no row is left{f' (dropped: {reasons})' if reasons else ': it is empty'}")
    step.finish(report)
    write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _identity(source: Path) -> str:
    """Names and sizes: the published sets have hundreds of gigabytes."""
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    return " ".join(f"{p.name}:{p.stat().st_size}" for p in paths if p.is_file())


def _kept(found: Iterable[Choice | Dropped], root: Path | None, embed: bool, dropped: dict[str, list[str]]) -> Iterator[Choice]:
    for row in found:
        if isinstance(row, Dropped):
            dropped.setdefault(row.reason, []).append(row.where)
            continue
        wrong = problem(row)
        if not wrong and root is not None and not row.images:
            row, wrong = _with_images(row, root, embed)
        if not wrong:
            wrong = next((w for data in row.images if (w := _unreadable(data))), "")
        if wrong:
            dropped.setdefault(wrong, []).append(row.id)
        else:
            yield row


def _with_images(row: Choice, root: Path, embed: bool) -> tuple[Choice, str]:
    """The row, its images copied in if asked for, and what is wrong with a file."""
    images = []
    for name in row.files:
        try:
            data = (root / name).read_bytes()
        except OSError:
            return row, "image file is missing"
        if wrong := _unreadable(data):
            return row, wrong
        images.append(data)
    return (replace(row, images=tuple(images)) if embed else row), ""


def _unreadable(data: bytes) -> str:
    try:
        image_size(data)
    except ValueError:
        return "image is not readable"
    return ""


def write_choices(step: Step, rows: Iterable[Choice], rows_per_shard: int = 256) -> dict[str, Any]:
    """Write rows as shards and count them. All anew: which rows a shard has depends on the image files that were there."""
    counts: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    prompts, generators, raters = set[str](), set[str](), set[str]()
    waiting: list[Choice] = []
    number = 0

    def flush() -> None:
        nonlocal number
        if waiting:
            step.write(number, to_table(Choice, waiting))
            number += 1
            waiting.clear()

    for row in rows:
        known = pairs(row)
        ties = sum(p == 0.5 for *_, p in known)
        counts.update(rows=1, images=len(row.files), pairs=len(known), ties=ties, without_any_order=int(ties == len(known)))
        sizes[len(row.files)] += 1
        prompts.add(row.prompt_id)
        generators.update(row.generators)
        raters.update({row.rater} - {""})
        waiting.append(row)
        if len(waiting) == rows_per_shard:
            flush()
    flush()
    step.drop(number)
    return {
        **{k: counts[k] for k in ("rows", "images", "pairs", "ties", "without_any_order")}, "prompts": len(prompts), "raters": len(raters),
        "generators": sorted(generators), "images_a_row": {str(k): v for k, v in sorted(sizes.items())},
    }  # fmt: skip


PICK_A_PIC = pa.schema(
    [
        ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()), ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()), ("image_0_uid", pa.string()), ("image_0_url", pa.string()), ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
        ("model_0", pa.string()), ("model_1", pa.string()), ("ranking_id", pa.int64()), ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64()),
    ]
)  # fmt: skip


def export_choices(config: Export) -> int:
    """Write every pair of which something is known as a row of Pick-a-Pic's columns; returns how many.

    The pairs of one row share its number as ranking_id, raters are numbered in order of appearance, URLs are empty, created_at is null.
    Images keep their encoding, although the columns are called jpg. best_image_uid of a tie is "tie".

    Raises:
        ValueError: not a folder of choices, or an image that is not at hand.
    """
    if not config.choices or not config.output_dir:
        raise ValueError(f"{'choices' if not config.choices else 'output_dir'}: not set")
    choices = Choices(Path(config.choices), images=Path(config.images) if config.images else None)
    counts = Counter[str]()
    for row in choices.rows:
        counts[row.prompt_id] += len(pairs(row))
    raters = {name: i for i, name in enumerate(dict.fromkeys(row.rater for row in choices.rows))}
    step = open_step(Path(config.output_dir), "pick_a_pic", {"choices": config.choices, "rows_per_shard": config.rows_per_shard}, {
        "choices": input_hash(choices.folder)
    })  # fmt: skip
    done = 0
    for number, start in enumerate(range(0, len(choices), config.rows_per_shard)):
        out: list[dict[str, Any]] = []
        for index in range(start, min(start + config.rows_per_shard, len(choices))):
            row, pictures = choices.rows[index], choices.encoded(index)
            for i, j, p in pairs(row):
                out.append({
                    "are_different": pictures[i] != pictures[j],
                    "best_image_uid": "tie" if p == 0.5 else row.files[i if p > 0.5 else j], "caption": row.text, "created_at": None,
                    "has_label": True, "image_0_uid": row.files[i], "image_0_url": "", "image_1_uid": row.files[j], "image_1_url": "",
                    "jpg_0": pictures[i], "jpg_1": pictures[j], "label_0": p, "label_1": 1 - p,
                    "model_0": row.generators[i] if row.generators else "", "model_1": row.generators[j] if row.generators else "",
                    "ranking_id": index, "user_id": raters[row.rater], "num_example_per_prompt": counts[row.prompt_id],
                    "__index_level_0__": done + len(out),
                })  # fmt: skip
        step.write(number, pa.Table.from_pylist(out, schema=PICK_A_PIC))
        done += len(out)
    step.finish({"rows": done})
    return done
