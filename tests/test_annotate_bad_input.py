"""What people and programs throw at a study: odd prompts, odd images, odd requests, odd studies. Nothing breaks, nothing is executed."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import study as s
from limner.feedback import answers, server
from limner.feedback.display import LARGEST, image_file, store_image
from limner.feedback.items import make_items
from limner.feedback.rater_pages import pieces
from limner.feedback.richhf import tokens
from limner.feedback.study import load_study
from limner.records import Image as Row
from limner.records import to_table
from limner.store import open_step

PROMPTS = {
    "html": "<b>bold</b><script>alert(1)</script> & \"quotes\" </script><img src=x onerror=alert(1)>",
    "template": "{{ 7 * 7 }} {% raw %} ${x} `y`",
    "rtl": "امرأة راكعة في حديقة, wearing אדום",
    "emoji": "👩🏽‍🦰 kneeling 🏞️ zero\u200bwidth",
    "long": "word " * 400,
    "unbroken": "x" * 2000,
    "none": "",
    "marks": " ,.?! ",
    "lines": "a\nb\tc\u2028d",
}  # fmt: skip


def step_of(folder: Path, images: dict[str, bytes], texts: dict[str, str]) -> str:
    """A step's folder with these images: unlike a folder of files it may hold prompts of no words."""
    step = open_step(folder, "pool", {}, {})
    step.write(0, to_table(Row, [Row(id=n, prompt_id=n, text=texts.get(n, "a cat"), image=i) for n, i in images.items()]))
    step.finish({})
    return str(folder)


def site(tmp_path: Path, images: dict[str, bytes], texts: dict[str, str] | None = None, **values):
    values = {"overlap": 1, "images": {"from": step_of(tmp_path / "pool", images, texts or {})}, **values}
    study = s.study_of(tmp_path, {"server": {"requests_per_second": 1000}, **values})
    return study, server.prepare(study)


def test_prompts_of_all_kinds(tmp_path: Path) -> None:
    study, database = site(tmp_path, dict.fromkeys(PROMPTS, s.png()), PROMPTS)
    a = s.sign_in(s.client(study, database), study, database, "a")
    for n, text in enumerate(PROMPTS.values()):
        item = a.get("/api/task").json()["item"]
        assert item["text"] == text
        assert "".join(p["text"] for p in item["pieces"]) == text
        words = tokens(text)
        assert [p["text"] for p in item["pieces"] if p["word"] is not None] == words
        assert s.answer(a, s.rich([[0.5, 0.5]], [len(words) - 1] if words else []), f"prompt-{n}-x").status_code == 200
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    for page in (a.get("/mine").text, boss.get("/admin/gallery").text, boss.get("/admin").text, boss.get("/admin/items/1").text):
        assert "<script>alert" not in page and "<img src=x" not in page
    gallery = boss.get("/admin/gallery").text
    assert "&lt;script&gt;alert" in gallery and "{{" in gallery and "49" not in gallery.split("template")[0][-20:]
    rows = answers.feedback(answers.given(study, database))
    assert {r.image_id for r in rows} == set(PROMPTS)


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_prompt(text: str) -> None:
    assert "".join(p["text"] for p in pieces(text)) == text
    assert [p["text"] for p in pieces(text) if p["word"] is not None] == tokens(text)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 60,000 by 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def odd_images() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "tiny": s.png(size=(1, 1)),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "palette": encoded(photo.convert("P"), "PNG"),
        "deep": encoded(Image.fromarray(noise[..., 0].astype(np.uint16) << 8), "PNG"),
        "see-through": encoded(photo.convert("RGBA"), "PNG"),
        "animated": encoded(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]),
        "turned": encoded(photo, "JPEG", exif=turned),
        "tiff": encoded(photo, "TIFF"),
        "plain": encoded(photo, "JPEG"),
    }


def test_images_of_all_kinds_are_shown_or_reported(tmp_path: Path) -> None:
    bad = {"cut": s.png(size=(200, 200))[:90], "bomb": bomb(), "text": b"GIF89a, not really", "empty": b""}
    good = odd_images()
    study, database = site(tmp_path, {**good, **bad}, order="given")
    a = s.sign_in(s.client(study, database), study, database, "a")
    seen = {}
    for n in range(len(good)):
        item = a.get("/api/task").json()["item"]
        (image,) = item["images"]
        found = a.get(f"/images/{image['token']}")
        assert found.headers["content-type"] in ("image/png", "image/jpeg") and found.headers["x-content-type-options"] == "nosniff"
        shown = Image.open(io.BytesIO(found.content))
        assert shown.size == (image["width"], image["height"]) and shown.mode in ("RGB", "L") and getattr(shown, "n_frames", 1) == 1
        seen[list(good)[n]] = found.content
        assert s.answer(a, s.rich([[0.5, 0.5]]), f"image-{n}-x").status_code == 200
    assert a.get("/api/task").json()["finished"]  # the four that cannot be shown are no items
    assert seen["plain"] == good["plain"]  # what browsers show as it is stays as it is
    assert Image.open(io.BytesIO(seen["turned"])).size == (30, 50)


def test_a_huge_image_is_shown_smaller(tmp_path: Path) -> None:
    data = encoded(Image.new("L", (8000, 8000), 200), "PNG")
    shown = store_image(tmp_path, data, "huge")
    assert (shown.width, shown.height) == (LARGEST, LARGEST)
    assert Image.open(image_file(tmp_path, shown.digest)).size == (LARGEST, LARGEST)


def test_a_study_of_unreadable_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unreadable image \(1\).*not a readable image"):
        site(tmp_path, {"only": b"no"})


def test_paths_and_ids(tmp_path: Path) -> None:
    study, database = site(tmp_path, {"a": s.png(), "b": s.png()})
    a = s.sign_in(s.client(study, database), study, database, "a")
    for path in (
        "/images/../study.db", "/images/..%2fstudy.db", "/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/static/../templates/base.html",
        "/static/%2e%2e/%2e%2e/server.py", "/static/..%5cserver.py", "/images/%00", "/images/" + "a" * 5000, "/static/", "/images/",
        "/admin/export/../../study.db", "/nothing",
    ):  # fmt: skip
        found = a.get(path)
        assert found.status_code in (400, 403, 404, 405), path
        assert b"SQLite" not in found.content and b"root:" not in found.content and b"def " not in found.content
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    assert boss.get("/admin/export/nothing.csv").status_code == 404
    assert boss.get("/admin/items/999").status_code == 404 and boss.get("/admin/items/x").status_code == 422
    assert boss.get("/api/task?item=999").status_code == 404
    other = 3 - a.get("/api/task").json()["item"]["id"]  # of 1 and 2
    assert s.answer(a, s.rich(), "not-mine-1", other).json()["error"] == "This item is not yours."
    assert a.get(f"/api/task?item={other}").status_code == 400
    assert s.answer(a, s.rich(), "no-item-1", 12345).status_code == 400


def test_bodies(tmp_path: Path) -> None:
    study, database = site(tmp_path, {"a": s.png()})
    a = s.sign_in(s.client(study, database), study, database, "a")
    item = a.get("/api/task").json()["item"]["id"]
    kind = {"content-type": "application/json"}
    large = json.dumps({"item": item, "version": 0, "payload": {"x": "y" * study.server.max_body}})
    assert a.post("/api/draft", content=large, headers=kind).status_code == 413

    def endless():
        for _ in range(40):
            yield b" " * 10_000

    assert a.post("/api/draft", content=endless(), headers=kind).status_code == 413  # says no length
    assert a.post("/api/draft", content=b"", headers={**kind, "content-length": "-5"}).status_code in (400, 413)
    for body in (b"", b"{", b"[]", b"null", b'{"item": "x"}', b"\xff\xfe", b"[" * 50_000, b'{"item": 1e400, "version": 0, "payload": {}}'):
        assert a.post("/api/draft", content=body, headers=kind).status_code in (400, 422), body[:30]
    for id in ("", "short", "a" * 65, "../../etc", "ünïcode-id", "with space"):
        assert s.answer(a, s.rich(), id, item).status_code == 422
    nan = json.dumps({"id": "not-a-number", "item": item, "base": 0, "payload": s.rich() | {"events": [[float("nan"), "x"]]}})
    assert a.post("/api/submit", content=nan, headers=kind).status_code in (400, 422)
    for payload in (
        {"points": 5},
        {"ratings": []},
        {"nothing": "yes"},
        {"words": {"misaligned": [True]}},
        {"points": {"artifact": [[0.1]]}},
    ):
        refused = s.answer(a, {**s.rich(), **payload}, "odd-payload-1", item)
        assert refused.status_code == 400 and refused.json()["error"], payload
    assert s.answer(a, s.rich(), "fine-after-all", item).status_code == 200


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "sides"}, "task"),
        ({"overlap": 0}, "overlap: 0; expected at least 1"),
        ({"imges": {}}, "unknown key imges; did you mean images"),
        ({"images": {}}, "images.from: not set"),
        ({"images": {"from": "x", "against": "y"}}, "only task side compares"),
        ({"task": "side"}, "images.against: not set"),
        ({"questions": ["beauty"]}, "questions: beauty; expected some of plausibility"),
        ({"questions": []}, "questions: empty"),
        ({"raters": ["a", "a"]}, "there twice"),
        ({"task": "choice", "images": {"from": "x", "each": 1}}, "images.each: 1; expected 2 to 9"),
        ({"images": {"from": "x", "balance": ["kind"]}}, "one without the other"),
        ({"lease_minutes": 0}, "expected more than 0"),
    ],
)
def test_odd_studies(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        s.study_of(tmp_path, values)


def test_gold_that_does_not_fit(tmp_path: Path) -> None:
    s.image_folder(tmp_path / "images", {"a": "x", "b": "y"})
    gold = tmp_path / "gold.jsonl"
    for line, message in (
        ("{", "line 1: expected an object"), ('{"image_id": "zzz", "answer": {"ratings": {"overall": 3}}}', "'zzz' is no item"),
        ('{"image_id": "a", "answer": {"best": ["a"]}}', "task rich takes points, ratings, words"),
        ('{"image_id": "a", "answer": {"ratings": {"overall": 9}}}', "expected 1 to 5"),
    ):  # fmt: skip
        gold.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            server.prepare(s.study_of(tmp_path, {"gold": {"from": str(gold)}}))


def test_balance(tmp_path: Path) -> None:
    """Of 12 images 9 are photos; of a balanced 6 three are. With a judge's numbers, every third occurs."""
    s.image_folder(tmp_path / "images", {f"i{n:02d}": "x" for n in range(12)})
    table = tmp_path / "table.csv"
    table.write_text("image_id,kind,score\n" + "".join(f"i{n:02d},{'photo' if n < 9 else 'drawing'},{n}\n" for n in range(12)))
    images = {"from": str(tmp_path / "images"), "table": str(table), "balance": ["kind"]}
    items, dropped = make_items(s.study_of(tmp_path, {"images": images}))
    assert sum(i.key < "i09" for i in items) == 3 and len(items) == 6 and dropped == {"more of a kind than of the rarest": 6}
    for limit, each in ((10, 3), (4, 2)):  # three drawings end it though ten are allowed
        items, _ = make_items(s.study_of(tmp_path, {"images": {**images, "limit": limit}}))
        assert [sum((i.key < "i09") is photo for i in items) for photo in (True, False)] == [each, each]
    items, _ = make_items(s.study_of(tmp_path, {"images": {**images, "balance": ["score"], "limit": 6}}))
    assert [sum(int(i.key[1:]) // 4 == third for i in items) for third in range(3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="no column colour; found image_id, kind, score"):
        make_items(s.study_of(tmp_path, {"images": {**images, "balance": ["colour"]}}))


def test_no_such_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no study"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="holds a list"):
        load_study(tmp_path / "list.yaml")
