"""Rows to tables and back."""

from __future__ import annotations

import pyarrow as pa
import pytest

from limner.records import Choice, Example, Feedback, Image, Prompt, Score, by_prompt, from_table, schema, to_table

ROWS = [
    Prompt(id="a", text="a man, é", image=b"\x00png", truth='{"x": 1}'),
    Prompt(id="b", text="a woman", split="test"),
    Image(id="a/0", prompt_id="a", text="a man", image=b"i", k=3, seed=2**40, timestep=400, sampler="{}", model="m"),
    Image(id="a/1", prompt_id="a", text="a man", image=b"i"),
    Score(image_id="a/0", prompt_id="a", scorer="s", score=0.1, revision="r"),
    Score(image_id="a/0", prompt_id="a", scorer="s", score=None, reason="nan"),
    Feedback(id="f", image_id="a/0", rater="r", kind="points", payload="[]", seconds=1.5),
    Example(group="a", role="winner", image_id="a/0", text="t", image=b"i", latents=b"\x01" * 8, shape=(1, 1, 2), weight=0.5, score=1.0),
    Example(group="a", role="loser", image_id="a/1", text="t", image=b"i"),
    Choice(id="c", prompt_id="a", text="t", kind="choice", said=(1.0, 0.0), files=("x", "y")),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{type(r).__name__}-{ROWS.index(r)}")
def test_every_row_comes_back_from_its_table(row) -> None:
    assert from_table(type(row), to_table(type(row), [row, row])) == [row, row]


def test_only_optional_fields_are_nullable() -> None:
    nullable = {f.name for f in schema(Image) if f.nullable}
    assert nullable == {"timestep"}


def test_a_missing_column_is_named() -> None:
    broken = to_table(Image, [ROWS[2]]).drop_columns(["image", "prompt_id"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"pool/part-0: no column prompt_id, image; a Image row needs id, prompt_id"):
        from_table(Image, broken, "pool/part-0")


def test_defaults_fill_absent_columns_and_others_are_ignored() -> None:
    found = from_table(Prompt, pa.table({"id": ["a"], "text": ["t"], "mood": ["calm"]}))
    assert found == [Prompt(id="a", text="t")]


def test_an_empty_required_value_is_named_by_row_and_field() -> None:
    with pytest.raises(ValueError, match=r"f\.parquet: row 1: text is empty"):
        from_table(Prompt, pa.table({"id": ["a", "b"], "text": ["t", None]}), "f.parquet")


def test_by_prompt_keeps_the_order() -> None:
    images = [Image(id=i, prompt_id=p, text="", image=b"") for i, p in (("1", "b"), ("2", "a"), ("3", "b"))]
    assert {p: [i.id for i in group] for p, group in by_prompt(images).items()} == {"b": ["1", "3"], "a": ["2"]}
    assert list(by_prompt(images)) == ["b", "a"]
