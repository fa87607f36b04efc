"""What a stage trains on: examples made into pairs, and which of them a step draws, with what noise, timestep and text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limner.images import encode_png
from limner.recipe import Learn
from limner.training.stage import Draw, Pairs, prepare
from pairs import examples, fresh, latents

LEARN = Learn(max_train_steps=4, train_batch_size=2)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return prepare(fresh(), examples())


def key(z: Tensor) -> bytes:
    return z.numpy().tobytes()


def rows(batches: list) -> list[tuple]:
    """What each sample of some batches is: its group, noise, timestep and text."""
    return [(b.names[i], key(b.noise[i]), int(b.t[i]), key(b.text[i])) for b in batches for i in range(len(b.names))]


def test_processes_and_accumulation_draw_what_one_large_batch_draws(pairs: Pairs) -> None:
    """Six pairs a step: one batch of 6, three of 2 in turn, or three processes of one 2 each; over three epochs."""
    learn = replace(LEARN, caption_dropout=0.3)
    large = Draw(pairs, replace(learn, train_batch_size=6), 0, "easy")
    turns = Draw(pairs, replace(learn, gradient_accumulation_steps=3), 0, "easy")
    parts = [Draw(pairs, learn, 0, "easy", process, 3) for process in range(3)]
    for step in range(3):
        wanted = rows(large(step))
        assert len({name for name, *_ in wanted}) == 6
        assert rows(turns(step)) == wanted
        assert [r for part in parts for r in rows(part(step))] == wanted


def test_processes_share_batches_that_pairs_do_not_fill() -> None:
    """Seven pairs of two sizes, four a step: whatever the epoch, two processes of two each draw what one of four does, in one size."""
    mixed = prepare(fresh(), examples(7, sizes=((8, 8), (12, 8))))
    large = Draw(mixed, replace(LEARN, train_batch_size=4), 0, "easy")
    parts = [Draw(mixed, LEARN, 0, "easy", process, 2) for process in range(2)]
    for step in range(6):
        halves = [part(step) for part in parts]
        assert [r for half in halves for r in rows(half)] == rows(large(step))
        assert len({b.winner.shape for half in halves for b in half}) == 1


def test_draws_depend_on_the_step_alone(pairs: Pairs) -> None:
    """Asked for out of order, as after a resume; and differ by seed, stage and step."""
    draw, again = Draw(pairs, LEARN, 0, "easy"), Draw(pairs, LEARN, 0, "easy")
    forward = [rows(draw(s)) for s in range(8)]
    assert [rows(again(s)) for s in reversed(range(8))] == forward[::-1]
    others = [Draw(pairs, LEARN, 1, "easy"), Draw(pairs, LEARN, 0, "hard")]
    noise = [n for batch in [*forward, *(rows(o(0)) for o in others)] for _, n, *_ in batch]
    assert len(set(noise)) == len(noise)


def test_every_epoch_has_every_pair_once(pairs: Pairs) -> None:
    draw = Draw(pairs, LEARN, 0, "easy")
    epochs = [[n for s in range(3 * e, 3 * e + 3) for n in draw(s)[0].names] for e in range(4)]
    assert all(sorted(e) == sorted(pairs.names) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1


def test_timesteps_stay_in_their_range_and_dropout_blanks_texts(pairs: Pairs) -> None:
    draw = Draw(pairs, replace(LEARN, min_timestep=200, max_timestep=210, caption_dropout=1.0, train_batch_size=6), 0, "easy")
    batches = [draw(s)[0] for s in range(20)]
    assert {int(t) for b in batches for t in b.t} == set(range(200, 210))
    assert all(torch.equal(b.text, pairs.empty.expand_as(b.text)) for b in batches)


def test_a_batch_holds_one_size() -> None:
    """Five pairs of 8x8 and 12x8 in turn: batches of each size, the lone third of 8x8 filled from its batch's beginning."""
    mixed = prepare(fresh(), examples(5, sizes=((8, 8), (12, 8))))
    draw = Draw(mixed, LEARN, 0, "easy")
    epoch = [draw(s)[0] for s in range(3)]
    assert sorted(tuple(b.winner.shape[2:]) for b in epoch) == [(8, 8), (8, 8), (12, 8)]
    assert all(len(b.names) == 2 and b.winner.shape == b.loser.shape == b.noise.shape for b in epoch)
    assert {n for b in epoch for n in b.names} == set(mixed.names)


def test_images_without_latents_are_encoded() -> None:
    """As the pipeline encodes them one at a time, beside others of another size that brought theirs."""
    pipeline = fresh()
    g = torch.Generator().manual_seed(0)
    pixels = (torch.rand(3, 3, 16, 16, generator=g) * 255).round() / 255
    bare = [
        replace(e, image=encode_png(pixels[i]), latents=None, shape=()) if i < 3 else e
        for i, e in enumerate(e for e in examples(3, sizes=((8, 8), (8, 8), (12, 8))))
    ]
    pairs = prepare(pipeline, bare)
    assert torch.allclose(pairs.winner[0], pipeline.encode_images(pixels[:1])[0], atol=1e-5)
    assert torch.allclose(pairs.loser[0], pipeline.encode_images(pixels[1:2])[0], atol=1e-5)
    assert torch.allclose(pairs.winner[1], pipeline.encode_images(pixels[2:])[0], atol=1e-5)
    assert torch.equal(pairs.winner[2], latents(20, 4, 12, 8))
    assert len(pairs.states) == 3, "each caption is encoded once"
    assert torch.allclose(pairs.states[pairs.text[1]], pipeline.encode_text(["a man 1"])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: [], "no examples to train on"),
        (lambda e: e[1:], "group g0 has no winner"),
        (lambda e: e[:3], "group g1 lacks a loser"),
        (
            lambda e: [e[0], replace(e[1], latents=latents(0, 4, 8, 12).numpy().tobytes(), shape=(4, 8, 12))],
            "group g0: winner and loser differ in size",
        ),
    ],
)
def test_examples_that_make_no_pairs(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(fresh(), change(examples(2)))
