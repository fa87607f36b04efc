"""What the JSON of a Feedback row holds, by its kind; made and checked here and nowhere else.

    points   {"artifact": [[x, y], ...], "misalignment": [[x, y], ...]}   fractions of width and height; both empty: seen, nothing wrong
    words    {"tokens": ["a", "cat"], "misaligned": [1]}                  positions among the prompt's tokens (`richhf.tokens`)
    ratings  {"plausibility": 4, "alignment": 5, ...}                     1 to 5, higher is better; what was not asked is left out
    choice   {"images": ["a", "b", "c"], "ranks": [1, 2, 2]}              1 is best, equal ranks are ties; best of K: one 1, the rest 2
    side     {"against": "b", "answer": -2}                               -2 (much worse) to 2 (much better) than image b

Keys beyond these are kept and not looked at (`side` may hold which image stood on the left, say).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from limner.records import Feedback

MARKS = ("artifact", "misalignment")
QUESTIONS = ("plausibility", "alignment", "aesthetics", "overall")
KINDS = ("points", "words", "ratings", "choice", "side")


def make(image_id: str, rater: str, kind: str, payload: Mapping[str, Any], seconds: float = 0.0, id: str = "") -> Feedback:
    """A checked Feedback row; equal payloads give equal JSON. Without an id it is image, rater and kind.

    Raises:
        ValueError: the payload is not one of its kind.
    """
    name = id or f"{image_id}/{rater}/{kind}"
    check(kind, payload, f"feedback {name}")
    return Feedback(id=name, image_id=image_id, rater=rater, kind=kind, payload=dump(payload), seconds=seconds)


def dump(payload: Mapping[str, Any]) -> str:
    """The one way to write a payload as JSON."""
    return json.dumps(payload, sort_keys=True, ensure_ascii=False, allow_nan=False)


def load(row: Feedback) -> dict[str, Any]:
    """The payload of a row.

    Raises:
        ValueError: not JSON, or not a payload of the row's kind; names the row and the field.
    """
    try:
        payload = json.loads(row.payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"feedback {row.id}: payload is not JSON ({error})") from error
    check(row.kind, payload, f"feedback {row.id}")
    return payload


def of_kind(rows: Iterable[Feedback], kind: str) -> list[tuple[Feedback, dict[str, Any]]]:
    """The rows of a kind with their payloads.

    Raises:
        ValueError: as `load`, or a rater answered for an image twice: which answer counts is the caller's to say.
    """
    found = [(row, load(row)) for row in rows if row.kind == kind]
    seen: dict[tuple[str, str, str], str] = {}
    for row, payload in found:
        key = (row.image_id, row.rater, str(payload.get("against", "")))
        if key in seen:
            raise ValueError(f"feedback {row.id}: rater {row.rater} answered {kind} of image {row.image_id} already in {seen[key]}")
        seen[key] = row.id
    return found


def check(kind: str, payload: Any, where: str) -> None:
    """Check a payload.

    Raises:
        ValueError: an unknown kind, or a field that is missing or out of range; names `where`, field and value.
    """
    if kind not in KINDS:
        raise ValueError(f"{where}: kind {kind!r}; expected {', '.join(KINDS)}")
    if not isinstance(payload, Mapping):
        raise ValueError(f"{where}: payload is {type(payload).__name__}; expected an object")
    problem = {"points": _points, "words": _words, "ratings": _ratings, "choice": _choice, "side": _side}[kind](payload)
    if problem:
        raise ValueError(f"{where}: {kind}.{problem}")


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # false for nan


def _whole(value: Any, low: int, high: float) -> bool:
    return _number(value, low, high) and isinstance(value, int)


def _points(payload: Mapping[str, Any]) -> str:
    for mark in MARKS:
        points = payload.get(mark)
        if not isinstance(points, list):
            return f"{mark}: {points!r}; expected a list of [x, y], empty if nothing is wrong"
        for point in points:
            if not isinstance(point, list) or len(point) != 2 or not all(_number(v, 0, 1) for v in point):
                return f"{mark}: {point!r}; expected [x, y] as fractions of width and height, 0 to 1"
    return ""


def _words(payload: Mapping[str, Any]) -> str:
    tokens, misaligned = payload.get("tokens"), payload.get("misaligned")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        return f"tokens: {tokens!r}; expected a list of words"
    if not isinstance(misaligned, list) or not all(_whole(i, 0, len(tokens) - 1) for i in misaligned):
        return f"misaligned: {misaligned!r}; expected positions among {len(tokens)} tokens, from 0"
    return ""


def _ratings(payload: Mapping[str, Any]) -> str:
    for question in QUESTIONS:
        if question in payload and not _number(payload[question], 1, 5):
            return f"{question}: {payload[question]!r}; expected 1 to 5"
    return "" if any(q in payload for q in QUESTIONS) else f"{QUESTIONS[0]}: no rating; expected one of {', '.join(QUESTIONS)}"


def _choice(payload: Mapping[str, Any]) -> str:
    images, ranks = payload.get("images"), payload.get("ranks")
    if not isinstance(images, list) or len(images) < 2 or not all(isinstance(i, str) for i in images) or len(set(images)) < len(images):
        return f"images: {images!r}; expected two or more different image ids"
    if not isinstance(ranks, list) or len(ranks) != len(images) or not all(_whole(r, 1, len(images)) for r in ranks):
        return f"ranks: {ranks!r}; expected {len(images)} whole numbers from 1 (best)"
    return ""


def _side(payload: Mapping[str, Any]) -> str:
    if not isinstance(payload.get("against"), str):
        return f"against: {payload.get('against')!r}; expected an image id"
    return "" if _whole(payload.get("answer"), -2, 2) else f"answer: {payload.get('answer')!r}; expected -2 to 2"
