"""What scorers and reader learn from: figures with known truth, taken through the paths that a generated image takes.

Each picture exists raw and as the base model would have made it: through the autoencoder alone (t = 0) or reconstructed from a
small timestep (SDRecon). A sound picture and its defective copy always take the same path, so the path gives nothing away.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from limner import seeds
from limner.figures.body import JOINTS
from limner.figures.scene import ATTRIBUTES
from limner.models.stable_diffusion import Pipeline
from limner.pool.sample import denoise
from limner.recipe import Sampler
from limner.scorers.joints import mirrored

RECONSTRUCTED = (0, 100, 200, 400)  # timesteps, by batch: 0 = the autoencoder alone; small enough that what was sound stays sound
_OUTER = {  # joints of a limb below its root
    f"{side}_{limb}": tuple(f"{side}_{j}" for j in joints)
    for side in ("left", "right") for limb, joints in {"arm": ("elbow", "wrist"), "leg": ("knee", "ankle")}.items()
}  # fmt: skip
_MIRROR = mirrored(JOINTS)

Joint = tuple[int, float, float]  # number in `JOINTS`, x and y in 0..1


@dataclass
class Lessons:
    """N pictures with their defective copies. images: path name ("raw", "recon") to (2, N, 64, 64, 3) uint8, sound first.

    joints: of the sound and of the defective figure, (joint, x, y) of all that a person has and that is where it may be: hidden ones
    too, a second limb's twice, none of a limb that is missing, twisted or of a wrong length, none that is smeared away.
    mask (N, 64, 64) bool of the defect; parts (N, 64, 64) uint8 of the sound figure, 0 = background.
    """

    prompts: list[str]
    swapped: list[str]
    attributes: np.ndarray  # (N, attributes) indices
    images: dict[str, np.ndarray]
    joints: list[tuple[list[Joint], list[Joint]]]
    mask: np.ndarray
    parts: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


def _array(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def attribute_indices(rows: Sequence[Mapping[str, str]]) -> np.ndarray:
    """(N, attributes) places of the values in `ATTRIBUTES`."""
    return np.array([[values.index(r[name]) for name, values in ATTRIBUTES.items()] for r in rows])


def load_lessons(files: Sequence[Path]) -> Lessons:
    """Read the shards of a split made with defects."""
    rows = [r for f in sorted(files) for r in pq.read_table(f).to_pylist()]
    attributes = attribute_indices([json.loads(r["attributes"]) for r in rows])
    raw = np.stack([np.stack([_array(r["image"]) for r in rows]), np.stack([_array(r["defective_image"]) for r in rows])])
    return Lessons(
        [r["prompt"] for r in rows], [r["swapped_prompt"] for r in rows], attributes, {"raw": raw},
        [_joints(r) for r in rows], np.stack([_array(r["defect_mask"]) > 0 for r in rows]), np.stack([_array(r["parts"]) for r in rows]),
    )  # fmt: skip


def _joints(row: Mapping[str, Any]) -> tuple[list[Joint], list[Joint]]:
    """The plausible joints of the sound and of the defective figure; see `Lessons`."""
    sound = [(k, float(x), float(y)) for k, (x, y) in enumerate(np.array(row["joints"]).reshape(-1, 2))]
    seen = [(j["joint"], j["x"], j["y"]) for j in row["defect_joints"]]
    kept = {k for k, *_ in seen}
    gone = {k for k, *_ in sound if row["visible"][k] and k not in kept}
    if row["defect"] == "extra_limb":
        # of a second limb's joints the first may be hidden, so that they stand there once
        twice = [j for j in seen if np.hypot(j[1] - sound[j[0]][1], j[2] - sound[j[0]][2]) > 1e-3]
        return sound, [j for j in sound if j[0] not in gone] + twice
    limb = {"head": ("head",)}.get(row["defect_limb"]) or _OUTER.get(row["defect_limb"], ())
    return sound, [j for j in sound if j[0] not in gone and JOINTS[j[0]] not in limb]


@torch.no_grad()
def add_paths(lessons: Lessons, pipeline: Pipeline, folder: Path, seed: int, sampler: Sampler, batch: int = 64) -> None:
    """Add the path "recon" to `lessons.images`; kept in `folder`, a file a batch, so that a second run goes on or reads them.

    A sound picture and its copy get the same timestep and the same noise. Captions guide the reconstruction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = lessons.images["raw"]
    made = np.empty_like(raw)
    for start in range(0, len(lessons), batch):
        rows, done = list(range(start, min(start + batch, len(lessons)))), folder / f"{start:06d}.npy"
        if not done.is_file():
            both = torch.from_numpy(raw[:, rows].reshape(-1, *raw.shape[2:])).permute(0, 3, 1, 2).float() / 255
            latents = pipeline.encode_images(both)
            if t := RECONSTRUCTED[start // batch % len(RECONSTRUCTED)]:
                latents = _reconstruct(pipeline, latents, [lessons.prompts[i] for i in rows], rows, t, seed, sampler)
            pixels = (pipeline.decode_latents(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            partial = done.with_suffix(".partial.npy")
            np.save(partial, pixels.reshape(2, len(rows), *raw.shape[2:]))
            partial.rename(done)
            print(f"paths {folder.name} {rows[-1] + 1}/{len(lessons)}", flush=True)
        made[:, rows] = np.load(done)
    lessons.images["recon"] = made


def _reconstruct(
    pipeline: Pipeline, latents: torch.Tensor, prompts: list[str], rows: list[int], t: int, seed: int, sampler: Sampler
) -> torch.Tensor:
    """Noise sound and defective latents (2n, C, h, w) alike to t and denoise them."""
    noise = seeds.noise(latents.shape[1:], [(seed, "lessons", i) for i in rows]).repeat(2, 1, 1, 1).to(latents)
    noisy = pipeline.add_noise(latents, noise, torch.full((len(latents),), t))
    text = pipeline.encode_text(prompts).repeat(2, 1, 1)
    return denoise(pipeline, noisy, text, pipeline.encode_text([""]), sampler, start=t)


def heatmaps(joints: Sequence[Joint], size: int = 32, sigma: float = 1.0) -> np.ndarray:
    """(14, size, size) in [0, 1]: a Gaussian at each joint that can be seen; a second limb's joints give second peaks."""
    y, x = np.mgrid[:size, :size] + 0.5
    out = np.zeros((len(JOINTS), size, size), np.float32)
    for k, jx, jy in joints:
        out[k] = np.maximum(out[k], np.exp(-((x - jx * size) ** 2 + (y - jy * size) ** 2) / (2 * sigma**2)))
    return out


def mirror_joints(joints: Sequence[Joint]) -> list[Joint]:
    """Joints of the mirrored picture: left becomes right."""
    return [(_MIRROR[k], 1 - x, y) for k, x, y in joints]


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A worse copy of (H, W, 3) uint8: blurred, or smeared along a direction, or full of grain."""
    x: np.ndarray = image.astype(np.float32)
    kind = rng.integers(3)
    if kind == 0:
        x = gaussian_filter(x, (*[rng.uniform(0.9, 2.0)] * 2, 0))
    elif kind == 1:
        angle, reach = rng.uniform(0, np.pi), int(rng.integers(2, 5))
        shifts = [(round(s * np.sin(angle)), round(s * np.cos(angle))) for s in range(-reach, reach + 1)]
        x = np.mean([np.roll(x, s, (0, 1)) for s in shifts], 0)
    else:
        x = x + gaussian_filter(rng.normal(0, 1, x.shape), (0.7, 0.7, 0)) * rng.uniform(25, 60)
    return x.clip(0, 255).astype(np.uint8)


def vary(image: np.ndarray, rng: np.random.Generator, reach: int = 2) -> np.ndarray:
    """A harmless variation of (H, W, 3) uint8: exposure, contrast, a shift of up to `reach` pixels, a faint blur."""
    x = image.astype(np.float32)
    x = (x - 128) * rng.uniform(0.9, 1.1) + 128 + rng.uniform(-12, 12)
    x = shift(x, *rng.integers(-reach, reach + 1, 2))
    if rng.random() < 0.3:
        x = gaussian_filter(x, (*[rng.uniform(0.2, 0.6)] * 2, 0))
    return x.clip(0, 255).astype(np.uint8)


def shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Move (H, W) or (H, W, C) by a few pixels; what comes in repeats the edge."""
    y, x = (np.arange(n) - by for n, by in zip(image.shape, (down, right)))
    return image[y.clip(0, len(y) - 1)][:, x.clip(0, len(x) - 1)]
