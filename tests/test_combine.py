"""Several scores to one, by hand and by properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from limner.images import encode_png
from limner.recipe import ScorerSpec
from limner.records import Image
from limner.scorers.combine import SumScorer, combine, dominates, normalise, pareto
from limner.scorers.protocol import describe
from limner.scorers.steps import score_images
from limner.steps.run import load_scorers

NAN = float("nan")


def test_zscores_by_hand() -> None:
    """1, 3 have mean 2 and deviation 1; 10, 20, 30 have mean 20 and deviation sqrt(200/3); a lone score has nothing beside it."""
    found = normalise([1, 10, 3, 20, 30, 7], list("abbbbc"), "zscore")
    assert found[0] == 0 and found[5] == 0
    found = normalise([1, 10, 3, 20, 30, 7], list("abaabb"), "zscore_all")
    assert found[1] == pytest.approx((10 - 71 / 6) / 10.155732, abs=1e-4)
    assert found.mean() == pytest.approx(0) and found.std() == pytest.approx(1)
    found = normalise([1, 10, 3, 20, 30], list("ababb"), "zscore")
    assert found.tolist() == pytest.approx([-1, -10 / (200 / 3) ** 0.5, 1, 0, 10 / (200 / 3) ** 0.5])
    assert normalise([1, 3], list("aa"), "zscore", higher_is_better=False).tolist() == [1, -1]
    assert normalise([0.1] * 7, ["a"] * 7, "zscore").tolist() == [0] * 7


def test_ranks_by_hand() -> None:
    """Of four with a tie in the middle: 0, 1/2, 1/2, 1. What is missing has no rank and takes none."""
    assert normalise([5, 9, 7, 7, NAN], list("aaaaa"), "rank").tolist() == pytest.approx([0, 1, 0.5, 0.5, NAN], nan_ok=True)
    assert normalise([5], ["a"], "rank").tolist() == [0.5]
    assert normalise([2, 2], ["a", "a"], "rank").tolist() == [0.5, 0.5]


@given(arrays(np.float64, 12, elements=st.integers(-50, 50)), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_a_common_scale_knows_neither_unit_nor_offset(x: np.ndarray, unit: float, offset: float) -> None:
    groups = list("aaabbbbbcccc")
    for how in ("zscore", "rank", "zscore_all"):
        assert np.allclose(normalise(x * unit + offset, groups, how), normalise(x, groups, how), atol=1e-6)  # type: ignore[arg-type]


def test_a_weighted_mean() -> None:
    """z-scores -1, 1 of the first, 1, -1 of the second, which is better when lower: (2·-1 + 1·-1) / 3 = -1 and 1."""
    scores = {"a": [1.0, 3.0], "b": [9.0, 5.0], "c": [NAN, 1.0]}
    found = combine(scores, ["p", "p"], {"a": 2, "b": 1, "c": 0}, directions={"b": False})
    assert found.tolist() == [-1, 1]
    assert combine(scores, ["p", "p"], {"a": 2, "b": 1}).tolist() == pytest.approx([-1 / 3, 1 / 3])
    assert np.isnan(combine(scores, ["p", "p"], {"a": 1, "c": 1})).tolist() == [True, False]


def test_dominance_and_the_front() -> None:
    assert dominates([1, 2], [1, 1]) and not dominates([1, 2], [1, 2]) and not dominates([2, 0], [1, 1]) and not dominates([2, NAN], [1, 1])
    scores = [[1, 1], [2, 2], [3, 0], [0, 9], [2, 2], [5, NAN]]
    assert pareto(scores, ["p"] * 6).tolist() == [False, True, True, True, True, False]
    assert pareto(scores, ["q", *"ppppp"]).tolist()[0]


@given(arrays(np.float64, (9, 2), elements=st.integers(0, 4)))
def test_every_image_left_out_is_dominated_by_one_kept(x: np.ndarray) -> None:
    front = pareto(x, ["p"] * 9)
    assert front.any()
    for i in np.flatnonzero(~front):
        assert any((x[j] >= x[i]).all() and (x[j] > x[i]).any() for j in np.flatnonzero(front))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="2 scores but 1 prompts"):
        normalise([1, 2], ["a"], "rank")
    with pytest.raises(ValueError, match="weights: no score 'x'; there are a"):
        combine({"a": [1.0]}, ["p"], {"x": 1})
    with pytest.raises(ValueError, match="expected numbers of at least 0, one of them above 0"):
        combine({"a": [1.0]}, ["p"], {"a": 0})


class Brightness:
    """Mean of the pixels, or its negative."""

    range, comparable_across_prompts, needs_prompt, revision = (0.0, 1.0), True, False, "b"

    def __init__(self, higher_is_better: bool):
        self.name, self.higher_is_better = "brightness", higher_is_better

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_sum_of_scorers_by_hand() -> None:
    """2 of one and 3 of another whose numbers are better when lower: 2 b - 3 b = -b."""
    both = SumScorer("both", [Brightness(True), Brightness(False)], [2, 3])
    images = torch.stack([torch.full((3, 8, 8), v) for v in (0.25, 0.5)])
    assert both(images, ["", ""]).tolist() == pytest.approx([-0.25, -0.5])
    assert both.range == (-3, 2) and both.higher_is_better and both.revision == "2*b+-3*b"
    both = SumScorer("both", [with_files("one"), with_files("other")], [2, 3])
    assert describe(both)["files"] == {"one/model.safetensors": "sha of one", "other/model.safetensors": "sha of other"}


def test_sums_ask_a_part_that_they_share_once() -> None:
    """Of two images in one batch: as `__call__` says, with one look at them a part; what has no score in one part has none in the sum."""

    class Counted(Brightness):
        asked = 0

        def __call__(self, images, prompts):
            Counted.asked += 1
            return super().__call__(images, prompts)

    bright, worded = Counted(True), Counted(True)
    worded.name, worded.needs_prompt = "worded", True
    sums = [SumScorer("one", [bright, worded], [2, 1]), SumScorer("other", [worded, bright], [-1, 5])]
    images = [Image(id=t, prompt_id=t, text=t, image=encode_png(torch.full((3, 8, 8), v))) for t, v in (("a", 0.2), ("b", 0.6))]
    found = score_images(images, [*sums, bright])
    assert Counted.asked == 2
    assert [(s.image_id, s.scorer) for s in found] == [(i, n) for i in "ab" for n in ("one", "other", "brightness")]
    assert [s.score for s in found] == pytest.approx([0.6, 0.8, 0.2, 1.8, 2.4, 0.6], rel=1e-6)
    silent = score_images([replace(images[0], text="")], sums)
    assert [(s.score, s.reason) for s in silent] == [(None, "there is no prompt")] * 2


def with_files(name: str) -> Brightness:
    scorer = Brightness(True)
    scorer.name, scorer.files = name, {"model.safetensors": f"sha of {name}"}  # type: ignore[attr-defined]
    return scorer


def test_a_recipe_adds_scorers() -> None:
    """The embedded preference scorer twice and half of itself, with the attributes that the embedded reader sees taken away."""
    of = {"preference": 2.5, "attributes": -1.0}
    specs = {
        "both": ScorerSpec(kind="sum", of=of), "preference": ScorerSpec(kind="dual", path="figures/preference"),
        "attributes": ScorerSpec(kind="attributes", path="figures/reader"),
    }  # fmt: skip
    found = load_scorers(specs)
    images, prompts = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a man in a park", "a woman waving"]
    numbers = {n: s(images, prompts) for n, s in found.items()}
    assert list(found) == ["both", "preference", "attributes"]
    sound = load_scorers({"attributes": ScorerSpec(kind="soundness", path="figures/reader")})["attributes"]
    assert sound.revision != found["attributes"].revision, "kept scores of one are not taken for the other's"
    assert torch.allclose(numbers["both"], 2.5 * numbers["preference"] - numbers["attributes"])
