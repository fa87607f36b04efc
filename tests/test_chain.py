"""The user's route: photos with metadata.jsonl and a diffusers folder through every command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from chain import photo_folder, write_recipe
from limner.cli import main
from limner.models.lora_file import load_lora
from limner.models.stable_diffusion import load_pipeline
from limner.recipe import load_recipe
from limner.records import Example, Image, Prompt
from limner.steps import Run
from limner.steps.judge import circular
from limner.store import read_manifest, read_rows
from tiny import tiny_pipeline, to_single_file


def test_a_recipe_runs_from_photos_to_report(tmp_path):
    """Every command in turn leaves what the design says, and running again changes nothing."""
    recipe = str(write_recipe(tmp_path))
    out = tmp_path / "out"
    for command in ("pool", "reconstruct", "score", "examples", "train", "generate", "evaluate", "report"):
        assert main([command, "--config", recipe]) == 0, command
    pool = list(read_rows(out / "pool", Image))
    assert len(pool) == 6 * 3
    assert {i.timestep for i in read_rows(out / "reconstruct", Image)} == {100, 400, 700}
    hard = list(read_rows(out / "examples/hard", Example))
    assert {e.role for e in hard} == {"winner", "loser"}
    assert all(e.latents is not None for e in hard), "latents of reconstructions are kept"
    assert read_manifest(out / "examples/easy")["counts"] == {"kept": 6}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["final"] == "hard"
    assert set(metrics["models"]) == {"real", "base", "easy", "normal", "hard"}
    assert set(metrics["wins"]["hard"]) >= {"preference", "judge"}
    assert (out / "train/hard/adapter/pytorch_lora_weights.safetensors").is_file()
    assert "<html" in (out / "report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    assert main(["run", recipe]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_drawn_again_at_another_strength_after_an_update(tmp_path):
    """Stages that were trained before an option existed are not trained again; the card says the strength that was measured last."""
    recipe, out = str(write_recipe(tmp_path)), tmp_path / "out"
    assert main(["run", recipe]) == 0
    for path in out.glob("train/*/identity.json"):
        identity = json.loads(path.read_text())
        assert identity["learn"].pop("layers") == "attention"
        path.write_text(json.dumps(identity))
    card = out / "train/easy/adapter/README.md"
    assert 'pipe.set_adapters("easy", 0.5)' in card.read_text()
    shutil.rmtree(out / "generate")
    before = {p: p.stat().st_mtime_ns for p in out.glob("train/*/adapter/*.safetensors")}
    assert main(["run", recipe, "--generate.lora_scale", "0.25"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert 'pipe.set_adapters("easy", 0.25)' in card.read_text()
    assert (
        main(
            ["run", recipe, "--stages.easy.learn.layers", "all", "--stages.normal.learn.layers", "all", "--stages.hard.learn.layers", "all"]
        )
        == 2
    )


def test_a_single_file_checkpoint_through_the_whole_chain(tmp_path):
    """Without a configuration of its own it takes the folder's; its adapter is what the folder's run gives, and the card loads the file."""
    folder = write_recipe(tmp_path)
    to_single_file(tiny_pipeline(), tmp_path / "person.safetensors")
    more = [
        "--model.path",
        str(tmp_path / "person.safetensors"),
        "--model.config",
        str(tmp_path / "model"),
        "--output_dir",
        str(tmp_path / "single"),
    ]
    assert main(["run", str(folder), *more]) == 0
    assert (tmp_path / "single/report.html").is_file()
    card = (tmp_path / "single/train/hard/adapter/README.md").read_text()
    assert 'from_single_file("person.safetensors")' in card
    assert """layer.set_scale("hard", 0.5 if name.startswith(('up_block',)) else 0.0)""" in card
    metrics = json.loads((tmp_path / "single/metrics.json").read_text())
    assert f"| judge | {metrics['models']['base']['judge']['value']:.4g} [" in card
    assert load_lora(load_pipeline(str(tmp_path / "model"), device="cpu").unet, tmp_path / "single/train/hard/adapter", "x")


def test_photos_are_compared_by_the_vectors_of_a_clip(tmp_path):
    """Without a reader: Fréchet distance and diversity with the judge's image vectors, of photos of two shapes."""
    recipe = write_recipe(tmp_path, evaluate={"features": "judge", "diversity_prompts": 3}, data={"aspect_buckets": [0.5, 1.0]})
    assert main(["run", str(recipe)]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    for model in ("base", "easy", "normal", "hard"):
        assert metrics["models"][model]["frechet"]["value"] > 0
        assert metrics["models"][model]["diversity"]["n"] == 3
    assert metrics["circular"] == ["preference"]
    run = Run(load_recipe(recipe))
    drawn = [i for i in read_rows(tmp_path / "out/generate/test-diversity/easy", Image) if i.k < 4]
    by_prompt = {p: [i for i in drawn if i.prompt_id == p] for p in dict.fromkeys(i.prompt_id for i in drawn)}
    from limner.images import decode

    def spread(images):
        vectors = run.scorers["judge"].tower.encode_images([decode(i.image) for i in images]).detach().numpy()
        return np.mean([np.linalg.norm(vectors[i] - vectors[j]) for i in range(4) for j in range(i)])

    by_hand = np.mean([spread(images) for images in by_prompt.values()])
    assert metrics["models"]["easy"]["diversity"]["value"] == pytest.approx(by_hand, rel=1e-3)


def test_what_chose_the_examples_is_circular(tmp_path):
    """The same weights under another name, a part of a sum, and a reader that chose as a scorer."""
    photo_folder(tmp_path / "other")
    both = {"picker": {"kind": "clip", "path": "picker"}, "judge": {"kind": "clip", "path": "judge"}}

    def found(scorers, by, **evaluate):
        path = write_recipe(tmp_path, scorers=scorers, evaluate=evaluate)
        stages = [f"--stages.{s}.{role}.by={by}" for s in ("easy", "normal") for role in ("winner", "loser")]
        return circular(Run(load_recipe(path, stages)))

    assert found(both, "picker") == {"preference"}
    assert found(both, "judge") == {"judge"}
    assert found({**both, "again": both["judge"]}, "again") == {"judge"}
    assert found({**both, "both": {"kind": "sum", "of": {"picker": 1.0, "judge": 1.0}}}, "both") == {"preference", "judge"}
    # other kinds and names of the same weights; a sum that measures; parts of the embedded world, told apart by the scorer's name
    assert found({**both, "again": {"kind": "pickscore", "path": "judge"}}, "again") == {"judge"}
    assert found({**both, "sum": {"kind": "sum", "of": {"picker": 1.0}}}, "picker", preference="sum") == {"preference"}
    embedded = {"preference": {"kind": "dual", "path": "figures"}, "judge": {"kind": "dual", "path": "figures"}}
    assert found({**both, **embedded}, "preference", preference="preference", judge="judge") == {"preference"}
    readers = {"sound": {"kind": "soundness", "path": "reader"}, "reader": {"kind": "reader", "path": "reader"}}
    read = {"frechet", "frechet_ratio", "attribute_accuracy", "joint_plausibility", "defect_rate", "diversity"}
    assert found({**both, **readers}, "sound", reader="reader") == read
    assert found({**both, **readers, "reader": {"kind": "reader", "path": "another"}}, "sound", reader="reader") == set()
    assert found(both, "picker", features="picker") == {"preference", "frechet", "frechet_ratio", "diversity"}


def test_grids_of_samples_show_the_base_above_the_policy(tmp_path):
    """At equal seeds: the upper row is what the base draws, in every grid; the lower one moves."""
    from PIL import Image as Picture

    from limner.pool.sample import Request, sample

    learn = [f"--stages.easy.learn.{k}={v}" for k, v in {"sample_steps": 1, "max_train_steps": 3, "learning_rate": 0.03}.items()]
    recipe = write_recipe(tmp_path)
    assert main(["run", str(recipe), *learn]) == 0
    found = sorted((tmp_path / "out/train/easy/samples").iterdir())
    assert [p.name for p in found] == ["step-000001.png", "step-000002.png", "step-000003.png"]
    sheets = [np.array(Picture.open(p).convert("RGB")) for p in found]
    side, half = 16, len(sheets[0]) // 2
    upper, lower = [s[:half] for s in sheets], [s[half:] for s in sheets]
    assert np.array_equal(upper[0], upper[2])
    assert not np.array_equal(lower[0], lower[2])
    run = Run(load_recipe(recipe))
    prompts = list(read_rows(tmp_path / "out/prompts/validation", Prompt))
    requests = [Request(replace(p, image=None), 0, side, side) for p in prompts]
    drawn = [(x * 255).round().byte().permute(1, 2, 0).numpy() for x, _ in sample(run.pipeline, requests, run.recipe.sampler, 0)]
    places = [upper[0][y : y + side, x : x + side] for y in range(half - side + 1) for x in range(upper[0].shape[1] - side + 1)]
    assert [any(np.array_equal(tile, place) for place in places) for tile in drawn] == [True] * 6
