"""What raters see and send: sign-in, the task, drafts, answers, and what they did so far."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, cast

import numpy as np
from fastapi import APIRouter, Depends, Form, HTTPException, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from pydantic import BaseModel, Field
from sqlalchemy import bindparam, func, select
from sqlmodel import Session, col

from limner import seeds
from limner.feedback import accounts, assign, fill
from limner.feedback.accounts import Person
from limner.feedback.database import Answer, Draft, Item, Picture, Slot, reading, writing
from limner.feedback.display import image_file
from limner.feedback.richhf import tokens
from limner.feedback.server import (
    COOKIE,
    Site,
    anyone,
    check_attempts,
    check_token,
    guide,
    parse_settings,
    render,
    signed_in,
    site_of,
)

router = APIRouter()
Signed = Annotated[Person, Depends(anyone)]


_SLOTS = select(func.count(), func.count().filter(~col(Slot.done))).select_from(Slot).where(~assign.IS_GOLD)  # gold finishes nothing
_MINE = select(func.count(func.distinct(col(Answer.item_id)))).where(col(Answer.rater_id) == bindparam("rater"))


class DraftIn(BaseModel):
    """A draft as the page sends it."""

    item: int
    version: int = Field(ge=0)
    payload: dict[str, Any]


class AnswerIn(BaseModel):
    """An answer, or a reason to skip, as the page sends it."""

    id: str = Field(pattern=r"^[A-Za-z0-9-]{8,64}$")
    item: int
    base: int = Field(ge=0)
    payload: dict[str, Any] = {}
    seconds: float = Field(0.0, ge=0, le=1e6)
    skipped: str = Field("", max_length=300)
    take_next: bool = True


@router.get("/login")
def login_page(request: Request) -> Response:
    return render(site_of(request), request, "login.html", None, problem="")


@router.post("/login")
def login(request: Request, name: Annotated[str, Form(max_length=80)], password: Annotated[str, Form(max_length=200)]) -> Response:
    check_attempts(request)
    site = site_of(request)
    secret = accounts.sign_in(site.database, name, password, site.study.server.session_hours)
    if secret is None:
        return render(site, request, "login.html", None, status=401, problem="Name and password do not fit.")
    return signed_in(site, secret)


@router.get("/join/{secret}")
def join_page(request: Request, secret: str) -> Response:
    """Looking does not use the link up: mail programs look too."""
    check_attempts(request)
    site = site_of(request)
    name = accounts.invited(site.database, secret)
    if name is None:
        raise HTTPException(410, "This invitation was used, or is too old. Ask for another, or sign in with your password.")
    return render(site, request, "join.html", None, name=name, secret=secret, shortest=accounts.SHORTEST)


@router.post("/join/{secret}")
def join(request: Request, secret: str, password: Annotated[str, Form(max_length=200)] = "") -> Response:
    check_attempts(request)
    site = site_of(request)
    if password and len(password) < accounts.SHORTEST:
        raise HTTPException(400, f"A password has at least {accounts.SHORTEST} characters. Go back and choose another.")
    session = accounts.accept(site.database, secret, site.study.server.session_hours)
    if session is None:
        raise HTTPException(410, "This invitation was used, or is too old.")
    if password:
        who = cast(Person, accounts.person(site.database, accounts.write_cookie(session, site.key), site.key))
        accounts.set_password(site.database, who.id, password)
    return signed_in(site, session)


@router.post("/logout")
def logout(request: Request, person: Signed, csrf: Annotated[str, Form()] = "") -> Response:
    check_token(csrf, person)
    site = site_of(request)
    secret = accounts.read_cookie(request.cookies.get(COOKIE, ""), site.key)
    if secret:
        accounts.sign_out(site.database, secret)
        assign.release(site.database, person.id)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE)
    return response


@router.get("/")
def task_page(request: Request, person: Signed) -> Response:
    if person.role == "admin":
        return RedirectResponse("/admin", 303)
    return _task_page(request, person, 0)


@router.get("/items/{item_id}")
def item_page(request: Request, person: Signed, item_id: int) -> Response:
    """An item of one's own, to look at and change again; for an admin any, to settle."""
    return _task_page(request, person, item_id)


def _task_page(request: Request, person: Person, item_id: int) -> Response:
    site = site_of(request)
    return render(site, request, "task.html", person, guide=guide(site.study), settings=parse_settings(person.settings), item_id=item_id)


@router.get("/mine")
def mine_page(request: Request, person: Signed) -> Response:
    site = site_of(request)
    with reading(site.database) as session:
        last = func.max(col(Answer.revision))
        query = select(Item, last, func.max(col(Answer.created))).join(Answer, col(Answer.item_id) == col(Item.id))
        found = session.execute(query.where(col(Answer.rater_id) == person.id).group_by(col(Item.id)).order_by(last.desc())).all()
        skipped = {
            (a, r)
            for a, r in session.execute(
                select(col(Answer.item_id), col(Answer.revision)).where(col(Answer.rater_id) == person.id, col(Answer.skipped) != "")
            )
        }
    rows = [
        {"id": i.id, "text": i.text, "picture": json.loads(i.pictures)[0], "revision": r, "at": at, "skipped": (i.id, r) in skipped}
        for i, r, at in sorted(found, key=lambda row: -row[2])
    ]
    return render(site, request, "mine.html", person, rows=rows, when=_when)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


@router.get("/images/{token}")
def image(request: Request, person: Signed, token: str) -> Response:
    site = site_of(request)
    with reading(site.database) as session:
        picture = session.get(Picture, token)
    if picture is None:
        raise HTTPException(404, "There is no such image.")
    file = image_file(fill.images_folder(site.study), picture.digest)
    return FileResponse(file, media_type=picture.media, headers={"cache-control": "private, max-age=86400, immutable"})


@router.get("/api/task")
def task(request: Request, person: Signed, item: int = 0) -> dict[str, Any]:
    """What to do next, or an item of one's own."""
    site = site_of(request)
    if item and person.role == "admin":
        with reading(site.database) as session:
            return _described(session, site, person, item)
    with writing(site.database) as session:
        return _next(session, site, person, item)


def _next(session: Session, site: Site, person: Person, item_id: int) -> dict[str, Any]:
    if item_id:
        assign._own_slot(session, person.id, item_id)
        return _described(session, site, person, item_id)
    slot = assign.take(session, site.study, person.id, time.time())
    if slot is not None:
        return _described(session, site, person, slot.item_id, slot)
    progress = _progress(session, person)
    return {"item": None, "finished": progress["done"] >= progress["total"], "progress": progress}


def _described(session: Session, site: Site, person: Person, item_id: int, slot: Slot | None = None) -> dict[str, Any]:
    """An item as the page needs it: prompt cut at its words, images in this rater's order, what was saved before."""
    item = session.get(Item, item_id)
    if item is None:
        raise HTTPException(404, "There is no such item.")
    names = json.loads(item.pictures)
    sizes = {p.token: p for p in session.execute(select(Picture).where(col(Picture.token).in_(names))).scalars()}
    slot = slot or session.execute(select(Slot).where(col(Slot.item_id) == item_id, col(Slot.rater_id) == person.id)).scalar_one_or_none()
    last = select(Answer).where(col(Answer.item_id) == item_id, col(Answer.rater_id) == person.id)
    answer = session.execute(last.order_by(col(Answer.revision).desc()).limit(1)).scalar_one_or_none()
    draft = session.get(Draft, (item_id, person.id))
    shown = [sizes[t] for t in shown_order(names, item, slot, site.study.seed)]
    return {
        "item": {
            "id": item_id, "text": item.text, "pieces": pieces(item.text),
            "images": [{"token": p.token, "width": p.width, "height": p.height} for p in shown],
        },
        "draft": json.loads(draft.payload) if draft and draft.version else None,
        "version": draft.version if draft else 0,
        "answer": json.loads(answer.payload) if answer and not answer.skipped else None,
        "revision": answer.revision if answer else 0,
        "skipped": answer.skipped if answer else "",
        "settles": person.role == "admin",
        "progress": _progress(session, person),
    }  # fmt: skip


def shown_order(names: list[str], item: Item, slot: Slot | None, seed: int) -> list[str]:
    """The order in which a rater sees an item's images: drawn for study and item, turned by one for each of its raters, so that every
    image takes every place equally often."""
    order = np.random.default_rng(seeds.seed_of(seed, "order", item.key)).permutation(len(names))
    number = slot.number if slot is not None else 0
    return [names[order[(i + number) % len(names)]] for i in range(len(names))]


def pieces(text: str) -> list[dict[str, Any]]:
    """The prompt cut into words with their number, and what is between them (number None)."""
    found, at = list[dict[str, Any]](), 0
    for number, word in enumerate(tokens(text)):
        start = text.index(word, at)
        if start > at:
            found.append({"text": text[at:start], "word": None})
        found.append({"text": word, "word": number})
        at = start + len(word)
    return [*found, {"text": text[at:], "word": None}] if at < len(text) else found


def _progress(session: Session, person: Person) -> dict[str, int]:
    total, left = session.execute(_SLOTS).one()
    return {"mine": session.execute(_MINE, {"rater": person.id}).scalar_one(), "done": total - left, "total": total}


@router.post("/api/draft")
def draft(request: Request, person: Signed, body: DraftIn) -> dict[str, int]:
    site = site_of(request)
    return {"version": assign.save_draft(site.database, site.study, person.id, body.item, body.version, body.payload)}


@router.post("/api/submit")
def submit(request: Request, person: Signed, body: AnswerIn) -> dict[str, Any]:
    """Take an answer in; the item after it comes along."""
    site = site_of(request)
    saved = assign.submit(
        site.database, site.study, person.id, body.item, body.id, body.base, body.payload, seconds=body.seconds,
        skipped=" ".join(body.skipped.replace("\0", " ").split()), final=person.role == "admin",
        then=(lambda session: _next(session, site, person, 0)) if body.take_next and person.role != "admin" else None,
    )  # fmt: skip
    found: dict[str, Any] = {"revision": saved.revision, "again": saved.again}
    if saved.correct is not None:
        found["gold"] = {"correct": saved.correct, "message": saved.message}
    if saved.next is not None:
        found["next"] = saved.next
    return found


@router.post("/api/settings")
def settings(request: Request, person: Signed, body: dict[str, Any]) -> dict[str, bool]:
    text = json.dumps(body)
    if len(text) > 5000:
        raise HTTPException(413, "These settings are too long.")
    accounts.save_settings(site_of(request).database, person.id, text)
    return {"saved": True}
