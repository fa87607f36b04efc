"""A small study for tests: images on disk, its database, its page by HTTP, and browsers' answers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy import select
from starlette.testclient import TestClient

from limner.feedback import accounts, server
from limner.feedback.database import Answer, Database, reading
from limner.feedback.study import Study, load_study

ORIGIN = "http://testserver"


def png(colour: tuple[int, int, int] = (120, 140, 160), size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(folder: Path, texts: dict[str, str], images: dict[str, bytes] | None = None) -> Path:
    """An image folder with a prompt for each id."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (name, text) in enumerate(texts.items()):
        rng = np.random.default_rng(n)
        data = (images or {}).get(name) or png(tuple(int(v) for v in rng.integers(0, 255, 3)))  # type: ignore[arg-type]
        (folder / f"{name}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": text, "id": name}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def study_of(folder: Path, values: dict[str, Any]) -> Study:
    """A study with its YAML in `folder`; images are in folder/images unless said otherwise."""
    values = {"output_dir": str(folder / "run"), "images": {"from": str(folder / "images")}, "order": "given", **values}
    path = folder / "study.yaml"
    path.write_text(json.dumps(values))
    return load_study(path)


def site(folder: Path, texts: dict[str, str], values: dict[str, Any]) -> tuple[Study, Database]:
    """A study of images with these texts, and its database."""
    image_folder(folder / "images", texts)
    study = study_of(folder, values)
    return study, server.prepare(study)


def client(study: Study, database: Database) -> TestClient:
    """A browser without a cookie."""
    return TestClient(server.make_app(study, database), base_url=ORIGIN, follow_redirects=False)


def sign_in(browser: TestClient, study: Study, database: Database, name: str, role: str = "rater") -> TestClient:
    """Use an invitation, and send the page's token with every change from then on."""
    link = server.invitation(study, database, name, role, "")
    assert browser.post(link).status_code == 303
    person = accounts.person(database, browser.cookies["limner"], accounts.study_key(database))
    assert person is not None
    browser.headers["x-csrf-token"] = person.csrf
    return browser


def token_in(html: str) -> str:
    found = re.search(r'name="csrf" content="([^"]+)"', html)
    assert found
    return found[1]


def rich(points: list | None = None, misaligned: list | None = None, rating: int = 3) -> dict[str, Any]:
    """A complete answer of task rich."""
    return {
        "points": {"artifact": points or [], "misalignment": []}, "words": {"misaligned": misaligned or []},
        "ratings": dict.fromkeys(("plausibility", "alignment", "aesthetics", "overall"), rating),
        "nothing": {"image": not points, "prompt": not misaligned},
    }  # fmt: skip


def answer(browser: TestClient, payload: dict[str, Any], id: str, item: int = 0, base: int = 0, **more: Any) -> Any:
    """Submit for the item that is due (or another); returns the response."""
    item = item or browser.get("/api/task").json()["item"]["id"]
    return browser.post("/api/submit", json={"id": id, "item": item, "base": base, "payload": payload, **more})


def stored(database: Database, kind: type = Answer) -> list[Any]:
    """All rows of a table."""
    with reading(database) as session:
        return list(session.execute(select(kind)).scalars())
