"""`limner score --serve`: scorers behind HTTP. Images of all requests that wait are scored together; nothing is pickled.

    POST /score    JSON {"images": [{"image": base64, "prompt": text}, ...]}, or multipart with files `image` and fields `prompt`
                   -> {"scores": [{scorer: number or null}, ...], "reasons": [{scorer: why there is none}, ...]}
    GET  /health   {"status": "ok", "scorers": what `describe` tells of each}
    GET  /metrics  counters in Prometheus' text format

Too many images waiting: 503 with Retry-After. A body too large: 413. Anything that cannot be read: 400, which names it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from limner.images import decode
from limner.scorers.protocol import Scorer, describe
from limner.scorers.steps import answers

Result = dict[str, float | str]  # by scorer: its score, or why there is none
RETRY_AFTER = 1  # seconds


@dataclass
class Item:
    """An image that waits for its scores; or why it cannot be read."""

    picture: PIL.Image.Image | str
    prompt: str
    result: Future[Result] = field(default_factory=Future)


class Full(Exception):
    """There is no room for the images of a request."""


class Batcher:
    """One thread that scores whatever waits, up to `batch_size` images at a time.

    Args:
        limit: images that may wait.
        linger: seconds that the first of a batch waits for others.
    """

    def __init__(self, scorers: Sequence[Scorer], batch_size: int = 32, limit: int = 256, linger: float = 0.005):
        self.scorers, self.batch_size, self.limit, self.linger = list(scorers), batch_size, limit, linger
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._room, self._lock = limit, threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Score what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    @property
    def size(self) -> int:
        """Images that wait or are being scored."""
        return self.limit - self._room

    def reserve(self, count: int) -> None:
        """Room for all images of a request, or none.

        Raises:
            Full: they do not fit.
        """
        with self._lock:
            if count > self._room:
                raise Full
            self._room -= count

    def release(self, count: int) -> None:
        """Room that was reserved and is free again."""
        with self._lock:
            self._room += count

    def submit(self, items: Sequence[Item]) -> None:
        """Images that room is reserved for."""
        for item in items:
            self._waiting.put(item)

    def _run(self) -> None:
        ended = False
        while not ended:
            first = self._waiting.get()
            batch = [first] if first else []
            ended, until = first is None, time.monotonic() + self.linger
            while not ended and len(batch) < self.batch_size:
                try:
                    item = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if item is None:
                    ended = True
                else:
                    batch.append(item)
            if batch:
                self._score(batch)

    def _score(self, batch: Sequence[Item]) -> None:
        began, results = time.monotonic(), [Result() for _ in batch]
        pictures = {i: item.picture for i, item in enumerate(batch) if not isinstance(item.picture, str)}
        for scorer in self.scorers:
            asked = [i for i in pictures if batch[i].prompt.strip() or not scorer.needs_prompt]
            try:
                found = answers(scorer, [pictures[i] for i in asked], [batch[i].prompt for i in asked]) if asked else []
            except Exception as error:  # the service goes on: an endpoint that is away, a device out of memory
                found = [f"{type(error).__name__}: {error}"] * len(asked)
                self.counts["failures"] += 1
            for item, result in zip(batch, results):
                result[scorer.name] = item.picture if isinstance(item.picture, str) else "there is no prompt"
            for i, value in zip(asked, found):
                results[i][scorer.name] = value
        self.release(len(batch))
        self.counts["images"] += len(batch)
        self.counts["batches"] += 1
        self.seconds += time.monotonic() - began
        for item, result in zip(batch, results):
            if item.result.set_running_or_notify_cancel():
                item.result.set_result(result)


def make_app(scorers: Sequence[Scorer], *, batch_size: int = 32, limit: int = 256, max_bytes: int = 64 << 20) -> FastAPI:
    """The service.

    Args:
        limit: images that may wait; a request with more can never be answered.
        max_bytes: of a request's body.
    """
    batcher = Batcher(scorers, batch_size, limit)
    statuses: Counter[int] = Counter()
    about = {s.name: describe(s) for s in scorers}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await run_in_threadpool(batcher.stop)

    app = FastAPI(title="Limner scores", lifespan=lifespan)
    app.state.batcher = batcher

    @app.post("/score")
    async def score(request: Request) -> Response:
        try:
            pairs = await read_pairs(request, max_bytes, limit)
            batcher.reserve(len(pairs))  # before decoding: a picture takes far more memory than its file
            try:
                items = await run_in_threadpool(decode_all, pairs)
            except BaseException:
                batcher.release(len(pairs))
                raise
            batcher.submit(items)
        except Full:
            statuses[503] += 1
            return problem(503, f"{batcher.size} of {limit} images wait already; try again", {"Retry-After": str(RETRY_AFTER)})
        except TooLarge as error:
            statuses[413] += 1
            return problem(413, str(error))
        except ValueError as error:
            statuses[400] += 1
            return problem(400, str(error))
        found = await asyncio.gather(*(asyncio.wrap_future(item.result) for item in items))
        statuses[200] += 1
        numbers = [{n: None if isinstance(v, str) or v != v else v for n, v in r.items()} for r in found]
        reasons = [
            {n: v if isinstance(v, str) else f"the scorer gave {v}" for n, v in r.items() if isinstance(v, str) or v != v} for r in found
        ]
        return JSONResponse({"scores": numbers, "reasons": reasons, "scorers": about})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.size, "scorers": about}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = [f'limner_requests_total{{status="{s}"}} {n}' for s, n in sorted(statuses.items())]
        lines += [f"limner_{n}_total {batcher.counts[n]}" for n in ("images", "batches", "failures")]
        lines += [f"limner_score_seconds_total {batcher.seconds:.6f}", f"limner_queue_images {batcher.size}", f"limner_queue_limit {limit}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    return app


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": text}, status, headers)


class TooLarge(ValueError):
    """A body or a request that is larger than the service takes."""


async def read_pairs(request: Request, max_bytes: int, limit: int) -> list[tuple[bytes, str]]:
    """The encoded images of a request with their prompts.

    Raises:
        TooLarge: more bytes or images than allowed.
        ValueError: names what cannot be read.
    """
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise TooLarge(f"the body is larger than {max_bytes} bytes")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = b""
        async for chunk in request.stream():  # the length told may be wrong, or not told
            body += chunk
            if len(body) > max_bytes:
                raise TooLarge(f"the body is larger than {max_bytes} bytes")
        pairs = read_json(body)
    elif kind == "multipart/form-data":
        if "content-length" not in request.headers:
            raise ValueError("a form needs a Content-Length")
        pairs = await read_form(request, limit, max_bytes)
    else:
        raise ValueError(f"content type {kind or 'missing'}; expected application/json or multipart/form-data")
    if not pairs:
        raise ValueError("no images; send at least one")
    if len(pairs) > limit:
        raise TooLarge(f"{len(pairs)} images; the service takes at most {limit} at a time")
    return pairs


def decode_all(pairs: Sequence[tuple[bytes, str]]) -> list[Item]:
    """Images with their prompts; an unreadable image does not fail the others.

    Raises:
        ValueError: none can be read.
    """
    items = []
    for i, (data, prompt) in enumerate(pairs):
        try:
            items.append(Item(decode(data, f"image {i}"), prompt))
        except ValueError as error:
            items.append(Item(str(error), prompt))
    if all(isinstance(item.picture, str) for item in items):
        raise ValueError(str(items[0].picture))
    return items


def read_json(body: bytes) -> list[tuple[bytes, str]]:
    """Encoded images and prompts of a JSON body.

    Raises:
        ValueError: names what is wrong.
    """
    try:
        found = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is not JSON ({error})") from None
    rows = found.get("images") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise ValueError('expected {"images": [{"image": base64, "prompt": text}, ...]}')
    pairs = []
    for i, row in enumerate(rows):
        image, prompt = (row.get("image"), row.get("prompt", "")) if isinstance(row, dict) else (None, "")
        if not isinstance(image, str) or not isinstance(prompt, str | None):
            raise ValueError(f'images[{i}]: expected {{"image": base64, "prompt": text}}')
        try:
            pairs.append((base64.b64decode(image.rpartition(",")[2] if image.startswith("data:") else image, validate=True), prompt or ""))
        except binascii.Error:
            raise ValueError(f"images[{i}].image: not base64") from None
    return pairs


async def read_form(request: Request, limit: int, max_bytes: int) -> list[tuple[bytes, str]]:
    """Files `image` and fields `prompt` of a form: one prompt for each, or one for all, or none.

    Raises:
        ValueError: names what is wrong.
    """
    try:
        form = await request.form(max_files=limit, max_fields=limit)
    except HTTPException as error:  # Starlette's, of a form that cannot be read
        raise ValueError(str(error.detail)) from None
    images = [await f.read() for f in form.getlist("image") if isinstance(f, UploadFile)]
    prompts = [p for p in form.getlist("prompt") if isinstance(p, str)]
    if sum(map(len, images)) > max_bytes:
        raise TooLarge(f"the images are larger than {max_bytes} bytes")
    if len(prompts) not in (0, 1, len(images)):
        raise ValueError(f"{len(images)} files `image` but {len(prompts)} fields `prompt`; expected one each, one for all, or none")
    prompts = prompts or [""]
    return list(zip(images, prompts if len(prompts) == len(images) else prompts * len(images)))
