"""`--dry_run`: counts against hand calculation, the printed table, and nothing written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chain import write_recipe
from endpoint import Server, said
from limner.cli import main
from limner.estimate import Costs, Counts, Line, check_inputs, duration, measure, plan, priced
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
    assert lines["evaluate"] == Line("evaluate", 6 * 5 * 2, 30), "the real photos as well, by two scorers"


def test_a_base_that_is_not_the_reference_is_a_pass_more(tmp_path: Path) -> None:
    """2 steps of 2 pairs through policy and reference, and with the statistics term their winners through the base."""
    start = ["--stages.normal.learn.reference=start", "--stages.hard.learn.reference=start", "--stages.hard.learn.statistics_weight=1e4"]
    lines = {line.step: line.calls for line in plan(Run(load_recipe(write_recipe(tmp_path), start)), Counts(6, 6, 16, 16))}
    assert [lines[f"train {s}"] for s in ("easy", "normal", "hard")] == [2 * 2 * 4, 2 * 2 * 4, 2 * 2 * 5]


def test_without_guidance_there_is_one_branch(tmp_path: Path) -> None:
    run = Run(load_recipe(write_recipe(tmp_path, sampler={"guidance_scale": 1.0}, evaluate={"diversity_prompts": 4, "features": "judge"})))
    lines = {line.step: line for line in plan(run, Counts(6, 6, 16, 16))}
    assert lines["pool"].calls == 6 * 3 * 2
    assert lines["generate"].images == (6 + 4 * 4) * 4


def test_images_for_diversity_are_drawn_where_something_measures_it(tmp_path: Path) -> None:
    run = Run(load_recipe(write_recipe(tmp_path, evaluate={"diversity_prompts": 4})))
    assert {line.step: line for line in plan(run, Counts(6, 6, 16, 16))}["generate"].images == 6 * 4


def costs_of(beside: float, folds: bool) -> Costs:
    stages = ("easy", "normal", "hard")
    return Costs(1.0, dict.fromkeys(stages, beside), folds, dict.fromkeys(stages, 5.0), 0.5, {"picker": 0.1, "judge": 0.2}, 1, 1, 1,
                 {"sample": 1.0}, dict.fromkeys(stages, 1))  # fmt: skip


def test_drawing_beside_an_adapter_takes_longer_unless_it_is_in_the_weights(tmp_path: Path) -> None:
    """Calls of 1 s without and 1.5 s beside an adapter. Generated are base and three stages: a quarter of 96 calls at 1 s."""
    more = [
        "--stages.hard.winner.from=pool",
        "--stages.hard.winner.model=easy",
        "--stages.hard.winner.pick=best",
        "--stages.hard.winner.by=picker",
    ]
    run = Run(load_recipe(write_recipe(tmp_path), more))
    lines = plan(run, Counts(6, 6, 16, 16))
    for folds, each, mean in ((True, 1.0, 1.0), (False, 1.5, (1 + 3 * 1.5) / 4)):
        seconds = {line.step: line.seconds for line in priced(run, lines, costs_of(beside=1.5, folds=folds))}
        assert seconds["pool"] == 72 + 18 * 0.5
        assert seconds["pool-easy"] == 72 * each + 18 * 0.5
        assert seconds["generate"] == 96 * mean + 24 * 0.5


def test_what_a_step_costs_is_measured_with_its_own_adapter(tmp_path: Path) -> None:
    """On all layers it has more weights; what is measured leaves the model as it was."""
    found = []
    for layers in ("attention", "all"):
        more = [f"--stages.{s}.learn.layers={layers}" for s in ("easy", "normal", "hard")] + ["--stages.hard.learn.reference=start"]
        run = Run(load_recipe(write_recipe(tmp_path), more))
        costs = measure(run, *check_inputs(run))
        found.append(costs.parameters["hard"])
    assert costs.folds
    assert found[1] > 2 * found[0]
    assert costs.beside.keys() == costs.train.keys() == {"easy", "normal", "hard"}
    assert not hasattr(run.pipeline.unet, "peft_config")


def test_grids_of_samples_take_time(tmp_path: Path) -> None:
    """Two steps of 5 s, a grid after each, or one at the end: 3 or 2 rows of 8 pictures, each of 2 steps with guidance."""
    costs = costs_of(beside=1.0, folds=True)
    seconds = []
    for steps in (0, 1, 5):
        run = Run(load_recipe(write_recipe(tmp_path), [f"--stages.easy.learn.sample_steps={steps}"]))
        lines = {line.step: line for line in priced(run, plan(run, Counts(6, 6, 16, 16)), costs)}
        seconds.append(lines["train easy"].seconds)
    assert seconds == [10.0, 10.0 + 3 * 8 * (2 * 2 * 1.0 + 0.5), 10.0 + 2 * 8 * (2 * 2 * 1.0 + 0.5)]
    assert lines["score"].seconds == pytest.approx(36 * 0.1)
    assert lines["evaluate"].seconds == pytest.approx(30 * 0.3)


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


def test_a_dry_run_asks_a_judge_and_keeps_nothing(tmp_path: Path) -> None:
    """Asked twice, the second time for its time, which is not that of an answer at hand; and what it said is in no file."""
    server = Server()
    scorers = {"judge": {"kind": "judge", "path": server.url, "model": "m"}}
    recipe, waits = write_recipe(tmp_path, scorers=scorers), 0.2
    server.reply = lambda body: time.sleep(waits) or (200, said("Final Score: 3"))  # type: ignore[func-returns-value]
    before = files(tmp_path)
    run = Run(load_recipe(recipe))
    counts, first = check_inputs(run)
    assert measure(run, counts, first).score["judge"] >= waits
    server.close()
    assert len(server.seen) == 2
    assert files(tmp_path) == before


@pytest.mark.parametrize("part", ["photos/3.png", "picker/model.safetensors", "model/model_index.json"])
def test_a_dry_run_finds_what_is_missing(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / part).unlink()
    assert main(["run", str(recipe), "--dry_run"]) == 2
    assert Path(part).parent.name in capsys.readouterr().err


def test_durations_read_well() -> None:
    assert [duration(s) for s in (3, 600, 7200)] == ["3.0 s", "10 min", "2.0 h"]
