"""Scorers trained on choices: which weights move, that a cut run goes on as if it had not been cut, and that they learn."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from chain import clip_scorer
from limner.cli import main
from limner.evaluation import choices as evaluation
from limner.images import decode_batch, encode_png, to_tensor
from limner.records import Choice, to_table
from limner.scorers import clip, dual, learn, losses, objective
from limner.scorers.choices import Choices
from limner.scorers.learner import learner_of
from limner.scorers.objective import shifted
from limner.store import open_step
from tiny import tiny_tokenizer


def flat(value: float, seed: int, size: int = 16) -> bytes:
    """A grey picture with some grain."""
    grain = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))
    return encode_png((value + 0.1 * grain).clamp(0, 1))


def bright_choices(folder: Path, count: int = 24, ties: int = 0, per_row: tuple[int, ...] = (2, 3, 4)) -> Path:
    """People choose the brightest picture, whatever the prompt."""
    rows = []
    for n in range(count):
        k = per_row[n % len(per_row)]
        values = [((n * 7 + 5 * i) % 9) / 10 for i in range(k)]
        best = values.index(max(values))
        said = [1 / k] * k if n < ties else [float(i == best) for i in range(k)]
        images = tuple(flat(v, 100 * n + i) for i, v in enumerate(values))
        rows.append(
            Choice(
                id=f"r{n}", prompt_id=f"p{n // 2}", text=f"a man in red {n // 2}", kind="choice", said=tuple(said),
                files=tuple(f"{n}/{i}" for i in range(k)), images=images, generators=tuple("ab"[i % 2] for i in range(k)),
            )
        )  # fmt: skip
    step = open_step(folder, "choices", {}, {})
    for shard in range(0, count, 8):
        step.write(shard // 8, to_table(Choice, rows[shard : shard + 8]))
    step.finish({})
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    clip_scorer(folder / "start")
    config = CLIPModel.from_pretrained(folder / "start").config
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 3
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder / "start")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    bright_choices(folder / "train")
    bright_choices(folder / "pairs", per_row=(2,), ties=4)
    return folder


def train(parts: Path, out: Path, **options) -> int:
    values = {
        "output_dir": out, "choices": parts / "train", "start.path": parts / "start", "learning_rate": 0.001, "max_train_steps": 3,
        "train_batch_size": 4, "lr_warmup_steps": 0, "lr_scheduler": "constant", **options,
    }  # fmt: skip
    return main(["scorer", "train", *(word for k, v in values.items() for word in (f"--{k}", str(v)))])


@pytest.mark.parametrize(
    ("vision", "text", "scale", "moved"),
    [
        (1, 0, "false", ("vision_model.encoder.layers.2.", "vision_model.post_layernorm.", "visual_projection.")),
        (
            2,
            1,
            "true",
            (
                "vision_model.encoder.layers.1.", "vision_model.encoder.layers.2.", "vision_model.post_layernorm.", "visual_projection.",
                "text_model.encoder.layers.2.", "text_model.final_layer_norm.", "text_projection.", "logit_scale",
            ),
        ),
        (-1, 0, "true", ("vision_model.", "visual_projection.", "logit_scale")),
        (-1, -1, "true", ("",)),
    ],
)  # fmt: skip
def test_only_the_chosen_layers_move(parts, tmp_path, vision, text, scale, moved):
    """Every tensor that was named moves, every other is what it was, bit for bit. (The bias of the keys moves no attention at all: the
    softmax does not see it, so its gradient is rounding; what it does is not looked at.)"""
    assert train(parts, tmp_path, vision_layers=vision, text_layers=text, train_scale=scale, max_train_steps=1) == 0
    before, after = load_file(parts / "start/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert before.keys() == after.keys()
    seen = 0
    for name in before:
        if name.endswith("k_proj.bias") or "token_embedding" in name or "position_embedding" in name:
            continue
        expected = name.startswith(moved)
        seen += expected
        assert torch.equal(before[name], after[name]) != expected, name
    assert seen > 5
    frozen = [n for n in before if not n.startswith(moved)]
    assert all(torch.equal(before[n], after[n]) for n in frozen)


def test_validation_without_a_decided_pair_loses_nothing(parts, tmp_path, capsys):
    """All ties: there is no accuracy, and the checkpoint is there before anybody asks for one."""
    ties, pairs = open_step(tmp_path / "ties", "choices", {}, {}), Choices(parts / "pairs")
    undecided = [replace(r, images=tuple(pairs.encoded(i))) for i, r in enumerate(pairs.rows) if r.said[0] == r.said[1]]
    ties.write(0, to_table(Choice, undecided))
    ties.finish({})
    assert train(parts, tmp_path / "out", validation=tmp_path / "ties", max_train_steps=1) == 0
    assert "validation accuracy not known of 0 pairs" in capsys.readouterr().out
    assert (tmp_path / "out/checkpoint-1/state.json").is_file()


@pytest.mark.parametrize("loss", ["choice_among", "pickscore", "bradley_terry", "bradley_terry_ties", "gaussian"])
def test_every_loss_learns_who_is_preferred(parts, tmp_path, loss, capsys):
    """Brightness decides. From chance the tiny CLIP gets nearly every pair of its training set right."""
    out = tmp_path / loss
    options = {"choices": parts / "pairs", "validation": parts / "pairs", "loss": loss, "max_train_steps": 16, "learning_rate": 0.01}
    assert train(parts, out, **options, train_batch_size=8, vision_layers=1, text_layers=0) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    final = lines[-1]
    assert final["step"] == 16 and final["validation_value"] > 0.9 and final["validation_n_pairs"] == 20
    said = capsys.readouterr().out
    assert f"train {loss}: {20 if loss == 'bradley_terry' else 24} of 24 rows" in said
    scorer = clip.load_scorer(out / "model", "mine")
    choices, right = Choices(parts / "pairs"), 0
    for index in range(4, 24):
        scores = scorer(decode_batch(choices.encoded(index)), [choices.rows[index].text] * 2)
        right += int(scores.argmax()) == choices.rows[index].said.index(1.0)
    assert right / 20 == pytest.approx(final["validation_value"]), "what `limner score` loads is what was measured"
    assert (out / "model/log_sigma.safetensors").is_file() == (loss == "gaussian")


def test_a_dual_encoder_from_nothing_learns_and_is_saved(parts, tmp_path):
    options = {
        "start.kind": "dual", "start.path": "", "start.tokenizer": parts / "tokenizer", "dual.channels": "[8, 8]", "dual.size": 16,
        "dual.width": 16, "dual.text_layers": 1, "dual.attention_layers": 0, "max_train_steps": 24, "learning_rate": 0.005,
        "train_batch_size": 8, "prompt_weights": "true", "mirror": 0.5, "validation": parts / "train",
    }  # fmt: skip
    assert train(parts, tmp_path / "a", **options) == 0
    final = json.loads((tmp_path / "a/log.jsonl").read_text().splitlines()[-1])
    assert final["validation_value"] > 0.85
    assert isinstance(dual.load_scorer(tmp_path / "a/model", "mine"), dual.DualScorer)
    about = json.loads((tmp_path / "a/model/training.json").read_text())
    assert about["kind"] == "dual" and about["generators"] == ["a", "b"] and about["config"]["loss"] == "choice_among"
    # trained on: a frozen text tower, and batch norms of a frozen image tower
    for tower, frozen in (("text", "text"), ("vision", "trunk")):
        onwards = {**options, "start.path": tmp_path / "a/model", f"{tower}_layers": 0, "max_train_steps": 1, "validation": ""}
        assert train(parts, tmp_path / tower, **onwards) == 0
        before, after = (load_file(tmp_path / n / "model/model.safetensors") for n in ("a", tower))
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert changed and not any(n.startswith(frozen) for n in changed)


@pytest.mark.parametrize("kind", ["clip", "dual"])
def test_a_cut_run_goes_on_as_if_it_had_not_been_cut(parts, tmp_path, kind, monkeypatch, capsys):
    """Stopped by a signal in its second step and started again: the same weights, bit for bit, and the same log."""
    options: dict = {"max_train_steps": 4, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2, "loss": "gaussian"}
    if kind == "dual":
        options |= {
            "start.kind": "dual", "start.path": "", "start.tokenizer": parts / "tokenizer", "dual.channels": "[8, 8]", "dual.size": 16,
            "dual.width": 16, "dual.text_layers": 1, "dual.attention_layers": 1,
        }  # fmt: skip
    assert train(parts, tmp_path / "whole", **options) == 0
    calls, real = [0], objective.losses.gaussian

    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(objective.losses, "gaussian", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(parts, tmp_path / "cut", **options)
    assert stopped.value.code == 130 and "stopped by signal at step 2" in capsys.readouterr().err
    assert not (tmp_path / "cut/model").exists()
    assert train(parts, tmp_path / "cut", **options) == 0
    for name in ("model.safetensors", "log_sigma.safetensors"):
        one, other = (load_file(tmp_path / run / "model" / name) for run in ("whole", "cut"))
        assert all(torch.equal(one[n], other[n]) for n in one), name
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "cut")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 4


def test_two_micro_batches_are_one_batch(parts, tmp_path):
    """Pairs have equal weights, so the mean of two means is the mean; the same rows, in the same order, whoever decodes them."""
    for name, options in (
        ("one", {"train_batch_size": 8}),
        ("two", {"train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}),
    ):
        assert train(parts, tmp_path / name, choices=parts / "pairs", loss="pickscore", max_train_steps=1, **options) == 0
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two")]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-5)
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-4)


def test_what_cannot_be_trained_says_so(parts, tmp_path, capsys):
    def error(**options) -> str:
        assert train(parts, options.pop("out", tmp_path / "x"), **options) == 2
        return capsys.readouterr().err

    assert "vision_layers: 4; the start has 3" in error(vision_layers=4)
    assert "nothing is left to train" in error(vision_layers=0, text_layers=0, train_scale="false", out=tmp_path / "y")
    assert "choices: not set" in error(choices="")
    assert "is not a finished folder of choices" in error(choices=tmp_path)
    assert "start.tokenizer: " in error(**{"start.kind": "dual", "start.path": ""})
    bright_choices(tmp_path / "ties", count=8, ties=8)
    assert "8 rows, but none that bradley_terry learns from: all are ties" in error(choices=tmp_path / "ties", loss="bradley_terry")
    assert train(parts, tmp_path / "z", max_train_steps=1) == 0
    assert "another configuration:\n  learning_rate: was 0.001, now 0.1" in error(out=tmp_path / "z", max_train_steps=1, learning_rate=0.1)
    assert train(parts, tmp_path / "z", max_train_steps=1, device="cpu", checkpointing_steps=5) == 0, "these do not change the result"


def test_training_sees_what_the_saved_scorer_sees(parts, tmp_path):
    """Texts of unlike lengths in one batch, one of them cut, and pictures of unlike sizes: the same scores as one at a time."""
    options = {"mixed_precision": "bf16", "gradient_checkpointing": "true", "vision_layers": 1, "text_layers": 0}
    assert train(parts, tmp_path, max_train_steps=1, **options) == 0
    assert json.loads((tmp_path / "log.jsonl").read_text())["grad_norm"] > 0
    saved = clip.load_scorer(tmp_path / "model", "mine")
    seen = learner_of(clip.load_scorer(tmp_path / "model", "mine"))
    texts = ["a", "a man in red and red and red", "man " * 40]
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)) for i in range(3)]
    with torch.no_grad():
        together = seen.scale() * (seen.images(seen.prepare(pictures)) * seen.texts(texts)).sum(1)
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer"):
        alone = [saved(to_tensor([p]), [t]).item() for p, t in zip(pictures, texts)]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)


def test_a_dry_run_says_how_much_it_is(parts, tmp_path, capsys):
    words = {"output_dir": tmp_path / "x", "choices": parts / "pairs", "start.path": parts / "start", "max_train_steps": 30}
    command = [w for k, v in words.items() for w in (f"--{k}", str(v))]
    assert main(["scorer", "train", "--dry_run", *command, "--train_batch_size", "8", "--vision_layers", "0", "--text_layers", "0"]) == 0
    said = capsys.readouterr().out
    assert "24 of 24 rows; an update sees 8 rows, about 16 images; 30 updates are 10 epochs" in said and not (tmp_path / "x").exists()
    count = sum(v.numel() for v in load_file(parts / "start/model.safetensors").values())
    assert f"1e-06 M of {count / 1e6:.3g} M parameters train" in said
    assert main(["scorer", "export", "--dry_run", "--choices", str(parts / "pairs")]) == 2
    assert "--dry_run: export has none" in capsys.readouterr().err


def test_all_images_of_a_row_are_shifted_alike():
    """Each result is a slice of the images with their edges repeated, by numpy; all places come up, and none beyond the most."""
    x = torch.rand(2, 3, 20, 10, generator=torch.Generator().manual_seed(0))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (1, 1)), mode="edge")
    places = {(top, left): padded[..., top : top + 20, left : left + 10] for top in range(5) for left in range(3)}
    seen = set()
    for k in range(200):
        moved = shifted(x, 0.1, torch.Generator().manual_seed(k)).numpy()
        (at,) = [place for place, expected in places.items() if np.array_equal(moved, expected)]
        seen.add(at)
    assert seen == set(places)


def test_rows_of_a_prompt_come_together_and_look_at_each_picture_once(tmp_path, parts):
    """Against batches of rows: the same loss and gradients where both have all rows, from a third of the pictures."""
    pictures, rng = {(p, i): flat(0.1 * (p + i), 10 * p + i) for p in range(4) for i in range(4)}, np.random.default_rng(0)
    rows = []
    for p, n in [(p, n) for n in range(6) for p in range(4)]:  # rows of a prompt do not follow each other
        some = rng.permutation(4)[:2].tolist()
        files, images = tuple(f"{p}/{i}" for i in some), tuple(pictures[p, i] for i in some)
        rows.append(Choice(id=f"{p}/{n}", prompt_id=f"p{p}", text=f"a man {p}", kind="choice", said=(1.0, 0.0), files=files, images=images))
    step = open_step(tmp_path / "choices", "choices", {}, {})
    step.write(0, to_table(Choice, rows[:12]))
    step.write(1, to_table(Choice, rows[12:]))
    step.finish({})
    choices, learner = Choices(tmp_path / "choices"), learner_of(clip.load_scorer(parts / "start", "mine"))
    learner.model.requires_grad_(True)
    config = {"loss": "pickscore", "seed": 3}
    with patch.object(learner, "images", wraps=learner.images) as looked:
        by_name = learn.score_rows(learner, choices, 24)
    assert sum(len(call.args[0]) for call in looked.call_args_list) == 16
    scorer = clip.load_scorer(parts / "start", "mine")
    for row, found in zip(rows, by_name):
        expected = scorer(decode_batch(row.images), [row.text] * 2)
        assert found == pytest.approx(expected.tolist(), rel=1e-4)
    with patch.object(evaluation, "score_images", wraps=evaluation.score_images) as scored:
        np.testing.assert_allclose(evaluation.score_choices(choices, [scorer])["mine"], by_name, rtol=1e-4)
    assert [len(call.args[0]) for call in scored.call_args_list] == [16]

    by_row = objective.Draw(choices, range(24), learner, objective.TrainScorer(train_batch_size=24, **config))
    by_prompt = objective.Draw(choices, range(24), learner, objective.TrainScorer(train_batch_size=4, prompt_batches=True, **config))
    (one,), (other,) = by_row(0), by_prompt(0)
    assert len(one.pixels) == 48 and len(other.pixels) == len({name for row in rows for name in row.files}) <= 16
    assert sorted(one.names) == sorted(other.names)
    found = []
    for batch in (one, other):
        learner.model.zero_grad()
        seen, said = objective.encode(learner, batch)
        loss, _ = objective.compute_loss(by_row.config, batch, learner.scale() * (seen * said).sum(1), None)
        loss.backward()
        found.append((loss.item(), learner.model.visual_projection.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)

    learned = objective.TrainScorer(train_batch_size=24, loss="pickscore", prompt_weights=True)
    (batch,) = objective.Draw(choices, range(24), learner, learned)(0)
    batch.weights = torch.arange(1.0, 25.0)  # rows of one pair each: weights as they are
    scores = torch.linspace(-1, 1, 48)
    by_pair = losses.pickscore(scores[0::2], scores[1::2], torch.ones(24))
    assert objective.compute_loss(learned, batch, scores, None)[0].item() == pytest.approx((by_pair * batch.weights).sum().item() / 300)
    ranked = Choice(id="k", prompt_id="p", text="a", kind="ranking", said=(1.0, 2.0, 3.0), files=("a", "b", "c"))
    both = objective.Batch([ranked, rows[0]], torch.empty(0), torch.arange(5), torch.tensor([0, 0, 0, 1, 1]), torch.ones(2))
    scores = torch.tensor([0.3, 0.1, -0.2, 0.5, 0.4])
    three = losses.pickscore(scores[[0, 0, 1]], scores[[1, 2, 2]], torch.ones(3)).mean()  # its three pairs count as the other's one
    one_pair = losses.pickscore(scores[3:4], scores[4:], torch.ones(1)).mean()
    assert objective.compute_loss(learned, both, scores, None)[0].item() == pytest.approx((three + one_pair).item() / 2)

    one_prompt = objective.TrainScorer(train_batch_size=1, prompt_batches=True, mirror=0.5, **config)
    single = objective.Draw(choices, range(24), learner, one_prompt)
    for epoch in range(2):  # each prompt once an epoch
        batches = [single(4 * epoch + n)[0] for n in range(4)]
        assert sorted({b.rows[0].prompt_id for b in batches}) == ["p0", "p1", "p2", "p3"] and all(len(b.rows) == 6 for b in batches)
    turned = [single(n)[0] for n in range(16)]
    plain = {name: learner.prepare([p]) for row in range(24) for name, p in zip(rows[row].files, choices.pictures(row))}
    ways = set()
    for batch in turned:  # all pictures of a prompt are mirrored, or none
        files = [name for row in batch.rows for name in row.files]
        seen = {torch.equal(batch.pixels[k], plain[f][0]) for k, f in zip(batch.place.tolist(), files)}
        assert len(seen) == 1
        ways |= seen
    assert ways == {True, False}
