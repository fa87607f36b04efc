"""The page in a real browser: whole items by mouse, by keys alone and by touch; what is stored and exported is what was done.

LIMNER_SCREENSHOTS=docs/annotate python -m pytest tests/test_annotate_browser.py     makes the pictures in docs/ again
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright", reason="needs playwright (pip install playwright)")
pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from playwright.sync_api import Browser, Page, expect
from sqlalchemy import select

import browser as b
import study as s
from limner.feedback import answers, exports, progress, server
from limner.feedback.database import Draft, reading
from limner.feedback.exchange import read_rows

expect.set_options(timeout=30_000)  # a machine may be busy
pytestmark = pytest.mark.skipif(not b.CHROMIUM, reason=b.WHY_NOT)
nothing_wrong = b.nothing_wrong
PROMPT = "a woman kneeling in a park, wearing a red shirt"  # a0 woman1 kneeling2 in3 a4 park5 wearing6 a7 red8 shirt9


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with b.started() as browser:
        yield browser


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, str]]:
    folder = tmp_path_factory.mktemp("rich")
    names = [f"i{n}" for n in range(6)]
    s.image_folder(folder / "images", dict.fromkeys(names, PROMPT), {n: b.picture(i) for i, n in enumerate(names)})
    study = s.study_of(folder, {"name": "Figures in the park", "overlap": 2})
    database = server.prepare(study)
    with server.serving(study, database) as address:
        yield study, database, address


def test_a_rich_item_by_mouse(chromium: Browser, rich: Any, tmp_path: Path) -> None:
    study, database, address = rich
    page = b.visit(chromium, f"{address}/login")
    b.shoot(page, "login")
    b.shoot(page, "login", phone=True)
    page.goto(server.invitation(study, database, "mouse", "rater", address))
    b.shoot(page, "join")
    b.shoot(page, "join", phone=True)
    page.fill("input[name=password]", "a long password")
    page.click("text=Begin")
    page.wait_for_selector("#stage")
    b.shoot(page, "tour")
    b.shoot(page, "tour", phone=True)
    for _ in range(5):
        page.click("#tournext")
    expect(page.locator("#tour")).to_be_hidden()
    layer = page.locator("#stage svg")
    box = layer.bounding_box()
    assert box

    def at(x: float, y: float) -> dict[str, float]:
        return {"x": x * box["width"], "y": y * box["height"]}

    layer.click(position=at(0.5, 0.4))
    layer.click(position=at(0.25, 0.75))
    layer.click(position=at(0.6, 0.7), button="right")
    assert page.locator("circle.artifact").count() == 2 and page.locator("circle.misalignment").count() == 1
    page.click("#undo")
    assert page.locator("circle.misalignment").count() == 0
    page.click("#redo")
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    page.locator("#prompt button", has_text="kneeling").click()
    page.locator("#prompt button", has_text="red").click()
    page.locator("#prompt button", has_text="red").click()  # taken back
    expect(page.locator("#saved")).to_have_text("Saved")
    page.reload()  # in mid-draft
    expect(page.locator("circle.artifact")).to_have_count(2)
    expect(page.locator("#prompt button[aria-pressed=true]")).to_have_text("kneeling")
    page.click("#submit")
    expect(page.locator("#problem")).to_contain_text("Not rated yet: plausibility, alignment, aesthetics, overall")
    for question, value in (("plausibility", 2), ("alignment", 3), ("aesthetics", 4), ("overall", 1)):
        page.locator(f"input[name={question}][value='{value}']").check()
    b.shoot(page, "rich")
    b.shoot(page, "rich", phone=True)
    page.click("[data-action=guide]")
    b.shoot(page, "guidelines")
    b.shoot(page, "guidelines", phone=True)
    page.keyboard.press("Escape")
    page.click("[data-action=keys]")
    assert page.evaluate("(e => e.scrollHeight <= e.clientHeight)(document.getElementById('keys'))")  # all keys at a glance
    b.shoot(page, "keys")
    page.keyboard.press("Escape")
    page.click("#submit")
    expect(page.locator("#saved")).to_have_text("Submitted")
    ((answer, payload),) = b.stored(database)
    points = payload["points"]
    assert np.array(points["artifact"]) == pytest.approx(np.array([[0.5, 0.4], [0.4, 0.5]]), abs=0.01)
    assert np.array(points["misalignment"]) == pytest.approx(np.array([[0.6, 0.7]]), abs=0.01)
    assert payload["words"] == {"misaligned": [2]} and payload["nothing"] == {"image": False, "prompt": False}
    assert payload["ratings"] == {"plausibility": 2, "alignment": 3, "aesthetics": 4, "overall": 1}
    assert [e[1].split()[0] for e in payload["events"]][:4] == ["artifact", "artifact", "misalignment", "undo"]
    assert [e[0] for e in payload["events"]] == sorted(e[0] for e in payload["events"]) and answer.seconds > 0
    exports.write(study, database, tmp_path / "feedback.jsonl")
    rows = {r.kind: json.loads(r.payload) for r in read_rows(tmp_path / "feedback.jsonl")}
    assert rows["points"]["artifact"] == points["artifact"] and rows["words"]["misaligned"] == [2] and rows["ratings"]["overall"] == 1
    page.click("text=My answers")
    b.shoot(page, "mine")
    b.shoot(page, "mine", phone=True)
    page.click("a.tile")
    page.locator("input[name=overall][value='5']").check()
    page.click("#submit")
    page.wait_for_url("**/mine")
    assert [(a.revision, p["ratings"]["overall"]) for a, p in b.stored(database)] == [(1, 1), (2, 5)]
    page.context.close()


def to(page: Page, selector: str) -> None:
    """Press Tab until what is wanted has the focus."""
    for _ in range(60):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab does not come to {selector}")


def test_a_rich_item_by_keys_alone(chromium: Browser, rich: Any) -> None:
    """Nothing but page.keyboard acts on the page, from the invitation on."""
    study, database, address = rich
    page = b.visit(chromium, server.invitation(study, database, "keys", "rater", address))
    key = page.keyboard.press
    to(page, "input[name=password]")
    page.keyboard.type("a long password")
    to(page, "button.primary")
    key("Enter")
    page.wait_for_selector("#tour:not([hidden])")
    for n in range(5):
        expect(page.locator("#tournext")).to_be_focused()
        expect(page.locator("#tournext")).to_have_text("Begin" if n == 4 else "Next")
        key("Enter")
    expect(page.locator("#tour")).to_be_hidden()
    expect(page.locator("#main")).to_be_focused()
    for _ in range(4):
        key("Shift+ArrowUp")  # from the middle: y 0.5 - 4 * 0.05
    key("a")
    key("ArrowRight")
    key("ArrowRight")
    key("m")
    key("m")  # a second on the same spot
    key("Delete")  # none is selected: the last goes
    key("n")  # selects the artifact point ...
    key("ArrowLeft")  # ... and moves it
    key("Escape")
    key("w")
    key("ArrowRight")
    key("ArrowRight")
    key("Space")  # kneeling
    key("ArrowRight")
    key("Space")  # in
    key("z")  # not in, after all
    for value in "4235":
        key(value)
    expect(page.locator("#saved")).to_have_text("Saved")
    key("z")
    key("y")  # the last rating away, and back
    key("Control+Enter")
    expect(page.locator("#saved")).to_have_text("Submitted")
    answer, payload = b.stored(database)[-1]
    assert payload["points"] == {"artifact": [[0.49, 0.3]], "misalignment": [[0.52, 0.3]]}
    assert payload["words"] == {"misaligned": [2]}
    assert payload["ratings"] == {"plausibility": 4, "alignment": 2, "aesthetics": 3, "overall": 5}
    # The next: nothing is wrong. One key is bound anew first.
    key("k")
    to(page, "[data-key=nothing-image]")
    key("Enter")
    key("f")
    expect(page.locator("[data-key=nothing-image]")).to_have_text("F")
    expect(page.locator("[data-key=nothing-image]")).to_be_focused()
    key("Escape")
    key("f")
    key("c")
    for value in "5555":
        key(value)
    key("s")
    to(page, "input[name=other]")
    page.keyboard.type("on second thoughts")
    key("Enter")
    expect(page.locator("#saved")).to_have_text("Submitted")
    skipped = b.stored(database)[-1][0]
    assert skipped.skipped == "on second thoughts" and skipped.rater_id == answer.rater_id
    page.context.close()


def test_by_touch_on_a_phone(chromium: Browser, rich: Any) -> None:
    study, database, address = rich
    page = b.begin(chromium, address, study, database, "phone", has_touch=True, is_mobile=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_selector("#stage")
    page.tap("#tourskip")
    layer = page.locator("#stage svg")
    box = layer.bounding_box()
    assert box and page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    layer.tap(position={"x": box["width"] * 0.5, "y": box["height"] * 0.25})
    page.tap(".segmented .ink-misalignment")
    layer.tap(position={"x": box["width"] * 0.25, "y": box["height"] * 0.5})
    expect(page.locator("circle.misalignment")).to_have_count(1)
    for question in study.questions:
        page.locator(f"label:has(input[name={question}][value='3'])").tap()
    page.tap("#submit")
    expect(page.locator("#saved")).to_have_text("Submitted")
    payload = b.stored(database)[-1][1]
    assert payload["points"]["artifact"][0] == pytest.approx([0.5, 0.25], abs=0.01)
    assert payload["points"]["misalignment"][0] == pytest.approx([0.25, 0.5], abs=0.01)
    page.context.close()


def test_signed_out_in_mid_draft_loses_nothing(chromium: Browser, rich: Any) -> None:
    study, database, address = rich
    page = b.begin(chromium, address, study, database, "expired")
    page.click("#tourskip")
    page.context.clear_cookies()
    page.keyboard.press("a")
    expect(page.locator("#saved")).to_have_text("Signed out")
    with reading(database) as session:
        assert session.execute(select(Draft).where(Draft.payload.contains("0.5"))).first() is None
    page.goto(server.invitation(study, database, "expired", "rater", address))
    page.click("text=Begin")
    expect(page.locator("circle.artifact")).to_have_count(1)  # from this browser
    expect(page.locator("#saved")).to_have_text("Saved")
    page.context.close()


def test_the_admin_sees_it(chromium: Browser, rich: Any) -> None:
    study, database, address = rich
    for name in ("fay", "gus"):
        rater = s.sign_in(s.client(study, database), study, database, name)
        for n in range(6):
            if rater.get("/api/task").json()["item"]:
                s.answer(rater, s.rich([[0.5, 0.4 + n / 50]], [2], 2 + (n + len(name)) % 3), f"fill-{name}-{n}", seconds=20 + n)
    page = b.begin(chromium, address, study, database, "boss", "admin")
    expect(page.locator("h1")).to_have_text("Overview")
    ends = "c => [...c.querySelectorAll('text, polyline')].map(e => [e.tagName, e.getBBox().x, e.getBBox().x + e.getBBox().width])"
    drawn = page.locator(".chart").nth(1).evaluate(ends)
    curves, labels = [d for d in drawn if d[0] == "polyline"], [d for d in drawn if d[0] == "text"][:2]
    assert curves and max(label[2] for label in labels) < min(curve[1] for curve in curves)  # beside them, not under
    b.shoot(page, "admin", whole=True)
    b.shoot(page, "admin", phone=True)
    page.fill("input[name=name]", "new one")
    page.click("text=New invitation")
    assert "/join/" in page.locator(".link-out").inner_text()
    page.click("text=Gallery")
    assert page.locator("circle.artifact").count() > 4
    b.shoot(page, "gallery")
    b.shoot(page, "gallery", phone=True)
    page.click("a.tile >> nth=0")
    b.shoot(page, "item")
    b.shoot(page, "item", phone=True)
    page.click("text=Settle it")
    page.wait_for_selector("#stage")
    for key in ("x", "c", "3", "3", "3", "3", "Control+Enter"):
        page.keyboard.press(key)
    page.wait_for_url("**/admin/items/*")
    assert [g.final for g in answers.given(study, database)].count(True) == 1
    page.context.close()


@pytest.fixture
def compared(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, str]]:
    """Images of prompts as tables: a step's folder of three a prompt for choice, two folders for side by side."""
    from limner.records import Image as Row
    from limner.records import to_table
    from limner.store import open_step

    def step(name: str, count: int, start: int) -> str:
        rows = [
            Row(id=f"{name}{p}-{k}", prompt_id=f"p{p}", text=PROMPT, image=b.picture(start + p * count + k), k=k)
            for p in range(3)
            for k in range(count)
        ]
        folder = open_step(tmp_path / name, "pool", {}, {})
        folder.write(0, to_table(Row, rows))
        folder.finish({})
        return str(tmp_path / name)

    values = dict(request.param)
    if values["task"] == "side":
        values["images"] = {"from": step("ours", 1, 0), "against": step("base", 1, 9)}
    else:
        values["images"] = {"from": step("pool", 4, 0)}
    study = s.study_of(tmp_path, {"name": "Figures in the park", "overlap": 2, **values})
    database = server.prepare(study)
    with server.serving(study, database) as address:
        yield study, database, address


@pytest.mark.parametrize("compared", [{"task": "choice", "answer": "ranking"}], indirect=True)
def test_a_ranking(chromium: Browser, compared: Any) -> None:
    study, database, address = compared
    page = b.begin(chromium, address, study, database, "anna")
    page.click("#tourskip")
    shown = [i["src"].rsplit("/", 1)[1] for i in page.locator(".option img").evaluate_all("all => all.map(i => ({src: i.src}))")]
    page.locator(".option >> nth=2").click()
    page.click("#submit")
    expect(page.locator("#problem")).to_have_text("Give every image a rank.")
    page.keyboard.press("1")
    page.keyboard.press("t")  # the next shares the rank
    page.keyboard.press("4")
    page.keyboard.press("2")
    page.keyboard.press("z")
    page.locator(".option >> nth=1").click()
    widths = []
    for key in ("0", "+", "+", "-", "0"):
        page.keyboard.press(key)
        widths.append(round(page.locator(".option").first.evaluate("e => e.getBoundingClientRect().width")))
    assert widths[0] < widths[1] < widths[2] and widths[3:] == [widths[1], widths[0]]
    b.shoot(page, "choice")
    b.shoot(page, "choice", phone=True)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#saved")).to_have_text("Submitted")
    payload = b.stored(database)[0][1]
    assert payload["images"] == shown and payload["ranks"] == [2, 3, 1, 2]
    (given,) = answers.given(study, database)
    choice = given.found["choice"]
    assert sorted(zip(choice["images"], choice["ranks"])) == sorted(zip(choice["shown"], [2, 3, 1, 2]))
    assert choice["images"] == ["pool0-0", "pool0-1", "pool0-2", "pool0-3"]
    page.context.close()


@pytest.mark.parametrize("compared", [{"task": "side"}], indirect=True)
def test_side_by_side(chromium: Browser, compared: Any) -> None:
    study, database, address = compared
    sides = []
    for name in ("anna", "bert"):
        page = b.begin(chromium, address, study, database, name)
        page.click("#tourskip")
        page.locator("button", has_text="A is better").click()
        page.locator("button", has_text="B is much better").click()
        if name == "anna":
            b.shoot(page, "side")
            b.shoot(page, "side", phone=True)
        page.keyboard.press("z")  # back to A
        expect(page.locator("#saved")).to_have_text("Saved")
        page.reload()
        expect(page.locator(".option.chosen .tag")).to_have_text("A")
        page.keyboard.press("5")
        page.click("#submit")
        expect(page.locator("#saved")).to_have_text("Submitted")
        side = answers.given(study, database)[-1].found["side"]
        sides.append(side["left"])
        assert side["against"] == "base0-0" and side["answer"] == (-2 if side["left"] == "ours0-0" else 2)  # the right one is much better
        page.context.close()
    assert sorted(sides) == ["base0-0", "ours0-0"]  # each stood on the left once
    assert progress.overview(database)["done"] == 2
