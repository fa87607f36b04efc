"""The system's Chromium to look at a served study with, and pictures of it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sqlalchemy import select

from limner.feedback import server
from limner.feedback.database import Answer, reading

if TYPE_CHECKING:  # tests that need it say so
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
WHY_NOT = "no Chromium on this machine (apt-get install chromium)"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
SHOTS = os.environ.get("LIMNER_SCREENSHOTS", "")  # a folder to put pictures of the pages into; "" = none are taken
wrong: list[str] = []  # what the pages of a test did that no page may


def shoot(page: Any, name: str, phone: bool = False, whole: bool = False) -> None:
    """Picture the page for docs/, if asked to: as it is, or as a phone shows it; whole, or what the window shows of it."""
    if not SHOTS:
        return
    Path(SHOTS).mkdir(parents=True, exist_ok=True)
    before = page.viewport_size
    if phone:
        page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(400)
    path = Path(SHOTS) / f"{name}{'-phone' if phone else ''}.png"
    page.screenshot(path=path, full_page=whole)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(200)  # a third of the bytes
    small.save(path, optimize=True)
    if phone:
        page.set_viewport_size(before)


@contextmanager
def started() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def picture(seed: int, side: int = 240) -> bytes:
    """A figure of sorts; for the pictures in docs/ one of the embedded world."""
    if SHOTS:
        from limner.figures import make

        (drawn,) = make.draw("raters", seed, seed + 1, defects=True)
        return make.row("raters", drawn)["defective_image"]
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(rng.integers(120, 230, 3).tolist()))
    draw = ImageDraw.Draw(image)
    draw.ellipse((side * 0.4, side * 0.1, side * 0.6, side * 0.3), fill=(224, 172, 140))
    draw.rectangle((side * 0.38, side * 0.3, side * 0.62, side * 0.8), fill=tuple(rng.integers(0, 255, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def nothing_wrong() -> Iterator[list[str]]:
    """Fails a test whose pages had errors or asked another host for something."""
    wrong.clear()
    yield wrong
    assert not wrong, wrong


def visit(browser: Browser, address: str, **context: Any) -> Page:
    """A browser of its own at this address, watched by `nothing_wrong`."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}, **context).new_page()
    page.set_default_timeout(60_000)

    def asked(request: Any) -> None:
        to = urlsplit(request.url)
        if to.scheme not in ("data", "blob") and to.netloc != urlsplit(address).netloc:
            wrong.append(f"asked for {request.url}")

    def said(message: Any) -> None:
        refused = message.text.startswith("Failed to load resource: the server responded with a status of 4")  # tests provoke these
        if message.type in ("error", "warning") and not refused:
            wrong.append(f"{message.type}: {message.text}")

    page.on("request", asked)
    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(f"error in the page: {error}"))
    page.goto(address)
    return page


def begin(browser: Browser, address: str, study: Any, database: Any, name: str, role: str = "rater", **context: Any) -> Page:
    """A browser of somebody who has just used their invitation."""
    page = visit(browser, server.invitation(study, database, name, role, address), **context)
    page.click("text=Begin")
    page.wait_for_load_state()
    return page


def stored(database: Any) -> list[tuple[Answer, dict[str, Any]]]:
    with reading(database) as session:
        return [(a, json.loads(a.payload)) for a in session.execute(select(Answer).order_by(Answer.created)).scalars()]
