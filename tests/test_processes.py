"""Several processes: the noise, the order and so the result are those of one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from chain import write_recipe
from limner.cli import main


def test_two_processes_run_what_one_with_two_micro_batches_runs(tmp_path):
    """Two processes of one pair each against one process that accumulates two: same global batches, gradients averaged; a second stage
    and grids of samples, which one process draws while the other waits."""
    learn = {"max_train_steps": 2, "train_batch_size": 1, "rank": 2, "learning_rate": 1e-3, "sample_steps": 1}
    pair = {"winner": {"from": "pool", "pick": "best", "by": "picker"}, "loser": {"from": "pool", "pick": "worst", "by": "picker"}}
    logs = []
    for name, accumulation in (("one", 2), ("two", 1)):
        stage = {**pair, "learn": {**learn, "gradient_accumulation_steps": accumulation}}
        stages = {"easy": stage, "normal": {**stage, "start": "easy"}, "hard": None}
        recipe = str(write_recipe(tmp_path, output_dir=str(tmp_path / name), stages=stages))
        if name == "one":
            assert main(["run", "--config", recipe]) == 0
        else:
            # accelerate launch on GPUs is the same; --standalone finds itself a free port
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]
            done = subprocess.run(
                [*launch, "-m", "limner.cli", "run", "--config", recipe],
                capture_output=True,
                text=True,
                timeout=240,
                env={**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("evaluate: base") == 1, "one of them evaluates"
        logs.append([json.loads(line) for line in (tmp_path / name / "train/easy/log.jsonl").read_text().splitlines()])
        assert (tmp_path / name / "train/normal/adapter/pytorch_lora_weights.safetensors").is_file()
        assert (tmp_path / name / "train/normal/samples/step-000002.png").is_file() and (tmp_path / name / "report.html").is_file()
    # The first gradient tells: equal batches, equal noise, gradients averaged. Weights do not: Adam turns rounding into whole steps.
    for metric in ("loss", "winner_error_difference", "loser_error_difference", "grad_norm"):
        assert logs[1][0][metric] == pytest.approx(logs[0][0][metric], rel=1e-4, abs=1e-7), metric
    assert logs[1][1]["loss"] == pytest.approx(logs[0][1]["loss"], rel=0.05)


STOPPED = """
import os, signal, sys
from accelerate import Accelerator
from limner.training.stage import Draw
ours = Draw.__call__
def draw(self, step):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return ours(self, step)
Draw.__call__ = draw
from limner.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_all_processes_stop_where_one_is_stopped(tmp_path):
    """A signal that only the second one gets: both end after that step with what the first one saved, and none waits for the other."""
    learn = {"max_train_steps": 9, "train_batch_size": 1, "rank": 2, "checkpointing_steps": 9}
    pair = {"winner": {"from": "pool", "pick": "best", "by": "picker"}, "loser": {"from": "pool", "pick": "worst", "by": "picker"}}
    recipe = str(write_recipe(tmp_path, stages={"easy": {**pair, "learn": learn}, "normal": None, "hard": None}))
    for command in ("pool", "score", "examples"):
        assert main([command, "--config", recipe]) == 0
    (tmp_path / "stopped.py").write_text(STOPPED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*launch, str(tmp_path / "stopped.py"), "train", "--config", recipe]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode != 0 and done.stderr.count("stopped by signal at step 2; saved") == 2, done.stderr
    assert [p.name for p in (tmp_path / "out/train/easy").glob("checkpoint-*")] == ["checkpoint-2"]
