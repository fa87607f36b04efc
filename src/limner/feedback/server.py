"""The web server of a study: who may do what, and errors as the page expects them. What the pages do is in `rater_pages` and `admin_pages`.

Nothing is acknowledged before it is on disk, so the server may be killed at any moment and started again.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteError

from limner.feedback import accounts
from limner.feedback.accounts import Person
from limner.feedback.assign import Conflict
from limner.feedback.database import Database, database_file, open_database
from limner.feedback.fill import images_folder, set_up
from limner.feedback.guard import Bucket, allow, guard
from limner.feedback.study import Server, Study, guidelines

PAGE = Path(__file__).parent / "page"
COOKIE = "limner"
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Site:
    """What every page needs. kept: costly numbers of the admin's pages, and until when they are good."""

    study: Study
    database: Database
    key: str
    templates: jinja2.Environment
    attempts: Bucket
    requests: Bucket
    kept: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)


def make_app(study: Study, database: Database) -> Callable[..., Any]:
    """The ASGI app of a study whose database is set up."""
    from limner.feedback import admin_pages, rater_pages

    limits = study.server
    site = Site(
        study, database, accounts.study_key(database), _templates(), Bucket(limits.attempts_per_minute / 60, limits.attempts_per_minute),
        Bucket(limits.requests_per_second, limits.requests_per_second * 10),
    )  # fmt: skip
    app = FastAPI(title=study.name, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site
    app.mount("/static", StaticFiles(directory=PAGE / "static"))
    app.include_router(rater_pages.router)
    app.include_router(admin_pages.router)
    for kind in (StarletteError, RequestValidationError, ValueError):
        app.add_exception_handler(kind, partial(_error, site))
    return guard(app, limits.max_body)


def _templates() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined)


async def _error(site: Site, request: Request, error: Exception) -> Response:
    """An error as JSON under /api, as a page elsewhere; of what the server did not foresee nothing is said."""
    status, text = 400, str(error)
    if isinstance(error, StarletteError):
        status, text = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        status, text = 422, f"{'.'.join(str(p) for p in first['loc'][1:])}: {first['msg']}"
    elif isinstance(error, Conflict):
        status = 409
    headers = getattr(error, "headers", None)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": text}, status, headers)
    if status == 401 and request.method == "GET":
        return RedirectResponse("/login", 303)
    page = render(site, request, "message.html", None, status=status, title="That did not work", text=text)
    page.headers.update(headers or {})
    return page


def site_of(request: Request) -> Site:
    """The site that a request came to."""
    return request.app.state.site


def render(site: Site, request: Request, template: str, person: Person | None, status: int = 200, **values: Any) -> HTMLResponse:
    """A page."""
    common = {"study": site.study, "person": person, "csrf": person.csrf if person else "", "path": request.url.path}
    return HTMLResponse(site.templates.get_template(template).render(common | values), status)


def anyone(request: Request) -> Person:
    """Who is signed in.

    Raises:
        HTTPException: 401 nobody; 429 too many requests; 403 a change without the page's token.
    """
    site = site_of(request)
    person = accounts.person(site.database, request.cookies.get(COOKIE, ""), site.key)
    if person is None:
        raise HTTPException(401, "You are signed out. Sign in again, and go on where you were.")
    if not allow(site.requests, str(person.id)):
        raise HTTPException(429, "Too many requests. Wait a moment.", {"retry-after": "2"})
    if request.method not in ("GET", "HEAD") and request.url.path.startswith("/api/"):
        check_token(request.headers.get("x-csrf-token", ""), person)
    return person


def admin(request: Request) -> Person:
    """The admin who is signed in.

    Raises:
        HTTPException: as `anyone`; 403 for raters.
    """
    person = anyone(request)
    if person.role != "admin":
        raise HTTPException(403, "This page is for admins.")
    return person


def check_token(token: str, person: Person) -> None:
    """Refuse a change that did not come from our page.

    Raises:
        HTTPException: 403.
    """
    if not secrets.compare_digest(token.encode(), person.csrf.encode()):
        raise HTTPException(403, "This page is too old. Reload it.")


def check_attempts(request: Request) -> None:
    """Refuse an address that tries too many passwords.

    Raises:
        HTTPException: 429.
    """
    if not allow(site_of(request).attempts, request.client.host if request.client else ""):
        raise HTTPException(429, "Too many attempts. Wait a minute.", {"retry-after": "60"})


def signed_in(site: Site, secret: str, to: str = "/") -> Response:
    """Send a browser on with its cookie."""
    server = site.study.server
    response = RedirectResponse(to, 303)
    response.set_cookie(
        COOKIE, accounts.write_cookie(secret, site.key), max_age=int(server.session_hours * 3600), httponly=True, samesite="strict",
        secure=server.https,
    )  # fmt: skip
    return response


def guide(study: Study) -> list[tuple[str, str]]:
    """The guidelines as (tag, text) of headings, list items and paragraphs."""
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[#-])|(?<=\n)(?=[#-])", guidelines(study).strip()):
        line = " ".join(block.split())
        if line.startswith("#"):
            found.append(("h3", line.lstrip("# ")))
        elif line.startswith("- "):
            found.append(("li", line[2:]))
        elif line:
            found.append(("p", line))
    return found


def is_begun(study: Study) -> bool:
    """Whether there is a database to open; of one behind a URL that is not known and taken to be so."""
    return bool(study.database) or database_file(Path(study.output_dir)).is_file()


def prepare(study: Study, begin: bool = True) -> Database:
    """Open the study's database and fill it if it is new; where that fails, nothing is left of it.

    Args:
        begin: a study that is not there is made.

    Raises:
        ValueError: another study lies there, or none; nothing can be shown; the database cannot be opened; or there are no such guidelines.
    """
    guidelines(study)
    folder, new = Path(study.output_dir), not is_begun(study)
    if new and not begin:
        raise ValueError(f"output_dir: there is no study in {folder}; `limner annotate serve` makes one")
    database = open_database(study.database, folder)
    try:
        for why, n in set_up(study, database).items():
            print(f"annotate: left out, {why}: {n}")
    except ValueError:
        database.engine.dispose()
        if new:
            for file in folder.glob(f"{database_file(folder).name}*"):  # with SQLite's log beside it
                file.unlink()
            shutil.rmtree(images_folder(study), ignore_errors=True)
        raise
    return database


def serve(study: Study, password: str = "") -> None:
    """Listen until stopped. Prints a link for the admin where there is no admin yet, and one for each rater who has none.

    Args:
        password: if given, that of the account `admin`.

    Raises:
        ValueError: asked to listen elsewhere than on this machine without `server.public` or without an admin's password; or
            the port is taken.
    """
    import uvicorn

    server = study.server
    if server.host not in LOCAL and not server.public:
        raise ValueError(f"server.host: {server.host} is reached from other machines; set server.public: true if that is meant")
    no_admin = ValueError("server.public: no admin has a password; set LIMNER_ADMIN_PASSWORD, or first serve locally and set one")
    if server.host not in LOCAL and not password and not is_begun(study):
        raise no_admin
    with closing(_bind(server)) as sock:
        database = prepare(study)
        if password:
            accounts.set_password(database, accounts.add_rater(database, "admin", "admin"), password)
        if server.host not in LOCAL and not accounts.has_admin(database):
            raise no_admin
        where = address(server, sock.getsockname()[1])
        print(f"annotate: {study.name} at {where}", flush=True)
        for name, link in first_links(study, database, where):
            print(f"annotate: {name}, once: {link}", flush=True)
        config = uvicorn.Config(make_app(study, database), log_level="warning", server_header=False, proxy_headers=server.https)
        uvicorn.Server(config).run(sockets=[sock])


def _bind(server: Server) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((server.host, server.port))
    except OSError as error:
        sock.close()
        raise ValueError(f"server.port: {server.host}:{server.port}: {error.strerror}; another is set by --server.port, 0 = any") from error
    return sock


def address(server: Server, port: int) -> str:
    """What links begin with."""
    host = socket.gethostname() if server.host in ("0.0.0.0", "::") else f"[{server.host}]" if ":" in server.host else server.host
    return server.address.rstrip("/") or f"{'https' if server.https else 'http'}://{host}:{port}"


@contextmanager
def serving(study: Study, database: Database) -> Iterator[str]:
    """The study's address, on a free port of this machine, while it is served by a thread of this process."""
    import uvicorn

    config = uvicorn.Config(make_app(study, database), host="127.0.0.1", port=0, log_level="warning", server_header=False)
    sock, server = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"  # connections wait in the socket's queue until it is up
    finally:
        server.should_exit = True
        thread.join(20)


def first_links(study: Study, database: Database, where: str) -> list[tuple[str, str]]:
    """Invitations of those who cannot sign in yet: (name, link). On paper nowhere else; `limner annotate invite` makes new ones."""
    from sqlalchemy import select
    from sqlmodel import col

    from limner.feedback.database import Invitation, Rater, reading

    with reading(database) as session:
        known = {n for (n,) in session.execute(select(col(Rater.name)).join(Invitation, col(Invitation.rater_id) == col(Rater.id)))}
    wanted = [(n, "") for n in study.raters if n not in known]
    if not accounts.has_admin(database):
        wanted.insert(0, ("admin", "admin"))
    return [(name, invitation(study, database, name, role, where)) for name, role in wanted]


def invitation(study: Study, database: Database, name: str, role: str, where: str) -> str:
    """A link that lets someone in once."""
    secret = accounts.invite(database, accounts.add_rater(database, name, role), study.server.invitation_hours)
    return f"{where}/join/{secret}"


def parse_settings(text: str) -> dict[str, Any]:
    """A person's settings; damaged ones are forgotten."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
