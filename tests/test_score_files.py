"""`limner score --images`: what is read, what is written, going on after a stop, bad input."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as Picture

from chain import clip_scorer, photo_folder
from limner.cli import main
from limner.images import decode, to_tensor
from limner.inputs import iter_images
from limner.recipe import ScorerSpec
from limner.records import Image, Score
from limner.scorers import clip, files, steps
from limner.steps.direct import parse_scorer
from limner.steps.run import load_scorer
from limner.store import read_rows, sha256


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_scorer(tmp_path_factory.mktemp("weights") / "clip")


def score(weights: Path, images: Path, out: Path, *options: str) -> int:
    both = [f"mine={weights},kind=clip", f"clip_cosine={weights}"]
    return main(["score", "--images", str(images), "--scorers", *both, "--output_dir", str(out), "--device", "cpu", *options])


def rows(out: Path, scorer: str = "mine") -> dict[str, Score]:
    return {s.image_id: s for s in read_rows(out, Score) if s.scorer == scorer}


def png(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_scores_as_pairs_one_at_a_time(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures of six sizes in batches of four: each as when it is alone; what a manifest must say of the scorers."""
    photos = photo_folder(tmp_path / "photos")
    assert score(weights, photos, tmp_path / "out", "--batch_size", "4") == 0
    scorer = clip.load_scorer(weights, "mine")
    found = rows(tmp_path / "out")
    texts = {v["file_name"]: v["text"] for v in map(json.loads, (photos / "metadata.jsonl").read_text().splitlines())}
    assert list(found) == list(texts)
    for name, text in texts.items():
        alone = scorer(to_tensor([decode((photos / name).read_bytes())]), [text]).item()
        assert found[name].score == pytest.approx(alone, rel=1e-5)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["config"]["scorers"]["mine"] == {
        "revision": scorer.revision, "metric": scorer.metric, "range": [pytest.approx(r, rel=1e-5) for r in scorer.range],
        "higher_is_better": True, "comparable_across_prompts": False, "needs_prompt": True,
        "files": {"model.safetensors": sha256(weights / "model.safetensors")},
    }  # fmt: skip
    assert manifest["counts"] == {"images": 6, "missing": {"mine": 0, "clip_cosine": 0}, "prompts_cut": {}}
    table = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert [t["text"] for t in table] == list(texts.values()) and float(table[2]["mine"]) == pytest.approx(found["2.png"].score, rel=1e-6)
    assert len({t["prompt_id"] for t in table}) == len(set(texts.values()))
    assert "mine: " in (out := capsys.readouterr().out) and " over 6 images" in out and "scores.csv" in out


def test_a_parquet_scores_as_the_folder(weights: Path, tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    images = list(iter_images(photos))
    table = pa.table({"id": [i.id for i in images], "caption": [i.text for i in images], "picture": [i.image for i in images],
                      "split": ["train", "test"] * 3, "prompt_id": list("aabbcc")})  # fmt: skip
    pq.write_table(table, tmp_path / "all.parquet")
    assert score(weights, photos, tmp_path / "a") == 0
    assert score(weights, tmp_path / "all.parquet", tmp_path / "b", "--image_column", "picture", "--images_per_shard", "2") == 0
    assert {k: v.score for k, v in rows(tmp_path / "a").items()} == {
        k: pytest.approx(v.score, rel=1e-5) for k, v in rows(tmp_path / "b").items()
    }
    assert [s.prompt_id for s in rows(tmp_path / "b").values()] == list("aabbcc")


def test_plain_folders_and_single_images(tmp_path: Path) -> None:
    """Captions from files beside them where there are any; names by path; hidden files are none."""
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "deep/a.jpg", ".hidden.png"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "b.txt").write_text("a man\n")
    found = list(iter_images(tmp_path))
    assert [(i.id, i.text, i.image == png(1)) for i in found] == [("b.png", "a man", True), ("deep/a.jpg", "", True)]
    assert found[1].prompt_id == "" and len(found[0].prompt_id) == 16
    (single,) = iter_images(tmp_path / "b.png")
    assert single == found[0]
    assert [i.image for i in iter_images(tmp_path, read=lambda n: n == 1)] == [b"", png(1)]
    assert [i.image for i in iter_images(tmp_path, read=None)] == [b"", b""]


def test_it_goes_on_where_it_stopped(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second of three shards: the first is not scored again, and the bytes are those of a run without a stop."""
    photos = photo_folder(tmp_path / "photos")
    options = ("--images_per_shard", "2", "--batch_size", "2")
    assert score(weights, photos, tmp_path / "whole", *options) == 0
    done: list[str] = []
    plain = steps.score_images

    def stopped(images: list[Image], *rest: object) -> list[Score]:
        if done:
            raise KeyboardInterrupt
        done.extend(i.id for i in images)
        return plain(images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "score_images", stopped)
    assert score(weights, photos, tmp_path / "out", *options) == 130
    assert done == ["0.png", "1.png"] and not (tmp_path / "out/scores.csv").exists()
    later: list[str] = []
    monkeypatch.setattr(files, "score_images", lambda images, *rest: (later.extend(i.id for i in images), plain(images, *rest))[1])
    assert score(weights, photos, tmp_path / "out", *options) == 0
    assert later == ["2.png", "3.png", "4.png", "5.png"]
    for name in ("part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "manifest.json", "scores.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parts_make_the_whole(weights: Path, tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    options = ("--images_per_shard", "1")
    assert score(weights, photos, tmp_path / "whole", *options) == 0
    for part in ("1/2", "0/2"):
        assert not (tmp_path / "out/scores.csv").exists()
        assert score(weights, photos, tmp_path / "out", *options, "--shard", part) == 0
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_each_image_is_decoded_once_and_each_prompt_read_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorers = [clip.load_scorer(weights, "a"), clip.load_scorer(weights, "b", "clip_cosine")]
    decoded: list[bytes] = []
    monkeypatch.setattr(steps, "decode", lambda data, where: (decoded.append(data), decode(data, where))[1])
    read: list[int] = []
    for scorer in scorers:
        encode = scorer.model.get_text_features
        monkeypatch.setattr(scorer.model, "get_text_features", lambda input_ids, f=encode: (read.append(1), f(input_ids=input_ids))[1])
    images = [Image(id=str(i), prompt_id="p", text=f"a man {i % 2}", image=png(i)) for i in range(6)]
    steps.score_images(images, scorers, batch_size=2)
    assert sorted(decoded) == sorted(i.image for i in images)
    assert len(read) == 4  # two prompts, two scorers


def test_what_cannot_be_scored_is_missing_with_its_reason(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated file, one that is no image, an empty prompt, a null image: the rest is scored."""
    whole = png(3)
    values = [(png(0), "a man"), (whole[: len(whole) // 2], "a man"), (b"<html>", "a man"), (png(1), " "), (None, "a man"), (png(2), None)]
    pq.write_table(pa.table({"image": [v[0] for v in values], "text": [v[1] for v in values]}), tmp_path / "x.parquet")
    assert score(weights, tmp_path / "x.parquet", tmp_path / "out") == 0
    found = list(rows(tmp_path / "out").values())
    assert [f.score is not None for f in found] == [True, False, False, False, False, False]
    reasons = [f.reason or "" for f in found]
    assert reasons[0] == "" and reasons[1].startswith("the image: not a readable image (")
    assert reasons[2:] == [
        "the image: not a readable image (of no known format)", "there is no prompt", "there is no image", "there is no prompt",
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "2 without: there is no prompt" in out
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["missing"]["mine"] == 5
    line = (tmp_path / "out/scores.csv").read_text().splitlines()[2]
    assert line.endswith(",,,a man")


def test_no_prompt_at_all(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error before anything is scored, unless one is given for all, or no scorer needs any."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png(0))
    assert score(weights, tmp_path / "photos", tmp_path / "out") == 2
    assert "mine, clip_cosine: needs the prompt of every image, and " in (err := capsys.readouterr().err) and "--prompt" in err
    assert score(weights, tmp_path / "photos", tmp_path / "out", "--prompt", "a man") == 0
    expected = clip.load_scorer(weights, "mine")(to_tensor([decode(png(0))]), ["a man"]).item()
    assert rows(tmp_path / "out")["a.png"].score == pytest.approx(expected, rel=1e-6)

    class Brightness:
        name, range, higher_is_better, comparable_across_prompts, needs_prompt, revision = "b", (0.0, 1.0), True, True, False, "1"

        def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return images.mean((1, 2, 3))

    assert files.score_files(files.Source(path=tmp_path / "photos"), tmp_path / "b", [Brightness()])
    assert rows(tmp_path / "b", "b")["a.png"].score == pytest.approx(np.asarray(decode(png(0))).mean() / 255, rel=1e-5)


def test_bad_commands(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(text: str, *words: str) -> None:
        assert main(["score", *words]) == 2
        assert text in capsys.readouterr().err

    photos = photo_folder(tmp_path / "photos")
    images, mine = ("--images", str(photos), "--output_dir", str(tmp_path / "out")), ("--scorers", f"mine={weights},kind=clip")
    says("--images and --output_dir: what to score", *mine)
    says("--scorers x: no kind of scorer 'x'; x=...,kind=KIND with one of clip, ", *images, "--scorers", "x=y")
    says("--scorers hps_v21: no kind of scorer 'hps_v21'; did you mean hps_v2_1?", *images, "--scorers", "hps_v21=y")
    says("--scorers mine: no option color; known: activation, ", *images, "--scorers", "mine=y,color=red")
    says("--scorers weights/x.pt: expected NAME=WEIGHTS[,kind=KIND]", *images, "--scorers", "weights/x.pt")
    says("--scorers mine: given twice", *images, *mine, f"mine={weights},kind=clip")
    says("no recipe none.yaml", "none.yaml", "--scorers.mine.path", "x")  # a value of a recipe, not the option
    says("--batch_size: 0; expected at least 1", *images, *mine, "--batch_size", "0")
    says("there is no file none.pt", *images, "--scorers", "hps_v1=none.pt")
    says(f"{tmp_path / 'nothing'}: no such file or folder", "--images", str(tmp_path / "nothing"), "--output_dir", "o", *mine)
    (photos / "2.png").unlink()
    says("file_name names 2.png, which does not exist", *images, *mine)
    (tmp_path / "empty").mkdir()
    says("nothing here that can be read as", "--images", str(tmp_path / "empty"), "--output_dir", "o", *mine)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    says("no image column image or file_name (found: text); set --image_column", "--images", str(tmp_path / "x.parquet"), "--output_dir",
         "o", *mine)  # fmt: skip


def test_combined_scores(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four images of one prompt by hand from the columns; other weights need no new scores."""
    pq.write_table(pa.table({"image": [png(i) for i in range(4)], "text": ["a man"] * 4}), tmp_path / "x.parquet")
    assert score(weights, tmp_path / "x.parquet", tmp_path / "out", "--combine", "mine=1", "clip_cosine=3") == 0
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    a, b = (np.array([float(r[n]) for r in rows]) for n in ("mine", "clip_cosine"))
    expected = ((a - a.mean()) / a.std() + 3 * (b - b.mean()) / b.std()) / 4
    assert [float(r["combined"]) for r in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [r["pareto"] for r in rows] == [
        "1" if (a[i], b[i]) == (a.max(), b.max()) else "0" for i in range(4)
    ]  # one is a multiple of the other
    assert score(weights, tmp_path / "x.parquet", tmp_path / "out", "--combine", "mine=1", "--combine_by", "rank") == 0
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert [float(r["combined"]) for r in rows] == pytest.approx(((a.argsort().argsort()) / 3).tolist(), abs=1e-6)
    assert score(weights, tmp_path / "x.parquet", tmp_path / "out", "--combine", "his=1") == 2
    assert "weights: no score 'his'; there are mine, clip_cosine" in capsys.readouterr().err
    assert score(weights, tmp_path / "x.parquet", tmp_path / "out", "--combine", "mine") == 2
    assert "--combine mine: expected NAME=WEIGHT" in capsys.readouterr().err


def test_weights_from_a_hub_only_if_asked(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is called with what the address says, and not at all for a path."""
    import huggingface_hub

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision, allow_patterns: (calls.append((name, revision)), weights)[1]
    )
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file, revision: calls.append((name, file, revision)) or tmp_path / "x.pt"
    )
    scorer = load_scorer("mine", ScorerSpec(kind="clip", path="hub:owner/model_1@v2"))
    assert scorer.revision == load_scorer("mine", ScorerSpec(kind="clip", path=str(weights))).revision and calls == [
        ("owner/model_1", "v2")
    ]
    with pytest.raises(ValueError, match=r"there is no file .*x\.pt"):
        load_scorer("mine", ScorerSpec(kind="hps_v2", path="hub:owner/model/deep/x.pt"))
    assert calls[1:] == [("owner/model", "deep/x.pt", None)]
    with pytest.raises(ValueError, match=r"hub:model; expected hub:owner/name, with @revision or /file behind it"):
        load_scorer("mine", ScorerSpec(kind="hps_v2", path="hub:model"))

    def away(name: str, revision: str | None, allow_patterns: list[str]) -> Path:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(ValueError, match=r"mine: hub:owner/model cannot be fetched \(ConnectionError: no route\)"):
        load_scorer("mine", ScorerSpec(kind="clip", path="hub:owner/model"))


def test_other_images_in_the_folder_of_scores(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = photo_folder(tmp_path / "photos")
    assert score(weights, photos, tmp_path / "out") == 0
    (photos / "more.png").write_bytes(png(0))
    assert score(weights, photos, tmp_path / "out") == 2
    assert "holds the output of another configuration:\n  inputs.images: was " in capsys.readouterr().err
    (photos / "more.png").unlink()
    assert score(weights, photos, tmp_path / "out") == 0
    captions = photos / "metadata.jsonl"
    captions.write_text(captions.read_text().replace("man", "tot"))  # as long as it was
    assert score(weights, photos, tmp_path / "out") == 2, "scores of other prompts"
    assert score(weights, photos, photos / "out") == 2
    assert f"output_dir: {photos / 'out'} lies in {photos}, whose files are read" in capsys.readouterr().err


def test_scorers_of_the_command_line() -> None:
    name, spec = parse_scorer("aesthetic_v2=w/sac+logos,v2.pth,tower=w/l14.pt,tokenizer=clip")
    assert (name, spec.kind, spec.path, spec.tower, spec.tokenizer) == (
        "aesthetic_v2", "aesthetic_v2", "w/sac+logos,v2.pth", "w/l14.pt", "clip",
    )  # fmt: skip


def test_long_prompts_are_counted_once_over_all_batches(weights: Path, tmp_path: Path) -> None:
    """Four batches, two distinct long prompts of which one stands in two of them; stopped and gone on with, the count is the same."""
    long = ["a man in red and " * 30, "a woman " * 60]
    table = [{"image": png(i), "text": text} for i, text in enumerate([long[0], "a man", long[1], long[0]])]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "x.parquet")
    scorers = [load_scorer("mine", ScorerSpec(kind="clip", path=str(weights)))]
    with pytest.warns(UserWarning, match="longer than") as told:
        files.score_files(files.Source(path=tmp_path / "x.parquet"), tmp_path / "out", scorers, batch_size=1, images_per_shard=2)
    assert [str(w.message) for w in told if "longer" in str(w.message)] == [
        f"2 of 3 prompts are longer than the {scorers[0].tower.context} tokens that mine reads; their ends are cut"  # type: ignore[attr-defined]
    ]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["prompts_cut"] == {"mine": 2}
