"""The closed loop: raters answer, what they prefer makes examples, examples train a model. And simulated raters against the truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import study as s
from chain import write_recipe
from limner.cli import main
from limner.feedback import answers, exports, payloads, server
from limner.feedback.preferences import preferences
from limner.feedback.study import load_study
from limner.recipe import load_recipe
from limner.records import Choice, Example, Image, Score
from limner.store import read_rows


def test_preferences_by_hand() -> None:
    choice = {"images": ["a", "b", "c"], "ranks": [1, 2, 2]}
    rows = [
        payloads.make("a", "r1", "choice", choice),  # a beats both; b and c tie: half of one of two
        payloads.make("a", "r2", "choice", {**choice, "ranks": [3, 1, 2]}),
        payloads.make("d", "r1", "side", {"against": "e", "answer": 1}),
        payloads.make("d", "r2", "side", {"against": "e", "answer": -2}),
        payloads.make("f", "r1", "ratings", {"overall": 4, "plausibility": 1}),
    ]
    assert preferences(rows) == {"a": 0.5, "b": 0.625, "c": 0.375, "d": 0.375, "e": 0.625, "f": 0.75}
    assert preferences(rows, "plausibility")["f"] == 0


def brightness(image: Image) -> float:
    from limner.images import decode

    return float(np.asarray(decode(image.image)).mean())


def test_the_loop_from_a_pool_to_a_model(tmp_path: Path) -> None:
    """Raters who like bright images choose among a pool's; of each pair that trains the model the winner is brighter."""
    recipe = write_recipe(tmp_path)
    assert main(["pool", "--config", str(recipe)]) == 0
    values = {"task": "choice", "answer": "ranking", "overlap": 2, "images": {"from": str(tmp_path / "out/pool"), "each": 3}}
    study = s.study_of(tmp_path, values)
    database = server.prepare(study)
    bright = {i.id: brightness(i) for i in read_rows(tmp_path / "out/pool", Image)}
    from limner.feedback.database import Picture, reading

    with reading(database) as session:
        of_token = {p.token: bright[p.image_id] for p in session.query(Picture)}
    for name in "ab":
        rater = s.sign_in(s.client(study, database), study, database, name)
        for n in range(6):
            shown = [i["token"] for i in rater.get("/api/task").json()["item"]["images"]]
            order = sorted(shown, key=lambda t: -of_token[t])
            assert (
                s.answer(rater, {"images": shown, "ranks": [order.index(t) + 1 for t in shown]}, f"loop-{name}-{n:04d}").status_code == 200
            )
    database.engine.dispose()
    assert main(["annotate", "consolidate", str(tmp_path / "study.yaml")]) == 0
    stage = {"winner": {"from": "feedback", "pick": "best"}, "loser": {"from": "feedback", "pick": "worst"}}
    learn = {"max_train_steps": 2, "train_batch_size": 2, "rank": 2, "learning_rate": 1e-3, "checkpointing_steps": 1}
    recipe = write_recipe(
        tmp_path, feedback=study.output_dir, stages={"people": {**stage, "learn": learn}, "easy": None, "normal": None, "hard": None}
    )
    for command in ("examples", "train"):
        assert main([command, "--config", str(recipe)]) == 0
    pairs: dict[str, dict[str, Example]] = {}
    for example in read_rows(tmp_path / "out/examples/people", Example):
        pairs.setdefault(example.group, {})[example.role] = example
    assert len(pairs) == 6
    assert all(bright[p["winner"].image_id] > bright[p["loser"].image_id] and p["winner"].score == 1 for p in pairs.values())
    assert (tmp_path / "out/train/people/adapter/pytorch_lora_weights.safetensors").is_file()


def test_from_feedback_needs_a_study(tmp_path: Path) -> None:
    stage = {"winner": {"from": "feedback"}, "loser": {"from": "feedback", "pick": "worst"}}
    with pytest.raises(ValueError, match=r"stages.easy.winner.from: feedback of which study"):
        load_recipe(write_recipe(tmp_path, stages={"easy": stage, "normal": None, "hard": None}))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("anny", reason="the renderer needs the extra `figures`")
    folder = tmp_path_factory.mktemp("simulated")
    study = {"output_dir": str(folder / "run"), "images": {"from": "figures", "limit": 32}, "overlap": 3, "seed": 1}
    (folder / "study.yaml").write_text(json.dumps(study))
    assert main(["annotate", "simulate", str(folder / "study.yaml"), "--count", "3"]) == 0
    return folder


def test_simulated_raters_answer_everything_and_together_know_more(simulated: Path) -> None:
    from limner.feedback.simulate import recovery
    from limner.figures.truths import load_truth
    from limner.inputs import read_prompts

    table = simulated / "run/figures.parquet"
    study = load_study(simulated / "study.yaml", ["--images.from", str(table)])
    database = server.prepare(study)
    given = answers.given(study, database)
    assert len(given) == 32 * 3 and {g.rater for g in given} == {f"simulated-{n:03d}" for n in range(3)}
    truths = {p.id: load_truth(p.truth or "") for p in read_prompts(table, "train")}
    assert {t.artifact.any() for t in truths.values()} == {True, False} and {bool(t.words) for t in truths.values()} == {True, False}
    keys, said = list(truths), [g.found for g in given]
    of_key = {k: [i for i, g in enumerate(given) if g.key == k] for k in keys}
    together = recovery(said, list(truths.values()), [of_key[k] for k in keys])
    for n in range(3):
        alone = recovery(said, list(truths.values()), [[i for i in of_key[k] if given[i].rater == f"simulated-{n:03d}"] for k in keys])
        assert all(together[part] > alone[part] for part in together), (n, alone, together)
    report = exports.consolidate_study(study, database)
    assert report["consolidated"]["rows"] == 32 and 0.2 < report["agreement"]["overall"]["alpha"] < 0.95
    scores = {x.image_id: x.score for x in read_rows(simulated / "run/preferences/scores", Score)}
    known = [truths[k].qualities["overall"] for k in scores]
    assert np.corrcoef(known, list(scores.values()))[0, 1] > 0.6


def test_qualities_by_hand() -> None:
    """A 10x10 picture: a black figure of 20 pixels left of the middle on white, 5 of them wrong, one of four claims untrue."""
    from limner.figures.latent import qualities

    picture, figure, defect = np.full((10, 10, 3), 255, np.uint8), np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    figure[:, 3:5] = True
    picture[figure] = 0
    sound = qualities(picture, figure, defect, 0)
    centred = 1 - 0.1 / 0.2  # its middle is at 0.4; its colour differs by more than 130
    assert sound == pytest.approx({"plausibility": 1, "alignment": 1, "aesthetics": 0.2 + 0.4 * centred + 0.4, "overall": 0.95})
    defect[:5, 3] = True
    wrong = qualities(picture, figure, defect, 1 / 4)
    expected = {"plausibility": 0.7 * np.exp(-0.75), "alignment": 0.75**3, "aesthetics": 0.6 * 0.8}
    expected["overall"] = 0.4 * expected["plausibility"] + 0.35 * expected["alignment"] + 0.25 * expected["aesthetics"]
    assert wrong == pytest.approx(expected)
    unsure = qualities(picture, figure, defect, 0, defect=0.5, blur=0.25)
    assert unsure["plausibility"] == pytest.approx(1 - 0.5 * (1 - 0.7 * np.exp(-0.75))), "half way between a defect and none"
    assert unsure["aesthetics"] == pytest.approx(0.8 * 0.8 * 0.75), "half of what a defect takes away, a quarter of the sharpness lost"
    with pytest.raises(ValueError, match="wrong is 4; expected 0 to 1"):
        qualities(picture, figure, defect, 4)


@pytest.mark.parametrize("task", ["choice", "side"])
def test_simulated_raters_prefer_what_is_better(task: str, tmp_path: Path) -> None:
    """The mean of three raters follows the latent quality: of two images with an answer apart, the better one usually wins."""
    pytest.importorskip("anny", reason="the renderer needs the extra `figures`")
    from limner.figures.truths import read_truths

    images = {"from": "figures", "limit": 12, **({"against": "figures"} if task == "side" else {})}
    values = {"output_dir": str(tmp_path / "run"), "task": task, "answer": "ranking", "images": images, "overlap": 3}
    (tmp_path / "study.yaml").write_text(json.dumps(values))
    assert main(["annotate", "simulate", str(tmp_path / "study.yaml")]) == 0
    assert main(["annotate", "consolidate", str(tmp_path / "study.yaml")]) == 0
    truths = read_truths(tmp_path / "run/figures" / ("choice" if task == "choice" else "ours"))
    groups: dict[str, list[Score]] = {}
    for score in read_rows(tmp_path / "run/preferences/scores", Score):
        groups.setdefault(score.prompt_id, []).append(score)
    assert len(groups) == 12 and {len(g) for g in groups.values()} == {4 if task == "choice" else 2}
    right = [
        (truths[a.image_id].qualities["overall"] > truths[b.image_id].qualities["overall"]) == ((a.score or 0) > (b.score or 0))
        for g in groups.values()
        for n, a in enumerate(g)
        for b in g[n + 1 :]
        if a.score != b.score
    ]
    assert np.mean(right) > 0.75
    out, feedback = tmp_path / "choices", str(tmp_path / "run/feedback/part-00000.parquet")
    command = ["scorer", "import", "--format", "feedback", "--source", feedback, "--output_dir", str(out)]
    assert main([*command, "--images", str(tmp_path / "run/preferences/images")]) == 0
    choices = list(read_rows(out, Choice))
    assert len(choices) == 12 * 3 and {len(c.images) for c in choices} == {4 if task == "choice" else 2}
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["agreement"][task]["alpha"] > 0.2 and ("side" in report) == (task == "side")


def test_simulate_needs_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s.image_folder(tmp_path / "images", {"a": "x", "b": "y"})
    s.study_of(tmp_path, {"overlap": 1})
    assert main(["annotate", "simulate", str(tmp_path / "study.yaml")]) == 2
    assert "no truth is known of 2 of 2 images, such as a; for generated figures say with whose eyes" in capsys.readouterr().err


def test_a_pool_for_people_is_drawn_when_asked_for(tmp_path: Path) -> None:
    """A recipe whose stages learn from people alone: `limner pool` draws what they look at; a stage finds its prompts without it."""
    stage = {
        "winner": {"from": "feedback", "pick": "best"},
        "loser": {"from": "feedback", "pick": "worst"},
    }
    recipe = str(write_recipe(tmp_path, feedback=str(tmp_path / "study"), stages={"easy": stage, "normal": None, "hard": None}))
    assert main(["pool", "--config", recipe]) == 0
    assert list(read_rows(tmp_path / "out/pool", Image))
