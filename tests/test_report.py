from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from limner.evaluation.compare import Measured, compare
from limner.evaluation.report import FIGURES_NOTE, print_table, read_curves, sheet, write_report

PROMPTS = ["a woman in a red coat", "<script>alert('x')</script> & \"quotes\"", "a man, sitting", "two arms up"]
VOID = {"meta", "img", "br"}


def png(seed: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def judged(offset: float, n: int = 4) -> np.ndarray:
    return np.arange(n) * offset + np.array([0.0, 0.125, -0.25, 0.5])[:n]


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    base = Measured(name="base", scores={"judge": judged(0), "preference": np.zeros(4)})
    easy = Measured(name="easy", scores={"judge": judged(0) + 1 + judged(0.01), "preference": np.full(4, -1.0)})
    hard = Measured(name="hard", scores={"judge": judged(-1) + 1, "preference": np.arange(4.0)})
    return compare(None, base, [easy, hard], None, {"preference"}, 0, "limner evaluate x.yaml")


class Page(HTMLParser):
    """Tags balance, and what they hold is kept."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html(metrics: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    models = ("real", "base", "easy", "hard")
    log = [
        {"step": i, "loss": 0.7 - i / 100, "winner_error_difference": -i, "loser_error_difference": i, "grad_norm": 1.0}
        for i in range(1, 30)
    ]
    write_report(
        path,
        metrics=metrics,
        images={m: [png(10 * k + i, 700 if m == "real" and i == 0 else 16) for i in range(4)] for k, m in enumerate(models)},
        prompts=PROMPTS,
        curves={"easy": log, "hard": []},
        judge_scores={m: metrics_scores.tolist() for m, metrics_scores in {"base": judged(0), "hard": judged(-1) + 1}.items()},
        command="limner evaluate --config <x>.yaml",
        recipe_yaml="name: '<b>bold</b>'\n",
        note=FIGURES_NOTE,
    )
    return path.read_text()


def test_report_is_whole_and_self_contained(html: str) -> None:
    page = Page(html)
    assert not [t for t, _ in page.tags if t in ("script", "link", "iframe", "b")]
    images = [a["src"] for t, a in page.tags if t == "img"]
    assert len(images) == 4 * 4 + 2 * (1 + 2)  # the grid; hard gained on one prompt, lost on two, and tied on one
    assert all(src and src.startswith("data:image/") for src in images)
    links = [v for _, a in page.tags for k, v in a.items() if v and k in ("href", "src", "xlink:href")]
    assert not [v for v in links if not v.startswith(("#", "data:"))]
    text = " ".join("".join(page.text).split())
    for expected in (
        *PROMPTS,
        FIGURES_NOTE,
        "limner evaluate --config <x>.yaml",
        "name: '<b>bold</b>'",
        "circular: selected the training examples",
    ):
        assert expected in text
    assert "numpy" in text
    assert "Seed 0." in text


def test_captions_are_escaped(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_large_images_are_shown_smaller(html: str) -> None:
    jpeg = next(a["src"] for t, a in Page(html).tags if t == "img" and "jpeg" in (a["src"] or ""))
    assert jpeg is not None
    with Image.open(io.BytesIO(base64.b64decode(jpeg.split(",")[1]))) as image:
        assert image.size == (512, 512)


def test_better_is_bold_and_worse_is_red(html: str) -> None:
    rows = {r.split("</th>")[0]: r for r in html.split('<th scope="row">')[1:]}
    assert rows["easy"].count('class="better"') == 1  # judge
    assert rows["easy"].count('class="worse"') == 1  # preference
    assert 'class="better"' not in rows["base"]
    assert 'class="better"' not in rows["hard"].split("</tr>")[0]  # judge falls on the mean, and both intervals are wide


def test_curves_are_drawn_in_the_pages_colour(html: str) -> None:
    assert html.count("<svg xmlns") == 3  # loss, error differences, gradient norm; a stage with an empty log is left out
    assert "currentColor" in html
    assert "#010203" not in html
    assert "<h3>hard</h3>" not in html


def test_report_refuses_images_that_do_not_match(metrics: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 images of base for 4 prompts"):
        write_report(
            tmp_path / "r.html",
            metrics=metrics,
            images={"base": [png(0)]},
            prompts=PROMPTS,
            curves={},
            judge_scores={},
            command="",
            recipe_yaml="",
        )
    assert not list(tmp_path.iterdir())


def test_report_without_pictures_or_stages(tmp_path: Path) -> None:
    found = compare(None, Measured(name="base", scores={"judge": np.arange(3.0)}), [], None, [], 0)
    write_report(tmp_path / "r.html", metrics=found, images={}, prompts=[], curves={}, judge_scores={}, command="c", recipe_yaml="")
    page = Page((tmp_path / "r.html").read_text())
    assert "Wins against base" not in "".join(page.text)


def test_read_curves(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "loss": 0.5}) + '\n{"step": 2, "lo')
    assert read_curves({"easy": log}) == {"easy": [{"step": 1, "loss": 0.5}]}
    log.write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_curves({"easy": log})


def test_print_table(metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_table(metrics)
    out = capsys.readouterr().out
    for word in ("base", "easy", "hard", "judge", "(circular)", "wins: judge", "100%"):
        assert word in out


def test_a_sure_small_gain_does_not_show_as_equal_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    wide = np.arange(20.0)
    gain = 0.05 + np.tile([0.01, -0.01], 10)
    stage = Measured(name="easy", scores={"judge": wide + gain})
    print_table(compare(None, Measured(name="base", scores={"judge": wide}), [stage], None, [], 0))
    assert "9.5000 │ 9.5500" in capsys.readouterr().out


def test_sheet(tmp_path: Path) -> None:
    sheet({"base": [png(0), png(1)], "hard": [png(2), png(3, 700)]}, PROMPTS[:2], tmp_path / "sheet.png", tile=64)
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.size == (176 + 2 * 70 + 6, 24 + 2 * 70)
        assert page.getpixel((160 + 6 + 32, 24 + 32)) != (255, 255, 255)
    with pytest.raises(ValueError, match="1 images of hard for 2 prompts"):
        sheet({"hard": [png(0)]}, PROMPTS[:2], tmp_path / "sheet.png")
