"""What the page sends, checked: an answer becomes payloads of Feedback rows, or an error that tells the rater what is missing.

rich    {"points": {...}, "words": {"misaligned": [1]}, "ratings": {...}, "nothing": {"image": false, "prompt": true}}
choice  {"images": [token, ...], "ranks": [1, 2, 2, 2]}
side    {"left": token, "right": token, "value": -2..2}         2: the right one is much better
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limner.feedback import payloads
from limner.feedback.richhf import tokens
from limner.feedback.study import Study

NEAR = 1 / 10  # of the height: a point that is so near a gold point has found it (two radii)
Payload = dict[str, Any]


def interpret(study: Study, answer: Any, text: str, images: Mapping[str, str], imported: bool = False) -> dict[str, Payload]:
    """The payloads that an answer makes, by kind.

    Args:
        answer: what the page sent.
        text: the item's prompt.
        images: the item's image ids by token, in the item's order.
        imported: not from the page: it may leave out kinds, and questions; its `kinds` says what there is.

    Raises:
        ValueError: something is missing, contradicts itself or is out of range; in the rater's words.
    """
    if not isinstance(answer, Mapping):
        raise ValueError(f"an answer is an object; found {type(answer).__name__}")
    if imported and study.task == "rich":
        found = {kind: payload for kind, payload in _parts(study, answer, text).items() if kind in answer.get("kinds", ())}
    else:
        found = {"rich": _rich, "choice": _choice, "side": _side}[study.task](study, answer, text, images)
    for kind, payload in found.items():
        payloads.check(kind, payload, "answer")
    return found


def _parts(study: Study, answer: Mapping[str, Any], text: str) -> dict[str, Payload]:
    points, marked, ratings = (_part(answer, k) for k in ("points", "words", "ratings"))
    return {
        "points": {mark: points.get(mark, []) for mark in payloads.MARKS},
        "words": {"tokens": tokens(text), "misaligned": marked.get("misaligned", [])},
        "ratings": {q: ratings[q] for q in study.questions if ratings.get(q) is not None},
    }


def _rich(study: Study, answer: Mapping[str, Any], text: str, images: Mapping[str, str]) -> dict[str, Payload]:
    found, nothing = _parts(study, answer, text), _part(answer, "nothing")
    for kind in ("points", "words"):
        payloads.check(kind, found[kind], "answer")
    artifact, contradicts = found["points"]["artifact"], found["points"]["misalignment"] or found["words"]["misaligned"]
    if not artifact and not nothing.get("image"):
        raise ValueError("Mark what looks wrong in the image, or say that nothing does.")
    if not contradicts and not nothing.get("prompt"):
        raise ValueError("Mark what contradicts the prompt, in the image or among its words, or say that nothing does.")
    if (artifact and nothing.get("image")) or (contradicts and nothing.get("prompt")):
        raise ValueError("Something is marked, and yet “nothing” is said: which of the two?")
    if missing := [q for q in study.questions if q not in found["ratings"]]:
        raise ValueError(f"Not rated yet: {', '.join(missing)}.")
    return found


def _part(answer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = answer.get(name, {})
    if not isinstance(part, Mapping):
        raise ValueError(f"{name}: {type(part).__name__}; expected an object")
    return part


def _choice(study: Study, answer: Mapping[str, Any], text: str, images: Mapping[str, str]) -> dict[str, Payload]:
    shown, ranks = answer.get("images"), answer.get("ranks")
    if not isinstance(shown, list) or sorted(map(str, shown)) != sorted(images):
        raise ValueError("These are not the images of this item.")
    if not isinstance(ranks, list) or len(ranks) != len(shown) or None in ranks:
        raise ValueError("Choose the best image." if study.answer == "best" else "Give every image a rank.")
    if 1 not in ranks:
        raise ValueError("One image at least has rank 1.")
    if study.answer == "best" and sorted(set(map(str, ranks))) not in (["1"], ["1", "2"]):
        raise ValueError(f"ranks {ranks}; expected 1 for the best and 2 for the rest")
    of = dict(zip(shown, ranks))
    return {"choice": {"images": list(images.values()), "ranks": [of[t] for t in images], "shown": [images[t] for t in shown]}}


def _side(study: Study, answer: Mapping[str, Any], text: str, images: Mapping[str, str]) -> dict[str, Payload]:
    left, right, value = answer.get("left"), answer.get("right"), answer.get("value")
    if not isinstance(left, str) or not isinstance(right, str) or sorted((left, right)) != sorted(images):
        raise ValueError("These are not the images of this item.")
    if isinstance(value, bool) or not isinstance(value, int) or not -2 <= value <= 2:
        raise ValueError("Choose how the two compare.")
    if study.levels == "forced" and value not in (-2, 2):
        raise ValueError("Choose one of the two.")
    ours, other = images
    return {
        "side": {"against": images[other], "answer": value if right == ours else -value, "left": images[left]}
    }  # images: one that is about itself has one token twice, and is refused above


def gold_score(expected: Mapping[str, Any], found: Mapping[str, Payload]) -> float:
    """How much of a known answer was found, 0 to 1: the mean over the parts that are known.

    points: F1 of artifact points within a tenth of the height (both empty: 1); words: F1; each rating: 1 if at most one step off;
    choice (`best`, image ids): 1 if one of them is first, alone or tied; side (`answer`): 1 if its sign is right.
    """
    parts = list[float]()
    if "points" in expected:
        for mark in payloads.MARKS:
            if mark in expected["points"]:
                parts.append(_points_f1(expected["points"][mark], found["points"][mark]))
    if "words" in expected:
        true, said = set(expected["words"]["misaligned"]), set(found["words"]["misaligned"])
        parts.append(1.0 if not true and not said else 2 * len(true & said) / (len(true) + len(said)))
    for question, rating in expected.get("ratings", {}).items():
        if question in found["ratings"]:
            parts.append(float(abs(found["ratings"][question] - rating) <= 1))
    if "best" in expected:
        choice = found["choice"]
        first = {i for i, rank in zip(choice["images"], choice["ranks"]) if rank == 1}
        parts.append(float(bool(first & set(expected["best"])) and len(first) <= max(len(expected["best"]), 1)))
    if "answer" in expected:
        parts.append(
            float((found["side"]["answer"] > 0) - (found["side"]["answer"] < 0) == (expected["answer"] > 0) - (expected["answer"] < 0))
        )
    return sum(parts) / len(parts) if parts else 1.0


def _points_f1(expected: Sequence[Sequence[float]], said: Sequence[Sequence[float]]) -> float:
    if not expected or not said:
        return float(not expected and not said)

    def near(a: Sequence[float], points: Sequence[Sequence[float]]) -> bool:
        return any((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 <= NEAR**2 for b in points)

    recall = sum(near(p, said) for p in expected) / len(expected)
    precision = sum(near(p, expected) for p in said) / len(said)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def gold_error(study: Study, expected: Mapping[str, Any]) -> str:
    """What is wrong with a known answer, or "".

    rich: {"points": {"artifact": [...]}, "words": {"misaligned": [...]}, "ratings": {...}}, any of them; choice: {"best": [image ids]};
    side: {"answer": -2..2} for the image from `images.from`.
    """
    allowed = {"rich": {"points", "words", "ratings"}, "choice": {"best"}, "side": {"answer"}}[study.task]
    if not expected or expected.keys() - allowed:
        return f"answer has {', '.join(sorted(expected)) or 'nothing'}; task {study.task} takes {', '.join(sorted(allowed))}"
    try:
        if "points" in expected:
            payloads.check("points", {"artifact": [], "misalignment": [], **expected["points"]}, "answer")
        if "words" in expected and not all(isinstance(i, int) for i in expected["words"]["misaligned"]):
            return "answer.words.misaligned: expected positions of words"
        if "ratings" in expected:
            payloads.check("ratings", expected["ratings"], "answer")
        if "best" in expected and not (isinstance(expected["best"], list) and expected["best"]):
            return "answer.best: expected a list of image ids"
        if "answer" in expected and expected["answer"] not in range(-2, 3):
            return f"answer.answer: {expected['answer']!r}; expected -2 to 2"
    except (ValueError, TypeError, KeyError) as error:
        return str(error)
    return ""
