"""Pools that a trained stage draws, for a later one that starts from it; and pools of several guidance scales."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image as Picture

from chain import write_recipe
from limner import seeds
from limner.cli import main
from limner.formats import files
from limner.recipe import Source, Stage, load_recipe
from limner.records import Example, Image, Score
from limner.scorers import steps
from limner.steps import Run
from limner.steps.make import reconstruct
from limner.store import read_manifest, read_rows, shards

POOL = {"from": "pool", "model": "easy", "by": "picker"}


def curriculum(folder: Path, **again: object) -> Path:
    """Stage `again` chooses from the pool of stage easy."""
    learn = {"max_train_steps": 2, "train_batch_size": 2, "rank": 2, "learning_rate": 0.3, "checkpointing_steps": 1}
    pick = [{"from": "pool", "pick": p, "by": "picker"} for p in ("best", "worst")]
    easy = {"winner": pick[0], "loser": pick[1], "learn": learn}
    stage = {"start": "easy", "winner": {**POOL, "pick": "best"}, "loser": {**POOL, "pick": "worst"}, "learn": learn, **again}
    return write_recipe(folder, stages={"easy": easy, "again": stage, "normal": None, "hard": None}, generate={"stage_blocks": None})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    assert main(["run", str(curriculum(folder))]) == 0
    return folder


def test_the_pool_is_drawn_with_the_stages_adapter(ran: Path) -> None:
    """The same picture as diffusers draws with the LoRA that the stage wrote, from the same noise, and another than the base's."""
    out = ran / "out"
    mine = {i.id: i for i in read_rows(out / "pool-easy", Image)}
    base = {i.id: i for i in read_rows(out / "pool", Image)}
    assert set(mine) == {f"{i}@easy" for i in base}, "as many, told apart by their ids"
    image = next(iter(mine.values()))
    pipe = StableDiffusionPipeline.from_pretrained(ran / "model", safety_checker=None)
    pipe.load_lora_weights(out / "train/easy/adapter")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    found = np.asarray(Picture.open(io.BytesIO(image.image))) / 255
    side = found.shape[0] // pipe.vae_scale_factor
    noise = seeds.noise((pipe.unet.config.in_channels, side, side), [(0, "pool", image.prompt_id, image.k)])
    with torch.no_grad():
        theirs = pipe(image.text, num_inference_steps=2, guidance_scale=2.0, latents=noise, output_type="np").images[0]
    before = np.asarray(Picture.open(io.BytesIO(base[image.id.removesuffix("@easy")].image))) / 255
    assert found.shape == theirs.shape
    assert np.abs(found - theirs).max() < 0.02
    assert np.abs(found - before).max() > 0.05


def test_pairs_come_from_that_pool_by_its_own_scores(ran: Path) -> None:
    out = ran / "out"
    score = {s.image_id: s.score for s in read_rows(out / "scores/pool-easy", Score)}
    pairs = list(read_rows(out / "examples/again", Example))
    assert len(pairs) == 2 * 6
    for e in pairs:
        group = [s for i, s in score.items() if i.startswith(f"{e.group}/")]
        assert len(group) == 3
        assert score[e.image_id] == (max(group) if e.role == "winner" else min(group))
    assert not any("pool-easy" in name for name in read_manifest(out / "examples/easy")["inputs"]), "easy came before that pool"


def test_running_again_changes_nothing(ran: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (ran / "out").rglob("*.parquet")}
    assert main(["run", str(ran / "recipe.yaml")]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_reconstructions_are_the_bases_whatever_was_drawn_before(ran: Path, tmp_path: Path) -> None:
    """As when a shard is made again, or a stage added, after a pool was drawn with a stage's adapter."""
    new = ["--stages.again.winner={from: reconstruction, model: '', t: [400]}"]
    shards = []
    for before in ([], ["easy"]):
        run = Run(load_recipe(ran / "recipe.yaml", [*new, f"--output_dir={tmp_path / '-'.join(['out', *before])}"]))
        shutil.copytree(ran / "out/train", run.out / "train")
        for stage in before:
            run.adapted(stage)
        reconstruct(run)
        shards.append((run.out / "reconstruct/part-00000.parquet").read_bytes())
    assert shards[0] == shards[1]


def test_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before easy is trained its pool waits and the stage that needs it says so; afterwards pool and score make it up."""
    recipe, out = str(curriculum(tmp_path)), tmp_path / "out"
    assert main(["pool", "--config", recipe]) == 0
    assert "pool-easy: drawn when stage easy is trained" in capsys.readouterr().out
    assert main(["score", "--config", recipe]) == 0
    assert main(["examples", "--stage", "again", "--config", recipe]) == 2
    assert "pool-easy" in capsys.readouterr().err
    for command in ("examples", "train"):
        assert main([command, "--stage", "easy", "--config", recipe]) == 0
    for command in (["pool"], ["score"], ["examples", "--stage", "again"], ["train", "--stage", "again"]):
        assert main([*command, "--config", recipe]) == 0
    assert len(list(read_rows(out / "pool-easy", Image))) == 18
    assert (out / "train/again/adapter").is_dir()


@pytest.mark.parametrize(
    ("winner", "message"),
    [
        ({"from": "pool", "model": "late", "by": "picker"}, "stages.again.winner.model: 'late' is not an earlier stage (easy)"),
        ({"from": "real", "model": "easy"}, "stages.again.winner.model: easy; only a pool is drawn by a stage, and this is from: real"),
    ],
)
def test_what_cannot_be(tmp_path: Path, winner: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(curriculum(tmp_path, winner=winner))


def test_guidance_by_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, pool={"guidance_scales": [1.0, 3.0]}))
    assert main(["pool", "--config", recipe]) == 0
    scales = [json.loads(i.sampler)["guidance_scale"] for i in read_rows(tmp_path / "out/pool", Image)]
    assert scales == [1.0, 3.0, 1.0] * 6
    assert main(["pool", "--config", recipe, "--pool.guidance_scales", "[1.0, 4.0]"]) == 2, "another pool than the one that lies there"
    assert "guidance_scales" in capsys.readouterr().err
    assert main(["pool", "--config", recipe, "--pool.guidance_scales", "[1, 2, 3, 4]"]) == 2
    assert "pool.guidance_scales: 4 for 3 images a prompt" in capsys.readouterr().err


def test_only_its_own_picks_keep_latents() -> None:
    from limner.examples.curriculum import selectable

    best = Source(source="pool", pick="best", by="a")
    worst = Source(source="pool", pick="worst", by="b", model="easy")
    stages = {"easy": Stage(winner=best, loser=None), "again": Stage(winner=worst, loser=None)}
    assert selectable(stages) == [("best", "a")]
    assert selectable(stages, "easy") == [("worst", "b")]


def test_what_was_scored_to_keep_latents_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`score` asks for reconstructions only, and has the rows of a pool that it scored by itself; but another scorer it asks."""
    recipe = str(write_recipe(tmp_path))
    plain = ["--pool.keep_latents", "none", "--output_dir", str(tmp_path / "plain")]
    commands = [[c, "--config", recipe] for c in ("pool", "reconstruct", "score")]
    for command in commands:
        assert main([*command, *plain]) == 0
    for command in commands[:2]:
        assert main(command) == 0
    assert sum(pq.read_metadata(path).num_rows for path in shards(tmp_path / "out/pool", "scores")) == 18
    asked: list[str] = []
    once = steps.score_images
    monkeypatch.setattr(steps, "score_images", lambda images, *rest: (asked.extend(i.id for i in images), once(images, *rest))[1])
    assert main(commands[2]) == 0
    assert set(asked) == {i.id for i in read_rows(tmp_path / "out/reconstruct", Image)}
    assert [p.stem for p in files(tmp_path / "out/pool", "")] == ["part-00000", "part-00001", "part-00002"], "else it is a folder of images"
    mine, theirs = (list(read_rows(tmp_path / o / "scores/pool", Score)) for o in ("out", "plain"))
    assert mine == theirs and len(mine) == 18
    asked.clear()
    shutil.rmtree(tmp_path / "out/scores")
    assert main([*commands[2], "--scorers.picker.path", str(tmp_path / "judge")]) == 0
    assert set(asked) >= {i.id for i in read_rows(tmp_path / "out/pool", Image)}
