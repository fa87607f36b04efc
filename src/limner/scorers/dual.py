"""A small scorer of the CLIP kind: an image tower, a text tower, score = exp(scale) · cosine.

What `limner` trains from nothing for the embedded world. Saved as a folder: config.json, model.safetensors and the tokenizer's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from limner.images import check_images, to_tensor, to_uint8
from limner.scorers.protocol import Reads, checked_prompts
from limner.scorers.tower import each_once
from limner.scorers.weights import compare, read_weights
from limner.store import sha256


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """Shape of both towers.

    Args:
        channels: of the convolution stages, each halving the side of a `size`-pixel image.
        blocks: residual blocks a stage.
        attention_layers: transformer layers over the last grid; 0 = average and maximum pooling.
        width: of the shared space and of the text tower.
        text_layers: of the text transformer.
        size: side of the images in pixels.
    """

    channels: tuple[int, ...] = (40, 80, 160)
    blocks: int = 1
    attention_layers: int = 2
    width: int = 128
    text_layers: int = 2
    size: int = 64


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm; `stride` 2 halves the side."""

    def __init__(self, inner: int, outer: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.skip = (
            nn.Identity()
            if stride == 1 and inner == outer
            else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def trunk(channels: Sequence[int], blocks: int) -> nn.Sequential:
    """Residual stages, each of which halves the side."""
    first = channels[0]
    # A plain first convolution: a strided 1×1 skip on three channels crashes torch's CPU backward (2.13, channels last).
    layers: list[nn.Module] = [nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True)]
    before = 0
    for c in channels:
        layers += [Residual(before, c, 2)] if before else []
        layers += [Residual(c, c) for _ in range(blocks)]
        before = c
    return nn.Sequential(*layers)


class DualEncoder(nn.Module):
    """Image and text towers with a learned scale."""

    def __init__(self, config: DualConfig, vocabulary: dict[str, int]):
        """vocabulary: vocab_size, bos_token_id, eos_token_id, pad_token_id, length of the tokenizer."""
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        last, grid = config.channels[-1], config.size // 2 ** len(config.channels)
        self.trunk = trunk(config.channels, config.blocks)
        self.position = nn.Parameter(torch.randn(1, grid * grid, last) * 0.02)
        layer = nn.TransformerEncoderLayer(last, 4, 2 * last, 0.0, "gelu", batch_first=True, norm_first=True)
        self.mixer = nn.TransformerEncoder(layer, config.attention_layers, enable_nested_tensor=False) if config.attention_layers else None
        self.head = nn.Linear(last if self.mixer else 2 * last, config.width)
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary["vocab_size"], hidden_size=config.width, intermediate_size=4 * config.width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=4, max_position_embeddings=vocabulary["length"], bos_token_id=vocabulary["bos_token_id"],
                eos_token_id=vocabulary["eos_token_id"], pad_token_id=vocabulary["pad_token_id"],
            )
        )  # fmt: skip
        self.text_head = nn.Linear(config.width, config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, size, size) in [0, 1] to unit vectors (B, width)."""
        x = self.trunk(((images - 0.5) * 4).contiguous(memory_format=torch.channels_last))
        if self.mixer is None:
            pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        else:
            pooled = self.mixer(x.flatten(2).transpose(1, 2) + self.position).mean(1)
        return F.normalize(self.head(pooled), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to unit vectors (B, width)."""
        return F.normalize(self.text_head(self.text(tokens).pooler_output), dim=-1)

    @property
    def scale(self) -> Tensor:
        """exp of the learned logarithm, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=100)


class DualScorer:
    """A `DualEncoder` with its tokenizer behind the scorer protocol. Score = exp(scale) · cosine.

    Trained on choices among images of one prompt, scores compare within a prompt only.

    Attributes:
        files: SHA-256 of the weights, by name.
        The others: as `Scorer`.
    """

    higher_is_better, comparable_across_prompts, needs_prompt, metric = True, False, True, "dual"

    def __init__(self, name: str, model: DualEncoder, tokenizer: Any, revision: str = ""):
        self.name, self.model, self.tokenizer, self.revision, self.files = name, model.eval(), tokenizer, revision, dict[str, str]()
        bound = float(model.scale.detach())
        self.range = (-bound, bound)
        self.reads = Reads(tokenizer.model_max_length, tokenizer)
        self._texts: dict[str, Tensor] = {}

    def to_device(self, device: str) -> None:
        """Move the weights, and forget texts."""
        self.model.to(device)
        self._texts.clear()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`; images of another size are resized as pictures are."""
        check_images(images)
        size = self.model.config.size
        right = images.shape[-2:] == (size, size)
        pixels = images if right else pixels_of([Image.fromarray(p) for p in to_uint8(images)], size)
        return self._scores(pixels, prompts).to(images.device)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """As `PictureScorer`: sizes may differ within a batch."""
        return self._scores(pixels_of(pictures, self.model.config.size), prompts).tolist()

    @torch.no_grad()
    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        text = self._encode(checked_prompts(self.name, self.metric, prompts, len(images)))
        seen = self.model.encode_images(images.float().to(text.device))
        return (seen * text).sum(1) * self.model.scale

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors (B, D); each is encoded once, and alone, so that batch mates cannot change a digit."""
        self.reads.count_long(texts, stacklevel=5)
        device = self.model.log_scale.device
        return each_once(texts, self._texts, lambda text: self.model.encode_tokens(tokenize(self.tokenizer, [text]).to(device))[0])


def pixels_of(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """RGB pictures to (n, 3, size, size) in [0, 1], by Pillow's bicubic resize, whatever their shape."""
    return to_tensor([p if p.size == (size, size) else p.resize((size, size), Image.Resampling.BICUBIC) for p in pictures])


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Texts to ids (B, L), padded and cut to the tokenizer's length."""
    return tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """What the text tower must know of a tokenizer."""
    return {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "length": tokenizer.model_max_length,
    }  # fmt: skip


def save_scorer(model: DualEncoder, tokenizer: Any, folder: Path, *, half: bool = False) -> None:
    """Write config.json, model.safetensors (float16 if `half`) and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"kind": "dual", **asdict(model.config), "vocabulary": model.vocabulary}, indent=1))
    weights = {k: v.half() if half and v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


def load_scorer(folder: Path, name: str) -> DualScorer:
    """Read what `save_scorer` wrote.

    Raises:
        ValueError: files are missing or damaged, or it is another kind of scorer.
    """
    wrong = f"scorers.{name}.path: {folder}/config.json is not what `limner scorer train` writes"
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"scorers.{name}.path: {folder} has no config.json; expected a folder that `limner scorer train` wrote") from None
    except ValueError as error:
        raise ValueError(f"{wrong} ({error})") from None
    if values.pop("kind", "") != "dual":
        raise ValueError(f"scorers.{name}.path: {folder} holds another kind of model; set scorers.{name}.kind")
    try:
        vocabulary = values.pop("vocabulary")
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        model = DualEncoder(DualConfig(**shape), vocabulary)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{wrong} ({error})") from error
    file = folder / "model.safetensors"
    weights = read_weights(file, f"scorers.{name}.path")
    compare(weights, {k: tuple(v.shape) for k, v in model.state_dict().items()}, f"scorers.{name}.path: {file}")
    model.load_state_dict(weights)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    digest = sha256(file)
    scorer = DualScorer(name, model, CLIPTokenizer.from_pretrained(folder), digest[:16])
    scorer.files = {file.name: digest}
    return scorer
