"""`limner caption`: what a vision-language model says of a user's photos, as prompts that a recipe's `data.train` reads.

    folder/part-00000.parquet     rows of `Prompt`: id, caption, split, the photo's bytes
    folder/missing-00000.parquet  photos without a caption, and why
    folder/captions.answers.jsonl what was answered, as it arrived
    folder/manifest.json          model, question, counts

HG-DPO captioned training and test photos with different models, so that a habit of one is no shortcut: caption each split by itself.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa

from limner.engine import Progress, run_shards, spans
from limner.images import decode
from limner.records import Image, Prompt, to_table
from limner.scorers.backends import Answer, Backend, Journal, Question, ask_all
from limner.scorers.files import Source, files_hash, outside, reader_of
from limner.scorers.judge import png
from limner.store import open_step, read_table, shards

QUESTION = (
    "Describe this photo in one sentence of at most 40 words, for someone who is to paint it: who is seen, what they wear and do, the "
    "pose, the place, the light. Only what is seen; no opinion, no names, no beginning such as 'This photo shows'."
)
MAX_TOKENS = 160
MISSING = pa.schema([pa.field("id", pa.string()), pa.field("reason", pa.string())])


def caption_files(
    source: Source, folder: Path, backend: Backend, *, split: str = "train", question: str = QUESTION, batch_size: int = 32,
    images_per_shard: int = 64, part: tuple[int, int] = (0, 1),
) -> Counter[str] | None:  # fmt: skip
    """Caption what `source` names into `folder`.

    Returns:
        How many have a caption, and how many have none by reason; None while other processes' shards are not finished.

    Raises:
        ValueError: as `iter_images`; an endpoint that stays away (what was answered is kept).
    """
    outside(folder, source.path)
    total = sum(1 for _ in source.images())
    config = {
        "model": backend.model, "revision": backend.revision, "files": backend.files, "question": question, "split": split,
        "images_per_shard": images_per_shard, "image_column": source.image_column,
    }  # fmt: skip
    step = open_step(folder, "prompts", config, {"images": files_hash(source.path)})
    journal = Journal(folder / "captions.answers.jsonl", backend)
    tasks = spans(total, images_per_shard)
    take = reader_of(source, step, tasks, images_per_shard, part)

    def work(_: int, task: range, progress: Progress) -> dict[str, pa.Table]:
        images = take(task)
        found: list[Prompt] = []
        missing: list[dict[str, str]] = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            for image, text in zip(batch, captions(batch, backend, journal, question)):
                if text.startswith("!"):
                    missing.append({"id": image.id, "reason": text.removeprefix("!")})
                else:
                    found.append(Prompt(id=image.id, text=text, split=split, image=image.image))
            progress(len(batch))
        return {"part": to_table(Prompt, found), "missing": pa.Table.from_pylist(missing, schema=MISSING)}

    if not run_shards(step, tasks, work, units=len, name="caption", part=part):
        return None
    reasons = Counter(reason for path in shards(folder, "missing") for reason in read_table(path).column("reason").to_pylist())
    counts = Counter({"captioned": total - reasons.total()}) + reasons
    step.finish(dict(counts))
    return counts


def captions(images: list[Image], backend: Backend, journal: Journal, question: str = QUESTION) -> list[str]:
    """The caption of each, or "!" and why there is none."""
    problems: dict[int, str] = {}
    shown: dict[int, bytes] = {}  # upright, over white, in a format that every endpoint reads
    for i, image in enumerate(images):
        try:
            shown[i] = png(decode(image.image, "the image"))
        except ValueError as error:
            problems[i] = f"!{error}"
    asked = list(shown)
    questions = [Question(text=question, images=(shown[i],), max_tokens=MAX_TOKENS) for i in asked]
    found = dict(zip(asked, map(read_caption, ask_all(backend, questions, journal) if questions else [])))
    return [problems[i] if i in problems else found[i] for i in range(len(images))]


def read_caption(answer: Answer) -> str:
    """An answer as one line, or "!" and why it is none."""
    if answer.problem:
        return f"!{answer.problem}"
    text = " ".join(answer.text.split()).strip("\"'")
    return text if len(text) > 1 and not text.startswith("!") else "!the model said nothing"
