"""Feedback of the kinds `choice` and `side` as the choices that scorers learn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from limner.feedback import payloads
from limner.records import Choice, Feedback, Image
from limner.scorers.rows import Dropped, prompt_id


def to_choices(rows: Iterable[Feedback], images: Mapping[str, Image]) -> Iterator[Choice | Dropped]:
    """One row an answer, images in it; other kinds of feedback are passed over.

    Ranks with one 1 and else 2 among three or more images are a choice, of which nothing is known between those not chosen; other ranks are
    a ranking. A side-by-side answer is a choice of two: how much better is not kept, 0 is a tie.

    Raises:
        ValueError: a payload that is not of its kind, or a rater who answered twice.
    """
    rows = list(rows)
    for row, payload in payloads.of_kind(rows, "choice"):
        ranks = payload["ranks"]
        only_best = len(ranks) > 2 and sorted(ranks) == [1] + [2] * (len(ranks) - 1)
        said = [float(r == 1) for r in ranks] if only_best else [float(r) for r in ranks]
        yield _row(row, payload["images"], "choice" if only_best else "ranking", said, images)
    for row, payload in payloads.of_kind(rows, "side"):
        first = (1 + (payload["answer"] > 0) - (payload["answer"] < 0)) / 2
        yield _row(row, [row.image_id, payload["against"]], "choice", [first, 1 - first], images)


def _row(row: Feedback, ids: list[str], kind: str, said: list[float], images: Mapping[str, Image]) -> Choice | Dropped:
    if not all(i in images for i in ids):
        return Dropped(f"feedback {row.id}", "image is not in the folder of images")
    found = [images[i] for i in ids]
    if len({i.prompt_id for i in found}) > 1:
        return Dropped(f"feedback {row.id}", "images of different prompts")
    models = tuple(i.model for i in found)
    return Choice(
        id=row.id, prompt_id=prompt_id(found[0].text), text=found[0].text, kind=kind, said=tuple(said), files=tuple(ids),
        images=tuple(i.image for i in found), generators=models if all(models) else (), rater=row.rater,
    )  # fmt: skip
