"""The embedded world: its recipe makes every part in a step or two, and what ships in the package loads in plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline

pytest.importorskip("anny")

from limner.cli import main
from limner.figures import quality
from limner.figures.assets import find
from limner.figures.captions import describe
from limner.figures.make import reword
from limner.models.stable_diffusion import load_pipeline
from limner.recipe import Sampler
from limner.records import Prompt
from limner.scorers import dual
from limner.scorers.reader import load_reader

ROOT = Path(__file__).parent.parent
TAKEN = "a man in a red shirt"  # of a scorer's pictures and of a test picture
SMALL = {
    "autoencoder_steps": "[1,1]", "base_steps": 2, "batch_size": 4, "scorer_steps": 2, "judge_steps": 2, "reader_steps": "[1,1]",
    "rater_reader_steps": "[2]", "counts.train": 8, "counts.validation": 2, "counts.test": 2, "counts.scorer": 16, "counts.judge": 16,
    "counts.reader": 2, "counts.raters": 1,
}  # fmt: skip


def test_the_recipe_makes_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the measuring; made again, nothing is: each part is found finished."""
    drawn = []

    def draw(pipeline: object, prompts: list[Prompt], seed: int, sampler: Sampler) -> torch.Tensor:  # in place of 1,600 samples
        drawn.append((prompts[0].id, prompts[-1].id, len(prompts), seed, sampler.guidance_scale))
        return torch.rand(len(prompts), 3, 64, 64, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(quality, "base_samples", draw)
    options = {**SMALL, "output_dir": tmp_path / "world", "ship_dir": tmp_path / "ship"}
    parts = ["images", "autoencoder", "base", "preference", "judge", "reader", "rater_reader", "ship"]
    words = ["figures", "make", "--config", str(ROOT / "recipes/figures/world.yaml"), "--only", f"[{','.join(parts)}]"]
    words += [w for key, value in options.items() for w in (f"--{key}", str(value))]
    assert main([w if w != f"[{','.join(parts)}]" else "[images]" for w in words]) == 0
    folder = tmp_path / "world/images"
    for split in ("scorer", "test"):
        _say(folder / split, TAKEN)
    assert main(words) == 0
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "world").rglob("*.safetensors")}
    assert main(words) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "world").rglob("*.safetensors")} == made
    ship = tmp_path / "ship"
    rows = {s: pq.read_table(ship / f"{s}.parquet").to_pylist() for s in ("train", "validation", "test")}
    assert {s: len(r) for s, r in rows.items()} == {"train": 8, "validation": 2, "test": 2}
    assert {m.dtype for m in DiffusionPipeline.from_pretrained(ship / "base").components.values() if hasattr(m, "dtype")} == {torch.float32}
    learned = {p for split in ("scorer", "judge") for p in _prompts(folder / split)}
    assert TAKEN in learned
    assert not learned & {r["prompt"] for split in rows.values() for r in split}
    assert load_pipeline(str(ship / "base")).latent_shape(64, 64) == (4, 16, 16)
    read = load_reader(ship / "reader").read(torch.rand(1, 3, 64, 64))
    assert set(read.attributes) >= set(json.loads(rows["test"][0]["truth"])["claimed"])
    assert drawn == [("train-004000", "train-005599", 1600, 53, 1.0)], "what the shipped looks are looks at"
    assert all(load_reader(ship / name).verdict is not None for name in ("reader", "rater_reader"))
    for name in ("preference", "judge"):
        assert dual.load_scorer(ship / name, name)(torch.rand(1, 3, 64, 64), ["a man"]).isfinite().all()


def _prompts(folder: Path) -> list[str]:
    return [
        p for path in sorted(folder.glob("part-*.parquet")) for p in pq.read_table(path, columns=["prompt"]).column("prompt").to_pylist()
    ]


def _say(folder: Path, caption: str) -> None:
    """Let the first picture of a split have a caption."""
    path = next(iter(sorted(folder.glob("part-*.parquet"))))
    table = pq.read_table(path)
    prompts = [caption, *table.column("prompt").to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", pa.array(prompts)), path)


def test_a_caption_that_is_taken_is_worded_anew() -> None:
    attributes = json.loads(pq.read_table(find("test")).column("truth")[0].as_py())["attributes"]
    taken = {describe(attributes, seed).text for seed in range(3)}
    row = {"prompt": describe(attributes, 0).text, "claimed": ["sex"], "attributes": json.dumps(attributes)}
    reword(row, taken)
    possible = {describe(attributes, seed).text: sorted(describe(attributes, seed).attributes) for seed in range(100)}
    assert row["prompt"] not in taken
    assert possible[row["prompt"]] == row["claimed"]
    before = dict(row)
    reword(row, taken)
    assert row == before
    with pytest.raises(ValueError, match="train-7: every wording of its caption is taken"):
        reword({**row, "id": "train-7"}, {describe(attributes, seed).text for seed in range(1000)})


def test_plain_diffusers_loads_the_embedded_base() -> None:
    """As a user of diffusers would: the folder is a pipeline, and draws a picture in [0, 1]."""
    pipe = DiffusionPipeline.from_pretrained(find("base"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a man waving", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    assert 0 <= image.min() <= image.max() <= 1
