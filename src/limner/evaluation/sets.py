"""Do measures of image sets agree with what people chose?

A Fréchet distance or the Inception Score's formula says nothing of a pair. It is asked whether it prefers the set of the chosen images to
that of the rejected ones of the same prompts, and whether it can tell them apart at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from limner.evaluation.distances import class_score, frechet, principal_components
from limner.images import decode
from limner.inputs import iter_images
from limner.records import Choice
from limner.scorers.choices import Choices, shares
from limner.scorers.learner import Learner, learner_of
from limner.scorers.protocol import Scorer
from limner.statistics import Interval, half_subsample_interval

SHUFFLES = 200


def chosen_and_rejected(rows: Sequence[Choice], seed: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, image) of the chosen image and of a rejected one, for each row with one best image.

    Of a ranking the worst is the rejected one; of a choice, where nothing is known of the others, one by lot.
    """
    chosen, rejected = [], []
    rng = np.random.default_rng([seed, 41])
    for n, row in enumerate(rows):
        share = shares(row)
        best = max(share)
        if share.count(best) > 1:
            continue
        winner = share.index(best)
        others = [k for k in range(len(share)) if k != winner]
        if row.kind == "ranking":
            others = [k for k in others if row.said[k] == max(row.said)]
        chosen.append((n, winner))
        rejected.append((n, others[int(rng.integers(len(others)))]))
    return chosen, rejected


def judge_sets(
    rows: Sequence[Choice], features: Mapping[str, NDArray], probabilities: Mapping[str, NDArray] | None, reference: NDArray | None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Do measures of sets prefer what people chose?

    Args:
        features: of an image by its file, (D,); rows with an image that has none are left out.
        probabilities: of classes, by file, (C,).
        reference: features of real images (m, D).

    Returns:
        rows; frechet_between: distance of chosen and rejected set, its mean with both swapped by lot within prompts, and how often that is
        as large (p); frechet_to_reference and class_score: chosen, rejected, and their difference with an interval. `prefers` says which
        set the measure prefers if its interval says so, else "neither".

    Raises:
        ValueError: fewer than four rows with features.
    """
    known = [row for row in rows if all(f in features for f in row.files)]
    places = list(zip(*chosen_and_rejected(known, seed)))
    n = len(places)
    if n < 4:
        raise ValueError(f"features: only {n} rows have features of all their images and one best image; expected 4 or more")
    files = [tuple(known[r].files[k] for r, k in place) for place in places]
    winners, losers = (np.stack([features[f[side]] for f in files]).astype(float) for side in (0, 1))
    most = min(64, 2 * n - 1, winners.shape[1])
    pca = principal_components(reference if reference is not None and len(reference) > most else np.concatenate([winners, losers]), most)
    a, b = pca(winners), pca(losers)
    found: dict[str, Any] = {"rows": n, "dimensions": most, "frechet_between": _between(a, b, seed)}
    if reference is not None:
        m = min(n, len(reference))
        real = pca(reference[:m])

        def difference(i: NDArray[np.intp]) -> float:
            return frechet(a[i], real[i]) - frechet(b[i], real[i])

        found["frechet_to_reference"] = {
            "chosen": frechet(a[:m], real), "rejected": frechet(b[:m], real), "n": m,
            **_verdict(half_subsample_interval(difference, m, seed), lower_is_better=True),
        }  # fmt: skip
    if probabilities is not None:
        p, q = (np.stack([probabilities[f[side]] for f in files]).astype(float) for side in (0, 1))
        interval = half_subsample_interval(lambda i: class_score(p[i]) - class_score(q[i]), n, seed)
        found["class_score"] = {"chosen": class_score(p), "rejected": class_score(q), "n": n, **_verdict(interval, lower_is_better=False)}
    return found


def _between(a: NDArray, b: NDArray, seed: int) -> dict[str, float]:
    rng = np.random.default_rng([seed, 43])
    observed, drawn = frechet(a, b), []
    for _ in range(SHUFFLES):
        swap = (rng.random(len(a)) < 0.5)[:, None]
        drawn.append(frechet(np.where(swap, b, a), np.where(swap, a, b)))
    return {"value": observed, "by_lot": float(np.mean(drawn)), "p": (1 + sum(d >= observed * (1 - 1e-6) for d in drawn)) / (1 + SHUFFLES)}


def _verdict(difference: Interval, lower_is_better: bool) -> dict[str, Any]:
    low, high = (-difference.high, -difference.low) if lower_is_better else (difference.low, difference.high)
    prefers = "chosen" if low > 0 else "rejected" if high < 0 else "neither"
    return {"difference": difference.value, "low": difference.low, "high": difference.high, "prefers": prefers}


def read_features(path: Path, key: str = "features") -> tuple[dict[str, NDArray], dict[str, NDArray] | None]:
    """features and probabilities by file of an .npz.

    Raises:
        ValueError: unreadable, or arrays of other names or lengths.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            there = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # damaged bytes raise zip's kinds and numpy's
        raise ValueError(f"{key}: {path} cannot be read as .npz without pickled objects ({error})") from error
    if "features" not in there or there["features"].ndim != 2:
        raise ValueError(f"{key}: {path} has no array features (n, D); found: {', '.join(there)}")
    files = [str(f) for f in there.get("files", np.arange(len(there["features"])))]
    if len(files) != len(there["features"]) or len(there.get("probabilities", files)) != len(files):
        raise ValueError(f"{key}: {path}: files, features and probabilities differ in length")
    probabilities = dict(zip(files, there["probabilities"])) if "probabilities" in there else None
    return dict(zip(files, there["features"])), probabilities


def find_features(
    source: str, reference: str, choices: Choices, scorers: Mapping[str, Scorer]
) -> tuple[dict[str, NDArray], dict[str, NDArray] | None, NDArray | None]:
    """Features and class probabilities of the choices' images by file, and features of real ones.

    Args:
        source: an .npz file, or the name of one of the scorers; reference: the same of real images, or images; "" = none.
    """
    if source not in scorers:
        features, probabilities = read_features(Path(source))
        real = np.stack(list(read_features(Path(reference), "reference")[0].values())) if reference else None
        return features, probabilities, real
    try:
        tower = learner_of(scorers[source])
    except ValueError:
        raise ValueError(f"features: {source} has no image tower to look with; name a CLIP that reads prompts, or a dual") from None
    seen: dict[str, NDArray] = {}
    for index, row in enumerate(choices.rows):
        seen |= dict(zip(row.files, image_vectors(tower, choices.pictures(index))))
    if not reference:
        return seen, None, None
    vectors = [image_vectors(tower, [decode(photo.image, f"reference: {photo.id}")]) for photo in iter_images(reference)]
    return seen, None, np.concatenate(vectors)


@torch.no_grad()
def image_vectors(tower: Learner, pictures: Sequence[PIL.Image.Image]) -> NDArray:
    """Unit vectors (n, D) of pictures by a scorer's image tower."""
    return tower.images(tower.prepare(pictures).to(tower.device)).float().cpu().numpy()
