"""`limner caption` against a small server in this process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chain import photo_folder
from limner.cli import main
from limner.inputs import read_prompts
from limner.store import read_manifest
from test_judge import Server, images_of, said, server  # noqa: F401 - a fixture


def test_captions_become_prompts(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Photos named by their size; one answer is empty, one file broken. A second run asks nothing; a recipe reads the prompts."""
    photos = photo_folder(tmp_path / "photos", 4)
    (photos / "metadata.jsonl").unlink()
    (photos / "broken.jpg").write_bytes(b"\xff\xd8")

    def reply(body: dict) -> tuple[int, object]:
        (picture,) = images_of(body)
        return 200, said("" if picture.height == 21 else f'"A photo\n {picture.height} high."')

    server.reply = reply
    words = [
        "caption",
        "--images",
        str(photos),
        "--backend",
        server.url,
        "--model",
        "m",
        "--output_dir",
        str(tmp_path / "out"),
        "--split",
        "test",
    ]
    assert main([*words, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "3 captioned" in out and "1 without: the model said nothing" in out and "1 without: the image: not a readable image" in out
    prompts = read_prompts(tmp_path / "out", "test", need_images=True)
    assert [(p.id, p.text, p.split) for p in prompts] == [(f"{i}.png", f"A photo {20 + i} high.", "test") for i in (0, 2, 3)]
    assert prompts[1].image == (photos / "2.png").read_bytes()
    assert len(server.seen) == 4 and read_manifest(tmp_path / "out")["counts"]["captioned"] == 3
    assert main([*words, "--device", "cpu"]) == 0 and len(server.seen) == 4


def test_a_table_of_paths_and_a_refused_photo(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Each photo counts once, under its reason; asking again when all is done asks nothing, though now it would be answered."""
    photos = photo_folder(tmp_path / "photos", 3)
    pq.write_table(pa.table({"image": [f"photos/{n}.png" for n in range(3)]}), tmp_path / "photos.parquet")
    server.reply = lambda body: (400, "not this one") if images_of(body)[0].height == 21 else (200, said("A man."))
    words = ["caption", "--images", str(tmp_path / "photos.parquet"), "--backend", server.url, "--model", "m"]
    words += ["--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert photos.is_dir() and main(words) == 0
    counts = read_manifest(tmp_path / "out")["counts"]
    assert counts.pop("captioned") == 2
    ((reason, number),) = counts.items()
    assert "refused it (status 400" in reason and number == 1
    server.reply, before = lambda body: (200, said("A wall.")), len(server.seen)
    assert main(words) == 0 and len(server.seen) == before
    assert "2 captioned" in capsys.readouterr().out


def test_it_goes_on_after_an_endpoint_went_away(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    photos = photo_folder(tmp_path / "photos", 4)
    count = itertools.count()
    server.reply = lambda body: (200, said("A man.")) if next(count) < 2 else (401, "the key is wrong")
    words = ["caption", "--images", str(photos), "--backend", server.url, "--model", "m", "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu"]) == 2
    assert "status 401: the key is wrong" in capsys.readouterr().err
    server.reply, before = lambda body: (200, said("A woman.")), len(server.seen)
    assert main([*words, "--device", "cpu"]) == 0
    assert len(server.seen) == before + 2
    assert sorted(p.text for p in read_prompts(tmp_path / "out", "train")) == ["A man.", "A man.", "A woman.", "A woman."]
