"""What simulated raters know of rendered figures, and studies of figures to rate. The formula of the qualities is `latent.qualities`.

Each figure is shown in one of four ways: sound or with a defect, with its own caption or one with swapped words. The truth travels
with the image (`truths`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from limner import records
from limner.feedback.simulate import Truth
from limner.figures.body import PARTS
from limner.figures.captions import contradicting, describe
from limner.figures.latent import qualities
from limner.figures.make import draw, png, row
from limner.figures.truths import decode_array, dump_truth
from limner.store import open_step

SPLIT = "raters"
BODY = ("background", *PARTS)


def shown(figure: dict[str, Any], defective: bool, swapped: bool) -> tuple[dict[str, Any], Truth]:
    """A row of `make.row` (with its defective copy) as an image to rate: its columns id, text, image, truth; and the truth itself."""
    parts = decode_array(figure["parts"]).astype(int) - 1
    picture = decode_array(figure["defective_image" if defective else "image"])
    defect = decode_array(figure["defect_mask"]) > 0 if defective else np.zeros(parts.shape, bool)
    contradicts = np.zeros(parts.shape, bool)
    if swapped:
        contradicts = contradicting(parts + 1, BODY, figure["swapped_attributes"])
    wrong = len(figure["swapped_attributes"]) if swapped else 0
    truth = Truth(
        artifact=defect, misalignment=contradicts, words=tuple(figure["swapped_words"]) if swapped else (),
        qualities=qualities(picture, parts >= 0, defect, wrong / len(figure["claimed"])),
    )  # fmt: skip
    values = {
        "id": f"{figure['id']}-{'defective' if defective else 'sound'}-{'swapped' if swapped else 'right'}",
        "text": figure["swapped_prompt" if swapped else "prompt"],
        "image": figure["defective_image" if defective else "image"],
        "truth": dump_truth(truth),
    }
    return values, truth


def rows(start: int, stop: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Figures to rate, one way each: of four, one is sound with its own caption."""
    for drawn in draw(SPLIT, start, stop, seed=seed, defects=True):
        yield shown(row(SPLIT, drawn), drawn.index % 2 == 1, drawn.index // 2 % 2 == 1)[0]


def write_study(path: Path, count: int, seed: int = 0) -> Path:
    """A parquet table of figures to rate, unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(pa.Table.from_pylist(list(rows(0, count, seed))), partial)
        partial.rename(path)
    return path


def groups(start: int, stop: int, seed: int = 0) -> Iterator[tuple[str, list[tuple[str, bytes, Truth]]]]:
    """Prompts with four images each (id, PNG, truth): what the prompt says, sound and with a defect, and the same body in other clothes
    and another place, sound and with a defect."""
    drawn = draw(SPLIT, start, stop, seed=seed, defects=True, paints=2)
    for first, other in zip(drawn, drawn):
        caption = describe(first.figure.attributes(), first.caption_seed)
        found = []
        for k, each in enumerate((first, other)):
            attributes = each.figure.attributes()
            wrong = [n for n, value in caption.attributes.items() if attributes[n] != value]
            words = tuple(i for i, name in enumerate(caption.words) if name in wrong)
            for defective in (False, True):
                picture = each.defective.picture if defective and each.defective else each.sound
                defect = each.defective.mask if defective and each.defective else np.zeros(picture.part.shape, bool)
                person = picture.part >= 0
                truth = Truth(
                    artifact=defect, misalignment=contradicting(picture.part + 1, BODY, wrong), words=words,
                    qualities=qualities(picture.image, person, defect, len(wrong) / len(caption.attributes)),
                )  # fmt: skip
                found.append((f"{SPLIT}-{first.index // 2:06d}-{2 * k + defective}", png(picture.image), truth))
        yield caption.text, found


def write_comparisons(folder: Path, count: int, seed: int = 0) -> None:
    """Step folders of figures to compare, unless they are there: `choice` (four images a prompt), `ours` and `base` (two of the four, drawn
    by lot), and truth.parquet of all of them."""
    if (folder / "truth.parquet").is_file():
        return
    rng, truths = np.random.default_rng([seed, count]), list[dict[str, str]]()
    rows: dict[str, list[records.Image]] = {"choice": [], "ours": [], "base": []}
    for n, (text, images) in enumerate(groups(0, count, seed)):
        made = [records.Image(id=i, prompt_id=f"{SPLIT}-{n:06d}", text=text, image=data, k=k) for k, (i, data, _) in enumerate(images)]
        rows["choice"] += made
        for name, k in zip(("ours", "base"), rng.permutation(len(made))[:2]):
            rows[name].append(replace(made[k], k=0))
        truths += [{"image_id": i, "truth": dump_truth(truth)} for i, _, truth in images]
    for name, found in rows.items():
        step = open_step(folder / name, "pool", {"figures": count, "seed": seed}, {})
        step.write(0, records.to_table(records.Image, found))
        step.finish({"rows": len(found)})
    partial = folder / ".truth.parquet.partial"
    pq.write_table(pa.Table.from_pylist(truths), partial)
    partial.rename(folder / "truth.parquet")
