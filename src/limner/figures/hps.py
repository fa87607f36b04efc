"""HPS on figures: choices among pictures of several generators, a tower that never saw them, HPS v1's objective and PickScore's.

`limner figures hps --config recipes/figures/hps.yaml`. Parts, each kept below `output_dir` and skipped when it is there:

    early             a base model stopped early in training
    images/<split>    of each caption: two pictures of the base late and early in training, two reconstructions, a defective figure, and
                      (test only) one of a sampler that training never saw; how good each is, and the real picture
    choices/<split>   simulated raters' choices among two to four of them
    tower             pre-trained contrastively on pictures and captions
    hps, pickscore    trained on from the tower by choices
    hps.json          accuracy of all, beside an aesthetic head on the tower, the generator's name alone, one more rater, and the truth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner import seeds
from limner.config import build, dump, read_yaml, to_dict
from limner.figures import fitting
from limner.figures.candidates import (
    REAL,
    TASTES,
    Hps,
    Row,
    hidden_quality,
    make_images,
    observer,
    painter,
    pixels,
    read_candidates,
    world_rows,
)
from limner.figures.choosers import choose
from limner.recipe import ScorerSpec
from limner.records import Choice
from limner.scorers.exchange import write_choices
from limner.store import input_hash, is_complete, open_step


def run_hps(path: Path, overrides: Sequence[str], *, print_config: bool = False) -> int:
    """The command. Returns the exit code.

    Raises:
        ValueError: unknown keys, or a part of the world that is not made yet.
    """
    config = build(Hps, read_yaml(path), overrides, str(path))
    hidden_quality(config, dict.fromkeys(TASTES, 0.0))  # mistakes in `taste` before hours of drawing
    if print_config:
        print(dump(config))
        return 0
    from limner.figures.candidates import resolve
    from limner.figures.hps_report import report
    from limner.figures.seen import beholder

    make_images(config, lambda: painter(config), lambda: beholder(resolve(config.raters)), lambda: observer(config))
    for split in config.splits:
        make_choices(config, split)
    tower = make_tower(config)
    trained = {loss: train(config, loss, tower) for loss in ("choice_among", "pickscore")}
    report(config, tower, trained)
    return 0


def make_choices(config: Hps, split: str) -> None:
    """Let raters choose among two to four pictures of each caption."""
    images = Path(config.output_dir) / "images" / split
    folder = Path(config.output_dir) / "choices" / split
    decides = {
        "seed": config.seed,
        "taste": config.taste,
        "noise": config.noise,
        "tie": config.tie,
        "choices_per_prompt": config.choices_per_prompt,
    }
    step = open_step(folder, "choices", decides, {"images": input_hash(images)})
    if is_complete(folder):
        return
    groups: dict[str, list[Row]] = {}
    for r in read_candidates(config, split):
        if r["generator"] != REAL:
            groups.setdefault(r["prompt_id"], []).append(r)
    rows = []
    for prompt_id, candidates in groups.items():
        for n in range(config.choices_per_prompt):
            rng = np.random.default_rng(seeds.seed_of(config.seed, "raters", prompt_id, n))
            count = int(rng.integers(2, min(4, len(candidates)) + 1))
            chosen = [candidates[i] for i in rng.choice(len(candidates), count, replace=False)]
            hidden = np.array([hidden_quality(config, c) for c in chosen])
            rows.append(
                Choice(
                    id=f"{prompt_id}/{n}", prompt_id=prompt_id, text=chosen[0]["text"], kind="choice",
                    said=tuple(choose(hidden, noise=config.noise, tie=config.tie, rng=rng)), files=tuple(c["file"] for c in chosen),
                    images=tuple(c["image"] for c in chosen), generators=tuple(c["generator"] for c in chosen), rater=str(n),
                )
            )  # fmt: skip
    step.finish(write_choices(step, rows))


def make_tower(config: Hps) -> Path:
    """The contrastive tower: CLIP's loss on the world's training pictures and captions, mirrored and re-exposed."""
    from limner.figures.base import make_tokenizer
    from limner.scorers.dual import DualConfig, save_scorer, tokenize
    from limner.scorers.learner import new_dual
    from limner.scorers.losses import contrastive

    folder = Path(config.output_dir) / "tower"
    done = folder / "model"
    decides = {"dual": to_dict(config.dual), "tower_steps": config.tower_steps, "tower_batch": config.tower_batch, "seed": config.seed}
    step = open_step(folder, "tower", decides, {"images": input_hash(Path(config.world) / "images/train")})
    if done.is_dir():
        step.finish({})
        return done
    rows = world_rows(config, "train", ["image", "prompt"])
    images, captions = pixels([r["image"] for r in rows]), [r["prompt"] for r in rows]
    tokenizer = make_tokenizer(captions, folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")  # with its length
    learner = new_dual(DualConfig(**{**to_dict(config.dual), "channels": tuple(config.dual.channels)}), folder / "tokenizer", config.seed)
    model: Any = learner.model
    tokens = tokenize(tokenizer, captions)
    o, start = fitting.resume(folder, model, 1e-3, config.tower_steps)
    model.train()

    def batches(step: int) -> list[tuple[Tensor, Tensor]]:
        g = seeds.generator(config.seed, "tower", step)
        chosen = torch.randperm(len(images), generator=g)[: config.tower_batch]
        x = images[chosen]
        x = torch.where((torch.rand(len(x), generator=g) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
        x = (x - 0.5) * (0.9 + 0.2 * torch.rand(len(x), 1, 1, 1, generator=g)) + 0.45 + 0.1 * torch.rand(len(x), 1, 1, 1, generator=g)
        return [(x.clamp(0, 1), tokens[chosen])]

    def loss(item: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return contrastive(model.encode_images(item[0]), model.encode_tokens(item[1]), model.scale), {}

    fitting.train("tower", folder, model, o, start, config.tower_steps, loss, batches)
    fitting.save_whole(done, lambda target: save_scorer(model.eval(), tokenizer, target))
    step.finish({})
    return done


def train(config: Hps, loss: str, tower: Path) -> Path:
    """Go on from the tower by choices; returns the scorer's folder."""
    from limner.scorers import dual
    from limner.scorers.learn import refuse_other, train_scorer
    from limner.scorers.learner import learner_of

    out = Path(config.output_dir)
    chosen: Any = loss
    made = replace(
        config.train, output_dir=str(out / {"choice_among": "hps"}.get(loss, loss)), seed=config.seed, loss=chosen,
        choices=str(out / "choices/train"), validation=str(out / "choices/validation"), start=ScorerSpec(kind="dual", path=str(tower)),
        prompt_weights=loss == "pickscore",
    )  # fmt: skip
    start = dual.load_scorer(tower, "tower")
    if (Path(made.output_dir) / "model/training.json").is_file():
        refuse_other(made, start.revision)
        return Path(made.output_dir) / "model"
    return train_scorer(made, learner_of(start), revision=start.revision)
