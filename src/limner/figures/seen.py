"""What simulated people know of figures whose truth nobody wrote down: what a reader sees in them.

That reader (`figures/rater_reader`) has its own seed and learned from other people than the reader that evaluates, so that raters do
not err as the judge does. It errs all the same: what raters of generated images say follows it, not the truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limner.evaluation.distances import sharpness
from limner.feedback.richhf import tokens
from limner.feedback.simulate import Truth
from limner.figures.assets import find
from limner.figures.captions import REGION, contradicting, parse
from limner.figures.latent import qualities
from limner.images import decode, decode_batch, to_tensor, to_uint8
from limner.inputs import iter_prompts
from limner.records import Image
from limner.scorers.reader import SURE, FigureReader, load_reader

SIZE, BATCH = 64, 64  # pixels a side that a reader sees; images at once
HALF = 0.5  # from here a defect, and a place of the defect map, is seen


def see(reader: FigureReader, images: Tensor, texts: Sequence[str]) -> list[Truth]:
    """What the reader makes of pictures for their captions, as if it were true.

    Something is wrong with chance p = 1 - (1 - d) · min(1, 1/j): d of the defect head, j how far the joints are from normal (1 = as far
    as the last of a hundred real figures). Where it is shows the defect map, if p is at least a half. Of what a caption claims, only
    attributes count that the reader reads surely.

    Args:
        reader: one that sees body parts.
        images: (B, 3, 64, 64) in [0, 1].
        texts: B captions, in the words of `captions.describe`.

    Raises:
        ValueError: a reader of other body parts, or a caption that claims nothing that can be seen.
    """
    body = list(getattr(reader.model, "parts", []))
    if missing := sorted({p for region in REGION.values() for p in region} - {*body, "place"}):
        raise ValueError(f"the reader does not see {', '.join(missing)}; raters need one that `limner figures make` made of late")
    reading = reader.read(images)
    with torch.no_grad():
        out = reader.model(images.float())
    parts = out["parts"].argmax(1).numpy()  # 0 = background
    heat = F.interpolate(out["defect_map"].sigmoid()[:, None], images.shape[-2:])[:, 0].numpy()
    defect = 1 - (1 - reading.defect) * np.minimum(1, 1 / np.maximum(reading.doubt, 1))
    pictures, blur = to_uint8(images), blurs(images)
    found = []
    for i, text in enumerate(texts):
        caption = parse(tokens(text))
        sure = [n for n in caption.attributes if reader.sure.get(n, 1.0) >= SURE]
        if not sure:
            raise ValueError(f"caption {text!r} claims nothing that the reader can see; raters know captions of the embedded figures only")
        untrue = [n for n in sure if reader.model.attributes[n][reading.attributes[n][i]] != caption.attributes[n]]
        artifact = (heat[i] >= HALF) & (defect[i] >= HALF)
        found.append(
            Truth(
                artifact=artifact, misalignment=contradicting(parts[i], body, untrue),
                words=tuple(k for k, name in enumerate(caption.words) if name in untrue),
                qualities=qualities(
                    pictures[i], parts[i] > 0, artifact, len(untrue) / len(sure), defect=float(defect[i]), blur=blur[i]
                ),
            )
        )  # fmt: skip
    return found


def blurs(images: Tensor) -> list[float]:
    """The share of real figures' sharpness that each picture (B, 3, 64, 64) lacks, 0 to 1."""
    return [float(v) for v in (1 - sharpness(images) / real_sharpness()).clip(0, 1)]


@cache
def real_sharpness(count: int = 200) -> float:
    """Median sharpness of the first embedded validation pictures."""
    pictures = [p.image or b"" for p in islice(iter_prompts(find("validation"), "validation", need_images=True), count)]
    return float(np.median(sharpness(decode_batch(pictures))))


def beholder(path: Path) -> partial[list[Truth]]:
    """`see` with the reader in a folder, for pictures and texts.

    Raises:
        ValueError: no reader lies there.
    """
    reader = load_reader(path)
    reader.verdict = None  # `see` has a way of its own to let the joints speak, which the simulated raters' manners are tuned to
    return partial(see, reader)


def see_images(images: Iterable[Image], path: Path) -> Iterator[tuple[str, Truth]]:
    """Ids of images, and what the reader in a folder sees in each.

    Raises:
        ValueError: as `see` and `beholder`; an image that cannot be decoded or is not of 64 x 64 pixels; names it.
    """
    look, waiting = beholder(path), iter(images)
    while batch := list(islice(waiting, BATCH)):
        pictures = [decode(i.image, f"image {i.id}") for i in batch]
        for image, picture in zip(batch, pictures):
            if picture.size != (SIZE, SIZE):
                raise ValueError(f"image {image.id} is {picture.width}x{picture.height}; the reader of figures sees {SIZE}x{SIZE}")
        yield from zip([i.id for i in batch], look(to_tensor(pictures), [i.text for i in batch]))


class AttributeScorer:
    """How likely a figure shows what its caption claims: the mean log-probability, over the claimed attributes, that a reader gives them.

    What VQAScore (arXiv 2404.01291) asks a vision-language model, asked of a reader of figures. What it reads unsurely counts less by
    itself, being near even odds; captions that claim nothing score 0.
    """

    higher_is_better = True
    comparable_across_prompts = True
    needs_prompt = True
    range = (-5.0, 0.0)  # what is less likely than exp(-5) counts as that

    def __init__(self, name: str, reader: FigureReader):
        self.name, self.reader, self.revision = name, reader, f"attributes@{reader.revision}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`; images of 64 x 64 pixels."""
        out = self.reader.model(images.float())
        scores = []
        for i, text in enumerate(prompts):
            claims = parse(tokens(text)).attributes
            said = [out[n][i].log_softmax(0)[self.reader.model.attributes[n].index(v)].clamp(min=self.range[0]) for n, v in claims.items()]
            scores.append(torch.stack(said).mean() if said else torch.zeros(()))
        return torch.stack(scores)


class SoundnessScorer:
    """How likely nothing is wrong with a figure: the log-odds that a reader gives to it, (B,); takes no captions."""

    higher_is_better = True
    comparable_across_prompts = True
    needs_prompt = False
    range = (-10.0, 10.0)  # nobody is surer than that

    def __init__(self, name: str, reader: FigureReader):
        self.name, self.reader, self.revision = name, reader, f"soundness@{reader.revision}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`; images of 64 x 64 pixels."""
        return torch.logit(torch.from_numpy(self.reader.read(images).defect)).neg().clamp(*self.range)
