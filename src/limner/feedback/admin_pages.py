"""What admins see: how the study goes, who rates how, where raters disagree; invitations and exports."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import select
from sqlmodel import col

from limner.feedback import accounts, answers, exports, progress
from limner.feedback.accounts import Person
from limner.feedback.database import Answer, Item, Picture, Rater, reading
from limner.feedback.richhf import tokens
from limner.feedback.server import Site, admin, check_token, invitation, render, site_of

router = APIRouter()
Admin = Annotated[Person, Depends(admin)]
FRESH = 5.0  # seconds that costly numbers are kept at least
GALLERY = 24  # images a page


@router.get("/admin")
def admin_page(request: Request, person: Admin) -> Response:
    site = site_of(request)
    return render(site, request, "admin.html", person, **_numbers(site), link="", charts=progress)


def _numbers(site: Site) -> dict[str, Any]:
    """What the overview shows. What takes long is kept so long that it takes a twentieth of the time at most: raters come first."""
    until, kept = site.kept.get("numbers", (0.0, {}))
    if time.monotonic() > until:
        began, found = time.monotonic(), answers.given(site.study, site.database, settled=False)
        kept = {
            "raters": progress.rater_rows(site.database, found),
            "curves": progress.agreement_curve(found),
            "disagreements": progress.disagreements(answers.given(site.study, site.database)),
        }
        took = time.monotonic() - began
        site.kept["numbers"] = (time.monotonic() + max(FRESH, 20 * took), kept)
    formats = [name for name in exports.FORMATS if site.study.task == "rich" or not name.endswith(exports.RICH_ONLY)]
    return {"overview": progress.overview(site.database), "formats": formats, **kept}


@router.get("/admin/gallery")
def gallery(request: Request, person: Admin, page: int = 0) -> Response:
    """Images with everything that was marked on them, one page at a time."""
    site = site_of(request)
    of_item: dict[int, list[answers.Given]] = {}
    for answer in answers.given(site.study, site.database):
        of_item.setdefault(answer.item_id, []).append(answer)
    ids = sorted(of_item)
    page = max(0, min(page, (len(ids) - 1) // GALLERY)) if ids else 0
    shown = [_item_view(site, of_item[i]) for i in ids[page * GALLERY : (page + 1) * GALLERY]]
    return render(site, request, "gallery.html", person, items=shown, page=page, more=len(ids) > (page + 1) * GALLERY, count=len(ids))


def _item_view(site: Site, group: list[answers.Given]) -> dict[str, Any]:
    """An item and what its raters said, for templates."""
    first = group[0]
    with reading(site.database) as session:
        pictures = {p.token: p for p in session.execute(select(Picture).where(col(Picture.token).in_(first.pictures))).scalars()}
    view: dict[str, Any] = {"id": first.item_id, "key": first.key, "text": first.text, "raters": len(group), "group": group}
    view["pictures"] = [pictures[t] for t in first.pictures]
    if site.study.task == "rich":  # what was imported may lack a kind
        words, ratings = ([a.found[kind] for a in group if kind in a.found] for kind in ("words", "ratings"))
        view["words"] = [(word, sum(i in w["misaligned"] for w in words)) for i, word in enumerate(tokens(first.text))]
        rated = {q: [r[q] for r in ratings if q in r] for q in site.study.questions}
        view["ratings"] = [(q, sum(values) / len(values)) for q, values in rated.items() if values]
    if "choice" in first.found:
        view["best"] = [sum(a.found["choice"]["ranks"][i] == 1 for a in group) for i in range(len(first.pictures))]
    if "side" in first.found:
        view["sides"] = [a.found["side"]["answer"] for a in group]
    return view


@router.get("/admin/items/{item_id}")
def item_page(request: Request, person: Admin, item_id: int) -> Response:
    """What each rater said of an item, every revision; and a link to settle it."""
    site = site_of(request)
    with reading(site.database) as session:
        item = session.get(Item, item_id)
        query = select(Answer, col(Rater.name)).join(Rater, col(Rater.id) == col(Answer.rater_id)).where(col(Answer.item_id) == item_id)
        revisions = session.execute(query.order_by(col(Answer.created))).all()
    if item is None:
        raise HTTPException(404, "There is no such item.")
    group = [a for a in answers.given(site.study, site.database, settled=False) if a.item_id == item_id]
    view = (
        _item_view(site, group) if group else {"id": item_id, "key": item.key, "text": item.text, "raters": 0, "group": [], "pictures": []}
    )
    rows = [
        {"rater": name, "revision": a.revision, "skipped": a.skipped, "seconds": a.seconds, "final": a.final, "created": a.created}
        for a, name in revisions
    ]
    gold = json.loads(item.gold) if item.gold else None
    return render(site, request, "item.html", person, view=view, rows=rows, gold=gold, when=_when)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + " UTC"


@router.post("/admin/invite")
def invite(
    request: Request, person: Admin, name: Annotated[str, Form(max_length=80)], csrf: Annotated[str, Form()],
    role: Annotated[str, Form()] = "",
) -> Response:  # fmt: skip
    check_token(csrf, person)
    site = site_of(request)
    where = site.study.server.address or str(request.base_url)
    link = invitation(site.study, site.database, name.strip(), role, where.rstrip("/"))
    site.kept.clear()
    return render(site, request, "admin.html", person, **_numbers(site), link=link, charts=progress)


@router.post("/admin/block")
def block(
    request: Request, person: Admin, rater: Annotated[int, Form()], csrf: Annotated[str, Form()], blocked: Annotated[bool, Form()] = True
) -> Response:
    check_token(csrf, person)
    site = site_of(request)
    if rater == person.id:
        raise HTTPException(400, "You cannot shut yourself out.")
    accounts.block(site.database, rater, blocked)
    site.kept.clear()
    return RedirectResponse("/admin", 303)


@router.get("/admin/export/{name}")
def export(request: Request, person: Admin, name: str) -> Response:
    """The answers so far as a file of one of `exports.FORMATS`."""
    site = site_of(request)
    if name not in exports.FORMATS:
        raise HTTPException(404, f"There is no such file; there are {', '.join(exports.FORMATS)}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        exports.write(site.study, site.database, path)
        data = path.read_bytes()
    media = {
        ".jsonl": "application/x-ndjson", ".json": "application/json", ".csv": "text/csv; charset=utf-8", ".xml": "application/xml",
    }  # fmt: skip
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=media.get(path.suffix, "application/octet-stream"), headers=headers)
