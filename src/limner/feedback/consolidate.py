"""Many raters, one answer: heatmaps, words and ratings as RichHF-18K consolidates them (arXiv 2312.10240), and how far raters agree.

Raters are those who answered. One who looked and marked nothing has a row with empty lists, and pulls a heatmap down; one who did not
look has none. Numbers of agreement are for each question; their intervals treat images as drawn, raters as given.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from limner.feedback.payloads import MARKS, QUESTIONS, of_kind
from limner.feedback.richhf import SIDE, RichFeedback, encode_map, tokens
from limner.images import image_size
from limner.records import Feedback, Image
from limner.statistics import Interval, bootstrap, krippendorff, paired_wins, share_interval, sign_test

RADIUS = 1 / 20  # of a point's disk, of the image's height; raters see it so
LEVELS = {2: "much better", 1: "better", 0: "same", -1: "worse", -2: "much worse"}


def disk_mask(points: ArrayLike, width: int, height: int, side: int = SIDE) -> NDArray[np.bool_]:
    """The union of disks around one rater's points, as a (side, side) map of the image.

    A pixel belongs to a disk if its centre is at most height / 20 image pixels away. The map is square whatever the image's shape, as
    RichHF's are, so on other images disks become ellipses.

    Args:
        points: (P, 2) x and y as fractions of width and height; P may be 0.
        width: pixels of the image.
        height: pixels of the image.
        side: pixels of the map.

    Raises:
        ValueError: another shape, or a point outside the image.
    """
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2) if np.size(points) == 0 else np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"points of shape {array.shape}; expected (P, 2) fractions of width and height, 0 to 1")
    if min(width, height, side) < 1:
        raise ValueError(f"an image of {width}x{height} on a map of {side}; expected at least 1 pixel")
    centres = (np.arange(side) + 0.5) / side
    mask = np.zeros((side, side), dtype=bool)
    for x, y in array:
        across, down = (centres - x) * width, (centres - y) * height
        mask |= across[None, :] ** 2 + down[:, None] ** 2 <= (height * RADIUS) ** 2
    return mask


def heatmap(points: Sequence[ArrayLike], width: int, height: int, side: int = SIDE) -> NDArray[np.float32]:
    """Share of raters whose disks cover each pixel, (side, side) in [0, 1].

    Args:
        points: (P, 2) of each rater, as `disk_mask`.

    Raises:
        ValueError: as `disk_mask`, or no raters.
    """
    if not len(points):
        raise ValueError("a heatmap of no raters; one who marked nothing is an empty list")
    total = np.zeros((side, side), dtype=np.float32)
    for one in points:
        total += disk_mask(one, width, height, side)
    return total / np.float32(len(points))


def mean_rating(ratings: Sequence[float]) -> float:
    """Mean of ratings 1 to 5, mapped to 0 to 1 by (s - 1) / 4.

    Raises:
        ValueError: no ratings, or one outside 1 to 5.
    """
    if not len(ratings) or not all(1 <= r <= 5 for r in ratings):
        raise ValueError(f"ratings {list(ratings)}; expected one or more from 1 to 5")
    return float((np.mean(ratings) - 1) / 4)


def majority_words(labels: Sequence[Sequence[int]], ties_misaligned: bool = False) -> tuple[int, ...]:
    """The label that most raters gave each word: 0 = misaligned, 1 = aligned.

    Args:
        labels: (raters, words) of 0 and 1.
        ties_misaligned: what is marked by exactly half of the raters is misaligned; else it is aligned.

    Raises:
        ValueError: no raters, raters with different numbers of words, or other labels.
    """
    if not labels or len({len(one) for one in labels}) > 1:
        raise ValueError(f"labels of {[len(one) for one in labels]} words; expected one or more raters of the same words")
    if not all(v in (0, 1) for one in labels for v in one):
        raise ValueError("labels: expected 0 (misaligned) or 1 (aligned)")
    marked = [sum(v == 0 for v in word) * 2 for word in zip(*labels)]
    return tuple(0 if m > len(labels) or (m == len(labels) and ties_misaligned) else 1 for m in marked)


def consolidate(
    feedback: Sequence[Feedback], images: Iterable[Image], side: int = SIDE, ties_misaligned: bool = False
) -> tuple[list[RichFeedback], dict[str, Any]]:
    """One row for each image that anyone answered for, in the order of the images, and a report.

    Returns:
        rows; and {"images", "rows", "raters": {image id: how many}, "unknown": ids in the feedback that are no image,
        "other_words": [[feedback id, image id]] whose tokens are not the prompt's (left out)}.

    Raises:
        ValueError: a payload that is not one of its kind, a rater who answered twice, or an image that cannot be read.
    """
    answers: dict[str, dict[str, list[tuple[Feedback, dict[str, Any]]]]] = {}
    for kind in ("points", "words", "ratings"):
        for row, payload in of_kind(feedback, kind):
            answers.setdefault(row.image_id, {}).setdefault(kind, []).append((row, payload))
    rows, count, raters, other_words = list[RichFeedback](), 0, dict[str, int](), list[list[str]]()
    for image in images:
        count += 1
        said = answers.pop(image.id, None)
        if said is None:
            continue
        values: dict[str, Any] = {"image_id": image.id, "prompt": image.text}
        if marks := [payload for _, payload in said.get("points", [])]:
            size = image_size(image.image, f"image {image.id}")
            values |= {f"{mark}_map": encode_map(heatmap([p[mark] for p in marks], *size, side)) for mark in MARKS}
        expected, labels = tokens(image.text), list[list[int]]()
        for row, payload in said.get("words", []):
            if payload["tokens"] != expected:
                other_words.append([row.id, image.id])
                continue
            labels.append([0 if i in payload["misaligned"] else 1 for i in range(len(expected))])
        if labels:
            values["labels"] = majority_words(labels, ties_misaligned)
        for question in QUESTIONS:
            if ratings := [payload[question] for _, payload in said.get("ratings", []) if question in payload]:
                values[question] = mean_rating(ratings)
        rows.append(RichFeedback(**values))
        raters[image.id] = len({row.rater for kind in said.values() for row, _ in kind})
    return rows, {"images": count, "rows": len(rows), "raters": raters, "unknown": sorted(answers), "other_words": other_words}


def ratings_table(feedback: Sequence[Feedback], question: str) -> NDArray[np.float64]:
    """Ratings of one question as (raters, images) 1 to 5, nan where a rater did not answer; raters and images in order of their ids."""
    cells = {(row.rater, row.image_id): payload[question] for row, payload in of_kind(feedback, "ratings") if question in payload}
    return _table(cells)


def words_table(feedback: Sequence[Feedback]) -> NDArray[np.float64]:
    """Labels of words as (raters, words of all images): 0 = misaligned, 1 = aligned, nan where a rater did not see the word."""
    cells = {}
    for row, payload in of_kind(feedback, "words"):
        for i in range(len(payload["tokens"])):
            cells[row.rater, (row.image_id, tuple(payload["tokens"]), i)] = float(i not in payload["misaligned"])
    return _table(cells)


def marks_table(feedback: Sequence[Feedback], mark: str) -> NDArray[np.float64]:
    """Whether each rater marked any point of a kind on an image, as (raters, images) of 0 and 1, nan where one did not look."""
    return _table({(row.rater, row.image_id): float(bool(payload[mark])) for row, payload in of_kind(feedback, "points")})


def _table(cells: Mapping[tuple[str, Any], float]) -> NDArray[np.float64]:
    raters, units = sorted({r for r, _ in cells}), sorted({u for _, u in cells})
    table = np.full((len(raters), len(units)), np.nan)
    row_of, column_of = {r: i for i, r in enumerate(raters)}, {u: i for i, u in enumerate(units)}
    for (rater, unit), value in cells.items():
        table[row_of[rater], column_of[unit]] = value
    return table


def agreement(feedback: Sequence[Feedback], seed: int = 0) -> dict[str, dict[str, Any]]:
    """How far raters agree, for each question that was asked.

    Returns:
        ratings: {"alpha" (interval), "differences" (`max_difference_histogram`), "ceiling" (`human_ceiling`)}; "words" and the two kinds
        of points (whether there is any): {"alpha" (nominal)}. Alpha is nan, and a ceiling empty, where answers are too few or all equal.
    """
    found: dict[str, dict[str, Any]] = {}
    for question in QUESTIONS:
        table = ratings_table(feedback, question)
        if table.size:
            found[question] = {
                "alpha": krippendorff(table, "interval"),
                "differences": max_difference_histogram(table),
                "ceiling": human_ceiling(table, seed),
            }
    for name, table in [("words", words_table(feedback)), *((mark, marks_table(feedback, mark)) for mark in MARKS)]:
        if table.size:
            found[name] = {"alpha": krippendorff(table, "nominal")}
    return found


def max_difference_histogram(ratings: ArrayLike) -> dict[float, Interval]:
    """Share of images by the largest difference between two of their raters, in steps of 0 to 1 (RichHF, figure 4).

    Args:
        ratings: (raters, images) of 1 to 5, nan for no answer. Images with fewer than two answers are left out.

    Returns:
        {0, 0.25, 0.5, 0.75, 1: share}: differences after (s - 1) / 4, to the nearest of these; empty if no image has two answers.
    """
    table = np.asarray(ratings, dtype=np.float64)
    table = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    if not table.size:
        return {}
    steps = np.rint(np.nanmax(table, axis=0) - np.nanmin(table, axis=0)).astype(int)
    return {step / 4: share_interval(int((steps == step).sum()), len(steps)) for step in range(5)}


def human_ceiling(ratings: ArrayLike, seed: int = 0, draws: int = 500) -> dict[str, Interval]:
    """How well one rater is predicted by the mean of the others: what can be asked of a model, measured on people.

    Each answer is paired with the mean of the other raters of its image, and all pairs correlated together, so raters may be many with few
    images each; a rater who is generous throughout lowers it. The interval is a bootstrap over images. (A model is usually held
    against the mean of all raters, which is less noisy than one of them, so it can come out above this.)

    Args:
        ratings: (raters, images), nan for no answer.

    Returns:
        {"plcc", "srcc"}: Pearson's and Spearman's correlation, n images; empty if fewer than three images have two answers, or all are
        equal.
    """
    table = np.asarray(ratings, dtype=np.float64)
    table = table[:, (~np.isnan(table)).sum(axis=0) > 1].T
    if len(table) < 3:
        return {}

    def correlation(images: NDArray[np.float64], ranked: bool) -> float:
        there = ~np.isnan(images)
        others = (np.nansum(images, axis=1, keepdims=True) - images) / (there.sum(axis=1, keepdims=True) - 1)
        one, rest = images[there], others[there]
        if ranked:
            one, rest = stats.rankdata(one), stats.rankdata(rest)
        if np.ptp(one) == 0 or np.ptp(rest) == 0:
            return 0.0  # a draw of equal images; as a whole it is refused below
        return float(np.corrcoef(one, rest)[0, 1])

    if np.nanmax(table) == np.nanmin(table):
        return {}
    return {
        name: bootstrap(table, lambda images, ranked=ranked: correlation(images, ranked), seed, draws)  # type: ignore[misc]
        for name, ranked in (("plcc", False), ("srcc", True))
    }


def side_by_side(answers: Sequence[int], pairs: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Side-by-side answers as shares of five levels, a win rate and a sign test.

    Answers to one pair by several raters are not independent, so whatever is tested rests on pairs: a pair is won if its answers' mean
    is above 0, and the levels' intervals are as wide as if each pair had one answer.

    Args:
        answers: -2 (ours much worse) to 2 (ours much better).
        pairs: which pair each answer is about; None: each about its own.

    Returns:
        {"levels": {"much better": share, ...} of answers, "wins": share of pairs won (a tie is half a win), "p_value": two-sided sign
        test over pairs, "answers": how many, "pairs": how many}.

    Raises:
        ValueError: no answers, other answers, or another number of pairs.
    """
    names = list(pairs if pairs is not None else range(len(answers)))
    if not answers or len(names) != len(answers) or not all(a in LEVELS for a in answers):
        raise ValueError(f"{len(answers)} answers about {len(names)} pairs; expected one or more of -2 to 2, and a pair for each")
    of_pair: dict[Hashable, list[int]] = {}
    for name, answer in zip(names, answers):
        of_pair.setdefault(name, []).append(answer)
    means = [float(np.mean(v)) for v in of_pair.values()]
    n = len(means)
    shares = {word: sum(a == level for a in answers) / len(answers) for level, word in LEVELS.items()}
    levels = {word: share_interval(share * n, n) for word, share in shares.items()}
    zeros = [0.0] * n
    return {"levels": levels, "wins": paired_wins(means, zeros), "p_value": sign_test(means, zeros), "answers": len(answers), "pairs": n}


def side_answers(feedback: Sequence[Feedback]) -> tuple[list[int], list[tuple[str, str]]]:
    """Answers and pairs of the rows of kind `side`, for `side_by_side`; ours is the image that a row is about."""
    rows = of_kind(feedback, "side")
    return [payload["answer"] for _, payload in rows], [(row.image_id, payload["against"]) for row, payload in rows]
