"""The system's Chromium to look at a served study with, and pictures of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
WHY_NOT = "no Chromium on this machine (apt-get install chromium)"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
SHOTS = os.environ.get("LIMNER_SCREENSHOTS", "")  # a folder to put pictures of the pages into; "" = none are taken


def shoot(page: Any, name: str, phone: bool = False) -> None:
    """Picture the page for docs/, if asked to: as it is, or as a phone shows it."""
    if not SHOTS:
        return
    Path(SHOTS).mkdir(parents=True, exist_ok=True)
    before = page.viewport_size
    if phone:
        page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(400)
    path = Path(SHOTS) / f"{name}{'-phone' if phone else ''}.png"
    page.screenshot(path=path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(200)  # a third of the bytes
    small.save(path, optimize=True)
    if phone:
        page.set_viewport_size(before)
