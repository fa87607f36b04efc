"""Imports of RichHF-18K by the command: records counted, what is missing reported, images from Pick-a-Pic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import study as s
from limner.cli import main
from limner.feedback import richhf, server
from limner.feedback.richhf import RichFeedback

TEXTS = {f"i{n}": f"a red cat number {n}" for n in range(4)}


@pytest.fixture
def site(tmp_path: Path):
    s.image_folder(tmp_path / "images", TEXTS)
    study = s.study_of(tmp_path, {"overlap": 2})
    return study, server.prepare(study)


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
