"""What raters prefer, as one number an image: choices, side-by-side answers and ratings become scores that examples are chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from limner.feedback.items import images_of
from limner.feedback.payloads import of_kind
from limner.feedback.study import Study
from limner.records import Feedback
from limner.scorers import steps as scorers


def preferences(rows: Sequence[Feedback], question: str = "overall") -> dict[str, float]:
    """Mean over raters of what they said of an image, 0 (worst) to 1; images that nobody spoke of are not there.

    choice: share of the other images of its item that it beats, a tie counting one half; side: (answer + 2) / 4 for the image that an
    answer is about and the rest for the other; ratings: (s - 1) / 4 of the question.

    Scores of choices and sides compare within an item only.
    """
    said: dict[str, list[float]] = {}
    for _, payload in of_kind(rows, "choice"):
        ranks = payload["ranks"]
        for image, rank in zip(payload["images"], ranks):
            beaten = sum((r > rank) + 0.5 * (r == rank) for r in ranks) - 0.5  # itself is no tie
            said.setdefault(image, []).append(beaten / (len(ranks) - 1))
    for row, payload in of_kind(rows, "side"):
        share = (payload["answer"] + 2) / 4
        said.setdefault(row.image_id, []).append(share)
        said.setdefault(payload["against"], []).append(1 - share)
    for row, payload in of_kind(rows, "ratings"):
        if question in payload:
            said.setdefault(row.image_id, []).append((payload[question] - 1) / 4)
    return {image: sum(values) / len(values) for image, values in said.items()}


def write_preferences(study: Study, rows: Sequence[Feedback], folder: Path) -> int:
    """Two step folders that stages with `from: feedback` read: `images` (as they came, not as they were shown) and `scores`.

    Returns:
        how many images have a score.

    Raises:
        ValueError: as `open_step`, or the images cannot be read any more.
    """
    found = preferences(rows)
    return scorers.write_preferences(folder, images_of(study, found), found)
