"""Make the pictures of the embedded world: rows of figures, each split with people and captions of its own.

A split owns a part of the space of attributes (by hash), so that what a scorer was trained on is in no pool, reconstruction or evaluation.
Captions may leave hair unsaid, so that a few would stand in two splits all the same: `reword` says them another way.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from limner.figures.body import build_meshes
from limner.figures.captions import describe, swap
from limner.figures.defects import make_defective
from limner.figures.render import Picture, cast, paint
from limner.figures.scene import ATTRIBUTES, Figure, sample

# Sixteenths of the attribute space.
_BUCKETS = {
    "train": range(0, 6),
    "validation": (6,),
    "test": (7,),
    "scorer": (8, 9),
    "judge": (10, 11),
    "reader": (12, 13),
    "raters": (14, 15),
}
_PAINTED = ("hair", "top", "sleeves", "bottom", "legwear", "place", "skin", "shoes", "horizon", "light", "scenery")


@dataclass(frozen=True)
class Drawn:
    """A figure, its sound picture, and (if asked for) a copy with one defect."""

    index: int
    figure: Figure
    caption_seed: int
    sound: Picture
    defective: Any | None


def split_of(figure: Figure) -> str:
    """The split that owns this combination of attributes."""
    key = "|".join(getattr(figure, n) for n in ATTRIBUTES).encode()
    bucket = hashlib.sha256(key).digest()[0] % 16
    return next(name for name, buckets in _BUCKETS.items() if bucket in buckets)


def _draw_figure(split: str, rng: np.random.Generator, keep: Figure | None = None) -> Figure:
    """A random figure of the split; with `keep`, the same body in new clothes, light and place."""
    while True:
        figure = sample(rng)
        if keep is not None:
            figure = replace(keep, **{n: getattr(figure, n) for n in _PAINTED})
        if split_of(figure) == split:
            return figure


def draw(split: str, start: int, stop: int, *, seed: int = 0, size: int = 64, defects: bool = False, paints: int = 1) -> Iterator[Drawn]:
    """Figures number start to stop of a split. Figure i depends on (seed, split, i) only.

    paints: pictures of each body (in other clothes and places), which costs a quarter of a new body.
    """
    stream = list(_BUCKETS).index(split)
    for block in range(start, stop, 32):
        indices = range(block, min(block + 32, stop))
        rngs = [np.random.default_rng([seed, stream, i]) for i in indices]
        figures = [_draw_figure(split, rng) for rng in rngs]
        for i, rng, first, mesh in zip(indices, rngs, figures, build_meshes(figures), strict=True):
            layers = cast(first, mesh, size)
            for k in range(paints):
                figure = first if k == 0 else _draw_figure(split, rng, first)
                wrong = make_defective(figure, mesh, layers, rng) if defects else None
                yield Drawn(i * paints + k, figure, int(rng.integers(2**31)), paint(figure, layers), wrong)


def reword(row: dict[str, Any], taken: Collection[str]) -> None:
    """Give a row of `row` another caption where its own is among those taken; swapped captions are as they were.

    Raises:
        ValueError: every wording is taken.
    """
    attributes, seeds = json.loads(row["attributes"]), iter(range(1000))
    while row["prompt"] in taken:
        if (seed := next(seeds, None)) is None:
            raise ValueError(f"{row['id']}: every wording of its caption is taken")
        caption = describe(attributes, seed)
        row["prompt"], row["claimed"] = caption.text, sorted(caption.attributes)


def png(array: np.ndarray) -> bytes:
    """Encode a uint8 array, (H, W) or (H, W, 3), as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def row(split: str, drawn: Drawn) -> dict[str, Any]:
    """The parquet row of a figure: caption, picture, truth, and the defective copy with its mask if there is one."""
    caption = describe(drawn.figure.attributes(), drawn.caption_seed)
    rng = np.random.default_rng(drawn.caption_seed)
    swapped = swap(drawn.figure, drawn.caption_seed, rng)
    out: dict[str, Any] = {
        "id": f"{split}-{drawn.index:06d}",
        "prompt": caption.text,
        "split": split,
        "image": png(drawn.sound.image),
        "attributes": json.dumps(drawn.figure.attributes()),
        "claimed": sorted(caption.attributes),
        "joints": drawn.sound.joints.round(4).reshape(-1).tolist(),
        "visible": drawn.sound.visible.tolist(),
        "parts": png((drawn.sound.part + 1).astype(np.uint8)),
        "swapped_prompt": swapped.text,
        "swapped_words": list(swapped.wrong_words),
        "swapped_attributes": list(swapped.attributes),
    }
    if drawn.defective is not None:
        d = drawn.defective
        joints = [(k, float(x), float(y)) for k, (x, y) in enumerate(d.picture.joints) if d.picture.visible[k]] + d.extra_joints
        out["defect_joints"] = [{"joint": k, "x": round(x, 4), "y": round(y, 4)} for k, x, y in joints]
        out |= {
            "defective_image": png(d.picture.image),
            "defect": d.kind,
            "defect_limb": d.limb,
            "defect_mask": png(d.mask.astype(np.uint8) * 255),
        }
    return out
