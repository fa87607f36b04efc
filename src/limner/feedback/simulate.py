"""Raters who know the truth and see it as people do: they miss things, point beside them, are strict or lenient, and careless at times.

What is true of an image is passed in; this module knows no world. Every draw is seeded by rater and item, so a study can be repeated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner import seeds
from limner.feedback import client
from limner.feedback.consolidate import RADIUS, heatmap, majority_words, mean_rating
from limner.feedback.payloads import QUESTIONS
from limner.feedback.richhf import tokens
from limner.feedback.study import Study

BESIDE = 0.4  # of a rating's spread is left when images are seen beside each other: people compare more steadily than they rate


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is true of an image for its prompt.

    artifact, misalignment: (H, W) bool, what is wrong and what contradicts the prompt; words: positions of wrong words among
    `richhf.tokens`; qualities: 0 to 1 for each of `QUESTIONS`.
    """

    artifact: NDArray[np.bool_]
    misalignment: NDArray[np.bool_]
    words: tuple[int, ...] = ()
    qualities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a rater answers.

    Args:
        bias: added to every rating, in steps of 1 to 5.
        spread: standard deviation of a rating around what it should be.
        care: share of answers given with care; of the others ratings are guesses and half of what is wrong is missed.
        miss: share of wrong places and words missed even with care.
        aim: standard deviation of a point, of the image's height.
        stray: share of images with a point where nothing is wrong, and of right words marked times five.
    """

    bias: float = 0.0
    spread: float = 0.7
    care: float = 0.9
    miss: float = 0.15
    aim: float = 0.02
    stray: float = 0.1


def manner_of(seed: int, rater: int) -> Manner:
    """The manner of the n-th rater: each is their own."""
    rng = np.random.default_rng(seeds.seed_of(seed, "manner", rater))
    return Manner(
        bias=float(rng.normal(0, 0.5)), spread=float(rng.uniform(0.5, 0.9)), care=float(rng.uniform(0.8, 0.98)),
        miss=float(rng.uniform(0.05, 0.25)), aim=float(rng.uniform(0.01, 0.03)), stray=float(rng.uniform(0.02, 0.15)),
    )  # fmt: skip


def answer(study: Study, item: Mapping[str, Any], truths: Sequence[Truth], manner: Manner, rng: np.random.Generator) -> dict[str, Any]:
    """What a rater sends for an item.

    Args:
        item: as the page gets it.
        truths: of its images, in the order shown.
    """
    careful = bool(rng.random() < manner.care)
    if study.task == "rich":
        return _rich(study, item, truths[0], manner, careful, rng)
    steadier = replace(manner, spread=manner.spread * BESIDE)
    pleasure = [_sees(t.qualities["overall"], steadier, careful, rng) for t in truths]
    shown = [i["token"] for i in item["images"]]
    if study.task == "choice":
        order = np.argsort(np.negative(pleasure), kind="stable")
        ranks = np.empty(len(order), int)
        ranks[order] = range(1, len(order) + 1)
        return {"images": shown, "ranks": [min(int(r), 2) for r in ranks] if study.answer == "best" else [int(r) for r in ranks]}
    difference = pleasure[1] - pleasure[0]
    if study.levels == "forced":
        value = 2 if difference > 0 else -2
    else:
        value = int(np.sign(difference)) * (2 if abs(difference) > 1.2 else 1 if abs(difference) > 0.3 else 0)
    return {"left": shown[0], "right": shown[1], "value": value}


def _sees(quality: float, manner: Manner, careful: bool, rng: np.random.Generator) -> float:
    """A quality of 0 to 1 as a rater feels it, on a scale of 1 to 5 without its ends."""
    return float(rng.uniform(1, 5)) if not careful else 1 + 4 * quality + manner.bias + float(rng.normal(0, manner.spread))


def _rich(study: Study, item: Mapping[str, Any], truth: Truth, manner: Manner, careful: bool, rng: np.random.Generator) -> dict[str, Any]:
    miss = manner.miss if careful else 0.5
    artifact = _points(truth.artifact, miss, manner, rng)
    misalignment = _points(truth.misalignment, 1 - (1 - miss) * 0.6, manner, rng)  # where does what is missing lie? Few say
    if rng.random() < manner.stray:
        artifact.append([round(float(v), 4) for v in rng.random(2)])
    words = len(tokens(item["text"]))
    marked = [i for i in range(words) if rng.random() < (1 - miss if i in truth.words else manner.stray / 5)]
    ratings = {q: int(np.clip(round(_sees(truth.qualities[q], manner, careful, rng)), 1, 5)) for q in study.questions}
    return {
        "points": {"artifact": artifact, "misalignment": misalignment}, "words": {"misaligned": marked}, "ratings": ratings,
        "nothing": {"image": not artifact, "prompt": not misalignment and not marked},
    }  # fmt: skip


def _points(mask: NDArray[np.bool_], miss: float, manner: Manner, rng: np.random.Generator) -> list[list[float]]:
    """Points that cover a mask: each disk where most is uncovered, aimed as well as the rater can."""
    height, width = mask.shape
    left, found = mask.copy(), list[list[float]]()
    if not mask.any() or rng.random() < miss:
        return found
    rows, columns = np.mgrid[:height, :width]
    for _ in range(6):
        at = np.argwhere(left)
        if len(at) < 0.15 * mask.sum():
            break
        tries = at[rng.integers(len(at), size=8)]
        disks = [(rows - y) ** 2 + (columns - x) ** 2 <= (height * RADIUS) ** 2 for y, x in tries]
        best = int(np.argmax([(d & left).sum() for d in disks]))
        left &= ~disks[best]
        y, x = tries[best]
        place = np.array([(x + 0.5) / width, (y + 0.5) / height]) + rng.normal(0, manner.aim, 2) * [height / width, 1]
        found.append([round(float(v), 4) for v in place.clip(0, 1)])
    return found


def run_rater(
    visitor: client.Visitor, study: Study, know: Callable[[str], Truth], number: int, names: Mapping[str, str], *, thinking: float = 0.0
) -> int:
    """One rater answers until nothing is left; returns how many answers were acknowledged.

    Args:
        know: what is true of an image, by image id.
        number: of the rater, for seeds.
        names: image ids by token.
        thinking: seconds between answers.
    """
    manner, done = manner_of(study.seed, number), 0
    found = client.get(visitor, "/api/task")
    while True:
        item = found["item"]
        if item is None:
            if found["finished"]:
                return done
            time.sleep(0.2)  # others hold what is left
            found = client.get(visitor, "/api/task")
            continue
        shown = [names[i["token"]] for i in item["images"]]
        rng = np.random.default_rng(seeds.seed_of(study.seed, "rater", number, min(shown)))
        payload = answer(study, item, [know(name) for name in shown], manner, rng)
        time.sleep(thinking)
        sent = {
            "id": f"{number:04d}-{item['id']:08d}-{found['revision']}",
            "item": item["id"],
            "base": found["revision"],
            "payload": payload,
        }
        try:
            result = client.post(visitor, "/api/submit", {**sent, "seconds": round(float(rng.gamma(6, 8)), 1)})
        except ValueError as error:
            if "409" not in str(error):
                raise
            found = client.get(visitor, "/api/task")  # the item went to others
            continue
        done += 1
        found = result["next"]


def run_raters(
    address: str, links: Sequence[str], study: Study, know: Callable[[str], Truth], names: Mapping[str, str], thinking: float = 0.0
) -> int:
    """All raters at once, a thread each; returns how many answers were acknowledged.

    Raises:
        RuntimeError: a rater failed.
    """
    counts, failures = [0] * len(links), list[BaseException]()

    def work(n: int) -> None:
        try:
            counts[n] = run_rater(client.join(address, links[n]), study, know, n, names, thinking=thinking)
        except BaseException as error:  # of a thread nobody would see it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(links))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(links)} simulated raters failed: {failures[0]}") from failures[0]
    return sum(counts)


def recovery(
    answers: Sequence[Mapping[str, Mapping[str, Any]]], truths: Sequence[Truth], raters: Sequence[Sequence[int]]
) -> dict[str, float]:
    """How well a choice of raters for each image recovers the truth, put together by what `consolidate` puts them together with.

    Args:
        answers: payloads by kind, of all raters and images.
        truths: of images.
        raters: for each image, which of `answers` speak for it; one = a single rater, several = consolidated.

    Returns:
        heatmap: mean correlation with the artifact mask, over images that have one; words: F1 over all words, by majority;
        ratings: mean over the questions of Pearson's correlation with the latent quality.
    """
    correlations, said = list[float](), {q: list[float]() for q in QUESTIONS}
    hits = marked = true = 0
    for truth, who in zip(truths, raters):
        group = [answers[i] for i in who]
        if truth.artifact.any():
            height, width = truth.artifact.shape
            found = heatmap([a["points"]["artifact"] for a in group], width, height, side=64)
            mask = _square(truth.artifact, 64)
            correlations.append(float(np.corrcoef(found.ravel(), mask.ravel())[0, 1]) if np.ptp(found) else 0.0)
        labels = [[int(i not in a["words"]["misaligned"]) for i in range(len(a["words"]["tokens"]))] for a in group]
        wrong = {i for i, label in enumerate(majority_words(labels)) if label == 0}
        hits, marked, true = hits + len(wrong & set(truth.words)), marked + len(wrong), true + len(truth.words)
        for q in QUESTIONS:
            said[q].append(mean_rating([a["ratings"][q] for a in group]))
    ratings = [np.corrcoef(said[q], [t.qualities[q] for t in truths])[0, 1] for q in QUESTIONS]
    return {"heatmap": float(np.mean(correlations)), "words": 2 * hits / max(marked + true, 1), "ratings": float(np.mean(ratings))}


def _square(mask: NDArray[np.bool_], side: int) -> NDArray[np.float64]:
    rows = (np.arange(side) * mask.shape[0] // side)[:, None]
    return mask[rows, np.arange(side) * mask.shape[1] // side].astype(np.float64)
