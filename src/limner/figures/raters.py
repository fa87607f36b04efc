"""What simulated raters know of rendered figures, and studies of figures to rate. The formula of the qualities is in docs/figures.md.

Each figure is shown in one of four ways: sound or with a defect, with its own caption or one with swapped words. The truth travels
with the image in the column `truth`, as JSON.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from limner import records
from limner.feedback.simulate import Truth
from limner.figures.body import PARTS
from limner.figures.captions import REGION, describe
from limner.figures.make import draw, png, row
from limner.store import open_step

SPLIT = "raters"


def qualities(
    picture: NDArray[np.uint8], figure: NDArray[np.bool_], defect: NDArray[np.bool_], wrong: int, claimed: int
) -> dict[str, float]:
    """The four latent qualities of a picture, 0 to 1.

    Args:
        picture: (H, W, 3).
        figure: (H, W), where the person is.
        defect: (H, W), what is wrong.
        wrong: attributes that the caption claims and that are not so.
        claimed: attributes that it claims.
    """
    share = float(defect.sum() / max(figure.sum(), 1))
    plausibility = 1.0 if not defect.any() else 0.7 * float(np.exp(-3 * share))
    alignment = (1 - wrong / max(claimed, 1)) ** 3
    columns = np.nonzero(figure)[1]
    middle = float(columns.mean() + 0.5) / figure.shape[1] if len(columns) else 0.5
    centred = max(0.0, 1 - abs(middle - 0.5) / 0.2)
    colours = picture.astype(np.float64)
    apart = float(np.linalg.norm(colours[figure].mean(0) - colours[~figure].mean(0))) if figure.any() and not figure.all() else 0.0
    aesthetics = (0.2 + 0.4 * centred + 0.4 * min(apart / 130, 1)) * (1 - 0.4 * (plausibility < 1))
    overall = 0.4 * plausibility + 0.35 * alignment + 0.25 * aesthetics
    return {"plausibility": plausibility, "alignment": alignment, "aesthetics": aesthetics, "overall": overall}


def shown(figure: dict[str, Any], defective: bool, swapped: bool) -> tuple[dict[str, Any], Truth]:
    """A row of `make.row` (with its defective copy) as an image to rate: its columns id, text, image, truth; and the truth itself."""
    parts = _array(figure["parts"]).astype(int) - 1
    picture = _array(figure["defective_image" if defective else "image"])
    defect = _array(figure["defect_mask"]) > 0 if defective else np.zeros(parts.shape, bool)
    contradicts = np.zeros(parts.shape, bool)
    if swapped:
        contradicts = _contradicting(parts, figure["swapped_attributes"])
    wrong = len(figure["swapped_attributes"]) if swapped else 0
    truth = Truth(
        artifact=defect, misalignment=contradicts, words=tuple(figure["swapped_words"]) if swapped else (),
        qualities=qualities(picture, parts >= 0, defect, wrong, len(figure["claimed"])),
    )  # fmt: skip
    values = {
        "id": f"{figure['id']}-{'defective' if defective else 'sound'}-{'swapped' if swapped else 'right'}",
        "text": figure["swapped_prompt" if swapped else "prompt"],
        "image": figure["defective_image" if defective else "image"],
        "truth": _dump(truth),
    }
    return values, truth


def _contradicting(parts: NDArray[np.int_], attributes: Iterable[str]) -> NDArray[np.bool_]:
    """Where wrong attributes show: their body parts, or all that is not the person."""
    names = {part for name in attributes for part in REGION[name]}
    body = np.isin(parts, [PARTS.index(n) for n in names if n != "place"])
    return body | (parts < 0) if "place" in names else body


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
                    artifact=defect, misalignment=_contradicting(picture.part, wrong), words=words,
                    qualities=qualities(picture.image, person, defect, len(wrong), len(caption.attributes)),
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
        truths += [{"image_id": i, "truth": _dump(truth)} for i, _, truth in images]
    for name, found in rows.items():
        step = open_step(folder / name, "pool", {"figures": count, "seed": seed}, {})
        step.write(0, records.to_table(records.Image, found))
        step.finish({"rows": len(found)})
    partial = folder / ".truth.parquet.partial"
    pq.write_table(pa.Table.from_pylist(truths), partial)
    partial.rename(folder / "truth.parquet")


def read_truths(images: Path) -> dict[str, Truth]:
    """Truths by image id: of the table that `write_study` wrote, or beside one of the folders of `write_comparisons`.

    Raises:
        ValueError: other images, of which no truth is known.
    """
    beside = images.parent / "truth.parquet"
    path = beside if images.is_dir() else images
    if path.suffix != ".parquet" or not path.is_file() or "truth" not in pq.read_schema(path).names:
        raise ValueError(f"{images}: no truth is known of these images; simulated raters answer for figures (images.from: figures)")
    table = pq.read_table(path)
    name = "image_id" if "image_id" in table.column_names else "id"
    return {str(row[name]): load_truth(row["truth"]) for row in table.select([name, "truth"]).to_pylist() if row["truth"]}


def load_truth(text: str) -> Truth:
    """The truth in a column `truth` that `shown` made.

    Raises:
        ValueError: another truth: of a figure that was not made to be rated.
    """
    values = json.loads(text)
    if "artifact" not in values:
        raise ValueError(f"truth has {', '.join(values)}; expected figures to rate (images.from: figures)")
    masks = {name: _array(base64.b64decode(values[name])) > 0 for name in ("artifact", "misalignment")}
    return Truth(**masks, words=tuple(values["words"]), qualities=values["qualities"])


def _dump(truth: Truth) -> str:
    masks = {n: base64.b64encode(png(getattr(truth, n).astype(np.uint8) * 255)).decode() for n in ("artifact", "misalignment")}
    return json.dumps({**masks, "words": list(truth.words), "qualities": dict(truth.qualities)})


def _array(data: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)))
