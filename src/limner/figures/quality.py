"""How good the embedded models are: `limner figures make --only '[measure]'`. Numbers for docs/figures.md, with intervals.

Held-out figures come from the split `raters`, which nothing learns from. Samples of the base model were labelled by eye, from numbered
sheets of them (by vision-language models, see docs/figures.md): those of validation captions, looked at by seven, are what the reader's
word on defects is measured on, and others (split `later`); from those of `train` it also learns, the raters' reader from those of `raters`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from limner import statistics
from limner.figures.assets import DATA, find
from limner.figures.lessons import Lessons, add_paths, attribute_indices, degrade
from limner.figures.scene import ATTRIBUTES
from limner.figures.teach import PATHS, to_input
from limner.images import decode_batch, grid, to_uint8
from limner.inputs import read_prompts
from limner.models.stable_diffusion import Pipeline, load_pipeline
from limner.pool.sample import Request, sample
from limner.recipe import Sampler
from limner.records import Prompt
from limner.scorers.dual import DualScorer
from limner.scorers.reader import FigureReader

# split, sample, image, looks: what each labeller said, 0 (nothing wrong) to 1, flawed: whether most of them saw something wrong
LABELLED = DATA / "labelled.parquet"
SAMPLES = 200  # of the sheets
RATED_BASE = "1182aeb716ec6180"  # hash of the base whose samples were looked at
RATED, RATED_SEED = range(4000, 5600), 53  # training captions whose samples the raters' reader learns its verdict from, drawn as for a pool
SAMPLER = Sampler(num_inference_steps=16, guidance_scale=2.0, batch_size=50)
POOL_SAMPLER = Sampler(num_inference_steps=12, guidance_scale=1.0, batch_size=64)


def base_samples(pipeline: Pipeline, prompts: Sequence[Prompt], seed: int, sampler: Sampler = SAMPLER) -> Tensor:
    """One sample of each caption, (N, 3, 64, 64) in [0, 1]. Those labelled were of the first 200 of validation (seed 7) and of
    training numbers 0 to 799 (seed 8), 800 to 1999 (seed 50) and, as `later`, 2000 to 2799 (seed 51)."""
    requests = [Request(Prompt(id=p.id, text=p.text), 0, 64, 64) for p in prompts]
    return torch.stack([pixels for pixels, _ in sample(pipeline, requests, sampler, seed)])


def labelled_samples(split: str, path: Path = LABELLED) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base samples of a split's captions (N, 64, 64, 3) uint8, how much is wrong with the body by all who looked (N,) in [0, 1], and
    whether most of them saw something wrong (N,)."""
    rows = pq.read_table(path, filters=[("split", "=", split)]).to_pylist()
    images = np.stack([np.array(Image.open(io.BytesIO(r["image"]))) for r in rows])
    return images, np.array([np.mean(r["looks"]) for r in rows]), np.array([r["flawed"] for r in rows])


def rated_samples(path: Path = LABELLED) -> tuple[np.ndarray, np.ndarray]:
    """What the raters' reader learns its verdict from: base samples (N, 64, 64, 3) uint8, drawn anew because only what was said of them
    is shipped, and how much is wrong with the body (N,) in [0, 1].

    Raises:
        ValueError: the shipped base is not the one whose samples were looked at.
    """
    pipeline = load_pipeline(str(find("base")))
    if pipeline.hash != RATED_BASE:
        raise ValueError(f"the samples of {path.name} are of base {RATED_BASE}, and the one here is {pipeline.hash}: label its own")
    looks = pq.read_table(path, filters=[("split", "=", "raters")]).column("looks").to_pylist()
    prompts = read_prompts(find("train"), "train")[RATED.start : RATED.stop]
    return to_uint8(base_samples(pipeline, prompts, RATED_SEED, POOL_SAMPLER)), np.array([np.mean(x) for x in looks])


def write_sheets(images: Tensor, folder: Path, columns: int = 10, rows: int = 5, zoom: int = 3) -> None:
    """Numbered sheets of samples to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), columns * rows):
        part = torch.nn.functional.interpolate(images[start : start + columns * rows], scale_factor=zoom, mode="nearest")
        labels = [str(i) for i in range(start, start + len(part))]
        grid(part, columns, labels).save(folder / f"sheet-{start:03d}.png")


def reader_quality(reader: FigureReader, real: Tensor, attributes: np.ndarray, held_out: Lessons) -> dict[str, Any]:
    """Attribute accuracy on real test pictures; how well defect head and joints tell defects, by path and by kind of path.

    Args:
        real: (N, 3, 64, 64); attributes (N, attributes) indices.
    """
    reading = reader.read(real)
    found: dict[str, Any] = {f"attribute {name}": share(reading.attributes[name] == attributes[:, i]) for i, name in enumerate(ATTRIBUTES)}
    found["real plausible"] = share(reading.plausible)
    for path in PATHS:
        sound, wrong = (reader.read(to_input(list(held_out.images[path][k]))) for k in (0, 1))
        labels = np.r_[np.zeros(len(held_out)), np.ones(len(held_out))]
        found[f"defect AUC {path}"] = auc(np.r_[sound.defect, wrong.defect], labels)
        found[f"joints AUC {path}"] = auc(np.r_[sound.doubt, wrong.doubt], labels)
        found[f"plausible sound {path}"], found[f"plausible defective {path}"] = share(sound.plausible), share(wrong.plausible)
    return found


def scorer_quality(scorer: DualScorer, held_out: Lessons, seed: int = 0) -> dict[str, Any]:
    """Share of held-out pairs whose better member scores higher, by kind of pair and path."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    others = (np.arange(len(held_out)) + 2 * rng.integers(1, len(held_out) // 2, len(held_out))) % len(held_out)
    for path in PATHS:
        images = held_out.images[path]
        sound = scorer(to_input(list(images[0])), held_out.prompts)
        pairs = {
            "sound over defective": to_input(list(images[1])),
            "right over wrong figure": to_input(list(images[0][others])),
            "clean over smeared": to_input([degrade(i, rng) for i in images[0]]),
        }
        for name, worse in pairs.items():
            found[f"{name} {path}"] = share((sound > scorer(worse, held_out.prompts)).numpy())
        found[f"right over swapped caption {path}"] = share((sound > scorer(to_input(list(images[0])), held_out.swapped)).numpy())
    return found


def share(right: Any) -> dict[str, float]:
    """A share with its Wilson interval."""
    values = np.asarray(right, dtype=float)
    return statistics.share_interval(values.sum(), len(values))._asdict()


def auc(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Area under the curve with a bootstrap interval over pictures."""
    rows = np.stack([scores, labels], 1)
    spread = statistics.bootstrap(rows, lambda x: statistics.auc(x[:, 0], x[:, 1]), seed, 500)
    return {**spread._asdict(), "value": statistics.auc(scores, labels)}


def measure(
    pipeline: Pipeline, reader: FigureReader, scorers: dict[str, DualScorer], held_out: Lessons, work: Path, data: Path
) -> dict[str, Any]:
    """Everything, with the pictures that lie in `data`; also writes the sheets to `work`."""
    add_paths(held_out, pipeline, work / f"paths/raters-{pipeline.hash}", 0, Sampler(num_inference_steps=16, guidance_scale=1.0))
    test = [p for p in read_prompts(find("test", data), "test") if p.image and p.truth]
    truth = [json.loads(p.truth or "")["attributes"] for p in test]
    indices = attribute_indices(truth)
    out: dict[str, Any] = {"reader": reader_quality(reader, decode_batch([p.image or b"" for p in test]), indices, held_out)}
    out |= {name: scorer_quality(scorer, held_out) for name, scorer in scorers.items()}
    write_sheets(base_samples(pipeline, read_prompts(find("validation", data), "validation")[:SAMPLES], seed=7), work / "sheets")
    for name, split in (("base samples", "validation"), ("base samples, three looks each", "later")):
        samples, _, flawed = labelled_samples(split)
        reading = reader.read(to_input(list(samples)))
        out[name] = {"flawed": share(flawed), "defect AUC": auc(reading.defect, flawed), "joints AUC": auc(reading.doubt, flawed)}
    return out
