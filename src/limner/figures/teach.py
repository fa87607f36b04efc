"""Train the embedded world's judges: the preference scorer, a second one as judge, and the reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter
from torch import Tensor, nn

from limner.figures.body import JOINTS, PARTS
from limner.figures.captions import describe
from limner.figures.fitting import logistic_regression, resume, train
from limner.figures.lessons import Lessons, degrade, heatmaps, mirror_joints, shift, vary
from limner.figures.scene import ATTRIBUTES
from limner.loop import Metrics
from limner.scorers.dual import DualConfig, DualEncoder, tokenize, vocabulary_of
from limner.scorers.joints import measure_limits, peaks
from limner.scorers.losses import contrastive, pickscore
from limner.scorers.reader import FigureReader, Reader, evidence

PATHS, ODDS = ("raw", "recon"), (0.25, 0.75)
SWAPS = 3  # wrong captions a picture
IGNORED = 255  # part of a pixel that a defect covers
BODY = ("background", *PARTS)  # what the reader's part maps name
LABELLED = 12  # samples labelled by eye in a reader's batch, if it is given any
SOUND = 50  # real pictures among those that a verdict is learned from


def pictures(lessons: Lessons, kinds: np.ndarray, rows: np.ndarray, paths: list[str], flips: np.ndarray) -> list[np.ndarray]:
    """uint8 pictures (64, 64, 3): kind 0 = sound, 1 = defective; each through its path, mirrored if asked."""
    out = []
    for kind, row, path, flip in zip(kinds, rows, paths, flips):
        image = lessons.images[path][kind, row]
        out.append(image[:, ::-1] if flip else image)
    return out


def to_input(images: list[np.ndarray]) -> Tensor:
    """uint8 pictures to (B, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def train_scorer(
    lessons: Lessons, tokenizer: Any, folder: Path, config: DualConfig, *, steps: int, batch: int = 32, lr: float = 1e-3, seed: int = 0
) -> DualEncoder:
    """A preference scorer: PickScore's loss on pairs whose better one is known, and CLIP's with swapped captions as hard negatives.

    Pairs of pictures of a caption: sound over defective (half), right over wrong figure (a third), clean over smeared; both take the
    same path. Pairs of captions of a picture, sound or not: the right one over one with a single wrong word. Without the latter a
    scorer ranks the pictures of a caption by soundness alone. Captions are worded anew each time.
    """
    torch.manual_seed(seed)
    model = DualEncoder(config, vocabulary_of(tokenizer)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    o, start = resume(folder, model, lr, steps)
    paths = [p for p in PATHS if p in lessons.images]
    odds = np.array([ODDS[PATHS.index(p)] for p in paths])

    def batches(step: int) -> list[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([seed, 2, step])
        rows = rng.choice(len(lessons), batch, replace=False)
        path = [str(p) for p in rng.choice(paths, batch, p=odds / odds.sum())]
        flips = rng.random(batch) < 0.5
        better = pictures(lessons, np.zeros(batch, int), rows, path, flips)
        kind = rng.random(batch)
        others = np.where(rng.random(batch) < 0.5, rows ^ 1, rng.integers(len(lessons), size=batch))
        worse = pictures(lessons, (kind < 0.5).astype(int), np.where((kind >= 0.5) & (kind < 0.83), others, rows), path, flips)
        worse = [degrade(w, rng) if k >= 0.83 else w for w, k in zip(worse, kind)]
        same = rng.integers(2**31, size=batch)
        varied = [[vary(i, np.random.default_rng(s)) for i, s in zip(images, same)] for images in (better, worse)]
        captions = [reword(lessons.attributes[row], rng, SWAPS) for row in rows]
        return [(to_input(varied[0] + varied[1]), tokenize(tokenizer, [c[k] for k in range(1 + SWAPS) for c in captions]))]

    def loss(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Metrics]:
        images, captions = item
        seen, said = model.encode_images(images), model.encode_tokens(captions).unflatten(0, (1 + SWAPS, batch))
        better, worse, texts = seen[:batch], seen[batch:], said[0]
        s_better, s_worse = (better * texts).sum(1) * model.scale, (worse * texts).sum(1) * model.scale
        s_swapped = (better * said[1:]).sum(-1) * model.scale
        pair = pickscore(s_better, s_worse).mean()
        swap = pickscore(s_better.expand_as(s_swapped), s_swapped).mean()
        match = contrastive(better, texts, model.scale, said[1:].flatten(0, 1))
        right = (s_better > s_worse).float().mean().item()
        return pair + swap + 0.5 * match, {
            "pair": pair.item(), "swap": swap.item(), "match": match.item(), "accuracy": right,
            "swaps": (s_better > s_swapped).float().mean().item(),
        }  # fmt: skip

    train(folder.name, folder, model, o, start, steps, loss, batches)
    return model.eval()


def reword(attributes: np.ndarray, rng: np.random.Generator, swaps: int) -> list[str]:
    """A caption of a figure (attribute indices), then `swaps` copies of it, each with one wrong attribute of those it names."""
    truth = {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), attributes)}
    wording = int(rng.integers(2**31))
    right = describe(truth, wording)
    out = [right.text]
    for name in rng.choice(list(right.attributes), swaps, replace=False):
        others = [v for v in ATTRIBUTES[name] if v != truth[name]]
        out.append(describe({**truth, str(name): others[rng.integers(len(others))]}, wording).text)
    return out


def train_reader(
    lessons: Lessons,
    folder: Path,
    *,
    cycles: Sequence[int],
    batch: int = 48,
    lr: float = 2e-3,
    seed: int = 0,
    channels: tuple[int, ...] = (16, 32, 64, 128),
    labelled: tuple[np.ndarray, np.ndarray] | None = None,
) -> Reader:
    """Attributes, joint heatmaps, body parts, defect map and logit, on sound and defective pictures of every path, with augmentation.

    Args:
        cycles: steps of each cosine of the learning rate; every further one begins at half the height of the one before.
        labelled: base samples (N, 64, 64, 3) uint8 and how surely something is wrong with the body, 0 to 1; they teach the defect head
            alone, which otherwise knows drawn defects only.
    """
    torch.manual_seed(seed)
    model = Reader(ATTRIBUTES, JOINTS, BODY, channels).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    o, start = resume(folder, model, lr, cycles)
    paths = [p for p in PATHS if p in lessons.images]
    odds = np.array([ODDS[PATHS.index(p)] for p in paths])

    def batches(step: int) -> list[tuple[Tensor, ...]]:
        rng = np.random.default_rng([seed, 3, step])
        rows = rng.choice(len(lessons), batch)
        kinds = np.arange(batch) % 2
        flips = rng.random(batch) < 0.5
        path = [str(p) for p in rng.choice(paths, batch, p=odds / odds.sum())]
        heat, mask, parts, images = [], [], [], []
        for image, kind, row, flip in zip(pictures(lessons, kinds, rows, path, flips), kinds, rows, flips):
            down, right = rng.integers(-2, 3, 2)
            wrong = lessons.mask[row] if kind else np.zeros((64, 64), bool)
            part = np.where(maximum_filter(wrong, 3), IGNORED, lessons.parts[row])
            wrong, part = (shift(m[:, ::-1] if flip else m, down, right) for m in (wrong, part))
            images.append(shift(vary(image, rng, 0), down, right))
            mask.append(wrong.reshape(32, 2, 32, 2).any((1, 3)))
            parts.append(part)
            joints = mirror_joints(lessons.joints[row][kind]) if flip else lessons.joints[row][kind]
            heat.append(heatmaps([(k, x + right / 64, y + down / 64) for k, x, y in joints]))
        wrongs = kinds
        if labelled is not None:
            chosen = rng.choice(len(labelled[0]), LABELLED)
            images += [vary(image[:, ::-1] if flip else image, rng) for image, flip in zip(labelled[0][chosen], rng.random(LABELLED) < 0.5)]
            wrongs = np.r_[kinds, labelled[1][chosen]]
        return [(
            to_input(images), torch.from_numpy(lessons.attributes[rows]), torch.from_numpy(np.stack(heat)),
            torch.from_numpy(np.stack(mask)).float(), torch.from_numpy(np.stack(parts)).long(), torch.from_numpy(wrongs).float(),
        )]  # fmt: skip

    def loss(item: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
        images, attributes, heat, mask, parts, wrong = item
        out = model(images)
        right = ((out["defect"] > 0) == (wrong > 0.5)).float()
        defect = F.binary_cross_entropy_with_logits(out["defect"], wrong)
        out = {name: values[:batch] for name, values in out.items()}
        named = sum((F.cross_entropy(out[n], attributes[:, i]) for i, n in enumerate(ATTRIBUTES)), torch.zeros(()))
        joints = F.binary_cross_entropy_with_logits(out["joints"], heat, weight=1 + 20 * heat)
        where = F.binary_cross_entropy_with_logits(out["defect_map"], mask, weight=1 + 8 * mask)
        body = F.cross_entropy(out["parts"], parts, ignore_index=IGNORED)
        total = 0.3 * named + 10 * joints + 2 * where + 2 * body + defect
        return total, {
            "attributes": named.item(), "joints": joints.item(), "parts": body.item(), "map": where.item(), "defect": defect.item(),
            "right": right[:batch].mean().item(), **({"labelled": right[batch:].mean().item()} if labelled is not None else {}),
        }  # fmt: skip

    train(folder.name, folder, model, o, start, sum(cycles), loss, batches)
    return model.eval()


def finish_reader(
    model: Reader, real: np.ndarray, attributes: np.ndarray, *, mirror: bool = False, labelled: tuple[np.ndarray, np.ndarray] | None = None
) -> FigureReader:
    """Measure what is normal on real pictures (N, 64, 64, 3) uint8, and how surely their attributes (N, attributes) are read.

    Args:
        mirror: as for `FigureReader`.
        labelled: base samples (M, 64, 64, 3) uint8 and how much is wrong with the body, 0 to 1, of which it learns its verdict.
    """
    seen = FigureReader(model, {}, mirror=mirror).look(to_input(list(real)))
    first, second, spots = (x.numpy() for x in peaks(seen["joints"]))
    sure = {n: round(float((seen[n].argmax(1).numpy() == attributes[:, i]).mean()), 4) for i, n in enumerate(ATTRIBUTES)}
    reader = FigureReader(model, measure_limits(model.joints, first, second, spots), sure=sure, mirror=mirror)
    if labelled is not None:
        reader.verdict = learn_verdict(reader, *labelled, sound=real[:SOUND])
    return reader


def learn_verdict(reader: FigureReader, samples: np.ndarray, wrong: np.ndarray, sound: np.ndarray, penalty: float = 0.03) -> nn.Linear:
    """A reader's verdict on soundness: a logistic regression of what labellers saw on all that the reader reads.

    Linear and penalised, because labels are few. What the network's own head misses is what the joints show, which it hardly sees.

    Args:
        reader: without a verdict.
        samples: of the base model, (N, 64, 64, 3) uint8; wrong (N,) in [0, 1]: how much, by those who looked.
        sound: real pictures (M, 64, 64, 3), with which nothing is wrong. The more, the fewer of them are called flawed, and the less well
            base samples are told apart.
        penalty: of the squared weights of standardised evidence, beside the mean cross-entropy.
    """
    x = evidence(reader.read(to_input([*samples, *sound]))).double()
    y = torch.cat([torch.as_tensor(wrong).double(), torch.zeros(len(sound)).double()])
    mean, spread = x.mean(0), x.std(0) + 1e-3  # some evidence never varies
    weight, bias = logistic_regression((x - mean) / spread, y, penalty)
    verdict = nn.Linear(x.shape[1], 1).requires_grad_(False)
    verdict.weight.copy_((weight / spread)[None])
    verdict.bias.copy_(bias - (mean / spread * weight).sum())
    return verdict
