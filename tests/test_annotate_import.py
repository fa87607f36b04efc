"""Imports of RichHF-18K by the command: records counted, what is missing reported, images from Pick-a-Pic; exports to Label Studio."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import pyarrow as pa
import pyarrow.parquet as pq

import study as s
from limner.cli import main
from limner.feedback import answers, exports, payloads, richhf, server
from limner.feedback.richhf import RichFeedback
from limner.feedback.study import load_study
from limner.records import Image
from limner.store import read_rows

TEXTS = {f"i{n}": f"a red cat number {n}" for n in range(4)}


@pytest.fixture
def site(tmp_path: Path):
    return s.site(tmp_path, TEXTS, {"overlap": 2})


def test_an_import_counts_records_and_writes_its_whole_report(site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixty records of which 56 are of no image of the study; all ids are in the report, whose print has their number."""
    rows = [RichFeedback(image_id=i, overall=0.25, labels=(1, 0, 1, 1, 1)) for i in [*TEXTS, *(f"other-{n:03d}" for n in range(56))]]
    file, config = tmp_path / "rich.tfrecord", str(tmp_path / "study.yaml")
    richhf.write(file, rows)
    richhf.write(tmp_path / "shorter.tfrecord", rows[:-1])
    cut = file.read_bytes()[: (tmp_path / "shorter.tfrecord").stat().st_size]
    assert cut == (tmp_path / "shorter.tfrecord").read_bytes(), "cut between two records"
    (tmp_path / "cut.tfrecord").write_bytes(cut)
    command = ["annotate", "import", config, "--file"]
    assert main([*command, str(tmp_path / "cut.tfrecord"), "--expected", "60"]) == 2
    assert "after 59 records; expected 60" in capsys.readouterr().err
    assert not (tmp_path / "run/import-cut.tfrecord.json").exists()
    assert main([*command, str(tmp_path / "x.csv"), "--expected=60"]) == 2 and "x.csv is no .tfrecord" in capsys.readouterr().err
    assert main([*command, str(file), "--expected", "60"]) == 0
    said = capsys.readouterr().out
    assert "without_prompt: 56" in said and "imported 4" in said and "other-0" not in said
    report = json.loads((tmp_path / "run/import-rich.tfrecord.json").read_text())
    assert report["without_prompt"] == [f"other-{n:03d}" for n in range(56)] and len(report["missing"]) == 60 * 5
    assert report["answers"] == {"imported": 4, "no such item": 56}


def test_richhf_finds_its_images_in_pick_a_pic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four rows two have an image in the first file and one in the second, whose caption has a word too many; one has none."""
    rows = [
        RichFeedback(image_id="a", overall=0.25, labels=(1, 0), artifact_map=richhf.encode_map([[0.0, 1.0]])),
        RichFeedback(image_id="b", overall=0.5, labels=(1, 1)),
        RichFeedback(image_id="gone", overall=0.5, labels=(1, 1)),
        RichFeedback(image_id="d", overall=1.0, labels=(1, 1)),
    ]
    richhf.write(tmp_path / "dev.tfrecord", rows)
    colours = {name: s.png((n, n, 90)) for n, name in enumerate("abcd")}
    (tmp_path / "pick").mkdir()
    for n, (left, right, caption) in enumerate([("a", "b", "red cat"), ("c", "d", "a red cat")]):
        columns = {"image_0_uid": [left], "image_1_uid": [right], "caption": [caption]}
        table = pa.table({**columns, "jpg_0": [colours[left]], "jpg_1": [colours[right]]})
        pq.write_table(table, tmp_path / f"pick/{n}.parquet")
    s.study_of(tmp_path, {"overlap": 1, "images": {"from": str(tmp_path / "run/pick_a_pic")}})
    command = ["annotate", "import", str(tmp_path / "study.yaml"), "--file", str(tmp_path / "dev.tfrecord"), "--pick_a_pic"]
    assert main([*command, str(tmp_path / "pick"), "--expected", "4"]) == 0
    said = capsys.readouterr().out
    assert "without_image: 1" in said and "labels_not_of_caption: 1" in said and "imported 3, no such item 1" in said
    report = json.loads((tmp_path / "run/import-dev.tfrecord.json").read_text())
    assert report["images"] == 3 and report["without_image"] == ["gone"] and report["labels_not_of_caption"] == [["d", 3, 2]]
    images = {i.id: (i.text, i.image) for i in read_rows(tmp_path / "run/pick_a_pic", Image)}
    assert images == {"a": ("red cat", colours["a"]), "b": ("red cat", colours["b"]), "d": ("a red cat", colours["d"])}
    study = load_study(tmp_path / "study.yaml")
    given = {g.key: g.found for g in answers.given(study, server.prepare(study))}
    assert given["a"] == {"words": {"tokens": ["red", "cat"], "misaligned": [1]}, "ratings": {"overall": 2}}
    assert given["d"] == {"ratings": {"overall": 5}}
    joined = exports.read_consolidated(tmp_path / "run/richhf")
    assert [(r.image_id, r.prompt, r.labels) for r in joined] == [
        ("a", "red cat", (1, 0)),
        ("b", "red cat", (1, 1)),
        ("d", "a red cat", ()),
    ]
    assert joined[0].artifact_map == rows[0].artifact_map
    (tmp_path / "pick/1.parquet").unlink()
    assert main([*command, str(tmp_path / "pick")]) == 2 and "another configuration" in capsys.readouterr().err
    for other, message in (("empty", "no .parquet in it"), ("gone.parquet", "cannot be read as parquet")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        out = ["--output_dir", str(tmp_path / f"out-{other}")]
        assert main([*command, str(tmp_path / other), *out]) == 2 and message in capsys.readouterr().err
    assert main(["annotate", "import", str(tmp_path / "study.yaml"), "--file", "x.csv", "--pick_a_pic", "y.parquet"]) == 2
    assert "joined with a .tfrecord of RichHF-18K, and x.csv is none" in capsys.readouterr().err


def test_label_studio_gets_the_configuration_of_what_it_is_given(site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, database = site
    rater = s.sign_in(s.client(study, database), study, database, "a")
    assert s.answer(rater, s.rich([[0.5, 0.5]], [1]), "label-studio-1").status_code == 200
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    served = boss.get("/admin/export/label-studio.xml")
    assert served.headers["content-type"] == "application/xml" and "label-studio.xml" in boss.get("/admin").text
    database.engine.dispose()
    assert main(["annotate", "export", str(tmp_path / "study.yaml"), "--file", str(tmp_path / "tasks.json")]) == 0
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    written = (tmp_path / "tasks.xml").read_bytes()
    assert written == served.content
    root = ElementTree.fromstring(written)
    controls = {tag.get("name"): (tag.tag.lower(), tag.get("toName")) for tag in root.iter() if tag.get("name")}
    for result in task["annotations"][0]["result"]:
        assert controls[result["from_name"]] == (result["type"], result["to_name"])
    assert {v[1:] for tag in root.iter() if (v := tag.get("value", "")).startswith("$")} <= task["data"].keys()


def test_a_choice_comes_back_as_it_was_shown_and_what_is_refused_is_named(tmp_path: Path) -> None:
    """The order that a rater saw is part of an answer; of a five-level answer a forced study says why not, and whose it was."""
    s.image_folder(tmp_path / "images", {"a": "the same", "b": "the same", "c": "the same"})
    study = s.study_of(tmp_path, {"task": "choice", "images": {"from": str(tmp_path / "images"), "each": 3}})
    database = server.prepare(study)
    payload = {"images": ["a", "b", "c"], "ranks": [2, 1, 2], "shown": ["c", "a", "b"]}
    assert answers.import_feedback(study, database, [payloads.make("a", "anna", "choice", payload)]) == {"imported": 1}
    (back,) = answers.feedback(answers.given(study, database))
    assert json.loads(back.payload) == payload
    s.image_folder(tmp_path / "other", {"d": "the same", "e": "the same", "f": "the same"})
    values = {"task": "side", "levels": "forced", "output_dir": str(tmp_path / "forced")}
    forced = s.study_of(tmp_path, {**values, "images": {"from": str(tmp_path / "images"), "against": str(tmp_path / "other")}})
    refused: list[dict[str, str]] = []
    rows = [payloads.make("a", "anna", "side", {"against": "d", "answer": 1, "left": "a"})]
    counts = answers.import_feedback(forced, server.prepare(forced), rows, refused)
    assert list(counts.values()) == [1] and refused == [{"image_id": "a", "rater": "anna", "why": next(iter(counts))}]
    assert "imported" not in counts
    print(counts)


def feedback_of(image: str, rater: str, kind: str, payload: dict) -> object:
    return payloads.make(image, rater, kind, payload, 1.0)


def test_what_an_import_cannot_tell_is_reported(site) -> None:
    """Words of another prompt; a second answer of one rater, of which the first counts; the same row twice is one."""
    study, database = site
    ratings = [{"plausibility": n, "alignment": n, "aesthetics": n, "overall": n} for n in (2, 4)]
    words = {"tokens": ["a", "woman"], "misaligned": [1]}
    rows = [
        feedback_of("i0", "anon", "ratings", ratings[0]), feedback_of("i0", "anon", "ratings", ratings[1]),
        feedback_of("i0", "anon", "ratings", ratings[0]), feedback_of("i1", "anna", "words", words),
    ]  # fmt: skip
    refused: list[dict[str, str]] = []
    counts = answers.import_feedback(study, database, rows, refused)  # type: ignore[arg-type]
    assert counts == {"imported": 1, "a second answer of this rater about ratings": 1, "its words are not those of the prompt": 1}
    assert {(r["image_id"], r["rater"]) for r in refused} == {("i0", "anon"), ("i1", "anna")}
    (given,) = answers.given(study, database)
    assert given.found["ratings"]["overall"] == 2


def test_images_whose_names_a_tfrecord_cannot_have(tmp_path: Path) -> None:
    """Names with a suffix, as a folder's images have, and with a slash, as a pool's: out without them, and in again to the same images."""
    folder = s.image_folder(tmp_path / "images", TEXTS)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    ids = ["0.png", "a/1", "b", "c/2.jpg"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({**row, "id": id}) + "\n" for row, id in zip(lines, ids)))
    study = s.study_of(tmp_path, {"overlap": 2})
    database = server.prepare(study)
    rows = [feedback_of(id, "anna", "ratings", dict.fromkeys(("plausibility", "alignment", "aesthetics", "overall"), 2)) for id in ids]
    answers.import_feedback(study, database, rows)  # type: ignore[arg-type]
    exports.write(study, database, tmp_path / "out.tfrecord")
    assert {row.image_id for row in richhf.read(tmp_path / "out.tfrecord")[0]} == {"0", "a_1", "b", "c_2"}
    back, _ = exports.read(tmp_path / "out.tfrecord", study, database)
    assert {row.image_id for row in back} == set(ids)
