"""Consolidation by hand, and agreement against published numbers."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image as PillowImage
from scipy import stats

from limner import statistics
from limner.feedback import consolidate as c
from limner.feedback import payloads, richhf
from limner.records import Feedback, Image

N = math.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": four observers, twelve units.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ]
)


def test_krippendorff_of_the_published_example() -> None:
    assert statistics.krippendorff(KRIPPENDORFF, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert statistics.krippendorff(KRIPPENDORFF, "interval") == pytest.approx(0.849, abs=5e-4)
    assert statistics.krippendorff(KRIPPENDORFF * 1e-3 + 1e6, "interval") == pytest.approx(0.849, abs=5e-4)


def test_krippendorff_of_two_observers() -> None:
    """Of the same text: binary data of two observers, alpha 0.095."""
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert statistics.krippendorff([first, second], "nominal") == pytest.approx(0.095, abs=5e-4)
    assert statistics.krippendorff([first, second], "interval") == pytest.approx(0.095, abs=5e-4)  # of two values the metrics are one


def test_krippendorff_by_hand() -> None:
    # Units {1, 2} and {2, 2}: coincidences 1-2 once each way, 2-2 twice; D_o = 2/4, D_e = (2 * 1 * 3) / (4 * 3) = 1/2.
    assert statistics.krippendorff([[1, 2], [2, 2]], "nominal") == pytest.approx(0.0)
    assert statistics.krippendorff([[1, 2, 5], [1, 2, N]], "interval") == pytest.approx(1.0)
    assert math.isnan(statistics.krippendorff([[0.1, 0.1], [0.1, 0.1]], "interval"))
    assert math.isnan(statistics.krippendorff([[1, N], [N, 2]], "nominal"))
    with pytest.raises(ValueError, match="finite"):
        statistics.krippendorff([[math.inf]], "nominal")
    with pytest.raises(ValueError, match="metric: 'ratio'"):
        statistics.krippendorff([[1.0]], "ratio")  # type: ignore[arg-type]


def test_disk_by_hand() -> None:
    """40x40 pixels, radius 2, around the corner of four pixels: centres at (±.5, ±.5), (±.5, ±1.5), (±1.5, ±.5), not (±1.5, ±1.5)."""
    mask = c.disk_mask([[0.5, 0.5]], 40, 40, 40)
    expected = np.zeros((40, 40), bool)
    expected[19:21, 18:22] = expected[18:22, 19:21] = True
    assert (mask == expected).all()
    assert not c.disk_mask([], 40, 40).any()
    assert c.disk_mask([[0, 0], [1, 1]], 40, 40, 40).sum() == 2 * 3  # quarters, in opposite corners


def test_disks_are_of_height_and_squeezed_with_the_image() -> None:
    """Radius 10 px of a 400x200 image: a fortieth of its width, a twentieth of its height."""
    rows, columns = np.nonzero(c.disk_mask([[0.25, 0.5]], 400, 200))
    assert (columns.max() - columns.min() + 1) / 512 == pytest.approx(2 / 40, abs=2 / 512)
    assert (rows.max() - rows.min() + 1) / 512 == pytest.approx(2 / 20, abs=2 / 512)
    assert columns.mean() / 512 == pytest.approx(0.25, abs=2 / 512)
    area = c.disk_mask([[0.5, 0.5]], 512, 512).mean()
    assert area == pytest.approx(math.pi / 400, rel=0.01)


@pytest.mark.parametrize("points", [[[1.01, 0]], [[N, 0]], [0.5, 0.5], [[0.5, 0.5, 0.5]]])
def test_disks_refuse(points: list) -> None:
    with pytest.raises(ValueError, match="expected \\(P, 2\\) fractions"):
        c.disk_mask(points, 10, 10)


def test_heatmap_counts_raters_not_points() -> None:
    found = c.heatmap([[[0.5, 0.5], [0.5, 0.5], [0.51, 0.5]], [[0.5, 0.5]], []], 100, 100, 100)
    assert np.unique(found) == pytest.approx([0, 1 / 3, 2 / 3])
    assert found[50, 50] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no raters"):
        c.heatmap([], 10, 10)


def test_ratings_are_averaged_then_mapped() -> None:
    assert c.mean_rating([1, 2, 3]) == 0.25 and c.mean_rating([5]) == 1 and c.mean_rating([1, 1]) == 0
    for bad in ([], [0], [6], [N]):
        with pytest.raises(ValueError, match="from 1 to 5"):
            c.mean_rating(bad)


def test_words_by_majority_and_ties() -> None:
    assert c.majority_words([[0, 1, 0], [0, 1, 1], [1, 1, 1]]) == (0, 1, 1)
    assert c.majority_words([[0, 1, 0], [1, 1, 0]]) == (1, 1, 0)
    assert c.majority_words([[0, 1, 0], [1, 1, 0]], ties_misaligned=True) == (0, 1, 0)
    assert c.majority_words([[], []]) == ()
    for bad in ([], [[1], [1, 1]], [[2]]):
        with pytest.raises(ValueError, match="labels"):
            c.majority_words(bad)


def image(name: str, text: str, size: tuple[int, int] = (60, 40)) -> Image:
    buffer = io.BytesIO()
    PillowImage.new("RGB", size).save(buffer, "PNG")
    return Image(id=name, prompt_id=name, text=text, image=buffer.getvalue())


def rows_of(name: str, rater: str, points: list, misaligned: list[int], rating: int, prompt: str = "a red cat") -> list[Feedback]:
    return [
        payloads.make(name, rater, "points", {"artifact": points, "misalignment": []}),
        payloads.make(name, rater, "words", {"tokens": richhf.tokens(prompt), "misaligned": misaligned}),
        payloads.make(name, rater, "ratings", {"plausibility": rating, "overall": 3}),
    ]


def test_consolidate_rows() -> None:
    feedback = [
        *rows_of("a", "r1", [[0.5, 0.5]], [1], 1),
        *rows_of("a", "r2", [], [1, 2], 2),
        *rows_of("a", "r3", [[0.5, 0.5]], [], 4),
        *rows_of("b", "r1", [], [], 5, "a red dog"),
        *rows_of("gone", "r1", [], [], 5),
        payloads.make("a", "r1", "side", {"against": "b", "answer": 1}),
    ]
    rows, report = c.consolidate(feedback, [image("a", "a red cat"), image("b", "a cat"), image("unseen", "")], side=100)
    a, b = rows
    assert (a.image_id, a.prompt, a.labels, a.overall, a.alignment) == ("a", "a red cat", (1, 0, 1), 0.5, None)
    assert a.plausibility == pytest.approx((7 / 3 - 1) / 4)
    assert a.artifact_map and b.artifact_map
    found = richhf.map_values(a.artifact_map)
    assert found == pytest.approx(c.heatmap([[[0.5, 0.5]], [], [[0.5, 0.5]]], 60, 40, 100), abs=1e-6) and found.max() == pytest.approx(
        2 / 3
    )
    assert richhf.map_values(b.artifact_map).max() == 0 and b.labels == ()
    assert report == {
        "images": 3, "rows": 2, "raters": {"a": 3, "b": 1}, "unknown": ["gone"], "other_words": [["b/r1/words", "b"]]
    }  # fmt: skip


def test_a_rater_answers_once() -> None:
    rows = rows_of("a", "r", [], [], 3)
    with pytest.raises(ValueError, match="rater r answered points of image a already in a/r/points"):
        c.consolidate(
            [*rows, payloads.make("a", "r", "points", {"artifact": [], "misalignment": []}, id="again")], [image("a", "a red cat")]
        )


def test_tables_and_agreement() -> None:
    feedback = [
        *rows_of("a", "r1", [[0, 0]], [1], 1),
        *rows_of("a", "r2", [], [1], 2),
        *rows_of("b", "r2", [], [], 4),
        *rows_of("b", "r1", [], [0], 4),
        *rows_of("c", "r3", [], [], 5),
    ]
    np.testing.assert_array_equal(c.ratings_table(feedback, "plausibility"), [[1, 4, N], [2, 4, N], [N, N, 5]])
    np.testing.assert_array_equal(c.words_table(feedback)[:2, :6], [[1, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(c.marks_table(feedback, "artifact"), [[1, 0, N], [0, 0, N], [N, N, 0]])
    found = c.agreement(feedback)
    assert set(found) == {"plausibility", "overall", "words", "artifact", "misalignment"}
    assert found["plausibility"]["alpha"] == statistics.krippendorff([[1, 4], [2, 4]], "interval")
    assert found["words"]["alpha"] == statistics.krippendorff([[1, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1]], "nominal")
    assert math.isnan(found["overall"]["alpha"]) and found["overall"]["ceiling"] == {}
    assert c.agreement([]) == {}


def test_max_difference_histogram_by_hand() -> None:
    found = c.max_difference_histogram([[1, 2, 5, 3, 4], [1, 3, 1, 3, N], [1, 2, 3, N, N]])
    assert {k: v.value for k, v in found.items()} == {0.0: 0.5, 0.25: 0.25, 0.5: 0, 0.75: 0, 1.0: 0.25}
    assert found[0.0] == statistics.share_interval(2, 4)
    assert c.max_difference_histogram([[1, N], [N, 2]]) == {}


def test_ceiling_by_hand() -> None:
    table = np.array([[1, 4, 5, 2], [2, 4, 3, 2], [1, N, 5, 4]])
    ones = [1, 2, 1, 4, 4, 5, 3, 5, 2, 2, 4]
    rest = [1.5, 1, 1.5, 4, 4, 4, 5, 4, 3, 3, 2]
    found = c.human_ceiling(table)
    assert found["plcc"].value == pytest.approx(stats.pearsonr(ones, rest).statistic) and found["plcc"].n == 4
    assert found["srcc"].value == pytest.approx(stats.spearmanr(ones, rest).statistic)
    assert found == c.human_ceiling(table)
    assert c.human_ceiling(np.full((3, 5), 2.0)) == {} and c.human_ceiling(table[:, :2]) == {}


def test_ceiling_of_raters_of_known_noise() -> None:
    """Of three raters with truth and noise of variance 1 each, one and the mean of two others correlate by 1 / sqrt(2 * 1.5)."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=600) + rng.normal(size=(3, 600))
    found = c.human_ceiling(table)["plcc"]
    assert found.low < 1 / math.sqrt(3) < found.high and found.high - found.low < 0.12


def test_side_by_side_of_the_papers_table() -> None:
    """RichHF, Table 5: 600 answers to 100 prompts; shares as printed, 129/182/188/76/25."""
    answers = [2] * 129 + [1] * 182 + [0] * 188 + [-1] * 76 + [-2] * 25
    found = c.side_by_side(answers)
    assert [round(100 * v.value, 2) for v in found["levels"].values()] == [21.5, 30.33, 31.33, 12.67, 4.17]
    assert list(found["levels"]) == ["much better", "better", "same", "worse", "much worse"]
    assert found["wins"].value == pytest.approx((311 + 94) / 600)
    assert found["p_value"] == pytest.approx(stats.binomtest(311, 412).pvalue)
    assert (found["answers"], found["pairs"]) == (600, 600)


def test_side_by_side_rests_on_pairs() -> None:
    alone = c.side_by_side([2, -1, 0], ["x", "y", "z"])
    often = c.side_by_side([2, -1, 0] * 6, ["x", "y", "z"] * 6)
    assert often["levels"] == alone["levels"] and often["wins"] == alone["wins"] and often["p_value"] == alone["p_value"]
    assert c.side_by_side([2, -1, -1], ["x"] * 3)["wins"].value == 0.5  # the mean is 0: a tie
    for answers, pairs in [([], None), ([3], None), ([1], ["x", "y"])]:
        with pytest.raises(ValueError, match="expected one or more of -2 to 2"):
            c.side_by_side(answers, pairs)


def test_side_answers() -> None:
    rows = [payloads.make("a", r, "side", {"against": b, "answer": v}) for r, b, v in [("r1", "b", 2), ("r2", "b", -1)]]
    assert c.side_answers(rows) == ([2, -1], [("a", "b"), ("a", "b")])
