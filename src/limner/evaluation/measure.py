"""Measure the images of a model: scorers, the reader, hue, sharpness and features, in the order of the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from limner.evaluation.compare import Measured
from limner.evaluation.distances import hue_vectors, sharpness
from limner.images import decode, decode_batch
from limner.records import Image, Prompt
from limner.scorers.clip import ClipScorer
from limner.scorers.protocol import Scorer
from limner.scorers.reader import FigureReader
from limner.scorers.steps import score_images

BATCH = 64
Look = Callable[[Sequence[bytes]], NDArray]  # n encoded images to features (n, D)


def claims(prompt: Prompt) -> dict[str, str]:
    """What a caption claims, by attribute, from the truth of the embedded world; empty without it."""
    truth = json.loads(prompt.truth) if prompt.truth else {}
    return {name: truth["attributes"][name] for name in truth.get("claimed", [])}


def measure_images(
    name: str, images: Sequence[Image], prompts: Mapping[str, Prompt], scorers: Mapping[str, Scorer], reader: FigureReader | None,
    diverse: Sequence[Image] = (), look: Look | None = None,
) -> Measured:  # fmt: skip
    """Everything about one model's images, one a prompt.

    Args:
        scorers: metric (preference, judge) to scorer.
        diverse: the same number of images of each of some prompts, for diversity.
        look: the features of Fréchet distance and diversity, with a reader its own; None = neither is measured.
    """
    order = {id: n for n, id in enumerate(prompts)}
    images = sorted(images, key=lambda i: order[i.prompt_id])
    scores: dict[str, NDArray] = {}
    for metric, scorer in scorers.items():
        found = score_images(images, [scorer], BATCH)
        scores[metric] = np.array([np.nan if s.score is None else s.score for s in found])
    hue, sharp = [], []
    for start in range(0, len(images), BATCH):
        for image in images[start : start + BATCH]:
            pixels = decode_batch([image.image])
            hue.append(np.asarray(hue_vectors(pixels)))
            sharp.append(np.asarray(sharpness(pixels)))
    scores["sharpness"] = np.concatenate(sharp)
    features = diversity = None
    if reader is not None:
        reading = reader.read(decode_batch([i.image for i in images]))
        scores["attribute_accuracy"] = reader.attribute_accuracy(reading, [claims(prompts[i.prompt_id]) for i in images])
        scores["joint_plausibility"] = reading.plausible.astype(float)
        scores["defect_rate"] = (reading.defect > 0.5).astype(float)
        features = reading.features  # what `look` would read once more
    elif look:
        features = look([i.image for i in images])
    if look and diverse:
        ids = list(dict.fromkeys(i.prompt_id for i in diverse))
        seen = look([i.image for i in sorted(diverse, key=lambda i: (ids.index(i.prompt_id), i.k))])
        diversity = seen.reshape(len(ids), -1, seen.shape[1])
    return Measured(
        name=name, scores=scores, features=features, diversity_features=diversity, hue=np.concatenate(hue), images=[i.image for i in images]
    )


def measure_real(
    prompts: Sequence[Prompt], n: int, scorers: Mapping[str, Scorer], reader: FigureReader | None, look: Look | None = None
) -> Measured | None:
    """The prompts' real images as a row of their own; None if there are none."""
    images = [Image(id=f"{p.id}/real", prompt_id=p.id, text=p.text, image=p.image) for p in prompts if p.image is not None]
    return measure_images("real", images, {p.id: p for p in prompts}, scorers, reader, (), look) if len(images) == n else None


def reader_look(reader: FigureReader) -> Look:
    """The reader's features."""
    return lambda data: reader.read(decode_batch(data)).features


def clip_look(scorer: ClipScorer) -> Look:
    """Image vectors of a scorer's CLIP tower, of images of any size."""

    def look(data: Sequence[bytes]) -> NDArray:
        batches = (data[i : i + BATCH] for i in range(0, len(data), BATCH))
        with torch.no_grad():
            return torch.cat([scorer.tower.encode_images([decode(d, "image") for d in batch]).cpu() for batch in batches]).double().numpy()

    return look
