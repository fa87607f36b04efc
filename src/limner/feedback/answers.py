"""What a study's raters said, out of the database as Feedback rows and into it from them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select
from sqlmodel import Session, col

from limner import records
from limner.feedback import accounts, assign, checks, fill, payloads, richhf
from limner.feedback.database import Answer, Database, Item, Picture, Rater, Slot, reading, writing
from limner.feedback.display import image_file
from limner.feedback.study import Study
from limner.records import Feedback

IMPORTED = "import."  # begins the id of an answer that did not come from the page; pages cannot make ids with a dot


@dataclass(frozen=True)
class Given:
    """An answer that counts: of a rater the last revision, of a settled item the admin's only. found: payloads by kind."""

    item_id: int
    key: str
    text: str
    rater: str
    found: dict[str, dict[str, Any]]
    seconds: float
    created: float
    gold: bool
    correct: float | None
    final: bool
    pictures: tuple[str, ...]


def given(study: Study, database: Database, settled: bool = True) -> list[Given]:
    """The answers that count, in the order of items and raters.

    Args:
        settled: leave out what raters said of an item that an admin settled.
    """
    latest = select(col(Answer.item_id), col(Answer.rater_id), func.max(col(Answer.revision)).label("revision"))
    newest = latest.group_by(col(Answer.item_id), col(Answer.rater_id)).subquery()
    same = (
        (newest.c.item_id == col(Answer.item_id))
        & (newest.c.rater_id == col(Answer.rater_id))
        & (newest.c.revision == col(Answer.revision))
    )
    query = (
        select(Answer, col(Rater.name))
        .join(newest, same)
        .join(Rater, col(Rater.id) == col(Answer.rater_id))
        .where(col(Answer.skipped) == "")
    )
    with reading(database) as session:
        ids = {row[0]: row[1] for row in session.execute(select(col(Picture.token), col(Picture.image_id)))}
        items = {i.id: i for i in session.execute(select(Item)).scalars()}
        rows = session.execute(query.order_by(col(Answer.item_id), col(Answer.rater_id))).all()
    final = {a.item_id for a, _ in rows if a.final} if settled else set()
    found = []
    for answer, name in rows:
        if answer.final != (answer.item_id in final):
            continue
        item = items[answer.item_id]
        tokens = json.loads(item.pictures)
        said = checks.interpret(study, json.loads(answer.payload), item.text, {t: ids[t] for t in tokens}, answer.id.startswith(IMPORTED))
        found.append(
            Given(
                answer.item_id, item.key, item.text, name, said, answer.seconds, answer.created, item.gold is not None, answer.correct,
                answer.final, tuple(tokens),
            )
        )  # fmt: skip
    return found


def feedback(answers: Sequence[Given], gold: bool = False) -> list[Feedback]:
    """Feedback rows of answers; of gold items only if asked, since their answers were known."""
    return [
        payloads.make(a.key, a.rater, kind, payload, a.seconds / len(a.found))
        for a in answers
        if gold or not a.gold
        for kind, payload in a.found.items()
    ]


def history(database: Database) -> Iterator[dict[str, Any]]:
    """Every revision of every answer, with raw points, clicks and times, as it came."""
    query = (
        select(Answer, col(Item.key), col(Rater.name))
        .join(Item, col(Item.id) == col(Answer.item_id))
        .join(Rater, col(Rater.id) == col(Answer.rater_id))
    )
    with reading(database) as session:
        names = {row[0]: row[1] for row in session.execute(select(col(Picture.token), col(Picture.image_id)))}
        for answer, key, rater in session.execute(query.order_by(col(Answer.created), col(Answer.id))):
            payload = json.loads(answer.payload)
            for name in ("left", "right"):
                if name in payload:
                    payload[name] = names.get(payload[name], payload[name])
            if isinstance(payload.get("images"), list):
                payload["images"] = [names.get(t, t) for t in payload["images"]]
            yield {
                "id": answer.id, "item": key, "rater": rater, "revision": answer.revision, "skipped": answer.skipped,
                "seconds": answer.seconds, "created": answer.created, "final": answer.final, "correct": answer.correct, "answer": payload,
            }  # fmt: skip


def images(study: Study, database: Database) -> Iterator[records.Image]:
    """The study's images as they are shown, with their prompts; each once, in the order of the items."""
    folder = fill.images_folder(study)
    with reading(database) as session:
        pictures = {p.token: p for p in session.execute(select(Picture)).scalars()}
        items = list(session.execute(select(Item).order_by(col(Item.position))).scalars())
    seen = set[str]()
    for item in items:
        for token in json.loads(item.pictures):
            picture = pictures[token]
            if picture.image_id not in seen:
                seen.add(picture.image_id)
                data = image_file(folder, picture.digest).read_bytes()
                yield records.Image(id=picture.image_id, prompt_id=item.key, text=item.text, image=data)


def import_feedback(
    study: Study, database: Database, rows: Sequence[Feedback], refused: list[dict[str, str]] | None = None
) -> dict[str, int]:
    """Feedback rows as answers of the study, as if their raters had given them here. Importing again changes nothing.

    Rows of one image and rater make one answer, of each kind the first. Each takes a slot of its item, so that overlap counts it.

    Args:
        refused: gets image, rater and reason of each that was neither imported nor there.

    Returns:
        counts: imported, again, and why others were left out.

    Raises:
        ValueError: a payload that is not one of its kind.
    """
    said: dict[tuple[str, str, str], dict[str, tuple[Feedback, dict[str, Any]]]] = {}
    doubled: list[Feedback] = []
    for row in rows:
        payload = payloads.load(row)
        kinds = said.setdefault((row.image_id, row.rater, str(payload.get("against", ""))), {})
        if kinds.setdefault(row.kind, (row, payload))[1] != payload:
            doubled.append(row)
    raters = {name: accounts.add_rater(database, name) for name in dict.fromkeys(rater for _, rater, _ in said)}
    counts: dict[str, int] = {}
    for row in doubled:
        why = f"a second answer of this rater about {row.kind}"
        counts[why] = counts.get(why, 0) + 1
        if refused is not None:
            refused.append({"image_id": row.image_id, "rater": row.rater, "why": why})
    with writing(database) as session:
        items = {i.key: i for i in session.execute(select(Item)).scalars()}
        for (key, rater, _), kinds in said.items():
            item = items.get(key)
            why = "no such item" if item is None else _import(session, study, item, raters[rater], kinds)
            counts[why] = counts.get(why, 0) + 1
            if refused is not None and why not in ("imported", "again"):
                refused.append({"image_id": key, "rater": rater, "why": why})
    return counts


def _import(session: Session, study: Study, item: Item, rater: int, kinds: dict[str, tuple[Feedback, dict[str, Any]]]) -> str:
    """One answer; returns what became of it."""
    images = assign.images_of(session, item)
    answer = _as_answer(study, images, {kind: payload for kind, (_, payload) in kinds.items()})
    if answer is None:
        return f"not of task {study.task}, or of other images"
    if "words" in kinds and kinds["words"][1]["tokens"] != richhf.tokens(item.text):
        return "its words are not those of the prompt"
    try:
        checks.interpret(study, answer, item.text, images, imported=True)
    except ValueError as error:
        return str(error)
    digest = hashlib.sha256("\x1f".join(sorted(row.id + row.payload for row, _ in kinds.values())).encode()).hexdigest()[:32]
    mine = (col(Answer.item_id) == item.id, col(Answer.rater_id) == rater)
    if session.get(Answer, IMPORTED + digest) is not None:
        return "again"
    if session.execute(select(col(Answer.id)).where(*mine).limit(1)).first() is not None:
        return "answered here already"
    if item.gold is None:
        own = col(Slot.rater_id) == rater
        free = or_(own, col(Slot.rater_id).is_(None), col(Slot.expires) < time.time())
        query = select(Slot).where(col(Slot.item_id) == item.id, ~col(Slot.done), free).order_by(own.desc()).limit(1)
        slot = session.execute(query.with_for_update()).scalar_one_or_none()
        if slot is None:
            return "more raters than overlap"
        slot.rater_id, slot.done = rater, True
        session.add(slot)
    seconds = sum(row.seconds for row, _ in kinds.values())
    assert item.id is not None
    session.add(Answer(id=IMPORTED + digest, item_id=item.id, rater_id=rater, revision=1, payload=json.dumps(answer), seconds=seconds))
    session.flush()
    return "imported"


def _as_answer(study: Study, images: dict[str, str], kinds: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What the page would have sent; None if it is about something else."""
    tokens = {image_id: token for token, image_id in images.items()}
    if study.task == "rich" and kinds.keys() & {"points", "words", "ratings"}:
        return {kind: kinds[kind] for kind in ("points", "words", "ratings") if kind in kinds} | {"kinds": sorted(kinds)}
    if study.task == "choice" and "choice" in kinds and set(kinds["choice"]["images"]) == set(tokens):
        ranks = dict(zip(kinds["choice"]["images"], kinds["choice"]["ranks"]))
        shown = kinds["choice"].get("shown", kinds["choice"]["images"])
        return {"images": [tokens[i] for i in shown], "ranks": [ranks[i] for i in shown]} if set(shown) == set(ranks) else None
    if study.task == "side" and "side" in kinds and kinds["side"]["against"] == list(tokens)[1]:
        ours, other = images
        answer = kinds["side"]["answer"]
        on_left = kinds["side"].get("left") == images[ours]
        left, right = (ours, other) if on_left else (other, ours)
        return {"left": left, "right": right, "value": -answer if on_left else answer}
    return None
