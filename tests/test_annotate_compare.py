"""Choices and sides through the server: who stands where, what is refused, known answers. Expected values are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from sqlalchemy import select
from starlette.testclient import TestClient

import study as s
from limner.feedback import answers, exports, server
from limner.feedback.checks import gold_score
from limner.feedback.database import Database, Picture, reading
from limner.feedback.study import Study
from limner.records import Image, Score, to_table
from limner.store import open_step, read_rows


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


def choice_study(folder: Path, items: int, **values: Any) -> tuple[Study, Database]:
    folder.mkdir(parents=True, exist_ok=True)
    images = {"from": step_of(folder / "pool", items, 3), "each": 3}
    study = s.study_of(folder, {"task": "choice", "overlap": 1, "images": images, **values})
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


def test_forced_sides(tmp_path: Path) -> None:
    """No answer in between is taken; 2 means that the right one is better, whichever that is."""
    study, database = side_study(tmp_path, 2, levels="forced")
    rater = s.sign_in(s.client(study, database), study, database, "a")
    for n, value in enumerate((2, -2)):
        tokens = shown(rater, database)
        (left, right), names = tokens.values(), list(tokens)
        for bad in (-1, 0, 1):
            refused = s.answer(rater, {"left": left, "right": right, "value": bad}, f"forced-{n}-{bad}0000")
            assert refused.status_code == 400 and refused.json()["error"] == "Choose one of the two."
        for bad in (3, None, True, 1.5):
            assert "how the two compare" in s.answer(rater, {"left": left, "right": right, "value": bad}, "forced-bad").json()["error"]
        swapped = s.answer(rater, {"left": left, "right": left, "value": 2}, "forced-same")
        assert swapped.status_code == 400 and swapped.json()["error"] == "These are not the images of this item."
        assert s.answer(rater, {"left": left, "right": right, "value": value}, f"forced-{n}-good").status_code == 200
        side = answers.given(study, database)[-1].found["side"]
        ours_won = names[1 if value > 0 else 0].startswith("ours")
        assert side == {"against": f"base{n}-0", "answer": 2 if ours_won else -2, "left": names[0]}
    report = exports.consolidate_study(study, database)["side"]
    assert {level: round(v["value"], 3) for level, v in report["levels"].items() if v["value"]}.keys() <= {"much better", "much worse"}


def test_the_best_of_three(tmp_path: Path) -> None:
    study, database = choice_study(tmp_path, 2, answer="best")
    rater = s.sign_in(s.client(study, database), study, database, "a")
    tokens = shown(rater, database)
    for n, (ranks, message) in enumerate(
        [
            ([2, 2, 2], "One image at least has rank 1."),
            ([1, 2, 3], "expected 1 for the best and 2 for the rest"),
            ([1, 2, None], "Choose the best image."),
            ([1, 2], "Choose the best image."),
            ([0, 1, 2], "expected 1 for the best and 2 for the rest"),
        ]
    ):
        refused = s.answer(rater, {"images": list(tokens.values()), "ranks": ranks}, f"best-refused-{n}")
        assert refused.status_code == 400 and message in refused.json()["error"], ranks
    assert s.answer(rater, {"images": list(tokens.values()), "ranks": [2, 1, 2]}, "best-of-three").status_code == 200
    second = shown(rater, database)
    assert s.answer(rater, {"images": list(second.values()), "ranks": [1, 1, 2]}, "best-two-alike").status_code == 200
    one, two = (g.found["choice"] for g in answers.given(study, database))
    assert one["images"] == ["pool0-0", "pool0-1", "pool0-2"] and one["shown"] == list(tokens)
    assert dict(zip(one["images"], one["ranks"])) == dict(zip(tokens, [2, 1, 2]))
    assert dict(zip(two["images"], two["ranks"])) == dict(zip(second, [1, 1, 2]))
    assert exports.consolidate_study(study, database)["preferences"] == 6
    found = {x.image_id: x.score for x in read_rows(Path(study.output_dir) / "preferences/scores", Score)}
    expected = dict(zip(tokens, [0.25, 1, 0.25])) | dict(zip(second, [0.75, 0.75, 0]))  # a tie is half of one of two others
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("best", "ranks", "score"),
    [
        (["b"], [2, 1, 2], 1),
        (["b"], [1, 2, 2], 0),
        (["b"], [1, 1, 2], 0),  # everything that is not the best tied with it is no answer
        (["a", "b"], [1, 1, 2], 1),
        (["a", "b"], [2, 1, 3], 1),
        (["a", "b"], [2, 3, 1], 0),
        (["a", "b"], [1, 1, 1], 0),
    ],
)
def test_gold_of_choices(best: list[str], ranks: list[int], score: float) -> None:
    assert gold_score({"best": best}, {"choice": {"images": ["a", "b", "c"], "ranks": ranks}}) == score


@pytest.mark.parametrize(("known", "said", "score"), [(2, 1, 1), (1, 2, 1), (-1, -2, 1), (0, 0, 1), (1, -1, 0), (1, 0, 0), (0, 2, 0)])
def test_gold_of_sides(known: int, said: int, score: float) -> None:
    assert gold_score({"answer": known}, {"side": {"against": "b", "answer": said}}) == score


def test_gold_sides_and_choices_are_told(tmp_path: Path) -> None:
    """The known answer is about the image from `images.from`, wherever it stands."""
    (tmp_path / "sides.jsonl").write_text(json.dumps({"image_id": "ours1-0", "answer": {"answer": -1}, "message": "The base."}) + "\n")
    study, database = side_study(tmp_path / "s", 2, gold={"from": str(tmp_path / "sides.jsonl"), "every": 1})
    for name, favourite, score in (("a", "base", 1.0), ("b", "ours", 0.0)):
        rater, told = s.sign_in(s.client(study, database), study, database, name), []
        for n in range(2):
            tokens = shown(rater, database)
            value = 2 if list(tokens)[1].startswith(favourite) else -2
            left, right = tokens.values()
            told.append(s.answer(rater, {"left": left, "right": right, "value": value}, f"gold-side-{name}-{n}").json().get("gold"))
        assert told == [None, {"correct": score, "message": "The base."}]
    (tmp_path / "choices.jsonl").write_text(json.dumps({"image_id": "pool1-0", "answer": {"best": ["pool1-2"]}}) + "\n")
    study, database = choice_study(tmp_path / "c", 2, gold={"from": str(tmp_path / "choices.jsonl"), "every": 1})
    rater, told = s.sign_in(s.client(study, database), study, database, "a"), []
    for n in range(2):
        tokens = shown(rater, database)
        ranks = [1 if name.endswith("-2") else 2 for name in tokens]
        told.append(s.answer(rater, {"images": list(tokens.values()), "ranks": ranks}, f"gold-choice-{n}").json().get("gold"))
    assert told == [None, {"correct": 1.0, "message": ""}]
