"""Bad input through the command line: exit code 2, one message that names file, row and field, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from chain import write_recipe
from limner.cli import main
from limner.models.lora import add_lora
from limner.models.lora_file import save_lora
from limner.models.stable_diffusion import wrap
from tiny import tiny_pipeline


@dataclass
class World:
    """A recipe whose folders a test may spoil."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, command: str, *options: str) -> int:
        return main([command, str(self.folder / "recipe.yaml"), *options])

    def fails(self, command: str, *options: str) -> str:
        """The message of a command that must fail with exit code 2; no half-written file is anywhere."""
        self.capsys.readouterr()
        assert self.run(command, *options) == 2
        assert not [p for p in self.folder.rglob("*") if "partial" in p.name]
        return self.capsys.readouterr().err


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's inputs, and a finished pool."""
    folder = tmp_path_factory.mktemp("template")
    write_recipe(folder)
    assert main(["pool", str(folder / "recipe.yaml"), "--output_dir", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    """A copy with inputs only: models are shared, photos and output are its own."""
    shutil.copytree(template / "photos", tmp_path / "photos")
    text = (template / "recipe.yaml").read_text()
    text = text.replace(f"{template / 'photos'}", f"{tmp_path / 'photos'}").replace(f"{template / 'out'}", f"{tmp_path / 'out'}")
    (tmp_path / "recipe.yaml").write_text(text)
    return World(tmp_path, capsys)


@pytest.fixture
def pooled(world: World, template: Path) -> World:
    """The same with the finished pool."""
    shutil.copytree(template / "out", world.out)
    for manifest in world.out.rglob("manifest.json"):  # the prompts' source is a path
        manifest.write_text(manifest.read_text().replace(str(template), str(world.folder)))
    hashes(world.out)
    return world


def hashes(out: Path) -> None:
    """The pool's record of its input, whose source has moved."""
    from limner.store import input_hash

    manifest = json.loads((out / "pool/manifest.json").read_text())
    manifest["inputs"]["prompts"] = input_hash(out / "prompts/train")
    (out / "pool/manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def edit(row: int, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Change a row of metadata.jsonl."""

    def spoil(folder: Path) -> None:
        file = folder / "photos/metadata.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[row] = change(rows[row])
        file.write_text("\n".join(map(json.dumps, rows)))

    return spoil


def cut(folder: Path) -> None:
    """Pixels that break off behind a whole header."""
    file = folder / "photos/3.png"
    file.write_bytes(file.read_bytes()[:300])


INPUTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing image": (lambda f: (f / "photos/2.png").unlink(), ["metadata.jsonl:3", "file_name names 2.png", "does not exist"]),
    "not an image": (lambda f: (f / "photos/2.png").write_text("hello"), ["metadata.jsonl:3", "file_name 2.png", "not a readable image"]),
    "truncated image": (cut, ["metadata.jsonl:4", "file_name 3.png", "not a readable image"]),
    "caption absent": (edit(1, lambda r: {"file_name": r["file_name"]}), ["metadata.jsonl:2", "text is empty"]),
    "caption blank": (edit(4, lambda r: {**r, "text": "  "}), ["metadata.jsonl:5", "text is empty"]),
    "no file name": (edit(1, lambda r: {"text": "a man"}), ["metadata.jsonl:2", "file_name", "is empty"]),
    "no metadata": (lambda f: (f / "photos/metadata.jsonl").unlink(), ["photos", "nothing here that can be read as prompts"]),
    "not JSON": (lambda f: (f / "photos/metadata.jsonl").write_text('{"file_name": '), ["metadata.jsonl:1", "not JSON"]),
    "zero prompts": (lambda f: (f / "photos/metadata.jsonl").write_text("\n"), ["photos", "no prompts"]),
    "no folder": (lambda f: shutil.rmtree(f / "photos"), ["photos", "no such file or folder"]),
}


@pytest.mark.parametrize("case", INPUTS)
def test_bad_inputs(world: World, case: str) -> None:
    spoil, words = INPUTS[case]
    spoil(world.folder)
    message = world.fails("pool")
    assert message.startswith("limner pool: ")
    assert [w for w in words if w not in message] == []
    assert not list(world.out.rglob("*.parquet"))


def test_wrong_columns(world: World) -> None:
    (world.folder / "rows.csv").write_text("file,label\n1.png,a man\n")
    message = world.fails("pool", "--data.train", str(world.folder / "rows.csv"))
    assert "rows.csv: no caption column text or caption or prompt (found: file, label); set --data.caption_column" in message


def test_after_a_bad_row_is_taken_out_the_same_command_works(world: World) -> None:
    """The folder of the failed try holds nothing yet, so it is not in the way."""
    cut(world.folder)
    world.fails("reconstruct")
    file = world.folder / "photos/metadata.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:3]))
    assert world.run("reconstruct") == 0


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "typo": (["--stages.easy.learn.bta", "5"], ["unknown key stages.easy.learn.bta; did you mean stages.easy.learn.beta?"]),
    "wrong type": (["--seed", "soon"], ["recipe.yaml", "seed"]),
    "one image a prompt": (["--pool.images_per_prompt", "1"], ["pool.images_per_prompt: 1", "at least 2"]),
    "t outside": (["--stages.hard.winner.t", "[2000]"], ["stages.hard.winner.t: 2000 lies outside the schedule 1..1000"]),
    "no model": (["--model.path", "nowhere"], ["model.path: nowhere is neither a folder nor a file", "model.hub"]),
    "no scorer": (["--scorers.picker.path", "nowhere"], ["scorers.picker.path: nowhere has no config.json"]),
    "shard": (["--shard", "3/2"], ["--shard 3/2"]),
    "no batch": (["--sampler.batch_size", "0"], ["sampler.batch_size: 0; expected at least 1"]),
    "no accumulation": (
        ["--stages.hard.learn.gradient_accumulation_steps", "0"],
        ["stages.hard.learn.gradient_accumulation_steps: 0; expected at least 1"],
    ),
    "a reader that scores": (["--scorers.judge.kind", "reader"], ["evaluate.judge: judge is a reader", "only goes under evaluate.reader"]),
    "a scorer that reads": (["--evaluate.reader", "judge"], ["evaluate.reader: no scorer 'judge' of kind reader"]),
    "a pick that is none": (["--stages.easy.winner.pick", "all"], ["pick", "best", "worst"]),
    "grids of nothing": (
        ["--data.validation", "", "--stages.easy.learn.sample_steps", "5"],
        ["data.validation: not set; stages.easy.learn.sample_steps"],
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(world: World, case: str) -> None:
    options, words = OPTIONS[case]
    message = world.fails("pool", *options)
    assert [w for w in words if w not in message] == []
    assert not list(world.out.rglob("pool/*.parquet"))


def test_a_recipe_that_is_not_there(world: World) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert "no recipe nowhere.yaml" in world.capsys.readouterr().err
    assert main(["run"]) == 2
    assert "which recipe?" in world.capsys.readouterr().err


def test_an_unknown_stage(world: World) -> None:
    assert "--stage eazy: the recipe has easy, normal, hard" in world.fails("train", "--stage", "eazy")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "config.seed: was 0, now 1"),
        (["--data.resolution", "24"], "config.resolution: was 16, now 24"),
        (["--data.max_train_prompts", "3"], "config.rows: was 6, now 3"),
        (["--data.caption_column", "other"], "config.caption_column: was '', now 'other'"),
        (["--sampler.guidance_scale", "3"], "config.sampler.guidance_scale: was 2.0, now 3.0"),
        (["--pool.images_per_prompt", "2"], "config.images_per_prompt: was 3, now 2"),
    ],
)
def test_the_folder_of_another_configuration(pooled: World, options: list[str], words: str) -> None:
    assert pooled.run("pool") == 0
    before = {p: p.read_bytes() for p in pooled.out.rglob("*") if p.is_file()}
    message = pooled.fails("pool", *options)
    assert words in message
    assert "choose another output_dir" in message
    assert {p: p.read_bytes() for p in pooled.out.rglob("*") if p.is_file()} == before


def test_steps_out_of_order(world: World) -> None:
    assert "run the step that makes it first" in world.fails("train", "--stage", "easy")
    assert "run the step that makes it first" in world.fails("score")
    assert "run `limner evaluate` first" in world.fails("report")
    assert "generate/test/base is not complete; run `limner generate` first" in world.fails("evaluate")


def test_a_pool_goes_on_with_another_batch_size(pooled: World) -> None:
    """It only changes how much memory drawing takes, which may have been why the first run stopped."""
    last = max((pooled.out / "pool").glob("part-*.parquet"))
    last.unlink()
    manifest = pooled.out / "pool/manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    assert pooled.run("pool", "--sampler.batch_size", "1") == 0
    assert last.is_file()


def test_a_stage_that_failed_at_its_first_step_takes_another_configuration(pooled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pooled.run("reconstruct") == pooled.run("score") == pooled.run("examples", "--stage", "easy") == 0
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    easy = ("train", "--stage", "easy")
    assert "use_8bit_adam: bitsandbytes is not installed" in pooled.fails(*easy, "--stages.easy.learn.use_8bit_adam", "true")
    assert pooled.run(*easy) == 0, "as the message says: it can be set to false"
    assert "was trained with another configuration" in pooled.fails(*easy, "--stages.easy.learn.beta", "7")
    shutil.rmtree(pooled.out / "train/easy/checkpoint-1")
    shutil.rmtree(pooled.out / "train/easy/checkpoint-2")
    assert pooled.run("examples", "--stage", "normal") == 0
    assert "stage easy is trained, but" in (message := pooled.fails("train", "--stage", "normal")) and "no checkpoint to go on" in message
    assert "train/easy was trained with another" in pooled.fails(*easy, "--stages.easy.learn.beta", "7"), "its adapter is there"


def test_what_a_run_needs_is_asked_for_before_hours_of_drawing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.checks.find_spec", lambda name: None)
    for command in (("run",), ("run", "--dry_run")):
        message = world.fails(*command, "--stages.normal.learn.use_8bit_adam", "true")
        assert "stages.normal.learn.use_8bit_adam: bitsandbytes is not installed" in message
    grids, nowhere = ("--stages.easy.learn.sample_steps", "1"), str(world.folder / "nowhere")
    assert "nowhere" in world.fails("run", *grids, "--data.validation", nowhere)
    assert "nowhere" in world.fails("run", "--dry_run", *grids, "--data.validation", nowhere)
    assert not (world.out / "pool").exists()


def test_a_truncated_shard(pooled: World) -> None:
    shard = pooled.out / "pool/part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    message = pooled.fails("score")
    assert f"{shard} is damaged (" in message
    assert "delete it with the .sha256 and run the step again" in message
    pq.write_table(pa.table({"text": ["a man"]}), shard)  # whole, but another
    assert f"{shard} is damaged (its checksum differs); delete it with the .sha256 and run the step again" in pooled.fails("score")


def test_a_truncated_shard_of_latents(pooled: World) -> None:
    """That of the images marks it as made; the advice, once followed, mends it."""
    shard, whole = (pooled.out / f"pool/{n}-00001.parquet" for n in ("latents", "part"))
    before = shard.read_bytes()
    shard.write_bytes(before[:-100])
    for command in ("reconstruct", "score"):
        assert pooled.run(command) == 0
    message = pooled.fails("examples", "--stage", "easy")
    assert f"{shard} is damaged (" in message and "delete it and part-00001.parquet with the .sha256 and run the step again" in message
    for file in (shard, whole):
        file.unlink()
        file.with_name(f"{file.name}.sha256").unlink()
    assert pooled.run("pool") == 0 and pooled.run("examples", "--stage", "easy") == 0
    assert shard.read_bytes() == before


def test_a_truncated_shard_of_prompts(pooled: World) -> None:
    shard = pooled.out / "prompts/train/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} is damaged (" in pooled.fails("reconstruct")
    whole = pooled.out / "prompts/train/part-00000.parquet.sha256"
    for file in (shard, whole):
        file.unlink()
    assert pooled.run("reconstruct") == 0, "as the message says: the shard is made again"
    assert shard.is_file() and whole.is_file()


def test_a_lora_for_another_model(world: World) -> None:
    """A stage's adapter of a network of other widths."""
    other = wrap(tiny_pipeline(widths=(8, 24)), device="cpu")
    add_lora(other.unet, "policy", rank=2)
    save_lora(world.out / "train/easy/adapter", other.unet, "policy", metadata={})
    message = world.fails("generate", "--evaluate.stages", "[easy]")
    assert "pytorch_lora_weights.safetensors: the LoRA is for another model" in message
    assert "this model needs" in message


def test_a_loss_that_is_not_finite(pooled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that overflow: the message names the groups of the batch, and no checkpoint or adapter is left."""
    options = ["--stages.easy.learn.max_train_steps", "2"]
    for command in ("reconstruct", "score"):
        assert pooled.run(command) == 0
    assert pooled.run("examples", "--stage", "easy") == 0
    from limner.models.stable_diffusion import Pipeline

    predict = Pipeline.predict
    monkeypatch.setattr(Pipeline, "predict", lambda *args: predict(*args) * torch.inf)
    message = pooled.fails("train", "--stage", "easy", *options)
    assert "train easy: the loss of step 0 is nan; nothing was updated. Batch: train-00000" in message
    assert not list(pooled.out.glob("train/easy/checkpoint*"))
    assert not (pooled.out / "train/easy/adapter").exists()


def test_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = world.fails("pool")
    assert "no space left to write" in message
    assert "manifest.json" in message
    assert [p for p in world.out.rglob("*") if p.is_file()] == []
