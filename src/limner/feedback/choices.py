"""Feedback of the kinds `choice`, `side` and `ratings` as the choices that scorers learn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from limner.feedback import payloads
from limner.feedback.preferences import preferences
from limner.records import Choice, Feedback, Image
from limner.scorers.rows import Dropped, prompt_id


def to_choices(rows: Iterable[Feedback], images: Mapping[str, Image], question: str = "overall") -> Iterator[Choice | Dropped]:
    """One row an answer, images in it, and one row for the ratings of a prompt's images; other kinds of feedback are passed over.

    Ranks with one 1 and else 2 among three or more images are a choice, of which nothing is known between those not chosen; other ranks are
    a ranking. A side-by-side answer is a choice of two: how much better is not kept, 0 is a tie. Of ratings raters' mean counts: the images
    of a prompt are ranked by what `preferences` makes of `question`, since two raters' scales differ and few rate the same images.

    Raises:
        ValueError: a payload that is not of its kind, or a rater who answered twice.
    """
    rows = list(rows)
    for row, payload in payloads.of_kind(rows, "choice"):
        ranks = payload["ranks"]
        only_best = len(ranks) > 2 and sorted(ranks) == [1] + [2] * (len(ranks) - 1)
        said = [float(r == 1) for r in ranks] if only_best else [float(r) for r in ranks]
        yield _row(row.id, row.rater, payload["images"], "choice" if only_best else "ranking", said, images)
    for row, payload in payloads.of_kind(rows, "side"):
        first = (1 + (payload["answer"] > 0) - (payload["answer"] < 0)) / 2
        yield _row(row.id, row.rater, [row.image_id, payload["against"]], "choice", [first, 1 - first], images)
    yield from _ratings([row for row in rows if row.kind == "ratings"], images, question)


def _ratings(rows: Sequence[Feedback], images: Mapping[str, Image], question: str) -> Iterator[Choice | Dropped]:
    groups: dict[str, list[tuple[str, float]]] = {}
    for name, mean in preferences(rows, question).items():
        if name not in images:
            yield Dropped(f"feedback ratings/{name}", "image is not in the folder of images")
        else:
            groups.setdefault(images[name].prompt_id, []).append((name, round(mean, 9)))
    for prompt, found in groups.items():
        where = f"ratings/{prompt}/{question}"
        if len(found) == 1:
            yield Dropped(f"feedback {where}", "only one image of the prompt is rated")
            continue
        ranks = [1.0 + sum(other > mean for _, other in found) for _, mean in found]
        yield _row(where, "", [name for name, _ in found], "ranking", ranks, images)


def _row(where: str, rater: str, ids: list[str], kind: str, said: list[float], images: Mapping[str, Image]) -> Choice | Dropped:
    if not all(i in images for i in ids):
        return Dropped(f"feedback {where}", "image is not in the folder of images")
    found = [images[i] for i in ids]
    if len({i.prompt_id for i in found}) > 1:
        return Dropped(f"feedback {where}", "images of different prompts")
    models = tuple(i.model for i in found)
    return Choice(
        id=where, prompt_id=prompt_id(found[0].text), text=found[0].text, kind=kind, said=tuple(said), files=tuple(ids),
        images=tuple(i.image for i in found), generators=models if all(models) else (), rater=rater,
    )  # fmt: skip
