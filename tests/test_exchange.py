"""Feedback in files of three kinds and in Label Studio's JSON: round trips, and errors that name file, row and field."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from limner.feedback import exchange, payloads, richhf
from limner.records import Feedback, Image

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FRACTION = st.floats(0, 1)
POINTS = st.lists(st.lists(FRACTION, min_size=2, max_size=2), max_size=3)
PAYLOADS = st.one_of(
    st.tuples(st.just("points"), st.fixed_dictionaries({"artifact": POINTS, "misalignment": POINTS})),
    st.tuples(st.just("words"), TEXT.map(richhf.tokens).map(lambda t: {"tokens": t, "misaligned": list(range(0, len(t), 2))})),
    st.tuples(st.just("ratings"), st.fixed_dictionaries({"overall": st.floats(1, 5)}, optional={"alignment": st.integers(1, 5)})),
    st.tuples(st.just("choice"), st.just({"images": ["a", "b"], "ranks": [2, 1]})),
    st.tuples(st.just("side"), st.fixed_dictionaries({"against": TEXT, "answer": st.integers(-2, 2), "left": TEXT})),
)
ROWS = st.lists(
    st.builds(lambda i, image, rater, p, s: payloads.make(image, rater, *p, s, i), TEXT, TEXT, TEXT, PAYLOADS, st.floats(0, 1e6)),
    max_size=4,
)
GOOD = payloads.make("a", "r", "ratings", {"overall": 3}, 2.5)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_files_round_trip(tmp_path: Path, ending: str, rows: list[Feedback]) -> None:
    """Any text: line breaks of all kinds, quotes, commas, right-to-left, emoji."""
    path = tmp_path / f"rows.{ending}"
    exchange.write_rows(path, rows)
    assert exchange.read_rows(path) == rows


def test_jsonl_payloads_are_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    exchange.write_rows(path, [GOOD])
    line = json.loads(path.read_text())
    assert line["payload"] == {"overall": 3}
    path.write_text(json.dumps({**line, "payload": json.dumps(line["payload"]), "more": 1}) + "\n\n")
    assert exchange.read_rows(path) == [GOOD]


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """With a byte order mark, other columns and CR LF; no seconds."""
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffnote,id,image_id,rater,kind,payload\r\n"x, y",i,a,r,ratings,"{""overall"": 3}"\r\n'.encode())
    assert exchange.read_rows(path) == [replace(GOOD, id="i", seconds=0.0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"id": "i"}\n', r"x\.jsonl: line 1: image_id is None; expected text"),
        ("x.jsonl", '\n{"id"\n', r"x\.jsonl: line 2: not JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl: line 1: list; expected an object with id, image_id"),
        ("x.csv", "id,kind\n", r"x\.csv: columns id, kind; expected id, image_id"),
        ("x.csv", "id,image_id,rater,kind,payload\ni,a,r,ratings\n", r"x\.csv: row 1: payload is None"),
        ("x.csv", 'id,image_id,rater,kind,payload\ni,a,r,ratings,"{""overall"": 6}"', r"x\.csv: row 1: feedback i: ratings.overall: 6"),
        ("x.csv", "id,image_id,rater,kind,payload,seconds\ni,a,r,ratings,{},soon\n", r"x\.csv: row 1: seconds is 'soon'"),
        ("x.csv", b"id\n\xff", r"x\.csv: not UTF-8"),
        ("x.parquet", "PAR1", r"x\.parquet cannot be read as parquet"),
        ("x.txt", "", r"x\.txt: ends in \.txt; expected \.jsonl, \.csv or \.parquet"),
    ],
)  # fmt: skip
def test_reading_names_file_row_and_field(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        exchange.read_rows(tmp_path / name)


def test_parquet_is_the_records_schema(tmp_path: Path) -> None:
    exchange.write_rows(tmp_path / "x.parquet", [GOOD])
    assert pq.read_schema(tmp_path / "x.parquet").names == list(exchange.FIELDS)
    with pytest.raises(ValueError, match="expected"):
        exchange.write_rows(tmp_path / "x.xlsx", [GOOD])


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        ("points", {"artifact": []}, "points.misalignment: None"),
        ("points", {"artifact": [[0.5, 1.5]], "misalignment": []}, r"points.artifact: \[0.5, 1.5\]"),
        ("words", {"tokens": ["a"], "misaligned": [1]}, r"words.misaligned: \[1\]; expected positions among 1 tokens"),
        ("ratings", {}, "ratings.plausibility: no rating"),
        ("ratings", {"overall": True}, "ratings.overall: True; expected 1 to 5"),
        ("choice", {"images": ["a", "a"], "ranks": [1, 2]}, "choice.images"),
        ("choice", {"images": ["a", "b"], "ranks": [1]}, "choice.ranks"),
        ("side", {"against": "b", "answer": 3}, "side.answer: 3; expected -2 to 2"),
        ("smile", {}, "kind 'smile'; expected points, words"),
        ("points", [], "payload is list"),
    ],
)
def test_payloads_are_checked(kind: str, payload: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"feedback a/r/{kind}: .*{message}|{message}"):
        payloads.make("a", "r", kind, payload)


@pytest.mark.parametrize("payload", ["{", "[" * 100_000, "9" * 5000])
def test_payload_that_is_no_json(payload: str) -> None:
    with pytest.raises(ValueError, match=r"feedback a/r/ratings: payload is not JSON"):
        payloads.load(replace(GOOD, payload=payload))


@pytest.mark.parametrize("rating", ["NaN", "Infinity", "1e999", "1" + 400 * "0", "null", '"3"'])
def test_ratings_that_are_no_numbers(rating: str) -> None:
    with pytest.raises(ValueError, match=r"feedback a/r/ratings: ratings.overall: "):
        payloads.load(replace(GOOD, payload=f'{{"overall": {rating}}}'))


def image(name: str, text: str) -> Image:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (80, 40)).save(buffer, "PNG")
    return Image(id=name, prompt_id=name, text=text, image=buffer.getvalue())


IMAGES = [image("a", "a cat, a cat"), image("b", ""), image("c", "unseen")]
FEEDBACK = [
    payloads.make("a", "anna", "points", {"artifact": [[0.25, 0.5], [1.0, 0.0]], "misalignment": [[0.5, 0.125]]}, 4.0),
    payloads.make("a", "anna", "words", {"tokens": ["a", "cat", "a", "cat"], "misaligned": [3]}, 4.0),
    payloads.make("a", "anna", "ratings", {"plausibility": 2, "overall": 4}, 4.0),
    payloads.make("a", "ben", "points", {"artifact": [], "misalignment": []}),
    payloads.make("a", "ben", "words", {"tokens": ["a", "cat", "a", "cat"], "misaligned": []}),
    payloads.make("b", "anna", "ratings", {"alignment": 5}),
]


def test_label_studio_round_trip() -> None:
    tasks = json.loads(json.dumps(exchange.to_label_studio(FEEDBACK, IMAGES, lambda i: f"/data/{i}.png")))
    assert [t["data"]["image"] for t in tasks] == ["/data/a.png", "/data/b.png"]
    anna, ben = tasks[0]["annotations"]
    assert anna["lead_time"] == 12.0
    point = next(r for r in anna["result"] if r["type"] == "keypointlabels")
    assert point["value"] == {"x": 25.0, "y": 50.0, "width": 0.5, "keypointlabels": ["artifact"]}
    assert (point["original_width"], point["original_height"]) == (80, 40)
    assert [r["value"] for r in anna["result"] if r["type"] == "choices"] == [{"choices": ["3: cat"]}]
    assert [r["value"] for r in ben["result"] if r["type"] == "choices"] == [{"choices": list(exchange.NOTHING.values())}]
    rows, report = exchange.from_label_studio(tasks)
    assert rows == FEEDBACK
    assert report == {"tasks": 2, "annotations": 3, "cancelled": 0, "ignored": {}}


def test_the_labelling_configuration_has_the_controls_that_are_written() -> None:
    controls = {tag.get("name") for tag in ElementTree.fromstring(exchange.LABELING).iter()}
    tasks = exchange.to_label_studio(FEEDBACK, IMAGES, str)
    used = {r[key] for t in tasks for a in t["annotations"] for r in a["result"] for key in ("from_name", "to_name")}
    assert used <= controls and set(payloads.QUESTIONS) <= controls


def test_label_studio_of_another_project() -> None:
    """As Label Studio exports: ids, percentages beyond the edge by rounding, controls of their own, a skipped task."""

    def result(name: str, kind: str, **value: object) -> dict:
        return {"id": "x1", "from_name": name, "to_name": "image", "type": kind, "value": value, "origin": "manual"}

    found = [
        result("kp", "keypointlabels", x=100.2, y=50, width=0.4, keypointlabels=["artifact"]),
        result("kp", "keypointlabels", x=10, y=10, width=0.4, keypointlabels=["nose"]),
        result("box", "rectanglelabels", x=1, y=1, width=2, height=2, rectanglelabels=["hand"]),
        result("overall", "rating", rating=4),
    ]
    annotations = [
        {"id": 1, "completed_by": 7, "lead_time": 6.0, "result": found},
        {"id": 2, "completed_by": {"id": 8, "email": "b@example.org"}, "result": found[3:]},
        {"id": 3, "completed_by": 9, "was_cancelled": True, "result": []},
    ]
    rows, report = exchange.from_label_studio([{"id": 5, "data": {"image": "/data/1.png"}, "annotations": annotations}])
    assert [(r.image_id, r.rater, r.kind, r.seconds) for r in rows] == [
        ("/data/1.png", "7", "points", 3.0),
        ("/data/1.png", "7", "ratings", 3.0),
        ("/data/1.png", "b@example.org", "ratings", 0.0),
    ]
    assert payloads.load(rows[0]) == {"artifact": [[1.0, 0.5]], "misalignment": []}
    assert report == {"tasks": 1, "annotations": 2, "cancelled": 1, "ignored": {"kp (keypointlabels)": 1, "box (rectanglelabels)": 1}}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "dict; expected a list of tasks"),
        ([1], "Label Studio task 0: not as Label Studio exports it"),
        ([{"id": 5, "data": {}}], r"task 5: not as Label Studio exports it \(KeyError: 'image'\)"),
        ([{"id": 5, "data": {"image": "a"}, "annotations": [{}]}], r"task 5: .*'result'"),
    ],
)
def test_what_is_no_export_is_refused(tasks: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exchange.from_label_studio(tasks)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"from_name": "overall", "type": "rating", "value": {"rating": 9}}, "task 5: feedback a/7/ratings: ratings.overall: 9"),
        ({"from_name": "p", "type": "keypointlabels", "value": {"x": "left", "y": 0, "keypointlabels": ["artifact"]}}, "task 5: could not"),
        ({"from_name": "words", "type": "choices", "value": {"choices": ["1: dog"]}}, "task 5: choice '1: dog' is no word of the prompt"),
        ({"from_name": "p", "type": "keypointlabels", "value": {"x": 150, "y": 0, "keypointlabels": ["artifact"]}}, "points.artifact"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(result: dict, message: str) -> None:
    task = {"id": 5, "data": {"image": "a", "prompt": "a cat"}, "annotations": [{"completed_by": 7, "result": [result]}]}
    with pytest.raises(ValueError, match=message):
        exchange.from_label_studio([task])


def test_label_studio_takes_rich_feedback_only() -> None:
    with pytest.raises(ValueError, match="kind side; Label Studio's JSON takes"):
        exchange.to_label_studio([payloads.make("a", "r", "side", {"against": "b", "answer": 0})], IMAGES, str)
    with pytest.raises(ValueError, match="images that are not there: gone"):
        exchange.to_label_studio([replace(GOOD, image_id="gone")], IMAGES, str)
    with pytest.raises(ValueError, match="not those of the prompt of image c"):
        exchange.to_label_studio([replace(FEEDBACK[1], image_id="c")], IMAGES, str)
