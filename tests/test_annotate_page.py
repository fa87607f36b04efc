"""The page in detail: what undo takes back, the tour by keys, a finger on a point, what an overlay shows, contrast, names, zoom."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs playwright (pip install playwright)")
pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from PIL import Image
from playwright.sync_api import Browser, Error, Page, expect

import browser as b
import study as s
from limner.feedback import server

expect.set_options(timeout=30_000)  # a machine may be busy
pytestmark = pytest.mark.skipif(not b.CHROMIUM, reason=b.WHY_NOT)
nothing_wrong = b.nothing_wrong


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with b.started() as browser:
        yield browser


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, str]]:
    """A study of rich items whose images are one colour."""
    folder = tmp_path_factory.mktemp("plain")
    names = [f"i{n}" for n in range(3)]
    s.image_folder(folder / "images", dict.fromkeys(names, "a red ball"), dict.fromkeys(names, s.png((200, 200, 200), (240, 240))))
    study = s.study_of(folder, {"name": "Balls", "overlap": 9})
    database = server.prepare(study)
    with server.serving(study, database) as address:
        yield study, database, address


def places(page: Page) -> list[list[float]]:
    """The points of the page, as fractions of the image."""
    found = page.locator("#stage circle").evaluate_all("all => all.map(c => ['cx', 'cy'].map(k => c.getAttribute(k) / 240))")
    return [[round(x, 4), round(y, 4)] for x, y in found]


def test_undo_takes_back_one_movement_of_one_point(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "undo")
    page.click("#tourskip")
    key = page.keyboard.press
    for _ in range(4):
        key("Shift+ArrowLeft")
    key("a")
    for _ in range(8):
        key("Shift+ArrowRight")
    key("a")
    assert places(page) == [[0.3, 0.5], [0.7, 0.5]]
    for keys in ("nn", "nn"):  # the first point, then the second: two movements of the same kind of point
        key(keys[0])
        key("ArrowDown")
        key("ArrowDown")
    assert places(page) == [[0.3, 0.52], [0.7, 0.52]]
    key("z")
    assert places(page) == [[0.3, 0.52], [0.7, 0.5]]  # both steps of the second, and nothing of the first
    key("z")
    assert places(page) == [[0.3, 0.5], [0.7, 0.5]]
    box = page.locator("#stage svg").bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.75 * box["height"], steps=4)
    page.mouse.up()
    dragged = places(page)
    assert dragged[0] == pytest.approx([0.3, 0.75], abs=0.01)
    key("ArrowUp")
    assert places(page) != dragged
    key("z")
    assert places(page) == dragged  # the step by key alone, not the drag
    key("ArrowUp")
    expect(page.locator("#saved")).to_have_text("Saved")
    moved = places(page)
    page.reload()
    expect(page.locator("#stage circle")).to_have_count(2)
    expect(page.locator("#undo")).to_be_disabled()
    key("n")
    key("ArrowUp")
    assert places(page) != moved
    key("z")
    assert places(page) == moved
    page.context.close()


def test_undo_goes_on_when_no_more_events_are_kept(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "events")
    page.click("#tourskip")
    page.keyboard.press("a")
    page.keyboard.press("n")
    steps = """for (let n = 0; n < 401; n += 1) {
        document.body.dispatchEvent(new KeyboardEvent('keydown', { key: n % 2 ? 'ArrowUp' : 'ArrowDown', bubbles: true }));
    }"""
    page.evaluate(steps)  # more than are kept, the last that is kept being a move
    page.keyboard.press("n")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert places(page) == [[0.5, 0.49]]
    page.keyboard.press("z")
    assert places(page) == [[0.5, 0.51]]
    page.context.close()


def test_escape_ends_the_tour(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "tour")
    expect(page.locator("#tournext")).to_be_focused()
    page.keyboard.press("k")
    page.keyboard.press("Escape")  # the keys alone
    expect(page.locator("#keys")).to_be_hidden()
    expect(page.locator("#tournext")).to_be_focused()
    with page.expect_response("**/api/settings"):
        page.keyboard.press("Escape")
    expect(page.locator("#tour")).to_be_hidden()
    expect(page.locator("#main")).to_be_focused()
    assert page.locator(".spot").count() == 0
    page.reload()
    page.wait_for_selector("#stage")
    expect(page.locator("#tour")).to_be_hidden()  # once is enough
    page.context.close()


def test_a_finger_moves_a_point(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "finger", has_touch=True, is_mobile=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.tap("#tourskip")
    box = page.locator("#stage svg").bounding_box()
    assert box
    page.locator("#stage svg").tap(position={"x": box["width"] * 0.5, "y": box["height"] * 0.5})
    expect(page.locator("#stage circle")).to_have_count(1)
    touch = page.context.new_cdp_session(page)

    def drag(start: tuple[float, float], end: tuple[float, float]) -> None:
        for n in range(11):
            x, y = (a + (z - a) * n / 10 for a, z in zip(start, end, strict=True))
            point = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            touch.send("Input.dispatchTouchEvent", {"type": "touchMove" if n else "touchStart", "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    drag((0.5, 0.5), (0.3, 0.2))
    assert places(page)[0] == pytest.approx([0.3, 0.2], abs=0.02)
    assert page.evaluate("scrollY") == 0
    drag((0.8, 0.8), (0.8, 0.2))  # beside it: the page scrolls, and no point is made
    page.evaluate("new Promise(done => { const look = () => (scrollY > 0 ? done() : requestAnimationFrame(look)); look(); })")
    assert len(places(page)) == 1
    page.context.close()


def test_overlapping_disks_of_one_rater_are_one_rater(chromium: Browser, plain: Any) -> None:
    """Colours are read off the screen: two disks of one rater, artifacts left and misalignment right of them; then one disk of two raters."""
    study, database, address = plain
    both = {"artifact": [[0.2, 0.5], [0.25, 0.5]], "misalignment": [[0.6, 0.5], [0.65, 0.5]]}
    again = {"artifact": [[0.2, 0.5]], "misalignment": []}
    page = b.begin(chromium, address, study, database, "boss", "admin")
    colours: list[dict[str, list[tuple[int, ...]]]] = []
    for name, points in (("one", both), ("two", again)):
        rater = s.sign_in(s.client(study, database), study, database, name)
        assert s.answer(rater, s.rich([[0.5, 0.5]], [0]) | {"points": points}, f"overlay-{name}").status_code == 200
        found = {}
        for where in ("gallery", "items/1"):
            page.goto(f"{address}/admin/{where}")
            expect(page.locator(".framed circle").first).to_be_attached()
            page.evaluate("Promise.all([...document.images].map(i => i.decode()))")
            with Image.open(io.BytesIO(page.locator(".framed").first.screenshot())) as shot:
                picture, (width, height) = shot.convert("RGB"), shot.size
            found[where] = [picture.getpixel((int(x * width), height // 2)) for x in (0.17, 0.225, 0.28, 0.57, 0.625, 0.68, 0.9)]
        colours.append(found)
    for found in colours[0].values():
        assert found[0] == found[1] == found[2] != found[6] and found[3] == found[4] == found[5] != found[6]
        assert found[6] == (200, 200, 200)
    of_two = colours[1]["gallery"]  # 0.17 and 0.225 by both, 0.28 by one
    assert of_two[0] == of_two[1] and of_two[2][1] > of_two[0][1] + 10
    assert colours[1]["items/1"] == colours[0]["items/1"]  # a picture for each rater there
    page.context.close()


def test_what_is_fetched_from_elsewhere_is_seen_and_refused(chromium: Browser, plain: Any, nothing_wrong: list[str]) -> None:
    """The watch over all of these tests sees what it is there for; the page's policy stops it."""
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "elsewhere")
    page.click("#tourskip")
    page.wait_for_load_state("networkidle")
    assert not nothing_wrong
    page.evaluate("""new Promise(done => {
        const image = Object.assign(new Image(), { onerror: done, onload: done, src: 'http://elsewhere.invalid/pixel.png' });
        document.body.append(image);
    })""")
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate("fetch('http://elsewhere.invalid/')")
    assert sum("Content Security Policy" in w and "elsewhere.invalid" in w for w in nothing_wrong) >= 2
    nothing_wrong.clear()
    page.evaluate("setTimeout(() => { throw new Error('a mistake'); })")
    page.goto(f"{address}/mine")
    assert any("a mistake" in w for w in nothing_wrong)
    nothing_wrong.clear()
    page.goto("data:text/html,<img src='http://127.0.0.1:9/pixel.png'>")
    assert "asked for http://127.0.0.1:9/pixel.png" in nothing_wrong
    nothing_wrong.clear()
    page.context.close()
