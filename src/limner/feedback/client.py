"""A rater's browser without the page: the same requests, for simulated raters and for measuring the server."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

RETRIES = 60  # of a request that no server answers; between them a little longer each time, to three seconds


@dataclass
class Visitor:
    """Somebody at a server's address. cookie and csrf: once signed in; times: (path, seconds) of every request that was answered."""

    address: str
    cookie: str = ""
    csrf: str = ""
    times: list[tuple[str, float]] = field(default_factory=list, repr=False)
    connection: http.client.HTTPConnection | None = field(default=None, repr=False)


def join(address: str, link: str) -> Visitor:
    """Use an invitation.

    Raises:
        ValueError: it was used, or is too old.
    """
    visitor = Visitor(address)
    status, headers, body = send(visitor, "POST", urlsplit(link).path, urlencode({"password": ""}), "application/x-www-form-urlencoded")
    found = re.match(r"limner=([^;]+)", headers.get("set-cookie", ""))
    if status != 303 or not found:
        raise ValueError(f"{link}: not let in ({status})")
    visitor.cookie = found[1]
    _, _, body = send(visitor, "GET", "/mine")
    token = re.search(r'name="csrf" content="([^"]+)"', body.decode())
    visitor.csrf = token[1] if token else ""
    return visitor


def get(visitor: Visitor, path: str) -> Any:
    """The JSON of an answer. Errors as `post`."""
    return _json(*send(visitor, "GET", path), path)


def post(visitor: Visitor, path: str, body: Any) -> Any:
    """Send JSON; the answer's JSON.

    Raises:
        ValueError: the server refuses; with its words.
        OSError: nobody answers.
    """
    return _json(*send(visitor, "POST", path, json.dumps(body)), path)


def send(visitor: Visitor, method: str, path: str, body: str = "", kind: str = "application/json") -> tuple[int, dict[str, str], bytes]:
    """One request; sent again while the server is too busy or nobody answers, since it may have been killed before it acknowledged."""
    headers = {"cookie": f"limner={visitor.cookie}", "x-csrf-token": visitor.csrf} if visitor.cookie else {}
    if method == "POST":
        headers["content-type"] = kind
    for attempt in range(RETRIES):
        try:
            if visitor.connection is None:
                where = urlsplit(visitor.address)
                visitor.connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
            began = time.perf_counter()
            visitor.connection.request(method, path, body or None, headers)
            response = visitor.connection.getresponse()
            found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
            visitor.times.append((path, time.perf_counter() - began))
            if found[0] != 429 or attempt == RETRIES - 1:
                return found
            time.sleep(0.5)  # too fast
        except (OSError, http.client.HTTPException):
            if visitor.connection is not None:
                visitor.connection.close()
            visitor.connection = None
            if attempt == RETRIES - 1:
                raise
            time.sleep(random.uniform(0.5, 1) * min(0.1 * 2**attempt, 3.0))  # not all at once: a server that is back has enough to do
    raise AssertionError("not reached")


def _json(status: int, headers: dict[str, str], body: bytes, path: str) -> Any:
    try:
        found = json.loads(body)
    except ValueError:
        found = {}
    if status != 200:
        raise ValueError(f"{path}: {status} {found.get('error', '') if isinstance(found, dict) else ''}")
    return found
