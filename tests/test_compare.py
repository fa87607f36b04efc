from __future__ import annotations

import json

import numpy as np
import pytest

from limner import statistics
from limner.evaluation.compare import Measured, compare
from limner.evaluation.distances import frechet, principal_components

N = 40


def vectors(degrees: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)


def world(seed: int = 0) -> tuple[Measured, Measured, list[Measured]]:
    """Real images, a base, and two stages that lie ever nearer to real."""
    rng = np.random.default_rng(seed)
    prompt = rng.normal(size=(N, 6))
    real = Measured(name="real", scores={"judge": rng.normal(1, 0.2, N)}, features=prompt, hue=vectors(np.full(N, 20.0)))
    difficulty = rng.normal(0, 5, N)

    def model(name: str, offset: float) -> Measured:
        scores = {
            "judge": difficulty - offset + rng.normal(0, 0.1, N),
            "preference": np.where(np.arange(N) == 3, np.nan, difficulty - offset),
            "attribute_accuracy": rng.integers(0, 5, N) / 4,
            "joint_plausibility": (np.arange(N) < 30 - 10 * offset).astype(float),
            "defect_rate": np.where(np.arange(N) < 10 + 10 * offset, 0.9, 0.1),
            "sharpness": rng.uniform(10, 20, N),
        }
        noise = rng.normal(size=(N, 6)) * 0.2
        hue = vectors(np.full(N, 350 + 10 * offset))
        seeds = rng.normal(size=(5, 4, 3))
        return Measured(name=name, scores=scores, features=prompt + offset + noise, diversity_features=seeds, hue=hue)

    return real, model("base", 1.0), [model("easy", 0.6), model("hard", 0.3)]


@pytest.fixture(scope="module")
def metrics() -> dict:
    real, base, stages = world()
    return compare(real, base, stages, None, {"preference"}, seed=0, command="limner evaluate")


def test_shape_is_that_of_the_contract(metrics: dict) -> None:
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["final"] == "hard"
    assert list(metrics["models"]) == ["real", "base", "easy", "hard"]
    assert list(metrics["wins"]) == list(metrics["differences"]) == ["easy", "hard"]
    assert (metrics["circular"], metrics["seed"], metrics["command"]) == (["preference"], 0, "limner evaluate")
    assert "numpy" in metrics["versions"]
    for values in metrics["models"].values():
        for metric, number in values.items():
            assert set(number) == {"value", "low", "high", "n"}, metric
            assert number["low"] <= number["value"] <= number["high"]
    assert all(set(w) == {"value", "low", "high", "n", "p"} for wins in metrics["wins"].values() for w in wins.values())
    everything = {"frechet", "attribute_accuracy", "joint_plausibility", "defect_rate", "preference", "judge", "sharpness", "diversity"}
    assert set(metrics["models"]["base"]) == everything
    assert set(metrics["models"]["hard"]) == everything | {"frechet_ratio", "hue_shift"}
    assert set(metrics["models"]["real"]) == {"judge", "hue_shift"}  # real has no distance to itself


def test_values_by_hand(metrics: dict) -> None:
    real, _, (_, hard) = world()
    found = metrics["models"]["hard"]
    assert found["judge"] == pytest.approx(statistics.mean_interval(hard.scores["judge"])._asdict())
    assert found["joint_plausibility"] == pytest.approx(statistics.share_interval(27, N)._asdict())
    assert found["defect_rate"] == pytest.approx(statistics.share_interval(13, N)._asdict())
    assert found["frechet"]["value"] == pytest.approx(frechet(hard.features, real.features))
    assert found["frechet_ratio"]["value"] == pytest.approx(found["frechet"]["value"] / metrics["models"]["base"]["frechet"]["value"])
    assert found["frechet_ratio"]["high"] < 0.5
    assert found["hue_shift"] == pytest.approx({"value": 7, "low": 7, "high": 7, "n": N})  # 353° against 360°
    assert metrics["models"]["real"]["hue_shift"]["value"] == pytest.approx(20)
    assert found["preference"]["n"] == N - 1  # one had no answer


def test_wins_and_differences_are_paired_and_know_the_direction(metrics: dict) -> None:
    wins, differences = metrics["wins"]["hard"], metrics["differences"]["hard"]
    assert wins["preference"]["value"] == 1.0
    assert wins["preference"]["n"] == N - 1
    assert wins["judge"]["p"] < 1e-6
    assert wins["joint_plausibility"]["value"] == pytest.approx(0.5 + 7 / N / 2)  # 7 more are plausible, the rest tie
    assert wins["defect_rate"]["value"] == pytest.approx(0.5 + 7 / N / 2)  # 7 fewer have defects
    assert differences["defect_rate"]["value"] == pytest.approx(-7 / N)
    assert differences["preference"] == pytest.approx({"value": 0.7, "low": 0.7, "high": 0.7, "n": N - 1})
    assert differences["judge"]["high"] - differences["judge"]["low"] < 0.2  # though prompts differ by 5
    assert differences["diversity"]["n"] == 5


def test_same_seed_same_numbers(metrics: dict) -> None:
    assert compare(*world(), None, ["preference"], 0, "limner evaluate") == metrics
    assert compare(*world(), None, [], 1)["models"]["hard"]["frechet"]["low"] != metrics["models"]["hard"]["frechet"]["low"]


def test_projection_is_applied() -> None:
    real, base, stages = world()
    project = principal_components(np.random.default_rng(5).normal(size=(50, 6)), 2)
    found = compare(real, base, stages, project, [], 0)["models"]["base"]["frechet"]["value"]
    assert found == pytest.approx(frechet(project(base.features), project(real.features)))


def test_what_could_not_be_measured_is_absent() -> None:
    scores = {"judge": np.arange(4.0), "preference": np.full(4, np.nan)}
    found = compare(None, Measured(name="base", scores=scores), [Measured(name="easy", scores=scores)], None, [], 0)
    assert found["models"] == {m: {"judge": found["models"]["base"]["judge"]} for m in ("base", "easy")}
    assert found["wins"]["easy"]["judge"]["value"] == 0.5
    alone = compare(None, Measured(name="base"), [], None, [], 0)
    assert (alone["final"], alone["models"], alone["wins"]) == ("base", {"base": {}}, {})


def test_hue_shift_interval_reaches_zero_and_crosses_360() -> None:
    rng = np.random.default_rng(0)
    base = Measured(name="base", hue=vectors(rng.normal(0, 30, 200)))
    same = Measured(name="easy", hue=vectors(rng.normal(0, 30, 200)))
    far = Measured(name="hard", hue=vectors(180 + rng.normal(0, 30, 200)))
    found = compare(None, base, [same, far], None, [], 0)["models"]
    assert found["easy"]["hue_shift"]["low"] == 0.0
    assert 160 < found["hard"]["hue_shift"]["low"] < found["hard"]["hue_shift"]["value"] <= found["hard"]["hue_shift"]["high"] <= 180


def test_refuses() -> None:
    base = Measured(name="base", scores={"judge": np.zeros(4)})
    with pytest.raises(ValueError, match="expected real"):
        compare(None, Measured(name="easy"), [], None, [], 0)
    with pytest.raises(ValueError, match="each name once"):
        compare(None, base, [base], None, [], 0)
    with pytest.raises(ValueError, match="easy judge: 3"):
        compare(None, base, [Measured(name="easy", scores={"judge": np.zeros(3)})], None, [], 0)
    with pytest.raises(ValueError, match="unknown metric beauty"):
        compare(None, Measured(name="base", scores={"beauty": np.zeros(4)}), [], None, [], 0)
    with pytest.raises(ValueError, match=r"easy: joint_plausibility must be 0 or 1 .* 0\.4"):
        compare(None, base, [Measured(name="easy", scores={"joint_plausibility": np.array([0, 1, 0.4, 1])})], None, [], 0)
