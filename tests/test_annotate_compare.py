"""Choices and sides through the server: who stands where, what is refused, known answers. Expected values are worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from sqlalchemy import select
from starlette.testclient import TestClient

import study as s
from limner.feedback import exports, server
from limner.feedback.database import Database, Picture, reading
from limner.feedback.study import Study
from limner.records import Image, to_table
from limner.store import open_step


def step_of(folder: Path, prompts: int, each: int) -> str:
    """A pool with images p0-0, p0-1, ... called after the folder."""
    name = folder.name
    rows = [
        Image(id=f"{name}{n}-{k}", prompt_id=f"p{n}", text=f"cat {n}", image=s.png((n, k, len(name))), k=k)
        for n in range(prompts)
        for k in range(each)
    ]
    step = open_step(folder, "pool", {}, {})
    step.write(0, to_table(Image, rows))
    step.finish({})
    return str(folder)


def side_study(folder: Path, items: int, **values: Any) -> tuple[Study, Database]:
    folder.mkdir(parents=True, exist_ok=True)
    images = {"from": step_of(folder / "ours", items, 1), "against": step_of(folder / "base", items, 1)}
    study = s.study_of(folder, {"task": "side", "overlap": 2, "images": images, **values})
    return study, server.prepare(study)


def shown(rater: TestClient, database: Database) -> dict[str, str]:
    """The ids of the images that a rater sees next, in their order, and what the page calls them."""
    with reading(database) as session:
        names = {p.token: p.image_id for p in session.execute(select(Picture)).scalars()}
    return {names[i["token"]]: i["token"] for i in rater.get("/api/task").json()["item"]["images"]}


def lefts(folder: Path, seed: int) -> list[str]:
    """What stands left in each of 16 items for the first rater, after holding that the second sees the other one there."""
    study, database = side_study(folder, 16, seed=seed)
    a, b = (s.sign_in(s.client(study, database), study, database, n) for n in "ab")
    found = []
    for n in range(16):
        one, other = shown(a, database), shown(b, database)
        assert list(one) == list(other)[::-1]
        found.append(next(iter(one))[:4])
        for name, rater, tokens in (("a", a, one), ("b", b, other)):
            left, right = tokens.values()
            assert s.answer(rater, {"left": left, "right": right, "value": 1}, f"left-{name}-{n:03d}").status_code == 200
    return found


def test_the_studys_seed_decides_who_stands_left(tmp_path: Path) -> None:
    first, again, other = lefts(tmp_path / "first", 1), lefts(tmp_path / "again", 1), lefts(tmp_path / "other", 2)
    assert first == again != other
    assert {"ours", "base"} == set(first) == set(other)


def test_rich_formats_are_not_offered_for_sides(tmp_path: Path) -> None:
    study, database = side_study(tmp_path, 2)
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    page = boss.get("/admin").text
    for name in exports.FORMATS:
        rich = name.startswith(("label-studio", "richhf"))
        assert (f"/admin/export/{name}" in page) is not rich
        assert boss.get(f"/admin/export/{name}").status_code == (400 if rich else 200)
