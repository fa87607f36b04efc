"""RichHF-18K's format: names, polarity, tokens, scales, maps, and the join with Pick-a-Pic."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from limner.feedback import payloads, richhf
from limner.feedback.richhf import RichFeedback
from limner.feedback.tfrecord import encode_example, parse_example, read_records, write_records


def encoded(size: tuple[int, int] = (512, 512), form: str = "PNG", value: int = 85) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("L", size, value).save(buffer, form)
    return buffer.getvalue()


def published(uid: str = "u1", **changes: Any) -> dict[str, list]:
    """A record as the data set has it."""
    features = {
        "filename": [f"train/{uid}.png".encode()],
        "artifact_score": [0.25],
        "misalignment_score": [0.5],
        "aesthetics_score": [0.75],
        "overall_score": [1.0],
        "artifact_map": [encoded()],
        "misalignment_map": [encoded()],
        "prompt_misalignment_label": [b"1 0 1"],
    }
    return {name: values for name, values in {**features, **changes}.items() if values is not None}


def file_of(tmp_path: Path, *rows: dict[str, list]) -> Path:
    write_records(tmp_path / "dev.tfrecord", [encode_example(r) for r in rows])
    return tmp_path / "dev.tfrecord"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a yellow cat, sitting.", ["a", "yellow", "cat", "sitting"]),
        ('Who? "Me"! a:b;c', ["Who", "Me", "a", "b", "c"]),
        ("semi-real (8k) it's a/b\nc\td", ["semi-real", "(8k)", "it's", "a/b\nc\td"]),
        ("  ,. ", []),
        ("", []),
    ],
)
def test_tokens_are_the_published_ones(prompt: str, expected: list[str]) -> None:
    assert richhf.tokens(prompt) == expected


def test_read_takes_the_misleading_names_right(tmp_path: Path) -> None:
    (row,), report = richhf.read(file_of(tmp_path, published("abc-1")), expected=1)
    assert (row.image_id, row.filename, row.prompt) == ("abc-1", "train/abc-1.png", None)
    assert (row.plausibility, row.alignment, row.aesthetics, row.overall) == (0.25, 0.5, 0.75, 1.0)
    assert row.labels == (1, 0, 1)
    assert report == {
        "file": "dev.tfrecord", "rows": 1, "scale": "0-1", "missing": [], "unreadable": [], "other_size": [], "repeated": [], "constant": []
    }  # fmt: skip
    assert np.unique(richhf.map_values(row.artifact_map or b"")) == pytest.approx([1 / 3])
    with pytest.raises(ValueError, match="after 1 records; expected 955"):
        richhf.read(tmp_path / "dev.tfrecord", expected=955)


def test_scales(tmp_path: Path) -> None:
    low, high = (
        published("a", overall_score=[1.0]),
        published("b", **{name: [v] for name, v in zip(richhf.SCORES.values(), [1.0, 2.0, 3.0, 5.0])}),
    )
    rows, report = richhf.read(file_of(tmp_path, high, high))
    assert report["scale"] == "1-5" and report["constant"] == list(richhf.SCORES) and report["repeated"] == ["b"]
    assert [getattr(rows[0], n) for n in richhf.SCORES] == [0.0, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"scores from 0.25 to 5; expected all in 0-1 or all in 1-5"):
        richhf.read(file_of(tmp_path, low, high))
    for bad in (-0.1, 5.5, float("nan")):
        with pytest.raises(ValueError, match=r"dev.tfrecord: record 0 \(u1\): overall_score is"):
            richhf.read(file_of(tmp_path, published(overall_score=[bad])))


def test_what_is_missing_or_odd_is_reported_and_the_row_kept(tmp_path: Path) -> None:
    rows, report = richhf.read(
        file_of(
            tmp_path,
            published("a", overall_score=None, artifact_map=[encoded((256, 128), "JPEG")], misalignment_map=[b"no image"]),
            published("b", prompt_misalignment_label=[b"1 2 0"], artifact_map=None),
        )
    )
    assert report["missing"] == [["a", "overall_score"], ["b", "artifact_map"]]
    assert report["other_size"] == [["a", "artifact_map", 256, 128]]
    assert [r[:2] for r in report["unreadable"]] == [["a", "misalignment_map"], ["b", "prompt_misalignment_label"]]
    assert rows[0].overall is None and rows[0].misalignment_map is None and rows[0].artifact_map and rows[1].labels == ()
    with pytest.raises(ValueError, match="record 0: no feature filename; found x"):
        richhf.read(file_of(tmp_path, {"x": [1]}))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, published(), published())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"dev.tfrecord: record 1 at byte "):
        richhf.read(path)
    write_records(path, [b"\xff\xff"])
    with pytest.raises(ValueError, match=r"dev.tfrecord: record 0: byte 0"):
        richhf.read(path)


def test_join_never_truncates(tmp_path: Path) -> None:
    rows, _ = richhf.read(file_of(tmp_path, published("a"), published("b"), published("c"), published("d", prompt_misalignment_label=None)))
    joined, report = richhf.join(rows, {"a": "one, two three", "b": "one two", "d": "one two"})
    assert report == {"rows": 4, "joined": 3, "without_prompt": ["c"], "mismatched": [["b", 2, 3]]}
    assert [r.labels for r in joined] == [(1, 0, 1), (), (1, 0, 1), ()]
    assert [r.prompt for r in joined] == ["one, two three", "one two", None, "one two"]


def test_write_is_what_read_takes(tmp_path: Path) -> None:
    path = file_of(tmp_path, published("a"), published("b", aesthetics_score=None))
    rows, _ = richhf.read(path)
    assert richhf.write(tmp_path / "out.tfrecord", rows) == {"rows": 2, "other_size": []}
    assert (tmp_path / "out.tfrecord").read_bytes() == path.read_bytes()


def test_write_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "own.tfrecord"
    own = RichFeedback(image_id="i", prompt="a red cat", labels=(1, 0, 1), plausibility=0.5, artifact_map=encoded((64, 64)))
    assert richhf.write(path, [own])["other_size"] == [["i", "artifact_map", 64, 64]]
    (features,) = [parse_example(r) for r in read_records(path, 1)]
    assert features == {
        "filename": [b"i.png"],
        "artifact_score": [0.5],
        "artifact_map": [own.artifact_map],
        "prompt_misalignment_label": [b"1 0 1"],
    }
    (back,) = richhf.join(richhf.read(path)[0], {"i": "a red cat"})[0]
    assert (back.labels, back.plausibility, back.prompt) == (own.labels, 0.5, own.prompt)
    for bad, message in [
        (RichFeedback(image_id="i", prompt="a cat", labels=(1,)), "image i: 1 labels for 2 words"),
        (RichFeedback(image_id="i.1"), "does not give its id back"),
        (RichFeedback(image_id="i", artifact_map=b"x"), "image i: artifact_map: not a readable image"),
    ]:
        with pytest.raises(ValueError, match=message):
            richhf.write(path, [bad])
    assert richhf.read(path)[1]["rows"] == 1  # the file that was there is kept


def pick_a_pic(path: Path, rows: list[tuple[str, str, str]], row_group_size: int = 1) -> Path:
    table = pa.table(
        {
            "jpg_0": [f"jpg {a}".encode() for a, _, _ in rows],
            "jpg_1": [f"jpg {b}".encode() for _, b, _ in rows],
            "image_0_uid": [a for a, _, _ in rows],
            "image_1_uid": [b for _, b, _ in rows],
            "caption": [c for _, _, c in rows],
            "label_0": [0.5] * len(rows),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_pick_a_pic_gives_each_wanted_image_once(tmp_path: Path) -> None:
    first = pick_a_pic(tmp_path / "1.parquet", [("x", "y", "no"), ("a", "b", "one"), ("b", "c", "one")])
    second = pick_a_pic(tmp_path / "2.parquet", [("c", "a", "one"), ("d", "z", "two")], 2)
    found = list(richhf.pick_a_pic([first, second], ["a", "b", "d", "gone"]))
    assert [(i.id, i.text, i.image) for i in found] == [("a", "one", b"jpg a"), ("b", "one", b"jpg b"), ("d", "two", b"jpg d")]


def test_pick_a_pic_names_a_file_that_is_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: no column image_0_uid, image_1_uid, jpg_0, jpg_1"):
        list(richhf.pick_a_pic([tmp_path / "x.parquet"], ["a"]))
    (tmp_path / "y.parquet").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"y.parquet cannot be read"):
        list(richhf.pick_a_pic([tmp_path / "y.parquet"], ["a"]))


def test_to_feedback_and_tables() -> None:
    row = RichFeedback(image_id="i", prompt="a red cat", labels=(1, 0, 1), plausibility=0.5, overall=1.0, artifact_map=b"m")
    ratings, words = richhf.to_feedback(row)
    assert payloads.load(ratings) == {"plausibility": 3.0, "overall": 5.0}
    assert payloads.load(words) == {"tokens": ["a", "red", "cat"], "misaligned": [1]}
    assert richhf.to_feedback(RichFeedback(image_id="i", labels=(1,))) == []
    assert richhf.from_table(richhf.to_table([row, RichFeedback(image_id="j")])) == [row, RichFeedback(image_id="j")]


def test_maps() -> None:
    values = np.array([[0, 1 / 3], [2 / 3, 1]])
    assert richhf.map_values(richhf.encode_map(values)) == pytest.approx(values, abs=1e-6)
    for bad in ([[1.1]], [[float("nan")]], [0.5], np.zeros((0, 2))):
        with pytest.raises(ValueError, match=r"expected \(H, W\) in \[0, 1\]"):
            richhf.encode_map(bad)
    with pytest.raises(ValueError, match="map: not a readable image"):
        richhf.map_values(encoded()[:40])
    assert richhf.map_values(encoded(form="JPEG")).shape == (512, 512)
