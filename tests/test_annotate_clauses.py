"""Clauses of the study file and of the admin's page, one by one. Expected values are worked out by hand, or are properties."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from starlette.testclient import TestClient

import study as s
from limner.cli import main
from limner.feedback import progress, server
from limner.feedback.answers import Given
from limner.feedback.database import Item, Slot
from limner.feedback.items import make_items
from limner.feedback.rater_pages import shown_order
from limner.feedback.simulate import Truth, recovery
from limner.records import Score, to_table
from limner.store import open_step

IDS = [f"{n:03d}" for n in range(12)]  # digits alone: no table may take them for numbers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    s.image_folder(tmp_path / "images", dict.fromkeys(IDS, "a red cat"))
    return tmp_path


def keys(folder: Path, **values: Any) -> list[str]:
    return [i.key for i in make_items(s.study_of(folder, values))[0]]


def test_a_random_order_is_a_permutation_that_the_seed_decides(folder: Path) -> None:
    assert keys(folder, order="given") == IDS
    one, again, other = (keys(folder, order="random", seed=seed) for seed in (1, 1, 2))
    assert one == again and sorted(one) == sorted(other) == IDS
    assert one != other and IDS not in (one, other)
    study = s.study_of(folder, {"order": "random", "seed": 1, "overlap": 2})
    database = server.prepare(study)
    for name in ("anna", "ben"):  # the same order for all: items are finished one after the other
        rater = s.sign_in(s.client(study, database), study, database, name)
        for n, key in enumerate(one[:3]):
            item = rater.get("/api/task").json()["item"]["id"]
            assert item == n + 1
            assert rater.get(f"/images/{_token(database, key)}").status_code == 200
            assert s.answer(rater, s.rich(), f"order-{name}-{n}", item).status_code == 200


def _token(database: Any, key: str) -> str:
    from sqlalchemy import select

    from limner.feedback.database import reading

    with reading(database) as session:
        return json.loads(session.execute(select(Item.pictures).where(Item.key == key)).scalar_one())[0]


def table_of(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    """A table of image_id and score as a file, or as a folder of scores."""
    path = folder / f"table.{kind}"
    if kind == "csv":
        lines = [f"{r['image_id']},{'' if r['score'] is None else r['score']}\n" for r in rows]
        path.write_text("image_id,score\n" + "".join(lines))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        step = open_step(path, "scores", {}, {})
        step.write(0, to_table(Score, [Score(prompt_id="p", scorer="score", **r) for r in rows]))
        step.finish({})
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "scores"])
def test_every_kind_of_table_balances_alike(folder: Path, kind: str) -> None:
    """12 images: one has no score, one no row; ten scores 0 to 9 in two bins of five. Of any even beginning half is of each bin."""
    rows: list[dict[str, Any]] = [{"image_id": name, "score": float(n)} for n, name in enumerate(IDS[:10])]
    rows.append({"image_id": IDS[10], "score": None})
    images = {"from": str(folder / "images"), "table": table_of(folder, kind, rows), "balance": ["score"], "bins": 2}
    found, dropped = make_items(s.study_of(folder, {"images": images}))
    assert dropped == {"not in images.table": 1, "no value in images.table": 1}
    high = [int(i.key) >= 5 for i in found]
    assert sorted(i.key for i in found) == IDS[:10] and [sum(high[: 2 * n]) for n in range(6)] == list(range(6))


@pytest.mark.parametrize("line", ["{", "[1, 2]", "3"])
def test_a_damaged_table_names_its_line(folder: Path, line: str) -> None:
    path = folder / "table.jsonl"
    path.write_text('{"image_id": "000", "score": 1}\n' + line + "\n")
    images = {"from": str(folder / "images"), "table": str(path), "balance": ["score"]}
    with pytest.raises(ValueError, match=r"images.table: .*table.jsonl: line 2: expected an object"):
        make_items(s.study_of(folder, {"images": images}))


@pytest.mark.parametrize(("images", "overlap"), [(2, 1), (2, 2), (2, 5), (3, 3), (4, 6)])
def test_every_image_stands_everywhere_equally_often(images: int, overlap: int) -> None:
    """Of an item, over its raters: to within one. Over 400 items also of each slot alone, which is drawn: to within four deviations."""
    names = [str(i) for i in range(images)]
    seen = np.zeros((400, overlap, images, images))  # item, slot, place, image
    for n in range(400):
        item = Item(key=f"i{n}", position=n, text="", pictures="[]")
        for number in range(overlap):
            slot = Slot(item_id=1, number=number, position=n)
            order = shown_order(names, item, slot, seed=3)
            assert order == shown_order(names, item, slot, seed=3) and sorted(order) == names
            seen[n, number, np.arange(images), [int(i) for i in order]] = 1
    of_item = seen.sum(axis=1)
    assert (of_item.max(axis=(1, 2)) - of_item.min(axis=(1, 2)) <= 1).all()
    if overlap % images == 0:
        assert (of_item == overlap / images).all()
    share = 1 / images
    assert (abs(seen.mean(axis=0) - share) < 4 * np.sqrt(share * (1 - share) / 400)).all()


def test_a_rater_who_is_too_fast_waits_alone(folder: Path) -> None:
    """0.2 a second, bursts of ten times that: two requests. The third says how long to wait, on pages too; others go on."""
    study = s.study_of(folder, {"server": {"requests_per_second": 0.2, "attempts_per_minute": 3}})
    database = server.prepare(study)
    fast = s.sign_in(s.client(study, database), study, database, "fast")
    slow = s.sign_in(TestClient(fast.app, base_url=s.ORIGIN, follow_redirects=False), study, database, "slow")
    found = [fast.get("/api/task") for _ in range(3)]
    assert [r.status_code for r in found] == [200, 200, 429]
    assert found[2].headers["retry-after"] == "2" and found[2].json() == {"error": "Too many requests. Wait a moment."}
    page = fast.get("/mine")
    assert page.status_code == 429 and page.headers["retry-after"] == "2" and "Too many requests" in page.text
    item = found[0].json()["item"]["id"]
    assert s.answer(fast, s.rich(), "too-fast-1", item).status_code == 429  # nothing slips through
    assert progress.overview(database)["done"] == 0
    assert slow.get("/api/task").status_code == 200
    tried = [slow.post("/login", data={"name": "fast", "password": "not this one"}) for _ in range(2)]  # two of three went for joining
    assert [r.status_code for r in tried] == [401, 429] and tried[1].headers["retry-after"] == "60"


def test_a_public_start_lets_its_admin_in_by_the_password(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything as by the command but the loop that listens: in its place the admin signs in to the app that would be served."""
    s.study_of(folder, {"raters": ["anna"], "server": {"public": True, "host": "0.0.0.0", "port": 0}})
    codes = list[int]()

    def run(self: uvicorn.Server, sockets: list[Any]) -> None:
        assert sockets[0].getsockname()[0] == "0.0.0.0"
        sockets[0].close()
        browser = TestClient(self.config.app, base_url=s.ORIGIN, follow_redirects=False)  # type: ignore[arg-type]
        for password in ("not the right one", "right and long enough"):
            codes.append(browser.post("/login", data={"name": "admin", "password": password}).status_code)
        codes.append(browser.get("/admin").status_code)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setenv("LIMNER_ADMIN_PASSWORD", "right and long enough")
    main(["annotate", "serve", str(folder / "study.yaml")])
    assert codes == [401, 303, 200]
    printed = capsys.readouterr().out
    assert f"anna, once: http://{socket.gethostname()}:" in printed and "admin, once" not in printed and "right and long" not in printed


def test_another_computer_goes_on_at_the_first_unfinished_item(folder: Path) -> None:
    study = s.study_of(folder, {"overlap": 1})
    database = server.prepare(study)
    here = s.client(study, database)
    assert here.post(server.invitation(study, database, "anna", "rater", ""), data={"password": "long enough it is"}).status_code == 303
    here.headers["x-csrf-token"] = s.token_in(here.get("/mine").text)
    assert s.answer(here, s.rich(), "here-0001").status_code == 200
    draft = {"ratings": {"overall": 2}}
    second = here.get("/api/task").json()["item"]["id"]
    assert here.post("/api/draft", json={"item": second, "version": 0, "payload": draft}).json() == {"version": 1}
    other = s.sign_in(s.client(study, database), study, database, "ben")
    assert other.get("/api/task").json()["item"]["id"] == second + 1
    there = s.client(study, database)
    assert there.post("/login", data={"name": "anna", "password": "long enough it is"}).status_code == 303
    found = there.get("/api/task").json()
    assert (found["item"]["id"], found["draft"], found["version"], found["progress"]["mine"]) == (second, draft, 1, 1)


def given(item: int, rater: str, created: float = 0.0, gold: bool = False, final: bool = False, **found: Any) -> Given:
    return Given(item, f"i{item}", f"text {item}", rater, found, 1.0, created, gold, None, final, (f"t{item}",))


def side(item: int, rater: str, value: int, **more: Any) -> Given:
    return given(item, rater, side={"against": "x", "answer": value}, **more)


def choice(item: int, rater: str, ranks: list[int], **more: Any) -> Given:
    return given(item, rater, choice={"images": list("abc"[: len(ranks)]), "ranks": ranks}, **more)


def test_the_curve_of_agreement_by_hand() -> None:
    """Two raters: 1 and 1, 5 and 4, 2 and 4. Of the first four answers alpha is 1 - (2/4) / (102/12) = 16/17, of all six
    1 - (10/6) / (178/30) = 64/89; the fifth has no partner. Before the second item all values are equal: no alpha.
    What is gold or settled does not count. The same for sides, which are ratings turned round: 3 - s."""
    said = [(1, 1), (5, 4), (2, 4)]
    extra = [given(9, "a", 0.1, gold=True, ratings={"overall": 1}), given(0, "boss", 0.2, final=True, ratings={"overall": 5})]
    ratings = [given(n, r, 1 + n + k / 2, ratings={"overall": v[k]}) for n, v in enumerate(said) for k, r in enumerate("ab")]
    sides = [side(n, r, 3 - v[k], created=1 + n + k / 2) for n, v in enumerate(said) for k, r in enumerate("ab")]
    for name, answers in (("overall", [*ratings[::-1], *extra]), ("side", sides)):
        curve = progress.agreement_curve(answers)
        assert list(curve) == [name] and [n for n, _ in curve[name]] == [4, 5, 6]
        assert [alpha for _, alpha in curve[name]] == pytest.approx([16 / 17, 16 / 17, 64 / 89])
    assert progress.agreement_curve([]) == {}


def test_agreement_with_others_by_hand() -> None:
    """Ratings: one of two questions within a step (1/2), and of four words one marked differently (3/4): (1 + 0 + 3/4) / 3 = 7/12
    with b; with c all alike. Items that nobody else answered, and words that another did not see, do not count."""
    words = {"tokens": list("abcd"), "misaligned": [0, 1]}
    answers = [
        given(0, "a", ratings={"overall": 2, "alignment": 5}, words=words),
        given(0, "b", ratings={"overall": 3, "alignment": 3}, words={**words, "misaligned": [1]}),
        given(0, "c", ratings={"overall": 1}),
        given(1, "a", ratings={"overall": 1}),
    ]
    assert progress.agreement_with_others(answers, "a") == pytest.approx((7 / 12 + 1) / 2)
    assert progress.agreement_with_others(answers[3:], "a") is None
    # same side, same size of it or not; "same" is no side
    assert progress.agreement_with_others([side(0, "a", 2), side(0, "b", 1), side(0, "c", 0), side(0, "d", -1)], "a") == pytest.approx(
        1 / 3
    )
    # the best: alike, not, and among two that share the first place
    picks = [choice(0, "a", [1, 2, 2]), choice(0, "b", [1, 3, 2]), choice(0, "c", [2, 1, 2]), choice(0, "d", [1, 1, 3])]
    assert progress.agreement_with_others(picks, "a") == pytest.approx(2 / 3)


def test_disagreement_of_choices_and_sides_by_hand() -> None:
    """Sides: range over 4. Choices: share of pairs of raters with another best. Worst first; gold is told apart by its answer, but
    what is settled, or has one answer, is not to be settled."""
    sides = [side(n, r, v) for n, values in enumerate([(2, 1, 1), (2, -1, 0), (-2, 2, 0), (0, 0, 0)]) for r, v in zip("abc", values)]
    settled = [side(4, "a", 2), side(4, "b", -2), side(4, "boss", 0, final=True)]
    alone, gold = [side(5, "a", 2)], [side(6, "a", 2, gold=True), side(6, "b", -2, gold=True)]
    found = progress.disagreements([*sides, *settled, *alone, *gold])
    assert [(row["id"], row["much"], row["raters"]) for row in found] == [(2, 1.0, 3), (1, 0.75, 3), (0, 0.25, 3), (3, 0.0, 3)]
    assert [row["id"] for row in progress.disagreements(sides, limit=2)] == [2, 1]
    first, second, both, third = [1, 2, 2], [2, 1, 2], [1, 1, 3], [2, 2, 1]
    picks = [(first, first, first), (first, first, second), (first, second, third), (first, both, second)]
    choices = [choice(n, r, ranks) for n, group in enumerate(picks) for r, ranks in zip("abc", group)]
    assert [(row["id"], row["much"]) for row in progress.disagreements(choices)] == [
        (2, 1.0), (1, pytest.approx(2 / 3)), (3, pytest.approx(1 / 3)), (0, 0.0),
    ]  # fmt: skip


def test_agreement_below_chance_is_drawn_below_zero(folder: Path) -> None:
    """On a chart 120 high: from 0, 0.5 is in the middle; from -1, 0 is. Raters who say the opposite are seen to."""
    assert progress.polyline([(2, 0.5), (3, 1), (4, 0)], 480, 120) == "0.0,60.0 240.0,0.0 480.0,120.0"
    assert progress.polyline([(2, 0.0), (4, -0.5), (6, -3)], 480, 120, -1) == "0.0,60.0 240.0,90.0 480.0,120.0"
    assert progress.chart_bottom({"a": [(2, 0.0)], "b": []}) == 0 and progress.chart_bottom({"a": [(2, 0.3)], "b": [(2, -0.1)]}) == -1
    study = s.study_of(folder, {"overlap": 2, "server": {"requests_per_second": 1000}})
    database = server.prepare(study)
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    for turn, (one, other) in enumerate([(1, 5), (5, 1)]):
        for name, rating in (("a", one), ("b", other)):
            rater = s.sign_in(s.client(study, database), study, database, name)
            assert s.answer(rater, s.rich(rating=rating), f"below-{name}-{turn}").status_code == 200
    page = boss.get("/admin").text  # alpha of 1, 5 and 5, 1 is 1 - 16 / (128 / 12) = -0.5: at 90 of 120
    assert '<text x="-6" y="124" text-anchor="end">-1</text>' in page and ',90.0" class="curve' in page and 'y1="60.0"' in page


def test_recovery_is_of_what_consolidate_makes() -> None:
    """Of four words the second is wrong. Each of three raters finds it or not and marks another one; most find it, none of the others
    is marked twice. Means of the ratings follow the truth, a single rater's do not."""
    nothing = np.zeros((8, 8), dtype=bool)
    truths = [
        Truth(artifact=nothing, misalignment=nothing, words=(1,), qualities=dict.fromkeys(progress.QUESTIONS, q)) for q in (0.0, 0.5, 1.0)
    ]

    def said(marked: list[int], rating: int) -> dict[str, Any]:
        return {
            "points": {"artifact": [], "misalignment": []}, "words": {"tokens": list("abcd"), "misaligned": marked},
            "ratings": dict.fromkeys(progress.QUESTIONS, rating),
        }  # fmt: skip

    truths[0] = Truth(artifact=~nothing, misalignment=nothing, words=(1,), qualities=truths[0].qualities)
    answers = [said(m, r) for ratings in ((1, 1, 1), (4, 1, 4), (5, 5, 5)) for m, r in zip(([0, 1], [1, 2], [3]), ratings)]
    together = recovery(answers, truths, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    assert together["words"] == 1.0 and together["ratings"] == pytest.approx(1.0)
    alone = recovery(answers, truths, [[0], [3], [6]])
    assert alone["words"] == pytest.approx(2 / 3) and alone["ratings"] < 1
