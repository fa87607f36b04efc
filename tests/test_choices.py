"""Choices of every published schema to the common record and out again; the small files are written as the sets are published."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from limner.cli import main
from limner.feedback import payloads
from limner.feedback.exchange import write_rows as write_feedback
from limner.images import encode_png
from limner.records import Choice, Image, to_table
from limner.scorers.choices import Choices, generators_of, pairs, problem
from limner.scorers.published import read_choices
from limner.scorers.rows import Dropped
from limner.store import open_step
from test_choice_records import choice


def picture(seed: int, size: int = 8) -> bytes:
    return encode_png(torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)))


def write_json(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def read(name: str, path: Path, **options) -> tuple[list[Choice], list[Dropped]]:
    found = list(read_choices(name, path, **options))
    return [r for r in found if isinstance(r, Choice)], [r for r in found if isinstance(r, Dropped)]


def test_hpd_v1(tmp_path):
    good = {
        "human_preference": 2, "prompt": "a knight", "id": 5, "file_path": ["5_0.jpg", "5_1.jpg", "5_2.jpg"], "user_hash": "u1",
        "contain_name": False,
    }  # fmt: skip
    rows, dropped = read("hpd_v1", write_json(tmp_path / "preference_train.json", [good, {**good, "human_preference": 3}]))
    assert len(rows) == 1 and rows[0].said == (0, 0, 1) and rows[0].kind == "choice"
    assert rows[0].rater == "u1" and rows[0].text == "a knight" and rows[0].files == ("5_0.jpg", "5_1.jpg", "5_2.jpg")
    assert dropped == [Dropped("preference_train.json: row 1", "human_preference points at no image")]


def test_hpd_v2_train_and_test(tmp_path):
    train = [
        {"prompt": "a cat", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
        {"prompt": "a cat", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 1]},
    ]
    rows, dropped = read("hpd_v2", write_json(tmp_path / "train.json", train))
    assert [r.said for r in rows] == [(0, 1)] and dropped[0].reason == "human_preference is not one-hot"
    test = [{"prompt": "a cat", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [1.7, 2.9, 1.4], "raw_annotations": []}]
    rows, _ = read("hpd_v2", write_json(tmp_path / "test.json", test))
    assert rows[0].kind == "ranking" and pairs(rows[0]) == [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.0)], "the lower rank is better"


def test_labels_that_are_not_there_are_said(tmp_path):
    """null in published files: dropped with a reason, as any other label that is no number."""
    test = [{"prompt": "a cat", "image_path": ["a.jpg", "b.jpg"], "rank": [1, None], "raw_annotations": []}]
    rows, _ = read("hpd_v2", write_json(tmp_path / "test.json", test))
    assert [problem(r) for r in rows] == ["label is not a number"]
    votes = {"prompt": "a cat", "path1": "a.jpg", "path2": "b.jpg", "choice_dist": [3, None]}
    rows, dropped = read("hpd_v3", write_json(tmp_path / "v3.json", [votes]), soft_labels=True)
    assert not rows and dropped[0].reason == "choice_dist does not hold the votes for path1 and path2"


def test_hpd_v2_rater_by_rater(tmp_path):
    """Two raters of three images whose ranks add up to the average's order; ranks that order the images the other way round are refused."""
    row = {"prompt": "a cat", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 3, 1]}
    said = [{"rank": [2, 3, 1], "user_hash": "u1"}, {"rank": [1, 2, 1], "user_hash": "u2"}]
    turned, short = [{"rank": [2, 1, 3], "user_hash": "u1"}], [{"rank": [1, 2], "user_hash": "u1"}]
    source = [{**row, "raw_annotations": r} for r in (said, turned, short)]
    rows, dropped = read("hpd_v2", write_json(tmp_path / "test.json", source), each_rater=True)
    assert [(r.id, r.rater, r.said, r.kind) for r in rows] == [
        ("hpd_v2-0000000-0", "u1", (2, 3, 1), "ranking"), ("hpd_v2-0000000-1", "u2", (1, 2, 1), "ranking"),
    ]  # fmt: skip
    assert [d.reason for d in dropped] == ["raw_annotations contradict the averaged rank", "raw_annotations do not rank every image"]
    with pytest.raises(ValueError, match=r"row 0: no raw_annotations \(found: prompt, image_path, rank\); leave each_rater out"):
        read("hpd_v2", write_json(tmp_path / "test.json", [row]), each_rater=True)
    pair = {"prompt": "a cat", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1], "user_hash": "u3"}
    assert read("hpd_v2", write_json(tmp_path / "train.json", [pair]))[0][0].rater == "u3"
    with pytest.raises(ValueError, match=r"each_rater: .*train\.json is no test\.json"):
        read("hpd_v2", tmp_path / "train.json", each_rater=True)


def test_hpd_v3_does_not_leave_the_preferred_image_first(tmp_path):
    source = [
        {
            "prompt": f"prompt {i}", "path1": f"{i}/good.jpg", "path2": f"{i}/bad.jpg", "confidence": 0.9 + 0.01 * (i % 10),
            "choice_dist": [9, 3], "model1": "flux", "model2": "sd",
        }
        for i in range(40)
    ]  # fmt: skip
    path = write_json(tmp_path / "train.json", [*source, {**source[0], "path2": "0/good.jpg"}])
    rows, dropped = read("hpd_v3", path)
    assert [d.reason for d in dropped] == ["both images are the same"]
    for row in rows:
        winner = row.said.index(1.0)
        assert row.files[winner].endswith("good.jpg") and row.generators[winner] == "flux" and row.generators[1 - winner] == "sd"
    assert 8 < sum(row.said[0] for row in rows) < 32, "about half of the winners stand first"
    soft, _ = read("hpd_v3", path, soft_labels=True)
    assert sorted(soft[0].said) == [0.25, 0.75]
    sure, unsure = read("hpd_v3", path, min_confidence=0.95)
    assert len(sure) == 20 and {d.reason for d in unsure} == {"both images are the same", "confidence below 0.95"}


def pick_a_pic(path: Path, images: bool = True) -> Path:
    rows = [
        {"caption": "a dog", "label_0": 1.0, "label_1": 0.0, "has_label": True, "jpg_0": picture(0), "jpg_1": picture(1), "user_id": 3},
        {"caption": "a dog", "label_0": 0.5, "label_1": 0.5, "has_label": True, "jpg_0": picture(0), "jpg_1": picture(2), "user_id": 4},
        {"caption": "a dog", "label_0": None, "label_1": None, "has_label": False, "jpg_0": picture(0), "jpg_1": picture(3), "user_id": 4},
        {"caption": "a fox", "label_0": 0.0, "label_1": 1.0, "has_label": True, "jpg_0": picture(4), "jpg_1": b"torn", "user_id": 4},
        {"caption": "a fox", "label_0": 0.0, "label_1": 1.0, "has_label": True, "jpg_0": picture(4), "jpg_1": picture(5), "user_id": 5},
    ]
    for i, row in enumerate(rows):
        row |= {"image_0_uid": f"u{2 * i}", "image_1_uid": f"u{2 * i + 1}", "model_0": "sdxl", "model_1": "dreamlike", "ranking_id": i}
        row |= {"are_different": True, "best_image_uid": "", "num_example_per_prompt": 3, "image_0_url": "", "image_1_url": ""}
        if not images:
            row.pop("jpg_0"), row.pop("jpg_1")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_pick_a_pic_with_images_and_without(tmp_path, capsys):
    path = pick_a_pic(tmp_path / "train-00000-of-00001.parquet")
    assert main(["scorer", "import", "--format", "pick_a_pic", "--source", str(path), "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["rows"], report["pairs"], report["ties"], report["prompts"], report["raters"]) == (3, 3, 1, 2, 3)
    assert report["generators"] == ["dreamlike", "sdxl"]
    assert {k: v["rows"] for k, v in report["dropped"].items()} == {"has_label is false": 1, "image is not readable": 1}
    said = capsys.readouterr().out
    assert "dropped 1: has_label is false (train-00000-of-00001.parquet: row 2)" in said
    choices = Choices(tmp_path / "out")
    assert choices.encoded(1) == [picture(0), picture(2)] and choices.rows[1].images == ()
    assert choices.pictures(2)[0].size == (8, 8)
    assert generators_of(choices.rows) == {"sdxl", "dreamlike"}
    bare, _ = read("pick_a_pic", pick_a_pic(tmp_path / "bare.parquet", images=False))
    assert len(bare) == 4 and bare[0].images == () and bare[0].files == ("u0", "u1")


def test_imagereward_with_ties_as_equal_ranks(tmp_path):
    source = [
        {"id": "005658-0040", "prompt": "a portal", "generations": ["a.webp", "b.webp", "c.webp", "d.webp"], "ranking": [1, 2, 2, 3]},
        {"id": "005658-0041", "prompt": "a door", "generations": ["a.webp", "a.webp"], "ranking": [1, 2]},
    ]
    rows, dropped = read("imagereward", write_json(tmp_path / "test.json", source))
    assert [p for *_, p in pairs(rows[0])] == [1, 1, 1, 0.5, 1, 1]
    assert dropped[0].reason == "an image is there twice"


SAMPLES = [  # prompt_id, image, rank; of the second prompt an image is missing
    ("1-0", "images/train/train_1/a.webp", 2), ("1-0", "images/train/train_1/b.webp", 1), ("1-0", "images/train/train_1/c.webp", 2),
    ("2-0", "images/train/train_1/d.webp", 1),
    ("3-0", "images/train/train_1/e.webp", 2), ("3-0", "images/train/train_1/f.webp", 1),
]  # fmt: skip
AMOUNTS = {"1-0": 3, "2-0": 2, "3-0": 2}


def test_imagerewarddb_an_image_a_row(tmp_path):
    """The JSON in the dataset's archives."""
    source = [
        {
            "image_path": path, "prompt_id": p, "prompt": f"prompt {p}", "classification": "People", "image_amount_in_total": AMOUNTS[p],
            "rank": rank, "overall_rating": 5, "image_text_alignment_rating": 5, "fidelity_rating": 6,
        }
        for p, path, rank in SAMPLES
    ]  # fmt: skip
    rows, dropped = read("imagereward", write_json(tmp_path / "train_1.json", source))
    assert [(r.text, r.said, r.kind) for r in rows] == [("prompt 1-0", (2, 1, 2), "ranking"), ("prompt 3-0", (2, 1), "ranking")]
    assert rows[0].files[1] == "images/train/train_1/b.webp"
    assert dropped == [Dropped("train_1.json: row 3", "not all images of the prompt are there")]


@pytest.mark.parametrize("shape", ["", "_group", "_pair"])
def test_imagerewarddb_as_datasets_saves_it(tmp_path, shape, capsys):
    """The features of the dataset's loading script, written by the package datasets; the images come along."""
    datasets = pytest.importorskip("datasets")
    text, small, image = datasets.Value("string"), datasets.Value("int8"), datasets.Image()
    shared = {"prompt_id": text, "prompt": text, "classification": text}
    drawn = {path: {"path": path, "bytes": picture(i)} for i, (_, path, _) in enumerate(SAMPLES)}
    groups = {p: [(drawn[path], rank) for q, path, rank in SAMPLES if p == q] for p in ("1-0", "3-0")}
    of = {p: {"prompt_id": p, "prompt": f"prompt {p}", "classification": "People"} for p in groups}
    if shape == "_group":
        features = {**shared, "image": datasets.Sequence(image), "rank": datasets.Sequence(small)}
        found = [{**of[p], "image": [i for i, _ in g], "rank": [r for _, r in g]} for p, g in groups.items()]
    elif shape == "_pair":
        features = {**shared, "img_better": image, "img_worse": image}
        found = [{**of[p], "img_better": g[1][0], "img_worse": i} for p, g in groups.items() for i, r in g if r == 2]
    else:
        features = {"image": image, **shared, "image_amount_in_total": small, "rank": small}
        found = [{**of[p], "image": i, "image_amount_in_total": len(g), "rank": r} for p, g in groups.items() for i, r in g]
    datasets.Dataset.from_list(found, features=datasets.Features(features)).to_parquet(tmp_path / "train-00000.parquet")
    words = ["--format", "imagereward", "--source", str(tmp_path / "train-00000.parquet"), "--output_dir", str(tmp_path / "out")]
    assert main(["scorer", "import", *words]) == 0
    choices = Choices(tmp_path / "out")
    better = {
        (row.text, choices.encoded(n)[i if p == 1 else j]) for n, row in enumerate(choices.rows) for i, j, p in pairs(row) if p != 0.5
    }
    assert better == {("prompt 1-0", picture(1)), ("prompt 3-0", picture(5))}
    assert [len(r.files) for r in choices.rows] == ([2, 2, 2] if shape == "_pair" else [3, 2])


def test_evalmuse_ranks_images_of_a_prompt_by_their_mean_rating(tmp_path):
    shared = {"prompt_id": "1", "type": "real", "element_score": {"cat (animal)": [1, 1]}, "split_confidence": [0], "prompt": "a cat"}
    source = [
        {**shared, "img_path": "SDXL/1.png", "total_score": [5, 4, 4], "promt_meaningless": [0, 0, 0]},
        {**shared, "img_path": "Kolors/1.png", "total_score": [2, 2], "promt_meaningless": [0, 1, 0]},
        {**shared, "img_path": "SD15/1.png", "total_score": [5, 4, 4], "promt_meaningless": [0, 0, 0]},
        {**shared, "prompt": "asdf", "img_path": "SD15/2.png", "total_score": [3], "promt_meaningless": [1, 1, 0]},
    ]
    rows, dropped = read("evalmuse", write_json(tmp_path / "train_list.json", source))
    assert rows[0].said == (1, 3, 1) and rows[0].generators == ("SDXL", "Kolors", "SD15")
    assert dropped == [Dropped("train_list.json: row 3", "most raters call the prompt meaningless")]


def test_another_format_is_named_by_row_and_field(tmp_path):
    path = write_json(tmp_path / "x.json", [{"prompt": "a", "generations": [], "ranking": []}])
    with pytest.raises(ValueError, match=r"x\.json: row 0: no file_path \(found: prompt, generations, ranking\); is it another format\?"):
        read("hpd_v1", path)
    with pytest.raises(ValueError, match=r"x\.json: row 0: human_preference is list; is it another format\?"):
        read("hpd_v1", write_json(path, [{"prompt": "a", "file_path": [], "human_preference": [1, 0]}]))
    with pytest.raises(ValueError, match=r"x\.json: dict; expected a list of rows"):
        read("imagereward", write_json(path, {"a": 1}))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        read("evalmuse", path)
    with pytest.raises(ValueError, match=r"missing\.json cannot be read"):
        read("evalmuse", tmp_path / "missing.json")
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: no column label_0, label_1, image_0_uid, image_1_uid \(found: caption\)"):
        read("pick_a_pic", tmp_path / "x.parquet")


def import_hpd(folder: Path, *options: str) -> int:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(3):
        (folder / f"images/{i}.png").write_bytes(picture(i))
    (folder / "images/3.png").write_bytes(picture(3)[:20])
    source = [
        {"prompt": f"prompt {n}", "file_path": [f"{i}.png" for i in files], "human_preference": 1, "user_hash": "u"}
        for n, files in enumerate([(0, 1, 2), (0, 3), (1, 9), (2, 1), (1,)])
    ]
    path = write_json(folder / "preference_train.json", source)
    return main(["scorer", "import", "--format", "hpd_v1", "--source", str(path), *options])


def test_images_are_checked_and_read_from_their_folder(tmp_path, capsys):
    out = tmp_path / "out"
    assert import_hpd(tmp_path, "--images", str(tmp_path / "images"), "--output_dir", str(out), "--rows_per_shard", "1") == 0
    report = json.loads((out / "report.json").read_text())
    dropped = {k: (v["rows"], v["first"]) for k, v in report["dropped"].items()}
    assert dropped == {
        "human_preference points at no image": (1, ["preference_train.json: row 4"]),
        "image file is missing": (1, ["hpd_v1-0000002"]),
        "image is not readable": (1, ["hpd_v1-0000001"]),
    }
    choices = Choices(out)
    assert [len(choices.encoded(i)) for i in range(2)] == [3, 2] and choices.encoded(1) == [picture(2), picture(1)]
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"row hpd_v1-0000000: .*0\.png cannot be read .*; set images to the folder"):
        Choices(out).encoded(0)
    assert Choices(out, images=tmp_path / "elsewhere").encoded(0)[0] == picture(0)
    assert import_hpd(tmp_path, "--images", str(tmp_path / "elsewhere"), "--output_dir", str(out)) == 2, "a folder belongs to one config"
    assert "config.images: was" in capsys.readouterr().err


def test_embedded_images_need_no_folder_any_more(tmp_path):
    out = tmp_path / "out"
    assert import_hpd(tmp_path, "--images", str(tmp_path / "images"), "--output_dir", str(out), "--embed", "true") == 0
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    assert Choices(out).encoded(1) == [picture(2), picture(1)]


def test_a_lost_shard_is_made_again_and_limit_takes_the_first_rows(tmp_path):
    out = tmp_path / "out"
    options = ["--images", str(tmp_path / "images"), "--output_dir", str(out), "--rows_per_shard", "1", "--embed", "true"]
    assert import_hpd(tmp_path, *options) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for name in ("part-00001.parquet", "part-00001.parquet.sha256"):
        (out / name).unlink()
    assert import_hpd(tmp_path, *options) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert import_hpd(tmp_path, "--output_dir", str(tmp_path / "few"), "--limit", "2") == 0
    assert [r.id for r in Choices(tmp_path / "few").rows] == ["hpd_v1-0000000", "hpd_v1-0000001"]


def test_images_that_came_later_are_in_a_second_import(tmp_path):
    """First two of the eight rows' images are there, then all, then three: the folder holds what the report counts, in shards of two."""
    rows = [{"prompt": f"p{i}", "file_path": [f"{i}a", f"{i}b"], "human_preference": 0} for i in range(8)]
    (tmp_path / "images").mkdir()
    source = str(write_json(tmp_path / "t.json", rows))
    words = ["scorer", "import", "--format", "hpd_v1", "--source", source, "--output_dir", str(tmp_path / "out")]
    for there in ((0, 5), range(8), (1, 2, 6)):
        for i in range(8):
            for side in "ab":
                (tmp_path / "images" / f"{i}{side}").unlink(missing_ok=True)
                if i in there:
                    (tmp_path / "images" / f"{i}{side}").write_bytes(picture(i))
        assert main([*words, "--images", str(tmp_path / "images"), "--rows_per_shard", "2"]) == 0
        assert [r.text for r in Choices(tmp_path / "out").rows] == [f"p{i}" for i in there]
        assert json.loads((tmp_path / "out/report.json").read_text())["rows"] == len(there)


def test_a_set_of_which_nothing_is_left_is_an_error(tmp_path, capsys):
    path = write_json(tmp_path / "t.json", [{"prompt": "a", "file_path": ["x"], "human_preference": 0}])
    assert main(["scorer", "import", "--format", "hpd_v1", "--source", str(path), "--output_dir", str(tmp_path / "o")]) == 2
    assert "no row is left (dropped: fewer than two images: 1)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a finished folder of choices; make it with `limner scorer import`"):
        Choices(tmp_path / "o")
    assert main(["scorer", "import", "--source", str(path)]) == 2
    assert "output_dir: not set" in capsys.readouterr().err
    assert main(["scorer", "import", "--formt", "hpd_v1"]) == 2
    assert "unknown key formt; did you mean format?" in capsys.readouterr().err


def test_export_to_pick_a_pic_and_back(tmp_path):
    rows = [
        choice([1, 2, 2], "ranking", id="a", images=(picture(0), picture(1), picture(1)), generators=("x", "y", "z"), rater="anna"),
        choice([0, 1], id="b", text="a fox", prompt_id="q", images=(picture(2), picture(3)), files=("s", "t")),
    ]
    step = open_step(tmp_path / "in", "choices", {}, {})
    step.write(0, to_table(Choice, rows))
    step.finish({})
    assert main(["scorer", "export", "--choices", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 0
    table = pq.read_table(tmp_path / "out/part-00000.parquet")
    published = """are_different bool best_image_uid string caption string created_at timestamp[ns] has_label bool image_0_uid string
        image_0_url string image_1_uid string image_1_url string jpg_0 binary jpg_1 binary label_0 double label_1 double model_0 string
        model_1 string ranking_id int64 user_id int64 num_example_per_prompt int64 __index_level_0__ int64"""
    assert " ".join(f"{f.name} {f.type}" for f in table.schema) == " ".join(published.split())
    assert table.column("are_different").to_pylist() == [True, True, False, True]
    assert table.column("best_image_uid").to_pylist() == ["0.png", "0.png", "tie", "t"]
    assert table.column("num_example_per_prompt").to_pylist() == [3, 3, 3, 1]
    back, dropped = read("pick_a_pic", tmp_path / "out")
    assert not dropped and [r.said for r in back] == [(1, 0), (1, 0), (0.5, 0.5), (0, 1)]
    assert back[3].images == rows[1].images and back[2].generators == ("y", "z")


def test_our_own_feedback_becomes_choices(tmp_path, capsys):
    """A best of three, a ranking with a tie, a side-by-side answer, ratings; images that are not there, and images of two prompts."""
    step = open_step(tmp_path / "pool", "pool", {}, {})
    shown = [
        Image(id=f"{p}/{k}", prompt_id=p, text=f"prompt {p}", image=picture(k), k=k, model="m" if p == "a" else "")
        for p in "ab"
        for k in range(3)
    ]
    step.write(0, to_table(Image, shown))
    step.finish({})
    rows = [
        payloads.make("a/0", "anna", "choice", {"images": ["a/0", "a/1", "a/2"], "ranks": [2, 1, 2]}, id="1"),
        payloads.make("b/0", "anna", "choice", {"images": ["b/0", "b/1", "b/2"], "ranks": [1, 3, 1]}, id="2"),
        payloads.make("b/0", "otto", "side", {"against": "b/1", "answer": -2}, id="3"),
        payloads.make("b/0", "otto", "choice", {"images": ["b/0", "c/1"], "ranks": [1, 2]}, id="4"),
        payloads.make("a/1", "otto", "choice", {"images": ["a/1", "b/1"], "ranks": [1, 2]}, id="5"),
        payloads.make("a/1", "otto", "ratings", {"overall": 3}, id="6"),
        payloads.make("a/0", "otto", "ratings", {"overall": 2, "alignment": 5}, id="7"),
        payloads.make("a/0", "anna", "ratings", {"overall": 5}, id="8"),
        payloads.make("a/2", "anna", "ratings", {"overall": 3}, id="9"),
        payloads.make("b/2", "anna", "ratings", {"overall": 5}, id="10"),
        payloads.make("b/1", "anna", "ratings", {"alignment": 5}, id="11"),
        payloads.make("c/1", "anna", "ratings", {"overall": 5}, id="12"),
    ]
    write_feedback(tmp_path / "feedback.jsonl", rows)
    options = ["--source", str(tmp_path / "feedback.jsonl"), "--images", str(tmp_path / "pool"), "--output_dir", str(tmp_path / "out")]
    assert main(["scorer", "import", "--format", "feedback", *options]) == 0
    choices = Choices(tmp_path / "out")
    assert [(r.kind, r.said, r.rater) for r in choices.rows] == [
        ("choice", (0, 1, 0), "anna"), ("ranking", (1, 3, 1), "anna"), ("choice", (0, 1), "otto"), ("ranking", (2, 1, 2), ""),
    ]  # fmt: skip
    assert choices.rows[3].files == ("a/1", "a/0", "a/2"), "means 3, 3.5 and 3"
    assert choices.rows[0].generators == ("m", "m", "m") and choices.rows[1].generators == ()
    assert choices.encoded(2) == [picture(0), picture(1)]
    said = capsys.readouterr().out
    assert "dropped 2: image is not in the folder of images (feedback 4, feedback ratings/c/1)" in said
    assert "dropped 1: only one image of the prompt is rated (feedback ratings/b/overall)" in said
    assert "dropped 1: images of different prompts" in said
