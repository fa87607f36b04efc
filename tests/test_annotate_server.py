"""The annotation server by HTTP: assignments, drafts, revisions, pages. Counts are worked out by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from sqlalchemy import select

import study as s
from limner.cli import main
from limner.feedback import answers, exports, fill, progress, server
from limner.feedback.database import Draft, Slot, open_database, writing
from limner.feedback.exchange import read_rows
from limner.feedback.study import load_study

TEXTS = {f"i{n}": f"a red cat number {n}" for n in range(4)}


@pytest.fixture
def site(tmp_path: Path):
    return s.site(tmp_path, TEXTS, {"overlap": 2, "raters": ["anna"], "server": {"requests_per_second": 1000}})


def test_two_raters_finish_a_study_and_nobody_sees_an_item_twice(site) -> None:
    study, database = site
    raters = [s.sign_in(s.client(study, database), study, database, f"r{n}") for n in range(3)]
    for turn in range(6):
        for n, rater in enumerate(raters):
            if rater.get("/api/task").json()["item"]:
                assert s.answer(rater, s.rich([[0.5, 0.5]], [1]), f"answer-{n}-{turn}").status_code == 200
    pairs = [(a.item_id, a.rater_id) for a in s.stored(database)]
    assert len(pairs) == len(set(pairs)) == 8  # 4 items by 2
    assert sorted([i for i, _ in pairs].count(i) for i in {i for i, _ in pairs}) == [2, 2, 2, 2]
    end = raters[0].get("/api/task").json()
    assert end["item"] is None and end["finished"] and end["progress"]["done"] == end["progress"]["total"] == 8


def test_the_last_slot_is_held_by_one_and_given_on_when_its_time_is_over(site) -> None:
    study, database = site
    a, b, c = (s.sign_in(s.client(study, database), study, database, n) for n in "abc")
    items = [r.get("/api/task").json()["item"]["id"] for r in (a, b, c)]
    assert items[0] == items[1] != items[2]
    with writing(database) as session:
        for slot in session.execute(select(Slot).where(Slot.item_id == items[0])).scalars():
            slot.expires = time.time() - 1
            session.add(slot)
    a.post("/api/draft", json={"item": items[0], "version": 0, "payload": {"ratings": {"overall": 2}}})  # keeps it for a
    d = s.sign_in(s.client(study, database), study, database, "d")
    e = s.sign_in(s.client(study, database), study, database, "e")
    assert d.get("/api/task").json()["item"]["id"] == items[0]  # b's place
    assert e.get("/api/task").json()["item"]["id"] != items[0]
    assert s.answer(d, s.rich(), "from-d-0").status_code == 200
    assert s.answer(a, s.rich(), "from-a-0", items[0]).status_code == 200
    late = s.answer(b, s.rich(), "from-b-0", items[0])
    assert late.status_code in (400, 409)
    assert sum(x.item_id == items[0] for x in s.stored(database)) == 2


def test_a_late_draft_is_kept_and_its_answer_refused(site) -> None:
    study, database = site
    a, b, c = (s.sign_in(s.client(study, database), study, database, n) for n in "abc")
    item = a.get("/api/task").json()["item"]["id"]
    a.post("/api/draft", json={"item": item, "version": 0, "payload": {"ratings": {"overall": 2}}})
    with writing(database) as session:
        for slot in session.execute(select(Slot).where(Slot.item_id == item)).scalars():
            slot.expires = 1.0
            session.add(slot)
    for n, r in enumerate((b, c)):
        assert s.answer(r, s.rich(), f"others-{n}", r.get("/api/task").json()["item"]["id"]).status_code == 200
    late = s.answer(a, s.rich(), "too-late-0", item)
    assert late.status_code == 409 and "went to other raters" in late.json()["error"]
    assert [json.loads(d.payload) for d in s.stored(database, Draft)] == [{"ratings": {"overall": 2}}]


def test_the_same_submission_twice_is_one_answer(site) -> None:
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    item = a.get("/api/task").json()["item"]["id"]
    first, again = (s.answer(a, s.rich([[0.1, 0.2]]), "same-id-1", item).json() for _ in range(2))
    assert (first["again"], again["again"], first["revision"], again["revision"]) == (False, True, 1, 1)
    assert len(s.stored(database)) == 1
    b = s.sign_in(s.client(study, database), study, database, "b")
    stolen = s.answer(b, s.rich(), "same-id-1")
    assert stolen.status_code == 400 and "used before" in stolen.json()["error"]


def test_edits_keep_every_revision_and_the_last_counts(site) -> None:
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    item = a.get("/api/task").json()["item"]["id"]
    s.answer(a, s.rich(rating=2), "first-one", item, seconds=8)
    seen = a.get(f"/api/task?item={item}").json()
    assert seen["revision"] == 1 and seen["answer"]["ratings"]["overall"] == 2
    s.answer(a, s.rich(rating=5), "second-one", item, base=1)
    assert [(x.revision, json.loads(x.payload)["ratings"]["overall"]) for x in s.stored(database)] == [(1, 2), (2, 5)]
    (given,) = answers.given(study, database)
    assert given.found["ratings"]["overall"] == 5
    assert [h["revision"] for h in answers.history(database)] == [1, 2]
    assert str(item) in a.get("/mine").text and "revision 2" in a.get("/mine").text


def test_two_tabs_of_one_rater(site) -> None:
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    one, two = a.get("/api/task").json(), a.get("/api/task").json()
    assert one["item"]["id"] == two["item"]["id"]  # the same item, not two
    item = one["item"]["id"]
    assert a.post("/api/draft", json={"item": item, "version": 0, "payload": {"x": 1}}).json() == {"version": 1}
    stale = a.post("/api/draft", json={"item": item, "version": 0, "payload": {"x": 2}})
    assert stale.status_code == 409 and "another tab" in stale.json()["error"]
    assert s.answer(a, s.rich(), "tab-one-1", item).status_code == 200
    other = s.answer(a, s.rich(rating=1), "tab-two-1", item)
    assert other.status_code == 409 and len(s.stored(database)) == 1


def test_skips_free_the_slot_for_others_and_can_be_taken_back(site) -> None:
    study, database = site
    a, b = (s.sign_in(s.client(study, database), study, database, n) for n in "ab")
    item = a.get("/api/task").json()["item"]["id"]
    body = {"id": "skip-this-1", "item": item, "base": 0, "skipped": "half a character \ud800"}
    assert a.post("/api/submit", content=json.dumps(body), headers={"content-type": "application/json"}).status_code == 422
    after = a.post("/api/submit", json={**body, "skipped": "I cannot\x00 tell\n"})
    assert after.json()["next"]["item"]["id"] != item
    assert [x.skipped for x in s.stored(database)] == ["I cannot tell"]
    assert answers.given(study, database) == [] and progress.overview(database)["skipped"] == 1
    assert b.get("/api/task").json()["item"]["id"] == item
    assert s.answer(a, s.rich(), "after-all-1", item, base=1).status_code == 200
    assert len(answers.given(study, database)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nothing": {}}, "Mark what looks wrong"),
        ({"nothing": {"image": True}}, "Mark what contradicts"),
        ({"points": {"artifact": [[0.1, 0.1]], "misalignment": []}}, "which of the two"),
        ({"ratings": {"overall": 3}}, "Not rated yet: plausibility, alignment, aesthetics"),
        ({"ratings": dict.fromkeys(("plausibility", "alignment", "aesthetics", "overall"), 6)}, "expected 1 to 5"),
        ({"points": {"artifact": [[1.5, 0]], "misalignment": []}}, "0 to 1"),
        ({"points": {"artifact": "x"}}, "expected a list"),
        ({"words": {"misaligned": [99]}}, "positions among 5 tokens"),
    ],
)
def test_incomplete_answers_are_refused_in_the_raters_words(site, change, message) -> None:
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    refused = s.answer(a, s.rich() | change, "not-complete")
    assert refused.status_code == 400 and message in refused.json()["error"]
    assert s.stored(database) == []


def test_an_admin_settles_and_the_raters_answers_are_kept(site) -> None:
    study, database = site
    a, b = (s.sign_in(s.client(study, database), study, database, n) for n in "ab")
    item = a.get("/api/task").json()["item"]["id"]
    assert b.get("/api/task").json()["item"]["id"] == item
    s.answer(a, s.rich(rating=1), "rater-a-1", item)
    s.answer(b, s.rich(rating=5), "rater-b-1", item)
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    (worst,) = progress.disagreements(answers.given(study, database))
    assert (worst["id"], worst["much"]) == (item, 1.0)
    assert "rater" in boss.get(f"/admin/items/{item}").text
    assert s.answer(boss, s.rich(rating=2), "settled-1", item).status_code == 200
    assert [(g.rater, g.found["ratings"]["overall"]) for g in answers.given(study, database)] == [("boss", 2)]
    assert len(answers.given(study, database, settled=False)) == 2 and progress.disagreements(answers.given(study, database)) == []
    assert len(s.stored(database)) == 3


def test_pages_and_exports_of_admins(site, tmp_path: Path) -> None:
    study, database = site
    a, b = (s.sign_in(s.client(study, database), study, database, n) for n in "ab")
    for n in range(4):
        for who, rater in (("a", a), ("b", b)):
            s.answer(rater, s.rich([[0.5, 0.5]], [1], 2 + n % 3), f"export-{who}-{n}")
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    page = boss.get("/admin").text
    assert "100 %" in page and "8 of 8 answers" in page
    assert boss.get("/admin/gallery").text.count("<circle") == 8
    for name in exports.FORMATS:
        file = tmp_path / name
        file.write_bytes(boss.get(f"/admin/export/{name}").content)
    rows = read_rows(tmp_path / "feedback.jsonl")
    assert rows == read_rows(tmp_path / "feedback.parquet") == read_rows(tmp_path / "feedback.csv") and len(rows) == 8 * 3
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 8
    again = s.study_of(tmp_path, {"overlap": 2, "output_dir": str(tmp_path / "again"), "images": {"from": str(tmp_path / "images")}})
    other = server.prepare(again)
    read, _ = exports.read(tmp_path / "label-studio.json", again, other)
    assert answers.import_feedback(again, other, read) == {"imported": 8}
    assert answers.import_feedback(again, other, read) == {"again": 8}
    back = {(f.image_id, f.rater, f.kind): json.loads(f.payload) for f in answers.feedback(answers.given(again, other))}
    assert back == {(f.image_id, f.rater, f.kind): json.loads(f.payload) for f in rows}
    third = [r for r in read if r.rater == "a"]
    late = [type(r)(**{**vars(r), "rater": "c", "id": r.id + "c"}) for r in third]
    assert answers.import_feedback(again, other, late) == {"more raters than overlap": 4}
    report = exports.consolidate_study(study, database)
    assert report["consolidated"]["rows"] == 4 and report["agreement"]["overall"]["alpha"] == pytest.approx(1)
    consolidated = exports.read_consolidated(Path(study.output_dir) / "rich")
    assert consolidated[0].labels == (1, 0, 1, 1, 1) and consolidated[0].overall == 0.25


def test_another_study_in_the_same_database_is_refused(site) -> None:
    study, database = site
    assert fill.set_up(study, database) == {}
    changed = load_study(Path(study.output_dir).parent / "study.yaml", ["--overlap", "3"])
    with pytest.raises(ValueError, match="overlap: was 2, now 3"):
        server.prepare(changed)
    with pytest.raises(ValueError, match="cannot be opened"):
        open_database("postgresql+psycopg://nobody:secret@127.0.0.1:1/none", Path("."))


def test_the_commands_for_files(site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Invite, answer, export, and import into another study: as rows all of it, as RichHF-18K what its format holds."""
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    s.answer(a, s.rich([[0.5, 0.5]], [1], rating=2), "exported-1")
    s.answer(a, s.rich([], [], rating=4), "exported-2")
    database.engine.dispose()
    config = str(tmp_path / "study.yaml")
    assert main(["annotate", "invite", config, "--rater", "dora"]) == 0
    assert "dora, once: http://127.0.0.1:8000/join/" in capsys.readouterr().out
    for name in ("answers.csv", "rich.tfrecord"):
        assert main(["annotate", "export", config, "--file", str(tmp_path / name)]) == 0
    for name, kinds in (("answers.csv", {"points", "words", "ratings"}), ("rich.tfrecord", {"words", "ratings"})):
        other = ["--output_dir", str(tmp_path / f"other-{name}")]
        assert main(["annotate", "import", config, "--file", str(tmp_path / name), *other]) == 0
        assert "imported 2" in capsys.readouterr().out
        again = load_study(config, other)
        opened = server.prepare(again)
        given = answers.given(again, opened)
        assert [set(g.found) for g in given] == [kinds, kinds]  # maps are no points: nobody said that nothing is wrong
        assert [g.found["ratings"]["overall"] for g in given] == [2, 4] and given[0].found["words"]["misaligned"] == [1]
        boss = s.sign_in(s.client(again, opened), again, opened, "boss", "admin")
        for page in ("/admin", "/admin/gallery", f"/admin/items/{given[0].item_id}"):
            assert boss.get(page).status_code == 200
    assert main(["annotate", "export", config, "--file", str(tmp_path / "answers.txt")]) == 2
    assert "expected .jsonl, .csv or .parquet" in capsys.readouterr().err
    assert main(["annotate", "import", config]) == 2 and "--file: not set" in capsys.readouterr().err


def test_a_page_that_missed_a_reply_is_not_another_tab(site) -> None:
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    item = a.get("/api/task").json()["item"]["id"]

    def draft(page: str, version: int, x: int) -> Any:
        return a.post("/api/draft", json={"item": item, "version": version, "payload": {"x": x, "page": page}})

    assert draft("one", 0, 1).json() == {"version": 1}
    assert draft("one", 0, 2).json() == {"version": 2}, "the reply to the first was lost"
    assert draft("two", 0, 3).status_code == 409
    assert [json.loads(d.payload)["x"] for d in s.stored(database, Draft)] == [2]


def test_a_rater_who_begins_after_the_lease_can_save(site) -> None:
    """Opened, left, and given to others meanwhile: what is done then is kept as a draft."""
    study, database = site
    a, b, c = (s.sign_in(s.client(study, database), study, database, n) for n in "abc")
    item = a.get("/api/task").json()["item"]["id"]
    with writing(database) as session:
        for slot in session.execute(select(Slot)).scalars():
            slot.expires = 1.0
            session.add(slot)
    assert [r.get("/api/task").json()["item"]["id"] for r in (b, c)] == [item] * 2
    again = a.get(f"/api/task?item={item}").json()
    assert (again["draft"], again["version"]) == (None, 0)
    assert a.post("/api/draft", json={"item": item, "version": 0, "payload": {"x": 1}}).json() == {"version": 1}
    d = s.sign_in(s.client(study, database), study, database, "d")
    assert d.post("/api/draft", json={"item": item, "version": 0, "payload": {"x": 1}}).status_code == 400, "it never was d's"
    assert progress.overview(database)["drafts"] == 1


def test_guidelines_are_text_or_a_file_that_is_there(tmp_path: Path) -> None:
    """A long line of text is no file's name, and a file's name no text."""
    s.image_folder(tmp_path / "images", TEXTS)
    study = s.study_of(tmp_path, {"guidelines": "Взгляните внимательно " * 15})
    a = s.sign_in(s.client(study, server.prepare(study)), study, server.prepare(study), "a")
    assert "Взгляните внимательно" in a.get("/").text
    missing = s.study_of(tmp_path, {"guidelines": "guidelins.txt", "output_dir": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"guidelines: guidelins.txt: no such file"):
        server.prepare(missing)
    assert not (tmp_path / "other").exists()
