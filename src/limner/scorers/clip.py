"""Scorers that are a transformers `CLIPModel`: PickScore, and any CLIP fine-tuned on choices. Score = exp(scale) · cosine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from limner.images import check_images
from limner.store import sha256

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """A CLIP model behind the scorer protocol.

    Images: shorter side to the model's size (bicubic, antialiased), centre crop, CLIP's mean and deviation.
    """

    higher_is_better = True
    comparable_across_prompts = True

    def __init__(self, name: str, model: Any, tokenizer: Any, revision: str = ""):
        self.name, self.model, self.tokenizer, self.revision = name, model.eval().requires_grad_(False), tokenizer, revision
        self.size = int(model.config.vision_config.image_size)
        bound = float(model.logit_scale.exp())
        self.range = (-bound, bound)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`."""
        check_images(images)
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct,
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        text = F.normalize(_vector(self.model.get_text_features(**tokens)), dim=-1)[[distinct.index(p) for p in prompts]]
        image = F.normalize(_vector(self.model.get_image_features(pixel_values=self.preprocess(images))), dim=-1)
        return (image * text).sum(1) * self.model.logit_scale.exp()

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the model's input (B, 3, size, size)."""
        h, w = images.shape[-2:]
        scale = self.size / min(h, w)
        x = F.interpolate(
            images, (max(self.size, round(h * scale)), max(self.size, round(w * scale))), mode="bicubic", antialias=True
        ).clamp(0, 1)
        top, left = (x.shape[-2] - self.size) // 2, (x.shape[-1] - self.size) // 2
        x = x[..., top : top + self.size, left : left + self.size]
        return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def _vector(output: Any) -> Tensor:
    """transformers 5 wraps the projected vector in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def load_scorer(folder: Path, name: str) -> ClipScorer:
    """Read a CLIPModel folder with its tokenizer (such as a local copy of PickScore_v1).

    Raises:
        ValueError: it is not there, or not a CLIP model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"scorers.{name}.path: {folder} has no config.json; expected a folder of a transformers CLIPModel with its tokenizer"
        )
    if json.loads(path.read_text()).get("model_type") != "clip":
        raise ValueError(f"scorers.{name}.path: {folder} does not hold a CLIPModel; set scorers.{name}.kind")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"scorers.{name}.path: {folder} has no model.safetensors")
    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    return ClipScorer(name, model, CLIPTokenizer.from_pretrained(folder, local_files_only=True), sha256(weights)[:16])
