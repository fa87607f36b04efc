"""The step that scores a folder of images with several scorers in one pass over decoded images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import PIL.Image
import pyarrow as pa

from limner.engine import Progress, run_shards
from limner.images import decode, in_threads, to_tensor
from limner.records import Image, Score, from_table, to_table
from limner.scorers.combine import SumScorer
from limner.scorers.protocol import PictureScorer, Scorer, count_long, describe, parts_of
from limner.store import input_hash, is_complete, open_step, read_column, read_manifest, read_table, shards

FEEDBACK = "feedback"  # the name of scores that say what was preferred
PREFERRED = 512  # images a shard of them


def score_images(
    images: Sequence[Image], scorers: Sequence[Scorer], batch_size: int = 64, progress: Progress = lambda n: None
) -> list[Score]:
    """Scores of images by every scorer, scorer by scorer within an image; each image is decoded once, each distinct prompt read once, and
    a scorer that is part of several sums asked once.

    What has no score is a missing one with its reason: an image that cannot be read, a prompt that is needed and not there, an answer that
    is not a number.
    """
    values: dict[tuple[int, str], float | str] = {}
    parts = {p.name: p for p in parts_of(scorers)}
    for pictures in _decoded_ahead(images, batch_size):
        for scorer in parts.values():
            asked: list[tuple[int, PIL.Image.Image]] = []
            for i, picture in pictures.items():
                if isinstance(picture, str):
                    values[i, scorer.name] = picture
                elif not images[i].text.strip() and scorer.needs_prompt:
                    values[i, scorer.name] = "there is no prompt"
                else:
                    asked.append((i, picture))
            found = answers(scorer, [p for _, p in asked], [images[i].text for i, _ in asked]) if asked else []
            values |= {(i, scorer.name): value for (i, _), value in zip(asked, found)}
        for total in (s for s in scorers if isinstance(s, SumScorer)):
            values |= {(i, total.name): total.add([values[i, p.name] for p in total.parts]) for i in pictures}
        progress(len(pictures))
    return [_row(image, scorer, values[i, scorer.name]) for i, image in enumerate(images) for scorer in scorers]


def _decoded_ahead(images: Sequence[Image], batch_size: int) -> Iterator[dict[int, PIL.Image.Image | str]]:
    """Batches of pictures by position. The next one is decoded while a batch is scored, so that a device does not wait for files."""

    def read(start: int) -> dict[int, PIL.Image.Image | str]:
        rows = range(start, min(start + batch_size, len(images)))
        return dict(zip(rows, in_threads(_decoded, [images[i].image for i in rows])))

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, 0)
        for start in range(0, len(images), batch_size):
            batch, following = following.result(), pool.submit(read, start + batch_size)
            yield batch


def _decoded(data: bytes) -> PIL.Image.Image | str:
    """An image, or why there is none."""
    try:
        return decode(data, "the image") if data else "there is no image"
    except ValueError as error:
        return str(error)


def keep_answers(scorers: Sequence[Scorer], folder: Path | None) -> None:
    """Let scorers that ask someone else keep the answers beside the scores, so that a stop within a shard loses none; None: forget."""
    for scorer in scorers:
        if hasattr(scorer, "keep_answers"):
            scorer.keep_answers(folder / f"{scorer.name}.answers.jsonl" if folder else None)


def answers(scorer: Scorer, pictures: Sequence[PIL.Image.Image], prompts: Sequence[str]) -> Sequence[float | str]:
    """Of each picture its score, or why there is none. A scorer that takes one size at a time gets a batch a size."""
    if hasattr(scorer, "score_pictures"):
        return cast(PictureScorer, scorer).score_pictures(pictures, prompts)
    values: dict[int, float] = {}
    for size in dict.fromkeys(p.size for p in pictures):
        same = [i for i, p in enumerate(pictures) if p.size == size]
        values |= zip(same, scorer(to_tensor([pictures[i] for i in same]), [prompts[i] for i in same]).tolist())
    return [values[i] for i in range(len(pictures))]


def _row(image: Image, scorer: Scorer, value: float | str) -> Score:
    reason = value if isinstance(value, str) else None if math.isfinite(value) else f"the scorer gave {value}"
    return Score(
        image_id=image.id, prompt_id=image.prompt_id, scorer=scorer.name, score=None if reason else float(value), reason=reason,
        revision=scorer.revision,
    )  # fmt: skip


def write_preferences(folder: Path, images: Iterable[Image], scores: Mapping[str, float]) -> int:
    """Two step folders that stages with `from: feedback` read: `images`, those that have a score, and their `scores`; returns how many."""
    steps = [open_step(folder / "images", "feedback images", {}, {}), open_step(folder / "scores", "scores", {}, {})]
    count, part, shard = 0, list[Image](), 0

    def write() -> None:
        rows = [Score(image_id=i.id, prompt_id=i.prompt_id, scorer=FEEDBACK, score=scores[i.id]) for i in part]
        for step, table in zip(steps, (to_table(Image, part), to_table(Score, rows))):
            step.write(shard, table)

    for image in images:
        part.append(image)
        count += 1
        if len(part) == PREFERRED:
            write()
            part, shard = [], shard + 1
    if part or not shard:
        write()
    for step in steps:
        step.finish({"rows": count})
    return count


def make_scores(images_folder: Path, folder: Path, scorers: Sequence[Scorer], batch_size: int = 64, part: tuple[int, int] = (0, 1)) -> None:
    """Score every image of a step's folder; shards follow the images' shards. What a pool was chosen from by is not scored again."""
    config = {"scorers": {s.name: describe(s) for s in scorers}, "batch_size": batch_size}
    step = open_step(folder, "scores", config, {"images": input_hash(images_folder)})
    tasks = shards(images_folder)

    known = read_manifest(folder)["counts"].get("prompts_cut", {}) if is_complete(folder) else None
    cut = count_long(scorers, (text for path in tasks for text in read_column(path, "text"))) if known is None else known

    def work(_: int, path: Path, progress: Progress) -> dict[str, pa.Table]:
        images = from_table(Image, read_table(path), str(path))
        known = _kept(path)
        missing = [s for s in scorers if any((i.id, s.name, s.revision) not in known for i in images)]
        known |= {(s.image_id, s.scorer, s.revision): s for s in (score_images(images, missing, batch_size) if missing else [])}
        progress(1)
        return {"part": to_table(Score, [known[i.id, s.name, s.revision] for i in images for s in scorers])}

    if run_shards(step, tasks, work, name=folder.name, part=part):
        step.finish({"scorers": [s.name for s in scorers], "shards": len(tasks), "prompts_cut": cut})


def _kept(path: Path) -> dict[tuple[str, str, str], Score]:
    """Scores that a pool kept beside a shard of its images, by image, scorer and the scorer's revision; not the missing ones, which are
    asked for again."""
    beside = path.with_name(path.name.replace("part-", "scores-"))
    rows = from_table(Score, read_table(beside), str(beside)) if beside.is_file() else []
    return {(s.image_id, s.scorer, s.revision): s for s in rows if s.score is not None}
