"""Every shipped curriculum runs: two steps a stage, on a tiny model and two photos, with everything else as shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from chain import clip_scorer, photo_folder, write_recipe
from limner.cli import main
from limner.recipe import load_recipe
from limner.records import Example
from limner.store import read_rows
from tiny import save_tiny, tiny_pipeline, to_single_file

ROOT = Path(__file__).parent.parent
RECIPES = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if p.name != "world.yaml" and p.parent.name != "annotate"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny pipeline, two photos, a scorer."""
    folder = tmp_path_factory.mktemp("parts")
    save_tiny(folder / "model")
    photo_folder(folder / "photos", count=4)
    clip_scorer(folder / "scorer")
    return folder


def small(recipe_path: Path, parts: Path, out: Path) -> list[str]:
    """Overrides that make a recipe tiny and keep its stages, picks, losses and switches."""
    recipe = load_recipe(recipe_path)
    options = {
        "output_dir": out, "model.path": parts / "model", "model.config": "", "model.mixed_precision": "no", "data.resolution": 16,
        "data.aspect_buckets": "[]", "data.max_train_prompts": 3, "data.max_test_prompts": 4, "data.max_validation_prompts": 4,
        "sampler.num_inference_steps": 2, "sampler.batch_size": 8, "pool.images_per_prompt": 3, "evaluate.diversity_prompts": 0,
        "evaluate.reader": "", **{f"data.{s}": parts / "photos" for s in ("train", "validation", "test")},
    }  # fmt: skip
    for name in (n for n, s in recipe.scorers.items() if s.kind != "sum"):
        options |= {f"scorers.{name}.kind": "clip", f"scorers.{name}.path": parts / "scorer"}
    for name in recipe.stages:
        learn = f"stages.{name}.learn"
        options |= {
            f"{learn}.max_train_steps": 2,
            f"{learn}.train_batch_size": 2,
            f"{learn}.use_8bit_adam": "false",
            f"{learn}.sample_steps": 0,
        }
        options |= {f"{learn}.lr_warmup_steps": 0, f"{learn}.gradient_accumulation_steps": 1}
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem != "hps"], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_runs_for_two_steps(recipe, parts, tmp_path):
    assert main(["run", str(recipe), *small(recipe, parts, tmp_path / "out")]) == 0
    for stage in load_recipe(recipe).stages:
        assert (tmp_path / "out/train" / stage / "adapter/kohya.safetensors").is_file()
    assert (tmp_path / "out/report.html").is_file()


def base_recipe(parts: Path, folder: Path) -> Path:
    """Supervised on real images first, then one stage."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
output_dir: {folder / "out"}
model: {{path: {parts / "model"}}}
data: {{train: {parts / "photos"}, validation: {parts / "photos"}, test: {parts / "photos"}, resolution: 16}}
sampler: {{num_inference_steps: 2, batch_size: 8}}
pool: {{images_per_prompt: 2}}
scorers: {{picker: {{kind: clip, path: {parts / "scorer"}}}}}
stages:
  base: {{winner: {{from: real}}, learn: {{loss: sft, max_train_steps: 2, learning_rate: 0.01, rank: 2}}}}
  easy:
    winner: {{from: pool, pick: best, by: picker}}
    loser: {{from: pool, pick: worst, by: picker}}
    learn: {{max_train_steps: 1, rank: 2}}
evaluate: {{preference: picker, diversity_prompts: 0}}
"""
    )
    return recipe


def test_a_base_stage_makes_the_model_that_others_start_from(parts, tmp_path):
    """Its merged model makes the pool, and is the reference of the stages after it."""
    recipe = base_recipe(parts, tmp_path)
    assert main(["run", str(recipe)]) == 0
    out = tmp_path / "out"
    assert {e.role for e in read_rows(out / "examples/base", Example)} == {"target"}
    assert {e.source for e in read_rows(out / "examples/base", Example)} == {"real"}
    import json

    import torch
    from safetensors.torch import load_file

    from limner.models.stable_diffusion import load_pipeline

    tuned, raw = load_pipeline(str(out / "train/base/model")), load_pipeline(str(parts / "model"))
    assert json.loads((out / "pool/manifest.json").read_text())["config"]["model"] == tuned.hash != raw.hash
    lora = load_file(out / "train/base/adapter/pytorch_lora_weights.safetensors")
    key = next(k for k in lora if "attn1.to_q" in k and ("lora_A" in k or "down" in k))
    up = lora[key.replace("lora_A", "lora_B").replace("down.weight", "up.weight")]
    layer = key.removeprefix("unet.").split(".lora")[0]
    moved = tuned.unet.get_submodule(layer).weight - raw.unet.get_submodule(layer).weight
    assert torch.allclose(moved, up @ lora[key], atol=1e-6), "alpha equals rank: the merged change is B A"


def test_a_base_stage_of_a_single_file(parts, tmp_path, capsys):
    """Its model is a folder from then on, which takes no configuration; and nothing is drawn before it is trained."""
    to_single_file(tiny_pipeline(), tmp_path / "person.safetensors")
    recipe = str(base_recipe(parts, tmp_path))
    single = ["--model.path", str(tmp_path / "person.safetensors"), "--model.config", str(parts / "model")]
    for command in ("pool", "generate"):
        assert main([command, "--config", recipe, *single]) == 2
        assert "stage base is not trained, and its model makes all else" in capsys.readouterr().err
    assert main(["run", recipe, *single]) == 0
    assert (tmp_path / "out/report.html").is_file()


def test_a_stage_is_added_to_a_run_that_is_finished(parts, tmp_path):
    """One that learns from reconstructions, which nobody needed before: what is trained stays as it is."""
    recipe = str(write_recipe(tmp_path))
    full = yaml.safe_load(Path(recipe).read_text())
    (tmp_path / "easy.yaml").write_text(yaml.safe_dump({**full, "stages": {"easy": full["stages"]["easy"]}, "generate": {}}))
    assert main(["run", str(tmp_path / "easy.yaml")]) == 0
    before = (tmp_path / "out/train/easy/adapter/pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert main(["run", recipe, "--generate.lora_scale", "1.0"]) == 0
    assert (tmp_path / "out/train/easy/adapter/pytorch_lora_weights.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "out/train/normal/adapter/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("written", [False, True])
def test_a_base_stage_cut_where_its_model_is_written(parts, tmp_path, monkeypatch, written):
    """Before or after the merged model is there: started again, the run has the bytes of one that was not cut."""
    from limner.steps import learn

    whole, cut = (base_recipe(parts, (tmp_path / name)) for name in ("whole", "cut") if not (tmp_path / name).mkdir())
    assert main(["run", str(whole)]) == 0
    save = learn._save_tuned_base

    def dies(run):
        if written:
            save(run)
        raise RuntimeError("killed")

    with monkeypatch.context() as m:
        m.setattr(learn, "_save_tuned_base", dies)
        assert main(["run", str(cut)]) != 0
    assert (tmp_path / "cut/out/train/base/model").is_dir() == written
    assert main(["run", str(cut)]) == 0
    weights = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole/out").rglob("*.safetensors"))
    assert len(weights) > 5
    for name in weights:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
