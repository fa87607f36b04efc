"""The user's route: photos with metadata.jsonl and a diffusers folder through every command."""

from __future__ import annotations

import json

from chain import write_recipe
from limner.cli import main
from limner.records import Example, Image
from limner.store import read_manifest, read_rows


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
