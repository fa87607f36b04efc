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
from limner.scorers.joints import PEAK, doubt, joint_measures, mirrored, peaks
from limner.store import sha256

LAYOUT = 16  # channels of the grid that is read place by place
VERDICT = "verdict."  # prefix of its weights in a file
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
    verdict: (F + 2) -> 1, the log-odds of a defect from all that was read (`evidence`), learned from samples that were looked at; without
        it the network's own defect head, which knows drawn defects best, has the last word.
    """

    def __init__(
        self,
        model: Reader,
        limits: dict[str, list[float]],
        revision: str = "",
        sure: Mapping[str, float] | None = None,
        mirror: bool = False,
        verdict: nn.Linear | None = None,
    ):
        self.model, self.limits, self.revision, self.sure, self.mirror = model.eval(), limits, revision, dict(sure or {}), mirror
        self.verdict = verdict

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
        doubts = doubt(joint_measures(self.model.joints, first.numpy(), second.numpy(), spots.numpy()), self.limits)
        attributes = [out[name] for name in self.model.attributes]
        features = torch.cat(
            [*attributes, first, second, spots.flatten(1) * (first > PEAK).repeat_interleave(2, 1), out["summary"], out["soundness"]], 1
        )
        reading = Reading(
            {name: out[name].argmax(1).numpy() for name in self.model.attributes},
            out["defect"].numpy(), doubts <= 1.0, doubts, features.numpy(),
        )  # fmt: skip
        if self.verdict is not None:
            reading.defect = self.verdict(evidence(reading)).sigmoid()[:, 0].numpy()
        return reading

    def attribute_accuracy(self, reading: Reading, claimed: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Share of the attributes that each caption claims and the image shows, (B,); of those that the reader reads surely (`SURE`)."""
        out = []
        for i, claims in enumerate(claimed):
            names = [n for n in claims if n in self.model.attributes and self.sure.get(n, 1.0) >= SURE]
            right = [self.model.attributes[n][reading.attributes[n][i]] == claims[n] for n in names]
            out.append(float(np.mean(right)) if right else np.nan)
        return np.array(out)


def evidence(reading: Reading) -> Tensor:
    """What a verdict on soundness goes by, (B, F + 2): the features, the defect head's log-odds, and the logarithm of the joints' doubt."""
    head = torch.logit(torch.from_numpy(reading.defect), eps=1e-6)
    doubts = torch.from_numpy(reading.doubt).float().log1p()
    return torch.cat([torch.from_numpy(reading.features), head[:, None], doubts[:, None]], 1)


def _probabilities(model: Reader, images: Tensor) -> dict[str, Tensor]:
    out = model(images)
    return {
        **{name: out[name].softmax(1) for name in model.attributes},
        "joints": out["joints"].sigmoid(), "defect": out["defect"].sigmoid(), "summary": out["summary"], "soundness": out["soundness"],
    }  # fmt: skip


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
    weights = {k: (v.half() if half and v.is_floating_point() else v).contiguous() for k, v in m.state_dict().items()}
    if reader.verdict is not None:  # whole numbers and small fractions weigh side by side in it: float32
        weights |= {VERDICT + k: v.contiguous() for k, v in reader.verdict.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


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
    weights = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    last = {k.removeprefix(VERDICT): weights.pop(k) for k in list(weights) if k.startswith(VERDICT)}
    model.load_state_dict(weights)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    verdict = None
    if last:
        verdict = nn.Linear(last["weight"].shape[1], 1)
        verdict.load_state_dict(last)
    revision = sha256(folder / "model.safetensors")[:16]
    return FigureReader(model, config["limits"], revision, config.get("sure"), config.get("mirror", False), verdict)
