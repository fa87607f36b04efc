"""Agreement of scores with choices: accuracy under every policy by hand, calibration, generators, and measures of sets."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from chain import clip_scorer, photo_folder
from limner.cli import main
from limner.evaluation.distances import class_score
from limner.evaluation.sets import chosen_and_rejected, judge_sets
from limner.records import Choice, to_table
from limner.scorers.agreement import Judged, accuracy, by_generator, calibration, choose_tie_margin, fit_temperature, judge, top_choice
from limner.store import open_step
from test_choice_records import choice
from test_choices import picture


def judged(preference: list[float], margin: list[float], prompt: list[int] | None = None) -> Judged:
    n = len(preference)
    return Judged(np.array(preference), np.array(margin), np.array(prompt or range(n)), np.full((n, 2), ""))


# Two prompts. Of the first: right, right, wrong, and a human tie with scores apart; of the second: a predicted tie on a decided pair, and a
# human tie with equal scores.
PAIRS = judged([1, 0, 1, 0.5, 1, 0.5], [2, -1, -3, 1, 0, 0], [0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("policy", "average", "value"),
    [
        ("drop", "pairs", 2 / 4),  # the predicted tie is wrong
        ("drop", "prompts", (2 / 3 + 0 / 1) / 2),
        ("half", "pairs", (2 + 0.5 + 0.5 + 1) / 6),
        ("half", "prompts", (2.5 / 4 + 1.5 / 2) / 2),
        ("right", "pairs", (2 + 1 + 0 + 1) / 6),
        ("right", "prompts", (3 / 4 + 1 / 2) / 2),
    ],
)
def test_accuracy_by_hand(policy, average, value):
    found = accuracy(PAIRS, tie_policy=policy, average=average)
    assert found["value"] == pytest.approx(value)
    assert (found["n_pairs"], found["n_ties"], found["n_predicted_ties"]) == (4 if policy == "drop" else 6, 2, 2)
    assert found["n_prompts"] == 2 and found["tie_policy"] == policy and found["average"] == average
    assert found["low"] <= found["value"] <= found["high"]


def test_rank_accuracy_is_one_minus_inversions():
    """HPSv2's number, counted as inversions over all pairs of a ranking, ties never being one."""
    rng = np.random.default_rng(0)
    rows = [choice(rng.integers(1, 5, 6).astype(float).tolist(), "ranking", prompt_id=str(i), id=str(i)) for i in range(20)]
    scores = [rng.normal(size=6).tolist() for _ in rows]
    expected = []
    for row, s in zip(rows, scores):
        inversions = sum((row.said[i] < row.said[j]) and s[i] < s[j] for i in range(6) for j in range(6))
        expected.append(1 - inversions / 15)
    found = accuracy(judge(rows, scores), tie_policy="right", average="prompts")
    assert found["value"] == pytest.approx(np.mean(expected))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(-3, 3)), min_size=1, max_size=12))
def test_turning_every_pair_round_changes_nothing(pairs):
    p, m = [a for a, _ in pairs], [float(b) for _, b in pairs]
    for policy in ("drop", "half", "right"):
        one, other = (accuracy(x, tie_policy=policy, draws=2)["value"] for x in (judged(p, m), judged([1 - a for a in p], [-b for b in m])))
        assert one == other


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-4, 4)), min_size=1, max_size=10))
def test_the_tie_margin_is_the_best_there_is(pairs):
    """Against every margin tried in turn."""
    x = judged([a for a, _ in pairs], [float(b) for _, b in pairs])
    best = max(accuracy(x, tie_policy="half", tie_margin=m, draws=2)["value"] for m in (-1, 0, 1, 2, 3, 4))
    assert accuracy(x, tie_policy="half", tie_margin=choose_tie_margin(x), draws=2)["value"] == pytest.approx(best)


def test_equal_scores_are_a_tie_whoever_comes_first():
    margin = choose_tie_margin(judged([1, 0], [3.0, -2.0]))  # none is best: all that differ are right
    found = accuracy(judged([1, 1, 0], [0.0, 0.0, 0.0]), tie_policy="half", tie_margin=margin, draws=2)
    assert found["value"] == 0.5 and found["n_predicted_ties"] == 3


def test_an_interval_over_prompts_is_wider_than_one_over_pairs():
    """Forty prompts whose twenty pairs are all right or all wrong hold forty answers, not eight hundred."""
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.7, 20)
    clustered = accuracy(judged([1.0] * 800, np.where(right, 1.0, -1.0).tolist(), np.repeat(np.arange(40), 20).tolist()))
    independent = accuracy(judged([1.0] * 800, np.where(right, 1.0, -1.0).tolist()))
    widths = [x["high"] - x["low"] for x in (clustered, independent)]
    assert widths[0] > 3 * widths[1]
    assert widths[0] == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 40), rel=0.25)


def test_nothing_to_count_is_no_number():
    found = accuracy(judged([0.5], [1.0]))
    assert found["value"] is None and found["low"] is None and found["n_ties"] == 1 and found["n_pairs"] == 0


def test_a_missing_score_leaves_its_pairs_out_and_is_counted():
    found = judge([choice([0, 1, 0]), choice([1, 0])], [[1.0, math.nan, 2.0], [3.0, 1.0]])
    assert len(found) == 1 and found.missing == 2 and accuracy(found)["value"] == 1
    with pytest.raises(ValueError, match=r"row r: 3 scores for 2 images"):
        judge([choice([1, 0])], [[1, 2, 3]])


def test_calibration_by_hand():
    """Margin log 3 says 0.75. Of four such pairs three agree: no error. Of margin log 9 (0.9) one of two: 0.4, a third of the pairs."""
    exact = judged([1, 0, 1, 0], [math.log(3), -math.log(3), math.log(3), math.log(3)])
    assert calibration(exact)["ece"] == pytest.approx(0)
    both = judged([1, 0, 1, 0, 1, 0], [math.log(3), -math.log(3), math.log(3), math.log(3), math.log(9), math.log(9)])
    found = calibration(both)
    assert found["ece"] == pytest.approx(0.4 / 3)
    assert [(r["n"], round(r["predicted"], 3), round(r["preferred"], 3)) for r in found["table"]] == [(4, 0.75, 0.75), (2, 0.9, 0.5)]
    doubled = judged([1, 0, 1, 0], [2 * math.log(3), -2 * math.log(3), 2 * math.log(3), 2 * math.log(3)])
    assert calibration(doubled, temperature=2)["ece"] == pytest.approx(0)


def test_the_temperature_that_made_the_choices_is_found():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 30, 20_000)
    preference = (rng.random(20_000) < 1 / (1 + np.exp(-margin / 15))).astype(float)
    x = judged(preference.tolist(), margin.tolist())
    assert fit_temperature(x) == pytest.approx(15, rel=0.05)
    assert calibration(x, temperature=15)["ece"] < 0.02 < calibration(x, temperature=3)["ece"]
    with pytest.raises(ValueError, match="no temperature fits"):
        fit_temperature(judged([1.0], [0.0]))


def test_generators_seen_and_not():
    rows = [
        choice([1, 0], generators=("a", "b"), prompt_id="1"), choice([1, 0], generators=("a", "c"), prompt_id="2"),
        choice([1, 0], generators=("c", "d"), prompt_id="3"), choice([1, 0], prompt_id="4"),
    ]  # fmt: skip
    found = by_generator(judge(rows, [[1, 0], [0, 1], [1, 0], [0, 1]]), {"a", "b"})
    assert {k: (v["value"], v["seen"]) for k, v in found["generators"].items()} == {
        "a": (0.5, True), "b": (1, True), "c": (0.5, False), "d": (1, False),
    }  # fmt: skip
    assert {k: v["value"] for k, v in found["groups"].items()} == {"both seen": 1, "one seen": 0, "none seen": 1}
    assert by_generator(judge(rows, [[1, 0]] * 4), None)["groups"] == {}


def test_top_choice_and_chance():
    rows = [choice([0, 1, 0, 0]), choice([1, 0]), choice([1, 2, 3], "ranking")]
    found = top_choice(rows, [[1, 2, 0, 0], [0, 1], [5, 4, 3]])
    assert found["value"] == pytest.approx(2 / 3) and found["chance"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3)
    assert top_choice(rows, [[1, 1, 1, 1], [1, 1], [1, 1, 1]])["value"] == pytest.approx(found["chance"]), "equal scores choose by lot"
    tied = [choice([1, 1, 2], "ranking"), choice([0.5, 0, 0.5])]
    assert top_choice(tied, [[0, 1, 0], [1, 0, 0]])["value"] == 1 and top_choice(tied, [[0, 1, 1], [0, 1, 0]])["value"] == 0.25
    assert top_choice(tied, [[0, 1, 0], [1, 0, 0]])["chance"] == pytest.approx(2 / 3)


def test_class_score_by_hand():
    """Certain and spread evenly over 4 classes: 4. All alike: 1. Half on two classes each way: exp(KL) by hand."""
    assert class_score(np.eye(4)) == pytest.approx(4)
    assert class_score(np.full((5, 4), 0.25)) == pytest.approx(1)
    p = np.array([[0.8, 0.2], [0.2, 0.8]])
    assert class_score(p) == pytest.approx(math.exp(0.8 * math.log(1.6) + 0.2 * math.log(0.4)))
    with pytest.raises(ValueError, match="rows must be 0 or more and sum to 1"):
        class_score(np.ones((2, 2)))


def many(n: int) -> list[Choice]:
    rows = []
    for i in range(n):
        said = [1.0, 0.0, 0.0] if i % 2 else [0.0, 1.0]
        rows.append(choice(said, id=str(i), prompt_id=str(i), files=tuple(f"{i}/{k}" for k in range(len(said)))))
    return rows


def test_the_chosen_and_one_rejected_image_a_row():
    rows = [*many(10), choice([0.5, 0.5]), choice([2, 1, 3, 3], "ranking")]
    chosen, rejected = chosen_and_rejected(rows)
    assert chosen == [(n, 0 if n % 2 else 1) for n in range(10)] + [(11, 1)], "a tie has no chosen image"
    assert [r for r, _ in rejected] == [r for r, _ in chosen] and all(a != b for a, b in zip(chosen, rejected))
    assert rejected[-1][1] in (2, 3), "of a ranking the worst"


def test_measures_of_sets_see_what_is_there_and_nothing_else():
    """Chosen images lie where real ones do and are clearly of a class; or features have nothing to do with what was chosen."""
    rng = np.random.default_rng(0)
    rows = many(80)
    real = rng.normal(0, 1, (120, 4))
    noise = {f: rng.normal(0, 1, 4) for row in rows for f in row.files}
    sure, unsure = np.array([0.98, 0.01, 0.01]), np.array([0.4, 0.3, 0.3])
    shifted, classes = {}, {}
    for row in rows:
        for file, share in zip(row.files, row.said):
            shifted[file] = noise[file] + (0 if share else 1.5)
            classes[file] = np.roll(sure if share else unsure, rng.integers(3))
    found = judge_sets(rows, shifted, classes, real)
    assert found["rows"] == 80 and found["frechet_between"]["p"] < 0.01
    assert found["frechet_between"]["value"] > 4 * found["frechet_between"]["by_lot"]
    assert found["frechet_to_reference"]["prefers"] == "chosen" and found["class_score"]["prefers"] == "chosen"
    blind = judge_sets(rows, noise, dict.fromkeys(noise, classes[rows[0].files[0]]), real)
    assert blind["frechet_between"]["p"] > 0.05 and blind["frechet_to_reference"]["prefers"] == "neither"
    assert blind["class_score"]["prefers"] == "neither"
    with pytest.raises(ValueError, match=r"only 0 rows have features"):
        judge_sets(rows, {}, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    clip_scorer(folder / "scorer")
    (folder / "scorer/training.json").write_text(json.dumps({"generators": ["x"]}))
    rows = [
        choice(
            [1.0, 0.0], id=f"r{i}", prompt_id=f"p{i}", files=(f"{i}a", f"{i}b"), images=(picture(2 * i), picture(2 * i + 1)),
            generators=("x", "y" if i % 2 else "x"),
        )
        for i in range(6)
    ]  # fmt: skip
    step = open_step(folder / "choices", "choices", {}, {})
    step.write(0, to_table(Choice, rows))
    step.finish({})
    lines = [
        {"file": f, "scorer": name, "score": score}
        for i in range(6)
        for f, k in ((f"{i}a", 0), (f"{i}b", 1))
        for name, score in (("oracle", 1.0 - k), ("contrary", float(k)))
    ]
    pq.write_table(pa.Table.from_pylist(lines), folder / "scores.parquet")
    rng = np.random.default_rng(0)
    files = np.array([f for i in range(6) for f in (f"{i}a", f"{i}b")])
    np.savez(folder / "features.npz", files=files, features=rng.normal(size=(12, 3)), probabilities=np.full((12, 2), 0.5))
    np.savez(folder / "real.npz", features=rng.normal(size=(9, 3)))
    return folder


def test_the_command_judges_scorers_scores_and_sets(folder, tmp_path, capsys):
    options = {
        "choices": folder / "choices", "output_dir": tmp_path, "scorers.mine.kind": "clip", "scorers.mine.path": folder / "scorer",
        "scores": folder / "scores.parquet", "features": folder / "features.npz", "reference": folder / "real.npz",
    }  # fmt: skip
    assert main(["scorer", "evaluate", *(w for k, v in options.items() for w in (f"--{k}", str(v)))]) == 0
    found = json.loads((tmp_path / "agreement.json").read_text())
    by_name = {name: s["accuracy"]["value"] for name, s in found["scorers"].items()}
    assert by_name["oracle"] == 1 and by_name["contrary"] == 0 and 0 <= by_name["mine"] <= 1
    groups = found["scorers"]["mine"]["by_generator"]["groups"]
    assert {k: v["n_pairs"] for k, v in groups.items()} == {"both seen": 3, "one seen": 3}
    assert found["scorers"]["oracle"]["by_generator"]["groups"] == {}, "nobody knows what it was trained on"
    assert found["sets"]["rows"] == 6 and found["sets"]["class_score"]["chosen"] == pytest.approx(1)
    said = capsys.readouterr().out
    assert said.index("oracle") < said.index("mine") < said.index("contrary"), "best first"
    # the scores it wrote give the same again
    again = ["--choices", str(folder / "choices"), "--output_dir", str(tmp_path / "again"), "--scores", str(tmp_path / "scores.parquet")]
    assert main(["scorer", "evaluate", *again, "--trained_on", str(folder / "choices")]) == 0
    second = json.loads((tmp_path / "again/agreement.json").read_text())
    assert {n: s["accuracy"] for n, s in second["scorers"].items()} == {n: s["accuracy"] for n, s in found["scorers"].items()}
    assert second["scorers"]["oracle"]["by_generator"]["groups"]["both seen"]["n_pairs"] == 6


def test_what_cannot_be_judged_says_so(folder, tmp_path, capsys):
    def error(*options: str) -> str:
        assert main(["scorer", "evaluate", "--choices", str(folder / "choices"), "--output_dir", str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    assert "nothing to judge" in error()
    pq.write_table(pa.table({"file": ["z"], "scorer": ["s"], "score": [1.0]}), tmp_path / "other.parquet")
    assert "has no score of any image of the choices; its files are called ['z']" in error("--scores", str(tmp_path / "other.parquet"))
    pq.write_table(pa.table({"file": ["z"]}), tmp_path / "columns.parquet")
    assert "has no column scorer, score (found: file)" in error("--scores", str(tmp_path / "columns.parquet"))
    np.savez(tmp_path / "short.npz", files=np.array(["a"]), features=np.ones((2, 2)))
    assert "files, features and probabilities differ in length" in error("--features", str(tmp_path / "short.npz"))
    np.savez(tmp_path / "pickled.npz", features=np.array([{}]))
    assert "cannot be read as .npz without pickled objects" in error("--features", str(tmp_path / "pickled.npz"))


def test_what_is_wrong_is_found_before_anything_is_scored(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("limner.evaluation.choices.score_choices", lambda *_: pytest.fail("scored"))
    mine = ["--scorers.mine.kind", "clip", "--scorers.mine.path", str(folder / "scorer"), "--output_dir", str(tmp_path)]
    np.savez(tmp_path / "few.npz", features=np.ones((3, 2)), files=np.array(["0a", "0b", "1a"]))
    pq.write_table(pa.table({"file": ["0a"], "scorer": ["mine"], "score": [1.0]}), tmp_path / "mine.parquet")
    for options, words in (
        (["--validation", str(tmp_path / "typo")], "is not a finished folder of choices"),
        (["--trained_on", str(tmp_path / "typo")], "is not a finished folder of choices"),
        (["--features", str(tmp_path / "few.npz")], "only 1 rows have features"),
        (["--scores", str(tmp_path / "mine.parquet")], "has scores of mine, which is also under scorers"),
    ):
        assert main(["scorer", "evaluate", "--choices", str(folder / "choices"), *mine, *options]) == 2
        assert words in capsys.readouterr().err


def test_a_scorers_own_tower_can_look_at_the_sets(folder, tmp_path):
    """Against the vectors that transformers gives for the same pictures, put through the .npz way. Real photos need no captions."""
    (photo_folder(tmp_path / "photos", count=6) / "metadata.jsonl").unlink()
    options = ["--choices", str(folder / "choices"), "--scorers.mine.kind", "clip", "--scorers.mine.path", str(folder / "scorer")]
    tower = [*options, "--features", "mine", "--reference", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "tower")]
    assert main(["scorer", "evaluate", *tower]) == 0
    model = CLIPModel.from_pretrained(folder / "scorer")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, resample=3)
    vectors = {}
    for name, data in [
        *((f"{i}{k}", picture(2 * i + (k == "b"))) for i in range(6) for k in "ab"),
        *((p.name, p.read_bytes()) for p in sorted((tmp_path / "photos").glob("*.png"))),
    ]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        with torch.no_grad():
            v = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output[0]
        vectors[name] = (v / v.norm()).numpy()
    own, real = [n for n in vectors if not n.endswith(".png")], [n for n in vectors if n.endswith(".png")]
    np.savez(tmp_path / "own.npz", files=np.array(own), features=np.stack([vectors[n] for n in own]))
    np.savez(tmp_path / "real.npz", features=np.stack([vectors[n] for n in real]))
    files = [*options, "--features", str(tmp_path / "own.npz"), "--reference", str(tmp_path / "real.npz")]
    assert main(["scorer", "evaluate", *files, "--output_dir", str(tmp_path / "files")]) == 0
    one, other = (json.loads((tmp_path / n / "agreement.json").read_text())["sets"] for n in ("tower", "files"))
    for measure in ("frechet_between", "frechet_to_reference"):
        assert {k: v for k, v in one[measure].items() if k != "prefers"} == pytest.approx(
            {k: v for k, v in other[measure].items() if k != "prefers"}, rel=1e-2, abs=1e-6
        )
