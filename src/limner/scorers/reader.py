"""The reader: what a picture of a figure shows. Attributes, joints, defects; it judges and never selects or trains.

One convolutional trunk with five kinds of heads: an attribute each, joint heatmaps at half resolution, body parts at full
resolution, a defect map at half resolution and a defect logit. Attributes are read part by part. Its features (for the Fréchet
distance and diversity) are made of these heads, because features that only know captions do not see flaws.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limner.images import check_images
from limner.scorers.dual import Residual
from limner.store import sha256

# Pairs of joints whose distances are compared with the torso's (neck to middle of the hips).
BONES = (
    ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"), ("right_shoulder", "right_elbow"), ("right_elbow", "right_wrist"),
    ("left_hip", "left_knee"), ("left_knee", "left_ankle"), ("right_hip", "right_knee"), ("right_knee", "right_ankle"), ("head", "neck"),
)  # fmt: skip
LAYOUT = 16  # channels of the grid that is read place by place
PEAK = 0.3  # height from which a local maximum of a heatmap counts as a joint
SURE = 0.95  # share of real pictures of which an attribute must be read rightly, to be counted in others


class Reader(nn.Module):
    """attributes: name to values; joints and parts: names, in the order of their maps. Part 0 is what is not the body."""

    def __init__(
        self,
        attributes: Mapping[str, Sequence[str]],
        joints: Sequence[str],
        parts: Sequence[str],
        channels: Sequence[int] = (16, 32, 64, 128),
        width: int = 96,
    ):
        super().__init__()
        self.attributes = {k: list(v) for k, v in attributes.items()}
        self.joints, self.parts = list(joints), list(parts)
        self.channels, self.width = list(channels), width
        f, a, b, c = channels
        self.stem = nn.Sequential(nn.Conv2d(3, f, 3, 1, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU(inplace=True))  # 64
        self.at_half = nn.Sequential(nn.Conv2d(f, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(inplace=True), Residual(a, a))  # 32
        self.at_quarter = nn.Sequential(Residual(a, b, 2), Residual(b, b))  # 16
        self.at_eighth = nn.Sequential(Residual(b, c, 2), Residual(c, c))  # 8
        self.up_quarter, self.up_half, self.up_full = Residual(b + c, b), Residual(a + b, a), Residual(f + a, f)
        self.maps = nn.Conv2d(a, len(joints) + 1, 1)
        self.part_maps = nn.Conv2d(f, len(parts), 1)
        self.layout = nn.Conv2d(c, LAYOUT, 1)  # few channels, but where: a pose is a matter of places
        known = 2 * c + LAYOUT * 64 + len(parts) * (3 + f + 1) + len(parts) * (len(parts) - 1) // 2
        self.summary = nn.Sequential(nn.Linear(known, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width), nn.ReLU(inplace=True))
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in self.attributes.items()})
        self.soundness = nn.Sequential(nn.Linear(known + 2 * a + 2 + len(joints), width), nn.ReLU(inplace=True))
        self.defect = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, 64, 64) in [0, 1] to logits: each attribute (B, values), joints (B, J, 32, 32), parts (B, P, 64, 64),
        defect_map (B, 32, 32), defect (B,), and the hidden layers summary and soundness (B, width)."""
        x = ((images - 0.5) * 4).contiguous(memory_format=torch.channels_last)
        full = self.stem(x)
        half = self.at_half(full)
        quarter = self.at_quarter(half)
        eighth = self.at_eighth(quarter)
        up = self.up_quarter(torch.cat([quarter, F.interpolate(eighth, scale_factor=2)], 1))
        fine = self.up_half(torch.cat([half, F.interpolate(up, scale_factor=2)], 1))
        finest = self.up_full(torch.cat([full, F.interpolate(fine, scale_factor=2)], 1))
        maps, parts = self.maps(fine), self.part_maps(finest)
        joints, wrong = maps[:, :-1], maps[:, -1]
        known = torch.cat(
            [eighth.mean((2, 3)), eighth.amax((2, 3)), self.layout(eighth).flatten(1), by_part(torch.cat([x, finest], 1), parts)], 1
        )
        summary = self.summary(known)
        seen = [fine.mean((2, 3)), fine.amax((2, 3)), wrong.amax((1, 2))[:, None], wrong.sigmoid().mean((1, 2))[:, None] * 10]
        soundness = self.soundness(torch.cat([known, *seen, joints.amax((2, 3)).sigmoid()], 1))
        return {
            **{name: head(summary) for name, head in self.heads.items()},
            "joints": joints, "parts": parts, "defect_map": wrong, "defect": self.defect(soundness)[:, 0],
            "summary": summary, "soundness": soundness,
        }  # fmt: skip


def by_part(features: Tensor, parts: Tensor) -> Tensor:
    """Mean features (B, C, H, W) of each body part, its size, and how far the colours (the first three features) of any two parts
    lie apart: (B, P * (C + 1) + P * (P - 1) / 2).

    Long sleeves are a forearm of the upper arm's colour instead of the face's: some twenty pixels, which a coarse grid blends
    away, and a comparison, which a network does not learn from colours alone.
    """
    share = parts.softmax(1).flatten(2)
    size = share.sum(2)
    means = share @ features.flatten(2).transpose(1, 2) / (size[..., None] + 1)
    one, other = torch.triu_indices(parts.shape[1], parts.shape[1], 1)
    apart = ((means[:, one, :3] - means[:, other, :3]).square().sum(2) + 1e-4).sqrt()  # the root of 0 has no gradient
    return torch.cat([means.flatten(1), (size + 1).log() / 4, apart], 1)


@dataclass
class Reading:
    """What the reader says of B images: attribute indices, probability of a defect, plausibility of the joints, features."""

    attributes: dict[str, np.ndarray]
    defect: np.ndarray
    plausible: np.ndarray
    doubt: np.ndarray
    features: np.ndarray


class FigureReader:
    """A trained `Reader` with what was measured on real figures: which ratios and how many joints are normal, how surely it reads.

    sure: share of real figures of which each attribute was read rightly; those not named count as read.
    mirror: read each picture and its mirror image, and take the mean.
    """

    def __init__(
        self,
        model: Reader,
        limits: dict[str, list[float]],
        revision: str = "",
        sure: Mapping[str, float] | None = None,
        mirror: bool = False,
    ):
        self.model, self.limits, self.revision, self.sure, self.mirror = model.eval(), limits, revision, dict(sure or {}), mirror

    @torch.no_grad()
    def look(self, images: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
        """What `read` reads from: of images (B, 3, 64, 64) in [0, 1] the probabilities of each attribute (B, values), of a defect (B,),
        joint heatmaps (B, J, 32, 32) in [0, 1], and the hidden layers summary and soundness (B, width)."""
        seen = [self._look(images[i : i + batch_size].float()) for i in range(0, len(images), batch_size)]
        return {k: torch.cat([s[k] for s in seen]) for k in seen[0]}

    def _look(self, images: Tensor) -> dict[str, Tensor]:
        seen = _probabilities(self.model, images)
        if not self.mirror:
            return seen
        other = _probabilities(self.model, images.flip(3))
        other["joints"] = other["joints"][:, mirrored(self.model.joints)].flip(3)
        return {k: (v + other[k]) / 2 for k, v in seen.items()}

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 64) -> Reading:
        """Read images (B, 3, 64, 64) in [0, 1]."""
        check_images(images)
        out = self.look(images, batch_size)
        first, second, spots = peaks(out["joints"])
        doubt = self._doubt(first.numpy(), second.numpy(), spots.numpy())
        attributes = [out[name] for name in self.model.attributes]
        features = torch.cat(
            [*attributes, first, second, spots.flatten(1) * (first > PEAK).repeat_interleave(2, 1), out["summary"], out["soundness"]], 1
        )
        return Reading(
            {name: out[name].argmax(1).numpy() for name in self.model.attributes},
            out["defect"].numpy(), doubt <= 1.0, doubt, features.numpy(),
        )  # fmt: skip

    def attribute_accuracy(self, reading: Reading, claimed: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Share of the attributes that each caption claims and the image shows, (B,); of those that the reader reads surely (`SURE`)."""
        out = []
        for i, claims in enumerate(claimed):
            names = [n for n in claims if n in self.model.attributes and self.sure.get(n, 1.0) >= SURE]
            right = [self.model.attributes[n][reading.attributes[n][i]] == claims[n] for n in names]
            out.append(float(np.mean(right)) if right else np.nan)
        return np.array(out)

    def _doubt(self, first: np.ndarray, second: np.ndarray, spots: np.ndarray) -> np.ndarray:
        """How far from normal the joints are: the largest of the measures below over its limit on real figures; above 1 = implausible.

        Joints without a high peak or with a second one (two wrists in one heatmap), and bone lengths over the torso's.
        """
        measures = joint_measures(self.model.joints, first, second, spots)
        worst = np.zeros(len(first))
        for name, values in measures.items():
            low, high = self.limits[name]
            middle = (low + high) / 2
            excess = np.abs(values - middle) / max((high - low) / 2, 1e-6)
            worst = np.fmax(worst, excess)
        return worst


def _probabilities(model: Reader, images: Tensor) -> dict[str, Tensor]:
    out = model(images)
    return {
        **{name: out[name].softmax(1) for name in model.attributes},
        "joints": out["joints"].sigmoid(), "defect": out["defect"].sigmoid(), "summary": out["summary"], "soundness": out["soundness"],
    }  # fmt: skip


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


def save_reader(reader: FigureReader, folder: Path, *, half: bool = False) -> None:
    """Write config.json and model.safetensors (float16 if `half`)."""
    folder.mkdir(parents=True, exist_ok=True)
    m = reader.model
    config = {
        "kind": "reader",
        "attributes": m.attributes,
        "joints": m.joints,
        "parts": m.parts,
        "channels": m.channels,
        "width": m.width,
        "limits": reader.limits,
        "sure": reader.sure,
        "mirror": reader.mirror,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {k: (v.half() if half and v.is_floating_point() else v).contiguous() for k, v in m.state_dict().items()},
        folder / "model.safetensors",
    )


def load_reader(folder: Path) -> FigureReader:
    """Read what `save_reader` wrote.

    Raises:
        ValueError: no reader lies there.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json; expected a reader that `limner figures make` wrote") from None
    if config.get("kind") != "reader":
        raise ValueError(f"{folder} holds a {config.get('kind', 'model of another kind')!r}, not a reader")
    model = Reader(config["attributes"], config["joints"], config["parts"], config["channels"], config["width"])
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()})
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FigureReader(model, config["limits"], sha256(folder / "model.safetensors")[:16], config.get("sure"), config.get("mirror", False))
