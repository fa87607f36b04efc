"""`limner score --images`: a user's folder, table or single image, scored by several scorers in one pass, resumable.

folder/part-00000.parquet   rows of `Score`; image_id is the file's name in the folder, the column id, or the position
folder/manifest.json        of every scorer: revision, SHA-256 of its files, range, direction, whether prompts compare; how many images
                            have no score, how many prompts are longer than it reads
folder/scores.csv           a line an image, a column a scorer; empty where there is no score (the rows say why)
"""

from __future__ import annotations

import csv
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from limner.engine import Progress, run_shards, spans
from limner.inputs import iter_images
from limner.records import Image, Score, to_table
from limner.scorers.combine import Floats, Scale, combine, pareto
from limner.scorers.protocol import Scorer, count_long, describe
from limner.scorers.steps import keep_answers, score_images
from limner.statistics import mean_interval
from limner.store import Step, open_step, read_rows, sha256, write_atomic

CAPTIONS = (".txt", ".jsonl", ".csv", ".tsv", ".json")  # files whose content counts, not only their size

SHOWN = 3  # reasons that a summary lists


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to score.

    Args:
        path: a folder or file of images, as `iter_images` reads it.
        caption_column: its name in tables ("" = text, caption or prompt, whichever there is).
        image_column: its name in tables ("" = image or file_name).
        prompt: of the images that have no caption.
    """

    path: Path
    caption_column: str = ""
    image_column: str = ""
    prompt: str = ""

    def images(self, shard: int = 0, wanted: frozenset[int] | None = None) -> Iterator[Image]:
        """The images in order; pixels only of the shards `wanted`, of `shard` images each (none for None)."""
        read = None if wanted is None else lambda position: position // shard in wanted
        for image in iter_images(self.path, caption_column=self.caption_column, image_column=self.image_column, read=read):
            if not image.text and self.prompt:
                image = replace(image, text=self.prompt, prompt_id=hashlib.sha256(self.prompt.encode()).hexdigest()[:16])
            yield image


def reader_of(source: Source, step: Step, tasks: Sequence[range], size: int, part: tuple[int, int]) -> Callable[[range], list[Image]]:
    """A function that gives the images of one task after another; pixels only of shards of `size` that this process has yet to make."""
    mine = frozenset(i for i in range(len(tasks)) if i % part[1] == part[0] and not step.has(i))
    rows, at = source.images(size, mine), 0

    def take(task: range) -> list[Image]:
        nonlocal at
        images = list(islice(rows, task.start - at, task.stop - at))
        at = task.stop
        return images

    return take


def score_files(
    source: Source, folder: Path, scorers: Sequence[Scorer], *, batch_size: int = 64, images_per_shard: int = 256,
    part: tuple[int, int] = (0, 1), weights: Mapping[str, float] | None = None, scale: Scale = "zscore",
) -> bool:  # fmt: skip
    """Score what `source` names into `folder`.

    Args:
        weights: of the scorers that make `combined` and `pareto` of scores.csv; they may change from run to run.
        scale: that the scores are brought to, within each prompt or over all.

    Returns:
        Whether every shard, other processes' included, is finished; the manifest and scores.csv are then written.

    Raises:
        ValueError: rows that make no sense; a scorer that needs prompts where no image has one; another configuration's folder.
    """
    outside(folder, source.path)
    total = prompted = 0
    texts: set[str] = set()
    for image in source.images():
        total, prompted = total + 1, prompted + bool(image.text)
        texts.add(image.text)
    check_prompts(scorers, prompted, source.path)
    if scale == "zscore_all" and (within := [s.name for s in scorers if (weights or {}).get(s.name) and not s.comparable_across_prompts]):
        warnings.warn(f"zscore_all: {', '.join(within)} tell which image of a prompt is better, not which prompt went well", stacklevel=2)
    if weights:  # mistakes in them before the work, not behind it
        combine({s.name: [] for s in scorers}, [], weights)
    config = {
        "scorers": {s.name: describe(s) for s in scorers}, "batch_size": batch_size, "images_per_shard": images_per_shard,
        "caption_column": source.caption_column, "image_column": source.image_column, "prompt": source.prompt,
    }  # fmt: skip
    keep_answers(scorers, folder)
    step = open_step(folder, "scores", config, {"images": files_hash(source.path)})
    tasks = spans(total, images_per_shard)
    take = reader_of(source, step, tasks, images_per_shard, part)

    def work(_: int, task: range, progress: Progress) -> dict[str, pa.Table]:
        images = take(task)
        return {"part": to_table(Score, score_images(images, scorers, batch_size, progress))}

    cut = count_long(scorers, texts)
    done = run_shards(step, tasks, work, units=len, name="score", part=part)
    if done:
        found = list(read_rows(folder, Score))
        columns = wide_columns(found, scorers, weights or {}, scale)
        write_atomic(folder / "scores.csv", wide_table(source.images(), found, columns))
        missing = {s.name: sum(r.score is None for r in found if r.scorer == s.name) for s in scorers}
        step.finish({"images": total, "missing": missing, "prompts_cut": cut})
    return done


def check_prompts(scorers: Sequence[Scorer], prompted: int, path: Path) -> None:
    """Check that there are prompts for the scorers that need them.

    Raises:
        ValueError: names the scorers, and what to give.
    """
    if not prompted and (need := [s.name for s in scorers if s.needs_prompt]):
        raise ValueError(
            f"{', '.join(need)}: needs the prompt of every image, and {path} has none; add a metadata.jsonl with file_name and text, "
            "a .txt beside each image or a column text, set --caption_column, or give one for all with --prompt"
        )


def outside(folder: Path, images: Path) -> None:
    """Check that results do not go among the images.

    Raises:
        ValueError: they would; the next run would take them for input.
    """
    if images.is_dir() and folder.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"output_dir: {folder} lies in {images}, whose files are read; choose a folder outside")


def files_hash(path: Path) -> str:
    """What stands for a user's images in a manifest: of a file its SHA-256, of a folder the names in it, with sizes, and the SHA-256 of
    captions and tables of captions."""
    if path.is_file():
        return sha256(path)[:16]
    found = [p for p in path.rglob("*") if p.is_file()]
    lines = sorted(
        f"{p.relative_to(path).as_posix()} {sha256(p) if p.suffix.lower() in CAPTIONS else p.stat().st_size}" for p in found
    )  # fmt: skip
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def wide_columns(scores: Sequence[Score], scorers: Sequence[Scorer], weights: Mapping[str, float], scale: Scale) -> dict[str, Floats]:
    """A column a scorer, NaN where there is no score; with weights `combined` and `pareto` (1 or 0)."""
    nan = float("nan")
    columns = {n.name: np.array([nan if s.score is None else s.score for s in scores if s.scorer == n.name]) for n in scorers}
    if weights:
        groups = [s.prompt_id for s in scores if s.scorer == scorers[0].name]
        directions = {n.name: n.higher_is_better for n in scorers}
        counted = [n for n, w in weights.items() if w]
        stacked = np.stack([columns[n] if directions[n] else -columns[n] for n in counted], 1)
        columns |= {
            "combined": combine(columns, groups, weights, scale, directions),
            "pareto": pareto(stacked, groups).astype(float),
        }
    return columns


def wide_table(images: Iterable[Image], scores: Sequence[Score], columns: Mapping[str, Floats]) -> str:
    """A CSV line an image: id, prompt_id, the columns, and the prompt."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "prompt_id", *columns, "text"])
    ids = list(dict.fromkeys((s.image_id, s.prompt_id) for s in scores))
    for i, ((image_id, prompt_id), image) in enumerate(zip(ids, images)):
        numbers = [float(c[i]) for c in columns.values()]
        writer.writerow([image_id, prompt_id, *("" if v != v else f"{v:.7g}" for v in numbers), image.text])
    return out.getvalue()


def print_summary(folder: Path, scorers: Sequence[Scorer]) -> None:
    """A line a scorer: mean with its interval, how many have no score and why."""
    found = list(read_rows(folder, Score))
    for scorer in scorers:
        rows = [s for s in found if s.scorer == scorer.name]
        values = [s.score for s in rows if s.score is not None]
        mean = mean_interval(values) if len(values) > 1 else None
        text = f"{mean.value:.4g} [{mean.low:.4g}, {mean.high:.4g}]" if mean else ", ".join(f"{v:.4g}" for v in values) or "no score"
        note = "" if scorer.comparable_across_prompts else "; compare it within a prompt only"
        print(f"{scorer.name}: {text} over {len(values)} images{note}")
        reasons = Counter(s.reason for s in rows if s.score is None)
        for reason, count in reasons.most_common(SHOWN):
            print(f"  {count} without: {reason}")
