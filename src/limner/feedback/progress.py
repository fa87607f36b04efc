"""How a study goes: numbers for the admin's page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from sqlalchemy import func, select
from sqlmodel import col

from limner.feedback.answers import Given, feedback
from limner.feedback.assign import IS_GOLD
from limner.feedback.consolidate import marks_table, ratings_table, words_table
from limner.feedback.database import Answer, Database, Draft, Item, Rater, Slot, reading
from limner.feedback.payloads import MARKS, QUESTIONS
from limner.records import Feedback
from limner.seeds import seed_of
from limner.statistics import krippendorff

POINTS = 8  # of the curve of agreement


def overview(database: Database) -> dict[str, Any]:
    """Slots done and held, answers an hour, and when it will be done at that speed."""
    now = time.time()
    with reading(database) as session:
        count = select(func.count()).select_from(Slot).where(~IS_GOLD)
        total, done = (session.execute(q).scalar_one() for q in (count, count.where(col(Slot.done))))
        held = session.execute(count.where(~col(Slot.done), col(Slot.expires) > now)).scalar_one()
        items = session.execute(select(func.count()).select_from(Item)).scalar_one()
        times = [t for (t,) in session.execute(select(col(Answer.created)).where(col(Answer.revision) == 1).order_by(col(Answer.created)))]
        drafts = session.execute(select(func.count()).select_from(Draft).where(col(Draft.version) > 0)).scalar_one()
        skipped = session.execute(select(func.count()).select_from(Answer).where(col(Answer.skipped) != "")).scalar_one()
    recent = [t for t in times if t > now - 3600]
    span = max(now - recent[0], 60.0) / 3600 if recent else 0.0
    speed = len(recent) / span if span else 0.0
    hours = np.bincount([int((now - t) // 3600) for t in times if t > now - 24 * 3600], minlength=24)[:24][::-1].tolist()
    return {
        "total": total, "done": done, "held": held, "items": items, "drafts": drafts, "skipped": skipped, "speed": speed,
        "left": (total - done) / speed if speed else None, "hours": hours,
    }  # fmt: skip


def rater_rows(database: Database, answers: Sequence[Given]) -> list[dict[str, Any]]:
    """A row for each rater: answers, median seconds, share of gold found, agreement with the others, skips."""
    with reading(database) as session:
        people = list(session.execute(select(Rater).order_by(col(Rater.name))).scalars())
        query = select(col(Answer.rater_id), func.count()).where(col(Answer.skipped) != "").group_by(col(Answer.rater_id))
        skips = {row[0]: row[1] for row in session.execute(query)}
    found = []
    for person in people:
        mine = [a for a in answers if a.rater == person.name and not a.final]
        gold = [a.correct for a in mine if a.correct is not None]
        found.append(
            {
                "id": person.id, "name": person.name, "role": person.role, "blocked": person.blocked, "answers": len(mine),
                "seconds": float(np.median([a.seconds for a in mine])) if mine else None,
                "gold": float(np.mean(gold)) if gold else None, "golds": len(gold), "skips": skips.get(person.id, 0),
                "agreement": agreement_with_others(answers, person.name),
            }
        )  # fmt: skip
    return found


def agreement_with_others(answers: Sequence[Given], rater: str) -> float | None:
    """How often a rater says what another says, over all pairs of answers to an item: ratings at most one step apart, words marked alike,
    the same best image, the same side. None without such pairs."""
    of_item: dict[int, list[Given]] = {}
    for answer in answers:
        of_item.setdefault(answer.item_id, []).append(answer)
    alike = list[float]()
    for group in of_item.values():
        for mine in (a for a in group if a.rater == rater):
            alike += [_alike(mine, other) for other in group if other.rater != rater]
    return float(np.mean(alike)) if alike else None


def _alike(a: Given, b: Given) -> float:
    if "choice" not in a.found and "side" not in a.found:
        one, two = a.found.get("ratings", {}), b.found.get("ratings", {})
        parts = [float(abs(one[q] - two[q]) <= 1) for q in QUESTIONS if q in one and q in two]
        if "words" in a.found and "words" in b.found:
            said, words = [set(x.found["words"]["misaligned"]) for x in (a, b)], len(a.found["words"]["tokens"])
            parts.append(1 - len(said[0] ^ said[1]) / words if words else 1.0)
        return float(np.mean(parts)) if parts else 1.0
    if "choice" in a.found:
        best = [{i for i, r in zip(x.found["choice"]["images"], x.found["choice"]["ranks"]) if r == 1} for x in (a, b)]
        return float(bool(best[0] & best[1]))
    return float(np.sign(a.found["side"]["answer"]) == np.sign(b.found["side"]["answer"]))


def agreement_curve(answers: Sequence[Given]) -> dict[str, list[tuple[int, float]]]:
    """Krippendorff's alpha of each question as answers come in: (answers so far, alpha)."""
    ordered = sorted((a for a in answers if not a.gold and not a.final), key=lambda a: a.created)
    curves: dict[str, list[tuple[int, float]]] = {}
    for n in sorted({round(len(ordered) * k / POINTS) for k in range(1, POINTS + 1)} - {0, 1}):
        for name, alpha in _alphas(feedback(ordered[:n])).items():
            if not np.isnan(alpha):
                curves.setdefault(name, []).append((n, alpha))
    return curves


def _alphas(rows: Sequence[Feedback]) -> dict[str, float]:
    kinds = {r.kind for r in rows}
    found: dict[str, float] = {}
    if "ratings" in kinds:
        tables = {q: ratings_table(rows, q) for q in QUESTIONS}
        found |= {q: krippendorff(t, "interval") for q, t in tables.items() if t.size}
    if "words" in kinds:
        found["words"] = krippendorff(words_table(rows), "nominal")
    if "points" in kinds:
        found |= {f"{mark} points": krippendorff(marks_table(rows, mark), "nominal") for mark in MARKS}
    if "side" in kinds:
        found["side"] = krippendorff(answer_table(rows, "side"), "interval")
    if "choice" in kinds:
        found["choice"] = krippendorff(answer_table(rows, "choice"), "nominal")
    return found


def answer_table(rows: Sequence[Feedback], kind: str) -> np.ndarray:
    """Side answers, or the place of the best image, as (raters, items); nan where there is none (or no single best).

    Places are numbered by lot for each item: if the best image came first in most of them, agreement by chance would look high.
    """
    from limner.feedback.payloads import of_kind

    cells: dict[tuple[str, str], float] = {}
    for row, payload in of_kind(rows, kind):
        if kind == "side":
            cells[row.rater, row.image_id] = payload["answer"]
        elif payload["ranks"].count(1) == 1:
            best, lots = payload["images"][payload["ranks"].index(1)], [seed_of("place", i) for i in payload["images"]]
            cells[row.rater, row.image_id] = sorted(lots).index(seed_of("place", best))
    raters, items = sorted({r for r, _ in cells}), sorted({i for _, i in cells})
    table = np.full((len(raters), len(items)), np.nan)
    for (rater, item), value in cells.items():
        table[raters.index(rater), items.index(item)] = value
    return table


def disagreements(answers: Sequence[Given], limit: int = 12) -> list[dict[str, Any]]:
    """Items whose raters disagree most and that are not settled, worst first: 0 (all alike) to 1."""
    of_item: dict[int, list[Given]] = {}
    for answer in answers:
        if not answer.gold:
            of_item.setdefault(answer.item_id, []).append(answer)
    found = list[dict[str, Any]]()
    for group in of_item.values():
        if len(group) < 2 or any(a.final for a in group):
            continue
        first = group[0]
        row = {"id": first.item_id, "text": first.text, "raters": len(group), "picture": first.pictures[0], "much": _spread(group)}
        found.append(row)
    return sorted(found, key=lambda row: (-row["much"], row["id"]))[:limit]


def _spread(group: Sequence[Given]) -> float:
    """0 (all alike) to 1. Rich: the worst of its questions: ratings by their range; words by the share that some raters marked and others
    did not; each kind of points by how evenly raters are split about whether there is any (one of two: 1, one of three: 2/3)."""
    if "choice" not in group[0].found and "side" not in group[0].found:
        spreads = []
        for q in QUESTIONS:
            values = [a.found["ratings"][q] for a in group if q in a.found.get("ratings", {})]
            spreads += [(max(values) - min(values)) / 4] if values else []
        if words := [a.found["words"] for a in group if "words" in a.found]:
            marked = [set(w["misaligned"]) for w in words]
            spreads.append(len(set.union(*marked) - set.intersection(*marked)) / max(len(words[0]["tokens"]), 1))
        if points := [a.found["points"] for a in group if "points" in a.found]:
            some = [float(np.mean([bool(p[mark]) for p in points])) for mark in MARKS]
            spreads += [2 * min(share, 1 - share) for share in some]
        return max(spreads, default=0.0)
    if "side" in group[0].found:
        values = [a.found["side"]["answer"] for a in group]
        return (max(values) - min(values)) / 4
    return 1 - float(np.mean([_alike(a, b) for a in group for b in group if a is not b]))


def polyline(points: Sequence[tuple[float, float]], width: float, height: float, bottom: float = 0.0) -> str:
    """Points as an SVG polyline's coordinates: x from the first to the last, y from `bottom` (below) to 1."""
    if not points:
        return ""
    low, high = points[0][0], max(points[-1][0], points[0][0] + 1)
    return " ".join(f"{(x - low) / (high - low) * width:.1f},{from_top(y, height, bottom):.1f}" for x, y in points)


def from_top(y: float, height: float, bottom: float = 0.0) -> float:
    """How far below the top of a chart from `bottom` to 1 a value stands; on its edge if it is beyond."""
    return (1 - max(min(y, 1.0), bottom)) / (1 - bottom) * height


def chart_bottom(curves: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Where a chart of agreement ends below: at 0, or at -1 if raters agree less than by chance anywhere: drawn at 0 that would look like
    chance."""
    return -1.0 if any(y < 0 for points in curves.values() for _, y in points) else 0.0


def bars(values: Sequence[float], width: float, height: float) -> list[tuple[float, float, float, float]]:
    """(x, y, width, height) of a bar for each value."""
    edges, most = np.linspace(0, width, len(values) + 1), max([*values, 1])
    return [(a + 1, height - v / most * height, b - a - 2, v / most * height) for (a, b), v in zip(pairwise(edges.tolist()), values)]
