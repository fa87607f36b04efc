"""ImageReward and CycleReward: a BLIP image tower, a BERT that attends to it, and a small network on the first token.

ImageReward: arXiv 2304.05977 (ImageReward.pt); CycleReward: arXiv 2506.02095 (CycleReward-Combo.pth, -T2I, -I2T). Modules carry the names
of the published tensors, so files load as they are. Text cannot be encoded without its image here; it is split into tokens once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer

from limner.images import check_images
from limner.scorers.protocol import Reads, checked_prompts, tokens
from limner.scorers.tower import preprocess, preprocess_pictures
from limner.scorers.weights import compare, read_weights
from limner.store import sha256


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What makes a score of this architecture this one.

    Args:
        tokens: of a text that are read; what is longer is cut.
        gelu: whether the layers of the last network have activations between them.
        mean, deviation: taken from and divided out of its output.
    """

    tokens: int
    gelu: bool
    mean: float = 0.0
    deviation: float = 1.0


REWARDS = {
    "image_reward": Reward(tokens=35, gelu=False, mean=0.16717362830052426, deviation=1.0333394966054072),
    "cycle_reward": Reward(tokens=128, gelu=True),
}
HEAD = (1024, 128, 64, 16, 1)  # widths of the last network


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """By default BLIP-large with BERT-base."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    patch: int = 16
    image_size: int = 224
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    positions: int = 512
    vocabulary: int = 30524
    joint: int = 256


class BlipReward(nn.Module):
    """Pixels and tokens to one number."""

    blip: Any
    mlp: Any

    def __init__(self, reward: Reward, sizes: Sizes):
        super().__init__()
        s, self.reward, self.sizes = sizes, reward, sizes
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": Vision(s), "text_encoder": Text(s),
                "vision_proj": nn.Linear(s.width, s.joint), "text_proj": nn.Linear(s.text_width, s.joint),  # published, not used
            }
        )  # fmt: skip
        layers = [nn.Linear(a, b) for a, b in zip((s.text_width, *HEAD), HEAD)]
        between: list[nn.Module] = [nn.GELU() if reward.gelu else nn.Identity() for _ in HEAD]
        numbers = (0, 2, 4, 6, 8) if reward.gelu else (0, 2, 4, 6, 7)  # ImageReward has dropout behind the first three only
        self.mlp = nn.ModuleDict({"layers": nn.ModuleDict({str(n): layer for n, layer in zip(numbers, layers)})})
        self.between = between[1:]

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S), token ids (B, L) and which of them are text, to scores (B,)."""
        x = self.blip["text_encoder"](ids, mask, self.blip["visual_encoder"](pixels))[:, 0]
        for i, layer in enumerate(self.mlp["layers"].values()):
            x = layer(x if i == 0 else self.between[i - 1](x))
        return (x[:, 0] - self.reward.mean) / self.reward.deviation

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest score. Without activations it is linear in the first token, which a layer norm holds on a sphere."""
        if self.reward.gelu:
            return (-math.inf, math.inf)
        vector = torch.eye(self.sizes.text_width, dtype=torch.float64)
        bias = torch.zeros(self.sizes.text_width, dtype=torch.float64)
        for layer in self.mlp["layers"].values():
            vector, bias = layer.weight.double() @ vector, layer.weight.double() @ bias + layer.bias.double()
        norm = self.blip["text_encoder"].encoder["layer"][-1].output["LayerNorm"]
        middle = float(vector[0] @ norm.bias.double() + bias)
        radius = float((vector[0] * norm.weight.double()).norm()) * math.sqrt(self.sizes.text_width)
        low, high = ((end - self.reward.mean) / self.reward.deviation for end in (middle - radius, middle + radius))
        return low, high


class Vision(nn.Module):
    """ViT with the norm before each part; all tokens come out."""

    patch_embed: Any

    def __init__(self, s: Sizes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, s.width))
        self.pos_embed = nn.Parameter(torch.empty(1, (s.image_size // s.patch) ** 2 + 1, s.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, s.width, s.patch, s.patch)})
        self.blocks = nn.ModuleList(VisionBlock(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionBlock(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.heads = s.heads
        self.norm1, self.norm2 = nn.LayerNorm(s.width, eps=1e-6), nn.LayerNorm(s.width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(s.width, 3 * s.width), "proj": nn.Linear(s.width, s.width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(s.width, 4 * s.width), "fc2": nn.Linear(4 * s.width, s.width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](attend(q, k, v, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Text(nn.Module):
    """BERT, the norm behind each part, whose layers attend to the image between self-attention and MLP. No token types."""

    embeddings: Any
    encoder: Any

    def __init__(self, s: Sizes):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(s.vocabulary, s.text_width), "position_embeddings": nn.Embedding(s.positions, s.text_width),
                "LayerNorm": nn.LayerNorm(s.text_width, eps=1e-12),
            }
        )  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(s) for _ in range(s.text_layers))})

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        e = self.embeddings
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"].weight[: ids.shape[1]])
        for layer in self.encoder["layer"]:
            x = layer(x, mask, image)
        return x


class TextLayer(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.attention, self.crossattention = TextAttention(s, s.text_width), TextAttention(s, s.width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(s.text_width, s.text_hidden)})
        self.output = after(s.text_hidden, s.text_width)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), image, None)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class TextAttention(nn.Module):
    def __init__(self, s: Sizes, source: int):
        super().__init__()
        self.heads, w = s.text_heads, s.text_width
        self.self = nn.ModuleDict({"query": nn.Linear(w, w), "key": nn.Linear(source, w), "value": nn.Linear(source, w)})
        self.output = after(w, w)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Every token of x attends to the tokens of `source` that `mask` (B, L) has."""
        mixed = attend(self.self["query"](x), self.self["key"](source), self.self["value"](source), self.heads, mask)
        return self.output["LayerNorm"](x + self.output["dense"](mixed))


def after(inner: int, width: int) -> nn.ModuleDict:
    """What stands behind an attention or MLP of BERT."""
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of (B, L, D) to (B, M, D) in heads."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    wall = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=wall).transpose(1, 2).flatten(2)


class BlipScorer:
    """A `BlipReward` behind the scorer protocol. Trained on choices among images of one prompt, so scores compare within a prompt.

    Attributes:
        files: SHA-256 of every file of weights, by name.
        The others: as `Scorer`.
    """

    higher_is_better, comparable_across_prompts, needs_prompt = True, False, True

    def __init__(self, name: str, metric: str, model: BlipReward, tokenizer: Any, revision: str = ""):
        self.name, self.metric, self.revision, self.files = name, metric, revision, dict[str, str]()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.range = model.bounds()
        self.reads = Reads(model.reward.tokens, tokenizer)

    def to_device(self, device: str) -> None:
        """Move the weights."""
        self.model.to(device)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, differentiable: bool = False) -> Tensor:
        """As `Scorer`; `differentiable`, errors and warnings as `ClipScorer`."""
        check_images(images)
        pixels = preprocess(images, self.model.sizes.image_size, "openai", differentiable)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return self._scores(pixels, prompts).to(images.device)

    @torch.no_grad()
    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """As `PictureScorer`: sizes may differ within a batch."""
        return self._scores(preprocess_pictures(pictures, self.model.sizes.image_size, "openai"), prompts).tolist()

    def _scores(self, pixels: Tensor, prompts: Sequence[str | None]) -> Tensor:
        where = self.model.mlp["layers"]["0"].weight.device
        ids, mask = self._tokens(checked_prompts(self.name, self.metric, prompts, len(pixels)))
        return self.model(pixels.to(where), ids.to(where), mask.to(where))

    def _tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) padded to the longest, and where there are any."""
        limit, rows = self.model.reward.tokens, dict[str, list[int]]()
        for text in dict.fromkeys(prompts):
            rows[text] = tokens(self.tokenizer, text)
        self.reads.count_long(prompts, stacklevel=5)
        rows = {t: r if len(r) <= limit else [*r[: limit - 1], r[-1]] for t, r in rows.items()}
        longest = max(map(len, rows.values()))
        padded = torch.tensor([rows[t] + [0] * (longest - len(rows[t])) for t in prompts])
        return padded, torch.tensor([[True] * len(rows[t]) + [False] * (longest - len(rows[t])) for t in prompts])


def shapes(kind: str, sizes: Sizes = Sizes()) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in BlipReward(REWARDS[kind], sizes).state_dict().items()}


def build(kind: str, weights: Mapping[str, Tensor], where: str, sizes: Sizes = Sizes()) -> BlipReward:
    """A model that holds these very tensors.

    Raises:
        ValueError: lists the first keys that are missing, unexpected or of another shape.
    """
    weights = {k: v for k, v in weights.items() if not k.endswith(".position_ids")}  # a buffer that is 0, 1, 2 ...
    compare(weights, shapes(kind, sizes), where)
    with torch.device("meta"):
        model = BlipReward(REWARDS[kind], sizes)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_scorer(path: Path, name: str, kind: str, *, tokenizer: Path | None = None, sizes: Sizes = Sizes()) -> BlipScorer:
    """Read a scorer from local files.

    Args:
        path: ImageReward.pt, CycleReward-Combo.pth ..., or such a file as .safetensors.
        name: as in the recipe, for results and errors.
        kind: a key of `REWARDS`.
        tokenizer: folder of bert-base-uncased's vocabulary; None = beside the weights.
        sizes: where they are not the published ones.

    Raises:
        ValueError: files that are missing, corrupt, unsafe or of another model.
    """
    where = f"scorers.{name}"
    words = find_tokenizer(tokenizer or path.parent, sizes.vocabulary, f"{where}.tokenizer")
    model = build(kind, read_weights(path, f"{where}.path"), f"{where}.path: {path} does not fit {kind}", sizes)
    digest = sha256(path)
    scorer = BlipScorer(name, kind, model, words, f"{kind}@{digest[:16]}")
    scorer.files = {path.name: digest}
    return scorer


def find_tokenizer(folder: Path, vocabulary: int, where: str) -> Any:
    """BERT's tokenizer from a folder, or from `tokenizer` in it.

    Raises:
        ValueError: there is none, or it has more words than the weights.
    """
    for place in (folder, folder / "tokenizer"):
        if (place / "vocab.txt").is_file() or (place / "tokenizer.json").is_file():
            found = BertTokenizer.from_pretrained(place, local_files_only=True)
            if len(found) > vocabulary or found.cls_token_id is None:
                raise ValueError(
                    f"{where}: {place} has {len(found)} tokens, the weights {vocabulary}; expected bert-base-uncased's vocabulary"
                )
            return found
    raise ValueError(f"{where}: {folder} has no tokenizer; give a folder with vocab.txt or tokenizer.json of bert-base-uncased")
