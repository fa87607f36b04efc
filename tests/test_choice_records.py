"""A choice as a record: its pairs and shares, what is wrong with a row, weights of prompts, and the order of an epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.records import Choice, from_table, to_table
from limner.scorers.choices import Choices, pairs, problem, prompt_weights, shares
from limner.store import open_step


def choice(said: list[float], kind: str = "choice", **more) -> Choice:
    files = tuple(f"{i}.png" for i in range(len(said)))
    return Choice(**{"id": "r", "prompt_id": "p", "text": "a man", "kind": kind, "said": tuple(said), "files": files, **more})


def test_a_choice_comes_back_from_its_table():
    row = choice([0.5, 0.5], images=(b"a", b"b"), generators=("x", "y"), rater="7", weight=0.25)
    assert from_table(Choice, to_table(Choice, [row, choice([1, 0])])) == [row, choice([1.0, 0.0])]


def test_pairs_of_a_choice_say_nothing_of_two_that_nobody_chose():
    assert pairs(choice([0, 1, 0, 0])) == [(0, 1, 0.0), (1, 2, 1.0), (1, 3, 1.0)]
    assert pairs(choice([0.5, 0.5])) == [(0, 1, 0.5)]
    assert pairs(choice([0.6, 0.2, 0.2])) == [(0, 1, pytest.approx(0.75)), (0, 2, pytest.approx(0.75)), (1, 2, 0.5)]


def test_pairs_of_a_ranking_know_every_order():
    assert pairs(choice([1, 3, 1], "ranking")) == [(0, 1, 1.0), (0, 2, 0.5), (1, 2, 0.0)]
    assert shares(choice([2, 1.5, 3, 1.5], "ranking")) == [0, 0.5, 0, 0.5]


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6))
def test_a_ranking_and_its_pairs_agree(ranks):
    """Counting the pairs an image wins, ties half, orders images as their ranks do."""
    row = choice([float(r) for r in ranks], "ranking")
    won = [0.0] * len(ranks)
    for i, j, p in pairs(row):
        won[i] += p
        won[j] += 1 - p
    assert len(pairs(row)) == len(ranks) * (len(ranks) - 1) // 2
    assert all((won[i] > won[j]) == (ranks[i] < ranks[j]) for i in range(len(ranks)) for j in range(len(ranks)))
    assert sum(shares(row)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (choice([1.0]), "fewer than two images"),
        (choice([0.7, 0.7]), "labels do not sum to 1"),
        (choice([1.0, 0.0], text=" "), "empty prompt"),
        (choice([1.0, 0.0], generators=("x",)), "as many labels as images expected"),
        (choice([float("nan"), 1.0]), "label is not a number"),
        (choice([1.0, 0.0], "rating"), "unknown kind rating"),
        (choice([1.0, 0.0]), ""),
    ],
)
def test_what_is_wrong_with_a_row(row, said):
    assert problem(row) == said


def test_prompt_weights_are_one_over_the_rows_of_a_prompt():
    rows = [choice([1, 0], prompt_id="a"), choice([1, 0], prompt_id="b"), choice([1, 0], prompt_id="a", weight=3.0)]
    assert prompt_weights(rows).tolist() == [0.5, 1.0, 1.5]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    step = open_step(tmp_path, "choices", {}, {})
    for shard in range(20):
        step.write(shard, to_table(Choice, [choice([1, 0], id=f"{shard}/{i}") for i in range(3)]))
    step.finish({})
    choices = Choices(tmp_path)
    first, second = choices.order(0, "epoch", 0), choices.order(0, "epoch", 1)
    assert sorted(first) == sorted(second) == list(range(60)) and first != second and first == choices.order(0, "epoch", 0)
    assert len({index // 3 for index in first[:24]}) <= 8, "rows of eight shards at a time"
