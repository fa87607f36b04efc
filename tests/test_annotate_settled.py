"""How far raters agree, where they do not, and what an admin settles. Shares are worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import study as s
from limner.feedback import answers, exports, progress, server
from limner.feedback.exchange import read_rows

TEXTS = {f"i{n}": f"a red cat number {n}" for n in range(4)}


@pytest.fixture
def site(tmp_path: Path):
    return s.site(tmp_path, TEXTS, {"overlap": 2})


def test_raters_disagree_on_words_and_on_whether_anything_is_wrong(tmp_path: Path) -> None:
    """Three raters, prompts of five words. Worst first: whether there is an artifact (one of three:
    2/3), words 2 and 4 of some (2/5; word 1 of all is no disagreement), ratings one step apart (1/4), one word of one
    rater (1/5), all alike."""
    s.image_folder(tmp_path / "images", {f"i{n}": f"a red cat number {n}" for n in range(5)})
    study = s.study_of(tmp_path, {"overlap": 3})
    database = server.prepare(study)
    said = [
        [s.rich(), s.rich(), s.rich()],
        [s.rich(), s.rich([], [3]), s.rich()],
        [s.rich([], [1, 2]), s.rich([], [1, 4]), s.rich([], [1])],
        [s.rich([[0.5, 0.5]]), s.rich(), s.rich()],
        [s.rich(), s.rich(rating=4), s.rich()],
    ]
    for n in range(3):
        rater = s.sign_in(s.client(study, database), study, database, f"r{n}")
        for i, of_item in enumerate(said):
            assert s.answer(rater, of_item[n], f"disagree-{n}-{i}").status_code == 200
    found = progress.disagreements(answers.given(study, database))
    assert [(row["text"][-1], round(row["much"], 3)) for row in found] == [("3", 0.667), ("2", 0.4), ("4", 0.25), ("1", 0.2), ("0", 0)]


def test_what_was_settled_still_counts_as_disagreement(site, tmp_path: Path) -> None:
    """Of four items raters differ on two, by one and by four steps; the worse one is settled. All shares are over four items."""
    study, database = site
    a, b = (s.sign_in(s.client(study, database), study, database, n) for n in "ab")
    items = []
    for n, (one, other) in enumerate([(1, 5), (2, 3), (4, 4), (5, 5)]):
        items.append(a.get("/api/task").json()["item"]["id"])
        assert b.get("/api/task").json()["item"]["id"] == items[-1]
        for rater, rating, id in ((a, one, f"settle-a-{n}"), (b, other, f"settle-b-{n}")):
            assert s.answer(rater, s.rich(rating=rating), id, items[-1]).status_code == 200
    before = exports.consolidate_study(study, database)
    curve = progress.agreement_curve(answers.given(study, database, settled=False))["overall"][-1]
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    assert s.answer(boss, s.rich(rating=2), "settled-by-boss", items[0]).status_code == 200
    after = exports.consolidate_study(study, database)
    assert after["agreement"] == before["agreement"] and after["agreement"]["overall"]["alpha"] == curve[1]
    assert {k: v["value"] for k, v in after["agreement"]["overall"]["differences"].items()} == {
        "0.0": 0.5, "0.25": 0.25, "0.5": 0, "0.75": 0, "1.0": 0.25,
    }  # fmt: skip
    assert (before["settled"], after["settled"], after["answers"]) == (0, 1, 4 * 2 * 3)
    assert exports.read_consolidated(Path(study.output_dir) / "rich")[0].overall == 0.25, "what was settled decides"
    for name in ("feedback.jsonl", "feedback.csv", "feedback.parquet"):
        exports.write(study, database, tmp_path / name)
        assert {(r.image_id, r.rater) for r in read_rows(tmp_path / name)} == {(f"i{n}", r) for n in range(4) for r in "ab"}
    counted = {(r.image_id, r.rater) for r in read_rows(Path(study.output_dir) / "counted/part-00000.parquet")}
    assert counted == {("i0", "boss"), *((f"i{n}", r) for n in (1, 2, 3) for r in "ab")}
