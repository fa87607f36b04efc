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
    """Colours are read off the screen: two disks of one rater, artifacts left and misalignment right; then one disk of two raters."""
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


CONTRAST = """() => {
    // Every text that shows, with the ratio of its colour to what it stands on (WCAG 2.2). What is disabled need not be read.
    const pen = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d', { willReadFrequently: true });
    const rgba = (colour) => {
        pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
    const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
        const v = c[i] / 255;
        return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    }, 0);
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const text = walk.currentNode.textContent.trim();
        const at = walk.currentNode.parentElement;
        const shows = at.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
        if (!text || !shows || at.closest('script, noscript, :disabled, .skip-link')) continue;
        const chain = [];
        for (let e = at; e; e = e.parentElement) chain.unshift(e);
        let ground = [255, 255, 255];
        let opacity = 1;
        for (const e of chain) {
            const style = getComputedStyle(e);
            opacity *= Number(style.opacity);
            ground = over(rgba(style.backgroundColor), ground);
        }
        const ink = rgba(at instanceof SVGElement ? getComputedStyle(at).fill : getComputedStyle(at).color);
        ink[3] *= opacity;
        const [a, b] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
        found.push([text.slice(0, 40), Math.round((a + 0.05) / (b + 0.05) * 100) / 100]);
    }
    return found;
}"""


def looks(page: Page, where: str) -> None:
    """What everybody can read and name: contrast in both schemes; a name for all that can be used, as Chromium computes it."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        found = page.evaluate(CONTRAST)
        assert len(found) > 3
        assert [(where, scheme, *f) for f in found if f[1] < 4.5] == []
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    used = [n for n in tree if not n["ignored"] and n["role"]["value"] in USED]
    assert used
    assert [(where, n["role"]["value"], n.get("properties")) for n in used if not n["name"]["value"].strip()] == []


USED = {"button", "link", "textbox", "radio", "checkbox", "combobox", "radiogroup", "progressbar", "dialog", "application", "image"}


def test_contrast_and_names(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.visit(chromium, f"{address}/login")
    looks(page, "login")
    page.goto(server.invitation(study, database, "eyes", "rater", address))
    looks(page, "join")
    page.click("text=Begin")
    page.wait_for_selector("#tour:not([hidden])")
    looks(page, "tour")
    page.keyboard.press("Escape")
    for key in ("a", "m", "n", "1"):
        page.keyboard.press(key)
    page.locator("#prompt button").first.click()
    page.click("#submit")
    expect(page.locator("#problem")).to_contain_text("Not rated yet")
    looks(page, "task")
    for key in ("g", "k", "s"):
        page.keyboard.press(key)
        looks(page, f"dialog {key}")
        page.keyboard.press("Escape")
    for key in "2345":
        page.keyboard.press(key)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#saved")).to_have_text("Submitted")
    page.goto(f"{address}/mine")
    looks(page, "mine")
    page.context.close()
    page = b.begin(chromium, address, study, database, "boss", "admin")
    page.click("text=Shut out >> nth=0")
    expect(page.locator("tr.off")).to_have_count(1)
    looks(page, "overview")
    for where in ("gallery", "items/1"):
        page.goto(f"{address}/admin/{where}")
        looks(page, where)
    page.context.close()


def test_nothing_moves_for_those_who_ask_for_that(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "still")
    page.wait_for_selector("#stage")
    moving = """[...document.querySelectorAll('*')].filter(e => {
        const s = getComputedStyle(e);
        return parseFloat(s.transitionDuration) > 0 || s.animationName !== 'none' || s.scrollBehavior === 'smooth';
    }).length"""
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 5
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(moving) == 0
    page.context.close()


def test_zoom(chromium: Browser, plain: Any) -> None:
    study, database, address = plain
    page = b.begin(chromium, address, study, database, "zoom")
    page.click("#tourskip")

    def size() -> float:
        box = page.locator(".canvas").bounding_box()
        assert box
        return box["width"]

    fits = size()
    page.keyboard.press("-")
    assert size() == fits  # smaller than the window helps nobody
    page.click("[aria-label='Zoom in']")
    assert size() == pytest.approx(1.5 * fits, abs=1)
    page.keyboard.press("+")
    assert size() == pytest.approx(2.25 * fits, abs=1)
    stage, layer = page.locator("#stage").bounding_box(), page.locator("#stage svg").bounding_box()
    assert stage and layer and layer["x"] < stage["x"]  # scrolled to the cursor, the middle
    assert layer["x"] + layer["width"] / 2 == pytest.approx(stage["x"] + stage["width"] / 2, abs=12)
    spot = (stage["x"] + stage["width"] * 0.3, stage["y"] + stage["height"] * 0.4)
    page.mouse.click(*spot)
    expected = [(spot[0] - layer["x"]) / layer["width"], (spot[1] - layer["y"]) / layer["height"]]
    assert places(page)[0] == pytest.approx(expected, abs=0.003)
    disk = page.evaluate("document.querySelector('#stage circle').getBBox().height / 240")
    assert disk == pytest.approx(0.1)  # a twentieth of the height around it, whatever the zoom
    page.keyboard.press("0")
    assert size() == fits
    for _ in range(9):
        page.keyboard.press("+")
    assert size() == pytest.approx(8 * fits, abs=2)
    page.click("[aria-label='Fit the image']")
    assert size() == fits
    page.set_viewport_size({"width": 320, "height": 640})  # the browser's own zoom of 400 %
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.context.close()
