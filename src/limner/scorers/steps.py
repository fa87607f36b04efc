"""The step that scores a folder of images with several scorers in one pass over decoded images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch

from limner.engine import Progress, run_shards
from limner.images import decode_batch, image_size
from limner.records import Image, Score, from_table, to_table
from limner.scorers.protocol import Scorer
from limner.store import input_hash, open_step, read_table, shards


def score_images(
    images: Sequence[Image], scorers: Sequence[Scorer], batch_size: int = 64, progress: Progress = lambda n: None
) -> list[Score]:
    """Scores of images by every scorer, scorer by scorer within an image; each image is decoded once.

    A score that is not a number becomes a missing one with its reason.
    """
    out: list[Score] = []
    order = sorted(range(len(images)), key=lambda i: image_size(images[i].image))
    values: dict[tuple[int, str], float] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        sizes = [image_size(images[i].image) for i in rows]
        for size in dict.fromkeys(sizes):
            same = [i for i, s in zip(rows, sizes) if s == size]
            pixels = decode_batch([images[i].image for i in same])
            for scorer in scorers:
                for i, value in zip(same, scorer(pixels, [images[i].text for i in same]).tolist()):
                    values[i, scorer.name] = value
        progress(len(rows))
    for i, image in enumerate(images):
        for scorer in scorers:
            value = values[i, scorer.name]
            finite = bool(torch.isfinite(torch.tensor(value)))
            out.append(
                Score(
                    image_id=image.id, prompt_id=image.prompt_id, scorer=scorer.name, score=value if finite else None,
                    reason=None if finite else f"the scorer gave {value}", revision=scorer.revision,
                )
            )  # fmt: skip
    return out


def make_scores(images_folder: Path, folder: Path, scorers: Sequence[Scorer], batch_size: int = 64, part: tuple[int, int] = (0, 1)) -> None:
    """Score every image of a step's folder; shards follow the images' shards."""
    config = {"scorers": {s.name: s.revision for s in scorers}, "batch_size": batch_size}
    step = open_step(folder, "scores", config, {"images": input_hash(images_folder)})
    tasks = shards(images_folder)

    def work(_: int, path: Path, progress: Progress) -> dict[str, pa.Table]:
        images = from_table(Image, read_table(path), str(path))
        scores = score_images(images, scorers, batch_size)
        progress(1)
        return {"part": to_table(Score, scores)}

    if run_shards(step, tasks, work, name=folder.name, part=part):
        step.finish({"scorers": [s.name for s in scorers], "shards": len(tasks)})
