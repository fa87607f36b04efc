"""`--dry_run`: counts against hand calculation, the printed table, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from chain import write_recipe
from limner.cli import main
from limner.estimate import Counts, Line, duration, plan
from limner.recipe import load_recipe
from limner.steps import Run


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_counts_are_those_of_the_recipe(tmp_path: Path) -> None:
    """6 prompts of 3 images, 2 steps with guidance; reconstructions at 100, 400 and 700 take max(1, round(2 t / 1000)) = 1 step."""
    run = Run(load_recipe(write_recipe(tmp_path)))
    lines = {line.step: line for line in plan(run, Counts(6, 6, 16, 16))}
    assert lines["pool"] == Line("pool", 6 * 3 * 2 * 2, 18)
    assert lines["reconstruct"] == Line("reconstruct", 6 * 2 * (1 + 1 + 1), 18)
    assert lines["score"] == Line("score", 36, 36)
    for stage in ("easy", "normal", "hard"):  # 2 steps of 2 pairs: winner and loser, each through policy and reference
        assert lines[f"train {stage}"] == Line(f"train {stage}", 2 * 2 * 4, 2 * 2 * 2)
    assert lines["generate"] == Line("generate", 6 * 4 * 2 * 2, 24), "base and three stages"


def test_without_guidance_there_is_one_branch(tmp_path: Path) -> None:
    run = Run(load_recipe(write_recipe(tmp_path, sampler={"guidance_scale": 1.0}, evaluate={"diversity_prompts": 4})))
    lines = {line.step: line for line in plan(run, Counts(6, 6, 16, 16))}
    assert lines["pool"].calls == 6 * 3 * 2
    assert lines["generate"].images == (6 + 4 * 4) * 4


def test_a_pool_of_mixed_guidance(tmp_path: Path) -> None:
    """Of 3 images the first and third have one branch, the second two."""
    run = Run(load_recipe(write_recipe(tmp_path, pool={"guidance_scales": [1.0, 3.0]})))
    lines = {line.step: line for line in plan(run, Counts(6, 6, 16, 16))}
    assert lines["pool"] == Line("pool", 6 * (1 + 2 + 1) * 2, 18)


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    before = files(tmp_path)
    assert main(["run", str(recipe), "--dry_run"]) == 0
    assert files(tmp_path) == before
    printed = capsys.readouterr().out
    for step in ("pool", "reconstruct", "score", "train easy", "train hard", "generate"):
        assert step in printed
    for word in ("effective batch size 2", "trainable parameters", "beta 2500 per"):
        assert word in printed


@pytest.mark.parametrize("part", ["photos/3.png", "picker/model.safetensors", "model/model_index.json"])
def test_a_dry_run_finds_what_is_missing(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / part).unlink()
    assert main(["run", str(recipe), "--dry_run"]) == 2
    assert Path(part).parent.name in capsys.readouterr().err


def test_durations_read_well() -> None:
    assert [duration(s) for s in (3, 600, 7200)] == ["3.0 s", "10 min", "2.0 h"]
