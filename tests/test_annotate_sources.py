"""Where a study's images come from as users have them: folders whose images are named alike, without ids; and starts that fail."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import study as s
from limner.cli import main
from limner.feedback import server
from limner.feedback.database import Item, Picture, reading
from limner.feedback.items import make_items
from limner.feedback.study import load_study
from limner.records import Image, to_table
from limner.store import open_step


def folder_of(folder: Path, rows: list[tuple[str, str, int]]) -> Path:
    """An image folder without ids: (name, caption, shade)."""
    folder.mkdir()
    for name, _, shade in rows:
        (folder / name).write_bytes(s.png((shade, shade, shade)))
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t, _ in rows))
    return folder


def shown(study) -> dict[str, list[str]]:
    """Digests of the pictures that each item shows, by its text."""
    from sqlmodel import select

    database = server.prepare(study)
    with reading(database) as session:
        digests = {p.token: p.digest for p in session.exec(select(Picture))}
        return {i.text: [digests[t] for t in json.loads(i.pictures)] for i in session.exec(select(Item))}


def test_two_folders_are_paired_by_caption_whatever_their_names(tmp_path: Path) -> None:
    """Both name their images alike, in other orders, and one caption has two images in both."""
    ours = folder_of(tmp_path / "ours", [("0.png", "a", 10), ("1.png", "b", 20), ("2.png", "b", 30)])
    theirs = folder_of(tmp_path / "theirs", [("0.png", "b", 120), ("1.png", "b", 130), ("2.png", "a", 110), ("3.png", "c", 140)])
    study = s.study_of(tmp_path, {"task": "side", "images": {"from": str(ours), "against": str(theirs)}})
    items, dropped = make_items(study)
    assert [i.images for i in items] == [("0.png", "against/2.png"), ("1.png", "against/0.png"), ("2.png", "against/1.png")]
    assert not dropped
    pictures = shown(study)
    assert all(len(set(pair)) == 2 for pair in pictures.values())


def test_two_models_of_a_run_are_compared(tmp_path: Path) -> None:
    """Steps name the images of every model alike: those of the other one get names of their own, and their own pixels."""
    for model, shade in (("base", 40), ("hard", 200)):
        step = open_step(tmp_path / model, "generate", {}, {})
        rows = [Image(id=f"p{i}/0", prompt_id=f"p{i}", text=f"text {i}", image=s.png((shade + i, 0, 0))) for i in range(3)]
        step.write(0, to_table(Image, rows))
        step.finish({})
    study = s.study_of(tmp_path, {"task": "side", "images": {"from": str(tmp_path / "hard"), "against": str(tmp_path / "base")}})
    assert [i.images for i in make_items(study)[0]] == [(f"p{i}/0", f"against/p{i}/0") for i in range(3)]
    pictures = shown(study)
    assert len({d for pair in pictures.values() for d in pair}) == 6


def test_images_of_one_caption_in_a_folder_are_a_choice(tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", [(f"{i}.png", "ab"[i % 2], 10 * i) for i in range(6)])
    items, _ = make_items(s.study_of(tmp_path, {"task": "choice", "images": {"from": str(photos), "each": 3}}))
    assert [(i.text, i.images) for i in items] == [("a", ("0.png", "2.png", "4.png")), ("b", ("1.png", "3.png", "5.png"))]


def test_a_judges_table_names_images_as_their_folder_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = folder_of(tmp_path / "photos", [(f"{i}.png", f"caption {i}", i) for i in range(4)])
    (tmp_path / "judge.csv").write_text("image_id,photo\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(4)))
    images = {"from": str(photos), "table": str(tmp_path / "judge.csv"), "balance": ["photo"]}
    assert len(make_items(s.study_of(tmp_path, {"images": images}))[0]) == 4
    study = s.study_of(tmp_path, {"images": {**images, "table": str(tmp_path / "none.csv")}})
    with pytest.raises(ValueError, match=r"images.table: there is no .*none.csv"):
        make_items(study)


def test_a_dry_run_counts_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "images", [(f"{i}.png", f"caption {i}", i) for i in range(4)])
    s.study_of(tmp_path, {"overlap": 2})
    assert main(["annotate", "serve", str(tmp_path / "study.yaml"), "--dry_run"]) == 0
    assert "4 items of 4 images, and 0 gold ones; 2 raters each: 8 answers" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_starts_that_fail_leave_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "images", [("0.png", "a", 1), ("1.png", "a", 2)])
    s.study_of(tmp_path, {})
    command = ["annotate", "serve", str(tmp_path / "study.yaml")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*command, "--server.port", str(port)]) == 2
    assert f"server.port: 127.0.0.1:{port}: Address already in use; another is set by --server.port" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "images/0.png").write_bytes(b"no image")
    (tmp_path / "images/1.png").write_bytes(b"neither")
    assert main([*command, "--server.port", "0"]) == 2
    assert "no items: unreadable image (2)" in capsys.readouterr().err
    assert main([*command, "--server.host", "0.0.0.0", "--server.public", "true"]) == 2
    assert "no admin has a password" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*"))


def test_commands_about_answers_need_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "images", [("0.png", "a", 1)])
    s.study_of(tmp_path, {})
    for command in (["export", "--file", str(tmp_path / "x.csv")], ["consolidate"], ["invite", "--rater", "anna"]):
        assert main(["annotate", command[0], str(tmp_path / "study.yaml"), *command[1:]]) == 2
        assert "there is no study in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_links_begin_with_the_address_that_raters_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "images", [("0.png", "a", 1)])
    study = s.study_of(tmp_path, {"server": {"address": "https://rate.example.org/", "port": 0}})
    server.prepare(study).engine.dispose()
    assert main(["annotate", "invite", str(tmp_path / "study.yaml"), "--rater", "anna"]) == 0
    assert "anna, once: https://rate.example.org/join/" in capsys.readouterr().out
    assert server.address(load_study(tmp_path / "study.yaml", ["--server.address", ""]).server, 8001) == "http://127.0.0.1:8001"
    assert main(["annotate", "invite", str(tmp_path / "study.yaml"), "--rater", "bob", "--server.address", ""]) == 2
    assert "server.port: 0, so nobody knows where the page is" in capsys.readouterr().err
