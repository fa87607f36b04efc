"""Killed at any moment and started again, pool and train give the bytes of an undisturbed run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from chain import run_main, write_recipe

PATIENCE = 300  # seconds until a process that makes no progress is an error; long, for a machine that is busy elsewhere
CLOCK = ("seconds", "images_per_second", "peak_memory_mb")

# processes are forked from one that has imported everything: they start at once, and die as any process
context = multiprocessing.get_context("forkserver")
STEPS = [
    "limner.steps",
    "limner.cli",
    "limner.pool.steps",
    "limner.scorers.clip",
    "limner.scorers.dual",
    "limner.training.stage",
    "limner.models.card",
]
context.set_forkserver_preload([*STEPS, "jsonargparse", "pandas"])


def run(*commands: list[str], stop: signal.Signals | None = None, when: Callable[[], bool] = lambda: False) -> int:
    """Run commands to their end, or send the process a signal as soon as `when` is true; the exit code (below 0: killed)."""
    process = context.Process(target=run_main, args=commands)
    process.start()
    try:
        limit = time.monotonic() + PATIENCE
        while stop is not None and process.is_alive() and not when():
            assert time.monotonic() < limit, f"{commands} makes no progress"
            time.sleep(0.001)
        if stop is not None and process.is_alive():
            os.kill(process.pid or 0, stop)
        process.join(PATIENCE)
        assert process.exitcode is not None, f"{commands} does not end"
        return process.exitcode
    finally:
        process.kill()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def files(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def lines(path: Path) -> list[dict[str, float]]:
    """log.jsonl without what the clock says; a line in the making does not count."""
    text = path.read_text() if path.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def trained(folder: Path) -> tuple[dict[str, bytes], list[dict[str, float]], str]:
    """What must not depend on interruptions: the adapter's files, the log, and what the stage says it is."""
    weights = {p.name: p.read_bytes() for p in (folder / "adapter").glob("*.safetensors")}
    return weights, lines(folder / "log.jsonl"), (folder / "identity.json").read_text()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage; six shards of the pool and a dozen steps, so that there are moments to be killed in."""
    folder = tmp_path_factory.mktemp("kill")
    by = {"from": "pool", "by": "picker"}
    learn = {
        "max_train_steps": 12,
        "train_batch_size": 2,
        "rank": 2,
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "statistics_weight": 1e4,
    }
    path = write_recipe(folder, pool={"prompts_per_shard": 1}, sampler={"num_inference_steps": 6}, generate={"stage_blocks": {}})
    values = yaml.safe_load(path.read_text())
    values["stages"] = {"easy": {"winner": {**by, "pick": "best"}, "loser": {**by, "pick": "worst"}, "learn": learn}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def words(command: str, recipe: Path, out: Path) -> list[str]:
    return [command, str(recipe), "--output_dir", str(out)]


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    out = recipe.parent / "undisturbed"
    assert run(*(words(command, recipe, out) for command in ("pool", "score", "examples", "train"))) == 0
    return out


def test_pool_killed_again_and_again(recipe: Path, undisturbed: Path) -> None:
    """Kills come at file counts drawn at random: between shards, in a write, in the work that follows."""
    out, draw, codes = recipe.parent / "pool-killed", random.Random(0), []
    for _ in range(3):
        target = files(out / "pool") + draw.randint(1, 6)
        codes.append(run(words("pool", recipe, out), stop=signal.SIGKILL, when=lambda: files(out / "pool") >= target))  # noqa: B023
    assert -signal.SIGKILL in codes
    assert run(words("pool", recipe, out)) == 0
    assert bytes_of(out / "pool") == bytes_of(undisturbed / "pool")
    assert bytes_of(out / "prompts") == bytes_of(undisturbed / "prompts")


def test_pool_asked_to_stop(recipe: Path, undisturbed: Path) -> None:
    """SIGTERM: exit code 130, finished shards stay, and the rest follows."""
    out = recipe.parent / "pool-stopped"
    assert run(words("pool", recipe, out), stop=signal.SIGTERM, when=lambda: files(out / "pool") > 2) == 130
    assert not list(out.rglob("*.partial"))
    kept = bytes_of(out / "pool")
    assert 0 < sum(name.startswith("part") and name.endswith(".parquet") for name in kept) < 6
    assert run(words("pool", recipe, out)) == 0
    found = bytes_of(out / "pool")
    assert found == bytes_of(undisturbed / "pool")
    assert all(found[name] == data for name, data in kept.items() if name != "manifest.json")


def before_training(undisturbed: Path, out: Path) -> Path:
    """A copy of the undisturbed run without what training made."""
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "train")
    return out


def test_training_killed_again_and_again(recipe: Path, undisturbed: Path) -> None:
    """Kills come after random numbers of logged steps; at most the two steps since the last checkpoint are lost."""
    out, draw, codes = before_training(undisturbed, recipe.parent / "train-killed"), random.Random(1), []
    folder = out / "train/easy"
    for _ in range(3):
        target = min(11, len(lines(folder / "log.jsonl")) + draw.randint(1, 4))
        codes.append(run(words("train", recipe, out), stop=signal.SIGKILL, when=lambda: len(lines(folder / "log.jsonl")) >= target))  # noqa: B023
    assert -signal.SIGKILL in codes
    assert run(words("train", recipe, out)) == 0
    assert trained(folder) == trained(undisturbed / "train/easy")


def test_training_asked_to_stop(recipe: Path, undisturbed: Path) -> None:
    """SIGTERM after a step that is no checkpoint's: it is saved all the same, exit code 130; the same command ends the run."""
    out = before_training(undisturbed, recipe.parent / "train-stopped")
    folder = out / "train/easy"
    assert run(words("train", recipe, out), stop=signal.SIGTERM, when=lambda: len(lines(folder / "log.jsonl")) >= 3) == 130
    saved = max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
    assert 3 <= saved == len(lines(folder / "log.jsonl")) < 12
    assert not (folder / "adapter").exists()
    assert run(words("train", recipe, out)) == 0
    assert trained(folder) == trained(undisturbed / "train/easy")
    assert not list(folder.rglob(".*partial"))
