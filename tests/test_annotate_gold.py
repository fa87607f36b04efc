"""Items whose answer is known: when they come, whose they are, and which answer is judged. Counts are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from sqlalchemy import select

import study as s
from limner.feedback import answers, progress, server
from limner.feedback.database import Slot, writing

TEXTS = {f"i{n}": f"a red cat number {n}" for n in range(4)}


def test_gold_is_mixed_in_and_told(tmp_path: Path) -> None:
    s.image_folder(tmp_path / "images", TEXTS)
    gold = {"image_id": "i3", "answer": {"points": {"artifact": [[0.5, 0.5]]}, "ratings": {"overall": 1}}, "message": "Look at the hand."}
    (tmp_path / "gold.jsonl").write_text(json.dumps(gold) + "\n")
    study = s.study_of(tmp_path, {"overlap": 1, "gold": {"from": str(tmp_path / "gold.jsonl"), "every": 2}})
    database = server.prepare(study)
    a = s.sign_in(s.client(study, database), study, database, "a")
    texts = []
    for n in range(4):
        texts.append(a.get("/api/task").json()["item"]["text"])
        found = s.answer(a, s.rich([[0.55, 0.5]], rating=5), f"gold-run-{n}").json()
        if "gold" in found:
            assert found["gold"] == {"correct": 0.5, "message": "Look at the hand."}  # the point is near, the rating is not
    assert texts == [TEXTS[i] for i in ("i0", "i1", "i3", "i2")]
    (row,) = [r for r in progress.rater_rows(database, answers.given(study, database)) if r["answers"]]
    assert (row["gold"], row["golds"]) == (0.5, 1)
    assert {f.image_id for f in answers.feedback(answers.given(study, database))} == {"i0", "i1", "i2"}  # what was known is not exported


def with_gold(tmp_path: Path):
    """Two plain items for one rater each, and one whose answer is known: a rating of 1."""
    s.image_folder(tmp_path / "images", {k: TEXTS[k] for k in ("i0", "i1", "i2")})
    (tmp_path / "gold.jsonl").write_text(json.dumps({"image_id": "i2", "answer": {"ratings": {"overall": 1}}, "message": "Look."}) + "\n")
    study = s.study_of(tmp_path, {"overlap": 1, "gold": {"from": str(tmp_path / "gold.jsonl"), "every": 1}})
    return study, server.prepare(study)


def text_of(found: Any) -> str:
    return found.json()["item"]["text"] if found.json()["item"] else ""


def test_gold_is_each_raters_own(tmp_path: Path) -> None:
    """Signed out with gold in hand, a rater finds it again; nobody else gets it, and a study whose gold nobody answers is finished."""
    study, database = with_gold(tmp_path)
    a, b = (s.sign_in(s.client(study, database), study, database, n) for n in "ab")
    assert s.answer(a, s.rich(), "a-plain-0").status_code == 200
    assert text_of(a.get("/api/task")) == TEXTS["i2"]
    page = a.get("/").text
    assert a.post("/logout", data={"csrf": s.token_in(page)}).status_code == 303
    a = s.sign_in(s.client(study, database), study, database, "a")
    assert text_of(a.get("/api/task")) == TEXTS["i2"]
    with writing(database) as session:
        for slot in session.execute(select(Slot)).scalars():
            slot.expires = 1.0
            session.add(slot)
    assert s.answer(b, s.rich(), "b-plain-0").status_code == 200  # i1
    theirs = b.get("/api/task")
    assert text_of(theirs) == TEXTS["i2"], "b's own gold"
    assert (theirs.json()["progress"]["done"], theirs.json()["progress"]["total"]) == (2, 2)
    assert text_of(a.get("/api/task")) == TEXTS["i2"]
    assert s.answer(a, s.rich(rating=1), "a-gold-00").json()["gold"]["correct"] == 1.0
    assert a.get("/api/task").json()["finished"] and progress.overview(database)["total"] == 2


def test_gold_is_judged_by_the_first_answer(tmp_path: Path) -> None:
    """Afterwards the rater was told."""
    study, database = with_gold(tmp_path)
    a = s.sign_in(s.client(study, database), study, database, "a")
    s.answer(a, s.rich(), "a-plain-0")
    item = a.get("/api/task").json()["item"]["id"]
    assert s.answer(a, s.rich(rating=5), "a-gold-00", item).json()["gold"]["correct"] == 0.0
    assert s.answer(a, s.rich(rating=1), "a-gold-01", item, base=1).json()["gold"]["correct"] == 0.0
    (row,) = [r for r in progress.rater_rows(database, answers.given(study, database)) if r["answers"]]
    assert (row["gold"], row["golds"]) == (0.0, 1)
