"""What stands between the network and the pages: headers, limits, and where requests come from. Plain ASGI."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "same-origin",
    "x-frame-options": "DENY", "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}  # fmt: skip


def guard(app: App, max_body: int) -> App:
    """An app with the headers above on every answer, that refuses bodies above `max_body` bytes and changes asked for by other sites."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD") and not _same_site(request):
            await _refuse(send, 403, "This request comes from another site.")
            return
        length = request.get("content-length", "0")
        if not length.isdecimal() or int(length) > max_body:
            await _refuse(send, 413, f"More than {max_body:,} bytes.")
            return
        left = max_body

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:  # no length was given, and there is more than may be
                raise HTTPException(413, f"More than {max_body:,} bytes.")
            return message

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {k.lower() for k, _ in message["headers"]}
                own = {"cache-control": "no-store", **HEADERS}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in own.items() if k.encode() not in given)]
            await send(message)

        await app(scope, limited, headed)

    return guarded


def _same_site(headers: dict[str, str]) -> bool:
    """Whether a change is asked for by our own page (or by a program, which sends neither header)."""
    if "sec-fetch-site" in headers:  # browsers set it themselves, pages cannot
        return headers["sec-fetch-site"] in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = {"content-type": "text/plain; charset=utf-8", **HEADERS}
    await send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]})
    await send({"type": "http.response.body", "body": text.encode()})


@dataclass
class Bucket:
    """How often something may happen: `rate` a second in the long run, `burst` at once."""

    rate: float
    burst: float
    left: dict[str, tuple[float, float]] = field(default_factory=dict)


def allow(bucket: Bucket, who: str, now: float | None = None) -> bool:
    """Whether it may happen once more for `who`; counts it."""
    now = time.monotonic() if now is None else now
    tokens, then = bucket.left.get(who, (bucket.burst, now))
    tokens = min(bucket.burst, tokens + (now - then) * bucket.rate)
    if len(bucket.left) > 10_000:  # forget those who have long been full again
        full = bucket.burst / bucket.rate
        bucket.left = {k: v for k, v in bucket.left.items() if now - v[1] < full}
    bucket.left[who] = (max(tokens - 1, 0) if tokens >= 1 else tokens, now)
    return tokens >= 1
