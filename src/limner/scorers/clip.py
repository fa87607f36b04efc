"""Scores made of one CLIP tower: CLIP score, HPS v1, v2 and v2.1, PickScore, LAION's aesthetic score, CLIP-IQA.

Each is data (`Metric`): which tower, which text, which function of the cosine. Every prompt is encoded once, whatever the batch.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from limner.images import check_images
from limner.scorers.convert import VIT_H_14, VIT_L_14, Activation, Tower, build_clip, openai_to_clip, tower_of
from limner.scorers.protocol import Reads, checked_prompts
from limner.scorers.tower import ClipTower, Crop, find_tokenizer
from limner.scorers.weights import compare, read_weights
from limner.store import sha256

Head = Literal["linear", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What makes a score of a CLIP tower this one and no other.

    Args:
        scale: of the cosine; None = exp(logit_scale), learned.
        floor: negative cosines count as 0.
        prefix: put before every prompt.
        pair: the score is the probability of the first text against the second, softmax(100 · cosine); no prompt.
        head: the score is this function of the image's unit vector, read from a file of its own; no prompt.
        activation: of the tower's MLPs, which checkpoints do not tell; None = whatever the tower was trained with.
        tower: the sizes that it was published with; None = any CLIP, whose backbone then belongs to the metric's name.
        crop: as the reference implementation.
        comparable: scores of different prompts may be compared.
    """

    scale: float | None = None
    floor: bool = False
    prefix: str = ""
    pair: tuple[str, str] | None = None
    head: Head | None = None
    activation: Activation | None = None
    tower: Tower | None = None
    crop: Crop = "openai"
    comparable: bool = True

    @property
    def needs_prompt(self) -> bool:
        return self.pair is None and self.head is None


METRICS = {
    # Any CLIPModel folder, scored as PickScore is; it may have been trained on choices, as PickScore was.
    "clip": Metric(crop="transformers", comparable=False),
    # What most papers call CLIP score; as torchmetrics has it; as Hessel et al. wrote it (arXiv 2104.08718: ViT-B/32). Three scales.
    "clip_cosine": Metric(scale=1.0),
    "clip_score": Metric(scale=100.0, floor=True, crop="transformers"),
    "clip_score_w": Metric(scale=2.5, floor=True, prefix="A photo depicts ", activation="quick_gelu"),
    # HPS: 100 · cosine, as in the papers' tables; align_sd's evaluation and hpsv2.score() give the cosine. Trained on choices among images
    # of one prompt. v1: arXiv 2303.14420 (hpc.pt), from OpenAI's weights. v2: arXiv 2306.09341 (HPS_v2_compressed.pt and
    # HPS_v2.1_compressed.pt), from LAION's; hpsv2 resizes tensors, antialiased or not as the installed torchvision does, here Pillow does.
    "hps_v1": Metric(scale=100.0, activation="quick_gelu", tower=VIT_L_14, comparable=False),
    "hps_v2": Metric(scale=100.0, activation="gelu", tower=VIT_H_14, comparable=False),
    "hps_v2_1": Metric(scale=100.0, activation="gelu", tower=VIT_H_14, comparable=False),
    # arXiv 2305.01569 (PickScore_v1)
    "pickscore": Metric(activation="gelu", tower=VIT_H_14, crop="transformers", comparable=False),
    # About 1 to 10. LAION-AI/aesthetic-predictor (sa_0_4_vit_l_14_linear.pth); improved-aesthetic-predictor
    # (sac+logos+ava1-l14-linearMSE.pth, not the file with ReLUs).
    "aesthetic_v1": Metric(head="linear", activation="quick_gelu", tower=VIT_L_14),
    "aesthetic_v2": Metric(head="mlp", activation="quick_gelu", tower=VIT_L_14),
    # arXiv 2207.12396 has an RN50 without positional embedding at native size: another metric. These are the pairs on a ViT.
    "clip_iqa_quality": Metric(pair=("Good photo.", "Bad photo."), activation="quick_gelu", crop="transformers"),
    "clip_iqa_sharpness": Metric(pair=("Sharp photo.", "Blurry photo."), activation="quick_gelu", crop="transformers"),
}


class ClipScorer:
    """A CLIP tower behind the scorer protocol.

    Attributes:
        metric: what is measured: the kind, and the backbone where it is not fixed.
        needs_prompt: whether prompts are read; where not, None will do.
        range: the bounds that unit vectors set; of heads, of the weights read.
        files: SHA-256 of every file of weights, by name.
        The others: as `Scorer`.
    """

    higher_is_better = True

    def __init__(
        self, name: str, model: Any, tokenizer: Any, revision: str = "", *, kind: str = "clip", head: tuple[Tensor, float] | None = None
    ):
        """head: a vector (D,) and a bias, for the kinds that have one."""
        self.name, self.revision, self.files = name, revision, dict[str, str]()
        self._how = METRICS[kind]
        self.tower = ClipTower(model, tokenizer, self._how.crop)
        self._head = head
        self.reads = Reads(self.tower.context, tokenizer, self._how.prefix)
        self.metric = kind if self._how.tower else f"{kind}_{tower_of(model.config).backbone}"
        self.needs_prompt, self.comparable_across_prompts = self._how.needs_prompt, self._how.comparable
        if head is not None:
            bound = float(head[0].norm())
            self.range = (head[1] - bound, head[1] + bound)
        elif self._how.pair:
            self.range = (0.0, 1.0)
        else:
            self.range = (0.0 if self._how.floor else -self._scale, self._scale)

    @property
    def model(self) -> Any:
        """The transformers CLIPModel."""
        return self.tower.model

    def to_device(self, device: str) -> None:
        """Move the tower."""
        self.tower.to_device(device)

    @property
    def _scale(self) -> float:
        return self.tower.scale if self._how.scale is None else self._how.scale

    def __call__(self, images: Tensor, prompts: Sequence[str | None] | None = None, *, differentiable: bool = False) -> Tensor:
        """As `Scorer`.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.
            prompts: B texts, "" among them; None where no prompt is needed.
            differentiable: gradients reach the images; the resize is then a tensor's, so scores differ from the others in the third digit.

        Raises:
            ValueError: images outside the contract, a prompt that is needed and not there, another number of prompts than of images.

        Warns:
            UserWarning: how many prompts are longer than the context.
        """
        check_images(images)
        return self._scores(images, prompts, differentiable).to(images.device)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str | None]) -> list[float]:
        """As `PictureScorer`: sizes may differ within a batch."""
        return self._scores(pictures, prompts, False).tolist()

    def _scores(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str | None] | None, differentiable: bool) -> Tensor:
        texts: list[str] = []
        if self._how.pair:
            texts = list(self._how.pair)
        elif self.needs_prompt:
            checked = checked_prompts(self.name, self.metric, prompts, len(images))
            self.reads.count_long(checked, stacklevel=4)
            texts = [self._how.prefix + p for p in checked]
        text = self.tower.encode_texts(texts) if texts else None
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return self._score(self.tower.encode_images(images, differentiable), text).float()

    def _score(self, image: Tensor, text: Tensor | None) -> Tensor:
        """Unit vectors (B, D) of images, and of their prompts or the pair, to (B,)."""
        if self._head is not None:
            return image @ self._head[0].to(image) + self._head[1]
        assert text is not None
        if self._how.pair:
            return (100 * (image @ text.T)).softmax(1)[:, 0]
        cosine = (image * text).sum(1)
        return self._scale * (cosine.clamp(min=0) if self._how.floor else cosine)


def load_scorer(
    path: Path,
    name: str,
    kind: str = "clip",
    *,
    tower: Path | None = None,
    tokenizer: Path | None = None,
    activation: Activation | None = None,
    shape: Tower | None = None,
) -> ClipScorer:
    """Read a scorer from local files.

    Args:
        path: a transformers CLIPModel folder (config.json, model.safetensors) or one file of OpenAI's naming (.pt, .pth, .bin,
            .safetensors). For the aesthetic kinds the head's file.
        name: as in the recipe, for results and errors.
        kind: a key of `METRICS`.
        tower: for the aesthetic kinds: OpenAI's ViT-L/14, a folder or file as above.
        tokenizer: its folder; None = beside the weights.
        activation: of a single file whose metric does not fix it.
        shape: sizes of the tower, where they are not the published ones.

    Raises:
        ValueError: files that are missing, corrupt, unsafe or of another model (lists the first keys that differ).

    Warns:
        UserWarning: a setting is ignored.
    """
    where = f"scorers.{name}"
    if kind not in METRICS:
        raise ValueError(f"{where}.kind: {kind!r}; expected one of {', '.join(METRICS)}")
    how = METRICS[kind]
    if how.head is None and tower:
        warnings.warn(f"{where}.tower: ignored; {kind} has its own", stacklevel=2)
    if how.head is not None and not tower:
        raise ValueError(
            f"{where}.tower: not set; {kind} is a head over OpenAI's CLIP ViT-L/14, so give that model's folder or file as well"
        )
    at, source = (f"{where}.tower", tower) if how.head and tower else (f"{where}.path", path)
    model, file = _read_tower(source, kind, activation, shape or how.tower, at, where)
    digests = {file.name: sha256(file)}
    head = None
    if how.head is not None:
        head = _read_head(path, how.head, int(model.visual_projection.out_features), f"{where}.path")
        digests = {path.name if path.name != file.name else f"head {path.name}": sha256(path), **digests}
    words = None if how.head else find_tokenizer(source, tokenizer, where)
    scorer = ClipScorer(name, model, words, kind=kind, head=head)
    if words is not None:
        scorer.tower.check_tokenizer(f"{where}.tokenizer")
    # several metrics share a file, and a changed metric must not pass for the same scores
    weights = next(iter(digests.values())) if head is None else hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    scorer.revision = weights[:16] if kind == "clip" else f"{scorer.metric}@{weights[:16]}"
    if activation:
        scorer.revision += f" {activation}"
    scorer.files = digests
    return scorer


def share_towers(scorers: Sequence[object]) -> None:
    """Let the CLIP scorers among `scorers` that were read from the same weights look through one copy of them, each picture once."""
    first: dict[tuple[str, str], ClipTower] = {}
    for scorer in scorers:
        if isinstance(scorer, ClipScorer) and scorer.files:
            weights = list(scorer.files.values())[-1]  # a head's own come before
            tower = first.setdefault((weights, scorer.model.config.vision_config.hidden_act), scorer.tower)
            if tower is not scorer.tower:
                scorer.tower.share(tower)


def _read_tower(source: Path, kind: str, activation: Activation | None, shape: Tower | None, at: str, where: str) -> tuple[CLIPModel, Path]:
    """The model, and the file of its weights."""
    pinned = METRICS[kind].activation
    if activation and pinned and activation != pinned:
        raise ValueError(f"{where}.activation: {activation}, but {kind} was trained with {pinned}; leave it out")
    if kind != "clip" and not source.is_dir():
        weights = read_weights(source, at)
        if (chosen := activation or pinned) is None:
            raise ValueError(
                f"{where}.activation: not set, and {source} does not tell it: quick_gelu if its weights descend from OpenAI's, "
                "gelu if from LAION's"
            )
        return openai_to_clip(weights, chosen, f"{at}: {source} does not fit {kind}", shape), source
    config = _read_config(source, at, where)
    file = source / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{at}: {source} has no model.safetensors")
    found = {config.text_config.hidden_act, config.vision_config.hidden_act}
    if (asked := activation or pinned) and found != {asked}:
        raise ValueError(f"{at}: {source} has the activation {', '.join(sorted(found))}; {kind} expects {asked}. Is it another CLIP?")
    weights = read_weights(file, at)
    if shape is not None and (here := tower_of(config)) != shape:
        compare(weights, shape.transformers_shapes(), f"{at}: {source} does not fit {kind}")
        raise ValueError(f"{at}: {source} does not fit {kind}: its config.json has {here}; expected {shape}")
    return build_clip(config, weights, f"{at}: {file} does not fit its config.json"), file


def _read_config(folder: Path, at: str, where: str) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{at}: {folder} has no config.json; expected a folder of a transformers CLIPModel with its tokenizer")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{at}: {path} is not JSON ({error})") from None
    if found.get("model_type") != "clip":
        raise ValueError(f"{at}: {folder} does not hold a CLIPModel; set {where}.kind")
    return CLIPConfig.from_pretrained(folder, local_files_only=True)


def _read_head(path: Path, head: Head, width: int, where: str) -> tuple[Tensor, float]:
    """A linear head, or five linear layers without activations, which are one: as a vector (width,) and a bias."""
    weights = read_weights(path, where)
    sizes = {"": (1, width)} if head == "linear" else dict(zip(MLP, zip((*MLP_WIDTHS, 1), (width, *MLP_WIDTHS))))
    expected = {f"{n}weight": s for n, s in sizes.items()} | {f"{n}bias": s[:1] for n, s in sizes.items()}
    compare(weights, expected, f"{where}: {path} does not fit")
    vector, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for n in sizes:
        w = weights[f"{n}weight"].double()
        vector, bias = w @ vector, w @ bias + weights[f"{n}bias"].double()
    return vector[0].float(), float(bias)


MLP, MLP_WIDTHS = tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7)), (1024, 128, 64, 16)  # dropout stands between
