"""What a scorer learns from and by: the configuration of `limner scorer train`, its batches, and the loss of a batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import ImageOps
from torch import Tensor, nn

from limner import seeds
from limner.loop import Metrics
from limner.recipe import ScorerSpec
from limner.records import Choice
from limner.scorers import losses
from limner.scorers.choices import Choices, Looks, pairs, prompt_weights, shares
from limner.scorers.learner import Learner

LossName = Literal["choice_among", "pickscore", "bradley_terry", "bradley_terry_ties", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class NewDual:
    """Shape of a dual encoder that starts from nothing (start.kind dual, no path), as `scorers.dual.DualConfig`."""

    channels: list[int] = field(default_factory=lambda: [40, 80, 160])
    blocks: int = 1
    attention_layers: int = 2
    width: int = 128
    text_layers: int = 2
    size: int = 64


@dataclass(frozen=True, kw_only=True)
class TrainScorer:
    """`limner scorer train`.

    Args:
        output_dir: checkpoints, log and the scorer.
        seed: of order and mirroring.
        choices: the folder of choices to learn from.
        validation: the folder on which accuracy is logged ("" = none).
        images: where files of the choices lie, if elsewhere than at import.
        start: the scorer to start from: clip, pickscore, hps_v1, hps_v2 ..., or dual; dual without a path starts from nothing, with
            start.tokenizer.
        dual: the shape of a new dual encoder.
        loss: choice_among (HPS v1: K-way over the images of a prompt), pickscore, bradley_terry (ties left out), bradley_terry_ties,
            gaussian (HPSv3). All but the first look at pairs.
        theta: of bradley_terry_ties.
        prompt_weights: a row counts one over the rows of its prompt (PickScore).
        prompt_batches: train_batch_size counts prompts: all rows of a prompt come together, and each of their pictures is looked at once,
            as ImageReward does with the pairs of a ranking. For data with many rows a prompt.
        vision_layers: -1 = the whole tower, k = its last k layers with norm and projection, 0 = none (HPS v1: 10).
        text_layers: the same (HPS v1: 6).
        train_scale: the logit scale as well.
        mirror: chance that all images of a row (of a prompt, with prompt_batches) are mirrored.
        shift: all images of a row (of a prompt) are moved by up to so much of their side, their edges repeated.
        learning_rate: of AdamW (HPS v1 about 1.7e-5, PickScore 3e-6).
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_weight_decay: of AdamW.
        lr_scheduler: constant or cosine, after warm-up.
        lr_warmup_steps: linear.
        max_grad_norm: 0 = no clipping.
        max_train_steps: updates.
        train_batch_size: rows a micro-batch, or prompts.
        gradient_accumulation_steps: micro-batches an update.
        gradient_checkpointing: of a CLIP: less memory, more time.
        dataloader_num_workers: threads that decode and resize a batch's images (0 = none).
        mixed_precision: no or bf16; scores and loss are float32.
        device: auto, cpu, cuda, mps ...
        checkpointing_steps: how often work is saved.
        checkpoints_total_limit: how many are kept.
        validation_steps: how often accuracy is logged (0 = at the end).
        validation_rows: the first so many (0 = all).
    """

    output_dir: str = ""
    seed: int = 0
    choices: str = ""
    validation: str = ""
    images: str = ""
    start: ScorerSpec = field(default_factory=ScorerSpec)
    dual: NewDual = field(default_factory=NewDual)
    loss: LossName = "choice_among"
    theta: float = 5.0
    prompt_weights: bool = False
    prompt_batches: bool = False
    vision_layers: int = -1
    text_layers: int = -1
    train_scale: bool = True
    mirror: float = 0.0
    shift: float = 0.0
    learning_rate: float = 1e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_weight_decay: float = 1e-2
    lr_scheduler: Literal["constant", "cosine"] = "cosine"
    lr_warmup_steps: int = 50
    max_grad_norm: float = 1.0
    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    dataloader_num_workers: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    device: str = "auto"
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 0
    validation_rows: int = 0


@dataclass
class Batch:
    """Rows ready to learn from. pixels (n, 3, S, S) of their images; of all rows' images one after the other, place (m,): which of these
    it is, owner (m,): its row; weights (B,)."""

    rows: list[Choice]
    pixels: Tensor
    place: Tensor
    owner: Tensor
    weights: Tensor

    @property
    def names(self) -> list[str]:
        return [row.id for row in self.rows]


class Draw:
    """Which rows a step sees: every row (or prompt, all its rows) once an epoch, in an order decided by (seed, epoch); position decides
    mirroring and shift."""

    def __init__(self, choices: Choices, chosen: Sequence[int], learner: Learner, config: TrainScorer):
        self.choices, self.learner, self.config = choices, learner, config
        self.units = units_of(choices.rows, chosen, config)
        self.weights = prompt_weights(choices.rows) if config.prompt_weights else [row.weight for row in choices.rows]
        self._unit = {index: unit for unit, indices in enumerate(self.units) for index in indices}
        self._order: tuple[int, list[int]] = (-1, [])
        self._workers = ThreadPoolExecutor(config.dataloader_num_workers) if config.dataloader_num_workers else None

    def __call__(self, step: int) -> list[Batch]:
        c = self.config
        first = step * c.gradient_accumulation_steps
        return [self._batch((first + m) * c.train_batch_size) for m in range(c.gradient_accumulation_steps)]

    def _indices(self, position: int) -> list[int]:
        epoch, place = divmod(position, len(self.units))
        if self._order[0] != epoch:
            mixed = self.choices.order(self.config.seed, "order", epoch)
            self._order = (epoch, list(dict.fromkeys(self._unit[i] for i in mixed if i in self._unit)))
        return self.units[self._order[1][place]]

    def _batch(self, first: int) -> Batch:
        positions = range(first, first + self.config.train_batch_size)
        units = [self._indices(position) for position in positions]
        found = [Looks(self.choices, indices) for indices in units]  # in one thread: shards are opened in turn
        apply = map if self._workers is None else self._workers.map
        pixels = list(apply(self._prepare, found, positions))
        before = itertools.accumulate((len(x) for x in pixels[:-1]), initial=0)
        places = [[start + i for i in row] for start, looks in zip(before, found) for row in looks.places]
        indices = [index for unit in units for index in unit]
        device = self.learner.device
        return Batch(
            [self.choices.rows[index] for index in indices], torch.cat(pixels).to(device),
            torch.tensor([i for row in places for i in row], device=device),
            torch.tensor([owner for owner, row in enumerate(places) for _ in row], device=device),
            torch.tensor([float(self.weights[index]) for index in indices], device=device),
        )  # fmt: skip

    def _prepare(self, looks: Looks, position: int) -> Tensor:
        c = self.config
        pictures = looks.decode()
        if bool(torch.rand((), generator=seeds.generator(c.seed, "mirror", position)) < c.mirror):
            pictures = [ImageOps.mirror(p) for p in pictures]
        pixels = self.learner.prepare(pictures)
        return shifted(pixels, c.shift, seeds.generator(c.seed, "shift", position)) if c.shift else pixels


def units_of(rows: Sequence[Choice], chosen: Sequence[int], config: TrainScorer) -> list[list[int]]:
    """What `train_batch_size` counts: chosen rows one by one, or those of each prompt."""
    if not config.prompt_batches:
        return [[index] for index in chosen]
    by_prompt: dict[str, list[int]] = {}
    for index in chosen:
        by_prompt.setdefault(rows[index].prompt_id, []).append(index)
    return list(by_prompt.values())


def shifted(pixels: Tensor, most: float, g: torch.Generator) -> Tensor:
    """Images (n, 3, H, W) all moved by the same whole pixels, at most `most` of their sides each way; what comes in repeats the edge."""
    height, width = pixels.shape[-2:]
    down, right = (int(most * side) for side in (height, width))
    top, left = (int(torch.randint(0, 2 * m + 1, (), generator=g)) for m in (down, right))
    return nn.functional.pad(pixels, (right, right, down, down), mode="replicate")[..., top : top + height, left : left + width]


def usable(rows: Sequence[Choice], loss: LossName) -> list[int]:
    """The rows that a loss learns something from; Bradley-Terry learns nothing from ties."""
    if loss == "bradley_terry":
        return [i for i, row in enumerate(rows) if any(p != 0.5 for *_, p in pairs(row))]
    return list(range(len(rows)))


def encode(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Unit vectors of the images of a batch's rows and of their prompts, (m, D) each."""
    texts = list(dict.fromkeys(row.text for row in batch.rows))
    place = torch.tensor([texts.index(row.text) for row in batch.rows], device=batch.owner.device)
    return learner.images(batch.pixels)[batch.place], learner.texts(texts)[place[batch.owner]]


def compute_loss(config: TrainScorer, batch: Batch, scores: Tensor, log_sigma: Tensor | None) -> tuple[Tensor, Metrics]:
    """The configured loss of scaled scores (m,) of the images of a batch, and how often the order is right."""
    at = [(batch.owner == b).nonzero()[:, 0] for b in range(len(batch.rows))]
    if config.loss == "choice_among":
        most = max(len(i) for i in at)
        padded = torch.stack([nn.functional.pad(scores[i], (0, most - len(i))) for i in at])
        share = scores.new_tensor([[*shares(row), *[0.0] * (most - len(row.files))] for row in batch.rows])
        there = torch.arange(most, device=scores.device) < torch.tensor([len(i) for i in at], device=scores.device)[:, None]
        loss = losses.choice_among(padded, share, there=there)
        right = share.gather(1, padded.masked_fill(~there, -math.inf).argmax(1)[:, None]).mean()
        return losses.weighted_mean(loss, batch.weights), {"accuracy": right.item()}
    known = [(at[b][i], at[b][j], p, b) for b, row in enumerate(batch.rows) for i, j, p in pairs(row)]
    if config.loss == "bradley_terry":
        known = [k for k in known if k[2] != 0.5]
    first, second, owner = (torch.stack([torch.as_tensor(k[n], device=scores.device) for k in known]) for n in (0, 1, 3))
    p = scores.new_tensor([k[2] for k in known])
    a, b = scores[first], scores[second]
    if config.loss == "pickscore":
        loss = losses.pickscore(a, b, p)
    elif config.loss == "bradley_terry":
        loss = losses.bradley_terry(a, b, preference=p)
    elif config.loss == "bradley_terry_ties":
        loss = losses.bradley_terry_ties(a, b, preference=p, tie=(p == 0.5).float(), theta=config.theta)
    else:
        assert log_sigma is not None
        loss = losses.gaussian(a, b, log_sigma[first], log_sigma[second], preference=p)
    decided = p != 0.5
    right = ((a > b) == (p > 0.5))[decided].float().mean() if bool(decided.any()) else scores.new_tensor(math.nan)
    weights = batch.weights[owner]
    if config.prompt_weights:  # a row's share is that of its pairs together
        weights = weights / torch.bincount(owner, minlength=len(batch.rows))[owner]
    return losses.weighted_mean(loss, weights), {"accuracy": right.item()} if bool(decided.any()) else {}
