"""Who answers what: items are kept for raters for a while, and answers come in once.

An item has `overlap` slots. Taking one is a single statement of the database, so two raters never hold the same; what a rater has answered
or skipped is not offered to them again. Gold comes after every so many answers, and has a slot for each rater.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from sqlalchemy import Float, Integer, bindparam, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased
from sqlmodel import Session, col

from limner.feedback import checks
from limner.feedback.database import Answer, Database, Draft, Item, Picture, Rater, Slot, writing
from limner.feedback.study import Study

# Statements of every request, made once. Parameters: rater, item, now.
_RATER, _ITEM, _NOW = (bindparam(name, type_=kind) for name, kind in (("rater", Integer), ("item", Integer), ("now", Float)))
_LOCK = select(col(Rater.id)).where(col(Rater.id) == _RATER).with_for_update(key_share=True)
_OWN = select(Slot).where(col(Slot.item_id) == _ITEM, col(Slot.rater_id) == _RATER).with_for_update()
_LAST = select(func.max(col(Answer.revision))).where(col(Answer.item_id) == _ITEM, col(Answer.rater_id) == _RATER)
_FIRST = (
    select(col(Answer.correct))
    .where(col(Answer.item_id) == _ITEM, col(Answer.rater_id) == _RATER, col(Answer.correct).is_not(None))
    .order_by(col(Answer.revision))
    .limit(1)
)
_HELD = select(Slot).where(col(Slot.rater_id) == _RATER, ~col(Slot.done), col(Slot.expires) > _NOW).order_by(col(Slot.position)).limit(1)
_BEGUN = select(col(Draft.item_id)).where(col(Draft.rater_id) == _RATER)
_other = aliased(Slot)
IS_GOLD = col(Slot.item_id).in_(select(col(Item.id)).where(col(Item.gold).is_not(None)))  # of a slot: its number is then a rater's id
# Slots that a rater may take: not done, kept for nobody, of an item that they have neither answered nor hold; locked so that no other
# transaction sees them. Those of gold are for one rater each.
_OPEN = (
    select(Slot)
    .where(
        ~col(Slot.done),
        or_(col(Slot.rater_id).is_(None), col(Slot.expires) <= _NOW),
        ~IS_GOLD,
        ~exists().where(col(Answer.item_id) == col(Slot.item_id), col(Answer.rater_id) == _RATER, ~col(Answer.final)),
        ~exists().where(col(_other.item_id) == col(Slot.item_id), col(_other.rater_id) == _RATER, col(_other.id) != col(Slot.id)),
    )
    .order_by(col(Slot.position), col(Slot.number))
    .limit(1)
    .with_for_update(skip_locked=True)
)
_OPEN_BEGUN = _OPEN.where(col(Slot.item_id).in_(_BEGUN))


class Conflict(ValueError):
    """Another tab, or another rater, was there first; the answer stays a draft."""


@dataclass(frozen=True)
class Saved:
    """What became of an answer. correct: share of a gold item's answer that was found, None for others; next: what `then` gave."""

    revision: int
    again: bool
    correct: float | None = None
    message: str = ""
    next: Any = None


def take(session: Session, study: Study, rater_id: int, now: float) -> Slot | None:
    """The slot that a rater works on: the one they hold, else one they have a draft for, else gold if it is due, else the next.

    None: there is none for them now. The slot is theirs for `lease_minutes` more.
    """
    _lock_rater(session, rater_id)
    who = {"rater": rater_id, "now": now}
    slot = session.execute(_HELD, who).scalar_one_or_none() or _due_gold(session, study, rater_id)
    if slot is None:
        begun = session.execute(_BEGUN, who).first() is not None
        for query in (_OPEN_BEGUN, _OPEN) if begun else (_OPEN,):
            if slot := session.execute(query, who).scalar_one_or_none():
                break
        else:
            return None
    if slot.rater_id not in (None, rater_id):
        _let_save(session, cast(int, slot.rater_id), slot.item_id)
    slot.rater_id, slot.expires = rater_id, now + study.lease_minutes * 60
    session.add(slot)
    session.flush()
    return slot


def _let_save(session: Session, rater_id: int, item_id: int) -> None:
    """Who held a slot until it expired may still be at it: with a draft of theirs, be it empty, what they save is kept."""
    if session.get(Draft, (item_id, rater_id)) is None:
        with suppress(IntegrityError), session.begin_nested():  # they saved one at this moment
            session.add(Draft(item_id=item_id, rater_id=rater_id, payload="{}"))


def _lock_rater(session: Session, rater_id: int) -> None:
    """Two tabs of a rater take turns. Every transaction locks the rater before a slot, so none waits for one that waits for it."""
    session.execute(_LOCK, {"rater": rater_id})


def _due_gold(session: Session, study: Study, rater_id: int) -> Slot | None:
    """A slot of the next gold item, if so many others were answered since the last."""
    if not study.gold.source:
        return None
    is_gold = col(Item.gold).is_not(None)
    mine = select(func.count(func.distinct(col(Answer.item_id)))).join(Item, col(Item.id) == col(Answer.item_id))
    answered = session.execute(mine.where(col(Answer.rater_id) == rater_id, ~is_gold)).scalar_one()
    seen = session.execute(mine.where(col(Answer.rater_id) == rater_id, is_gold)).scalar_one()
    if answered // study.gold.every <= seen:
        return None
    done = exists().where(col(Answer.item_id) == col(Item.id), col(Answer.rater_id) == rater_id)
    item = session.execute(select(Item).where(is_gold, ~done).order_by(col(Item.position)).limit(1)).scalar_one_or_none()
    if item is None:
        return None
    held = session.execute(select(Slot).where(col(Slot.item_id) == item.id, col(Slot.number) == rater_id)).scalar_one_or_none()
    return held or Slot(item_id=cast(int, item.id), number=rater_id, position=item.position)


def save_draft(database: Database, study: Study, rater_id: int, item_id: int, base: int, payload: dict[str, Any]) -> int:
    """Keep what a rater has so far, and the item for them; returns the draft's version.

    Args:
        payload: `page`, if there, tells open pages apart: one that missed our reply to its last draft is not another tab.

    Raises:
        Conflict: the draft was changed since `base`, in another tab.
        ValueError: it is not an item of this rater's.
    """
    now = time.time()
    with writing(database) as session:
        _lock_rater(session, rater_id)
        slot = _own_slot(session, rater_id, item_id)
        draft = session.get(Draft, (item_id, rater_id), with_for_update=True)
        if draft is None:
            draft = Draft(item_id=item_id, rater_id=rater_id, payload="")
        elif draft.version != base and (not payload.get("page") or payload["page"] != json.loads(draft.payload).get("page")):
            raise Conflict("This item was changed in another tab. Reload to see what is there.")
        draft.version, draft.payload, draft.saved = draft.version + 1, json.dumps(payload, allow_nan=False), now
        session.add(draft)
        if slot is not None and not slot.done:
            slot.expires = now + study.lease_minutes * 60
            session.add(slot)
        return draft.version


def _own_slot(session: Session, rater_id: int, item_id: int) -> Slot | None:
    """This rater's slot of the item, locked; None where it went to somebody else while they had a draft.

    Raises:
        ValueError: the item was never theirs.
    """
    slot = session.execute(_OWN, {"rater": rater_id, "item": item_id}).scalar_one_or_none()
    if slot is None and session.get(Draft, (item_id, rater_id)) is None:
        mine = select(col(Answer.id)).where(col(Answer.item_id) == item_id, col(Answer.rater_id) == rater_id)
        if session.execute(mine.limit(1)).first() is None:
            raise ValueError("This item is not yours.")
    return slot


def submit(
    database: Database, study: Study, rater_id: int, item_id: int, id: str, base: int, payload: Any, *, seconds: float = 0.0,
    skipped: str = "", final: bool = False, then: Callable[[Session], Any] | None = None
) -> Saved:  # fmt: skip
    """Take an answer (or a reason to skip) in. Durable when this returns; the same id again changes nothing.

    Args:
        id: made by the page.
        base: the revision that the page knew; 0 for none.
        skipped: why there is no answer; the slot is then free for somebody else.
        final: an admin settles the item; it takes no slot.
        then: what else to do in the same transaction: one wait for the disk instead of two.

    Raises:
        Conflict: answered in another tab since `base`, or all the item's slots went to others meanwhile.
        ValueError: an answer that is not complete, or an item that is not this rater's.
    """
    for attempt in (0, 1):
        try:
            with writing(database) as session:
                saved = _submit(session, study, rater_id, item_id, id, base, payload, seconds, skipped, final)
                return replace(saved, next=then(session)) if then else saved
        except IntegrityError:  # the same answer, or one of another tab, came in at the same moment: see which
            if attempt:
                raise Conflict("This item was answered in another tab.") from None
    raise AssertionError("not reached")


def _submit(
    session: Session, study: Study, rater_id: int, item_id: int, id: str, base: int, payload: Any, seconds: float, skipped: str, final: bool
) -> Saved:
    _lock_rater(session, rater_id)
    known = session.get(Answer, id)
    if known is not None:
        if (known.rater_id, known.item_id) != (rater_id, item_id):
            raise ValueError("This submission id was used before.")
        return Saved(known.revision, again=True, correct=known.correct)
    item = session.get(Item, item_id)
    if item is None:
        raise ValueError("There is no such item.")
    correct: float | None = None
    if not skipped:
        found = checks.interpret(study, payload, item.text, images_of(session, item))
        if item.gold and not final:  # who was told what they missed is not judged by their second answer
            first = session.execute(_FIRST, {"rater": rater_id, "item": item_id}).scalar_one_or_none()
            correct = first if first is not None else checks.gold_score(json.loads(item.gold), found)
    if not final:
        _settle_slot(session, rater_id, item, bool(skipped))
    revision = session.execute(_LAST, {"rater": rater_id, "item": item_id}).scalar_one() or 0
    if revision != base:
        raise Conflict("This item was answered in another tab. Reload to see the answer.")
    answer = Answer(
        id=id, item_id=item_id, rater_id=rater_id, revision=revision + 1, payload=json.dumps(payload, allow_nan=False), skipped=skipped,
        seconds=seconds, correct=correct, final=final,
    )  # fmt: skip
    session.add(answer)
    if draft := session.get(Draft, (item_id, rater_id)):
        session.delete(draft)
    session.flush()
    return Saved(answer.revision, again=False, correct=correct, message=item.message if item.gold else "")


def _settle_slot(session: Session, rater_id: int, item: Item, skipped: bool) -> None:
    """Mark the rater's slot done, or free it; one that was lost is got back if any is free."""
    slot = _own_slot(session, rater_id, cast(int, item.id))
    if skipped:
        if slot is not None and item.gold is None:
            slot.rater_id, slot.expires, slot.done = None, 0.0, False
        elif slot is not None:
            slot.done = True
    elif slot is None:
        free = or_(col(Slot.rater_id).is_(None), col(Slot.expires) <= time.time()) if item.gold is None else col(Slot.number) == rater_id
        query = select(Slot).where(col(Slot.item_id) == item.id, ~col(Slot.done), free).limit(1).with_for_update(skip_locked=True)
        slot = session.execute(query).scalar_one_or_none()
        if slot is None:
            raise Conflict("This item went to other raters meanwhile. Your draft is kept.")
        slot.rater_id, slot.done = rater_id, True
    else:
        slot.done = True
    if slot is not None:
        session.add(slot)


def images_of(session: Session, item: Item) -> dict[str, str]:
    """An item's image ids by token, in the item's order."""
    names = json.loads(item.pictures)
    rows = session.execute(select(col(Picture.token), col(Picture.image_id)).where(col(Picture.token).in_(names))).all()
    found = {row[0]: row[1] for row in rows}
    return {token: found[token] for token in names}


def release(database: Database, rater_id: int) -> None:
    """Give back what a rater holds and has not answered."""
    with writing(database) as session:
        session.execute(update(Slot).where(col(Slot.rater_id) == rater_id, ~col(Slot.done)).values(rater_id=None, expires=0.0))
