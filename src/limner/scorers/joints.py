"""Joint heatmaps as a skeleton: where the peaks are, and how far from real figures its joints and bones are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs of joints whose distances are compared with the torso's (neck to middle of the hips).
BONES = (
    ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"), ("right_shoulder", "right_elbow"), ("right_elbow", "right_wrist"),
    ("left_hip", "left_knee"), ("left_knee", "left_ankle"), ("right_hip", "right_knee"), ("right_knee", "right_ankle"), ("head", "neck"),
)  # fmt: skip
PEAK = 0.3  # height from which a local maximum of a heatmap counts as a joint


def mirrored(joints: Sequence[str]) -> list[int]:
    """The place of each joint's counterpart in a mirrored picture: left becomes right."""
    swap = {"left": "right", "right": "left"}
    return [joints.index("_".join(swap.get(word, word) for word in name.split("_"))) for name in joints]


def peaks(heat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heatmaps (B, J, H, W) in [0, 1] to the heights of the two highest local maxima (B, J) and the place of the first (B, J, 2).

    Places are x and y in 0..1, between pixels where the neighbours say so: a Gaussian's logarithm is a parabola, whose summit three
    values give.
    """
    h, w = heat.shape[-2:]
    top = F.max_pool2d(heat, 5, 1, 2)
    local = torch.where(heat == top, heat, torch.zeros_like(heat)).flatten(2)
    values, places = local.topk(2, dim=2)
    x, y = places[..., 0] % w, places[..., 0] // w
    log = heat.clamp(min=1e-4).log().flatten(2)

    def at(y: Tensor, x: Tensor) -> Tensor:
        return log.gather(2, (y.clamp(0, h - 1) * w + x.clamp(0, w - 1))[..., None])[..., 0]

    def summit(before: Tensor, after: Tensor, inside: Tensor) -> Tensor:
        bend = before - 2 * at(y, x) + after
        offset = (before - after) / (2 * bend.clamp(max=-1e-6))
        return torch.where(inside & (bend < -1e-6), offset, torch.zeros_like(bend)).clamp(-0.5, 0.5)

    right = summit(at(y, x - 1), at(y, x + 1), (x > 0) & (x < w - 1))
    down = summit(at(y - 1, x), at(y + 1, x), (y > 0) & (y < h - 1))
    return values[..., 0], values[..., 1], torch.stack([(x + 0.5 + right) / w, (y + 0.5 + down) / h], -1)


def joint_measures(names: Sequence[str], first: np.ndarray, second: np.ndarray, spots: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers that tell a sound skeleton: of each joint how far its highest peak is from 1 (`weak NAME`) and how high its second one is
    (`second NAME`), and of each bone its length over the torso's, NaN if an end is not seen."""
    seen = first > PEAK
    at = {n: i for i, n in enumerate(names)}
    hips = (spots[:, at["left_hip"]] + spots[:, at["right_hip"]]) / 2
    torso = np.linalg.norm(spots[:, at["neck"]] - hips, axis=1).clip(0.02)
    known = seen[:, at["neck"]] & (seen[:, at["left_hip"]] | seen[:, at["right_hip"]])
    out = {f"weak {n}": 1 - first[:, i] for n, i in at.items()} | {f"second {n}": second[:, i] for n, i in at.items()}
    for a, b in BONES:
        length = np.linalg.norm(spots[:, at[a]] - spots[:, at[b]], axis=1) / torso
        out[f"{a}-{b}"] = np.where(known & seen[:, at[a]] & seen[:, at[b]], length, np.nan)
    return out


def measure_names(joints: Sequence[str]) -> list[str]:
    """What `joint_measures` measures."""
    return [*(f"weak {n}" for n in joints), *(f"second {n}" for n in joints), *(f"{a}-{b}" for a, b in BONES)]


def measure_limits(names: Sequence[str], first: np.ndarray, second: np.ndarray, spots: np.ndarray) -> dict[str, list[float]]:
    """The 1 % and 99 % points of `joint_measures` on real figures; of weak and second peaks only the upper one counts."""
    limits = {}
    for name, values in joint_measures(names, first, second, spots).items():
        low, high = np.nanpercentile(values, [1, 99])
        one_sided = name.startswith(("weak ", "second "))
        limits[name] = [-float(high) - 1e-3, float(high) + 1e-3] if one_sided else [float(low), float(high)]
    return limits


def doubt(measures: Mapping[str, np.ndarray], limits: Mapping[str, Sequence[float]]) -> np.ndarray:
    """How far from normal the joints are (B,): the largest distance of a measure (B,) from the middle of its limits, in halves of their
    distance; above 1 = implausible. What was not measured is normal."""
    worst = np.zeros(len(next(iter(measures.values()))))
    for name, values in measures.items():
        low, high = limits[name]
        worst = np.fmax(worst, np.abs(values - (low + high) / 2) / max((high - low) / 2, 1e-6))
    return worst
