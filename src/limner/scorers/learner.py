"""A scorer that learns: the CLIP family or a small dual encoder, seen through the few things that training needs of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from limner.images import to_tensor
from limner.scorers.clip import METRICS, ClipScorer
from limner.scorers.dual import DualConfig, DualEncoder, DualScorer, pixels_of, save_scorer, tokenize, vocabulary_of
from limner.scorers.protocol import Reads
from limner.scorers.tower import _vector, preprocess

Tower = tuple[int, str, tuple[str, ...], tuple[str, ...]]


@dataclass
class Learner:
    """What training needs of a scorer.

    prepare: pictures of any size to pixels (n, 3, S, S), as the scorer itself sees them; images: pixels to unit vectors (n, D);
    texts: texts to unit vectors (n, D); scale: of the cosine; write: a folder that `load_scorer` of its kind reads; reads: how much of a
    text; towers: for vision and text, how many layers there are and what a parameter's name begins with: of a layer, behind the layers,
    anywhere in the tower.
    """

    kind: str
    model: nn.Module
    width: int
    prepare: Callable[[Sequence[Image.Image]], Tensor]
    images: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor]
    scale: Callable[[], Tensor]
    write: Callable[[Path], None]
    reads: Reads
    towers: dict[str, Tower]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def clip_learner(scorer: ClipScorer) -> Learner:
    """A CLIP scorer that is a cosine with a prompt; what it was is trained on as exp(logit_scale) · cosine.

    Raises:
        ValueError: a score of the image alone, or a pair of texts.
    """
    if not scorer.needs_prompt:
        raise ValueError(f"start.kind: {scorer.metric} reads no prompt; train clip, pickscore or one of the HPS")
    model, tower = scorer.model, scorer.tower
    tokenizer, context = tower.tokenizer, tower.context

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        # the folder that is written is scored as kind `clip`, which crops as transformers does
        return torch.cat([preprocess(to_tensor([p]), tower.size, METRICS["clip"].crop) for p in pictures])

    def texts(found: Sequence[str]) -> Tensor:
        ids = tokenizer(list(found), padding=True, truncation=True, max_length=context, return_tensors="pt").to(model.device)
        return F.normalize(_vector(model.get_text_features(input_ids=ids.input_ids, attention_mask=ids.attention_mask)), dim=-1)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    vision, text = (len(t.encoder.layers) for t in (model.vision_model, model.text_model))
    return Learner(
        "clip", model, int(model.config.projection_dim), prepare,
        lambda pixels: F.normalize(_vector(model.get_image_features(pixel_values=pixels)), dim=-1), texts,
        lambda: model.logit_scale.exp(), write, Reads(context, tokenizer),
        {
            "vision": _tower("vision_model.", vision, "post_layernorm.", "visual_projection."),
            "text": _tower("text_model.", text, "final_layer_norm.", "text_projection."),
        },
    )  # fmt: skip


def _tower(tower: str, layers: int, norm: str, projection: str) -> Tower:
    return layers, f"{tower}encoder.layers.", (tower + norm, projection), (tower, projection)


def dual_learner(model: DualEncoder, tokenizer: Any) -> Learner:
    """A small dual encoder. Its trunk is convolutions: its towers train whole or not at all."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = model.config.size

    return Learner(
        "dual", model, model.config.width, lambda pictures: pixels_of(pictures, size), model.encode_images,
        lambda found: model.encode_tokens(tokenize(tokenizer, found).to(model.log_scale.device)), lambda: model.scale,
        lambda folder: save_scorer(model, tokenizer, folder),
        Reads(tokenizer.model_max_length, tokenizer),
        {
            "vision": (0, "", (), ("trunk.", "position", "mixer.", "head.")),
            "text": (0, "", (), ("text.", "text_head.")),
        },
    )  # fmt: skip


def learner_of(scorer: Any) -> Learner:
    """Of a loaded scorer.

    Raises:
        ValueError: another kind than CLIP and dual.
    """
    if isinstance(scorer, DualScorer):
        return dual_learner(scorer.model, scorer.tokenizer)
    if not isinstance(scorer, ClipScorer):
        raise ValueError(f"start.kind: {type(scorer).__name__} cannot be trained; expected clip, pickscore, one of the HPS, or dual")
    return clip_learner(scorer)


def new_dual(config: DualConfig, tokenizer: Path, seed: int) -> Learner:
    """A dual encoder of random weights.

    Raises:
        ValueError: no tokenizer's folder, or a tokenizer that does not say how long texts may be.
    """
    if not (tokenizer / "tokenizer.json").is_file() and not (tokenizer / "vocab.json").is_file():
        raise ValueError(f"start.tokenizer: {tokenizer} has no tokenizer; a new dual encoder needs the folder of a CLIP tokenizer")
    words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if words.model_max_length > 1000:  # transformers' way to say that it is not known
        raise ValueError(f"start.tokenizer: {tokenizer} does not say model_max_length; set it in its tokenizer_config.json, e.g. to 77")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualEncoder(config, vocabulary_of(words))
    return dual_learner(model, words)


def choose_parameters(learner: Learner, *, vision_layers: int, text_layers: int, train_scale: bool = True) -> list[str]:
    """Let gradients reach what is to be trained, and nothing else.

    Args:
        vision_layers, text_layers: -1 = the whole tower; k = its last k layers with the norm and the projection behind them; 0 = nothing
            of it. HPS v1 trains the last 10 and 6.
        train_scale: the logit scale as well.

    Returns:
        names of the trained parameters.

    Raises:
        ValueError: more layers than there are, or some layers of a dual encoder.
    """
    wanted: list[str] = []
    for tower, count in (("vision", vision_layers), ("text", text_layers)):
        layers, block, behind, everything = learner.towers[tower]
        if count > layers or count < -1:
            there = f"the start has {layers}" if layers else "a dual encoder's towers train whole (-1) or not at all (0)"
            raise ValueError(f"{tower}_layers: {count}; {there}")
        last = tuple(f"{block}{i}." for i in range(layers - count, layers)) + behind if count else ()
        wanted += everything if count < 0 else last
    wanted += [n for n in ("logit_scale", "log_scale") if train_scale]
    names = []
    for name, parameter in learner.model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(wanted)))
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise ValueError("vision_layers, text_layers: 0 and 0 with train_scale false: nothing is left to train")
    return names


def training_mode(learner: Learner, on: bool) -> None:
    """Batch norms of what is trained see the batch; those of a frozen tower never do."""
    for module in learner.model.modules():
        own = list(module.parameters(recurse=False))
        module.training = on and (not own or any(p.requires_grad for p in own))
