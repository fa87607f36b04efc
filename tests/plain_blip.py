"""ImageReward's network in plain torch on a raw checkpoint, a picture and a text at a time. Imports neither limner nor transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def names_and_shapes(
    width: int, layers: int, patch: int, grid: int, text_width: int, text_layers: int, hidden: int, vocabulary: int, gelu: bool
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """ImageReward.pt and, with `gelu`, CycleReward's files; written out from the published code."""
    joint, v, t = 256, "blip.visual_encoder.", "blip.text_encoder."
    out: dict[str, tuple[int, ...]] = {
        v + "cls_token": (1, 1, width), v + "pos_embed": (1, grid * grid + 1, width),
        v + "patch_embed.proj.weight": (width, 3, patch, patch), v + "patch_embed.proj.bias": (width,),
        v + "norm.weight": (width,), v + "norm.bias": (width,),
        t + "embeddings.position_ids": (1, 512), t + "embeddings.word_embeddings.weight": (vocabulary, text_width),
        t + "embeddings.position_embeddings.weight": (512, text_width), t + "embeddings.LayerNorm.weight": (text_width,),
        t + "embeddings.LayerNorm.bias": (text_width,),
        "blip.vision_proj.weight": (joint, width), "blip.vision_proj.bias": (joint,),
        "blip.text_proj.weight": (joint, text_width), "blip.text_proj.bias": (joint,),
    }  # fmt: skip
    linear: dict[str, tuple[int, int]] = {}
    for i in range(layers):
        b = f"{v}blocks.{i}."
        linear |= {b + "attn.qkv": (3 * width, width), b + "attn.proj": (width, width)}
        linear |= {b + "mlp.fc1": (4 * width, width), b + "mlp.fc2": (width, 4 * width)}
        out |= {f"{b}norm{n}.{p}": (width,) for n in (1, 2) for p in ("weight", "bias")}
    for i in range(text_layers):
        b = f"{t}encoder.layer.{i}."
        for kind, source in (("attention", text_width), ("crossattention", width)):
            linear |= {f"{b}{kind}.self.query": (text_width, text_width), f"{b}{kind}.output.dense": (text_width, text_width)}
            linear |= {f"{b}{kind}.self.key": (text_width, source), f"{b}{kind}.self.value": (text_width, source)}
        linear |= {b + "intermediate.dense": (hidden, text_width), b + "output.dense": (text_width, hidden)}
        norms = ("attention.output", "crossattention.output", "output")
        out |= {f"{b}{n}.LayerNorm.{p}": (text_width,) for n in norms for p in ("weight", "bias")}
    sides = [text_width, 1024, 128, 64, 16, 1]
    for n, inner, outer in zip((0, 2, 4, 6, 8) if gelu else (0, 2, 4, 6, 7), sides, sides[1:]):
        linear[f"mlp.layers.{n}"] = (outer, inner)
    return out | {f"{k}.weight": s for k, s in linear.items()} | {f"{k}.bias": s[:1] for k, s in linear.items()}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Activations of the order of 1; norms are not 1, biases not 0."""
    g, out = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        if key.endswith("position_ids"):
            out[key] = torch.arange(shape[1])[None]
        elif "norm" in key.lower():
            out[key] = noise * 0.1 + (1.0 if key.endswith("weight") else 0.0)
        else:
            out[key] = noise / math.sqrt(shape[-1]) * 1.5 if len(shape) == 2 else noise * 0.3
    return out


def norm(x: Tensor, w: Weights, at: str, tiny: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + tiny) * w[at + ".weight"] + w[at + ".bias"]


def linear(x: Tensor, w: Weights, at: str) -> Tensor:
    return x @ w[at + ".weight"].T + w[at + ".bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Of (L, D) to (M, D), head after head."""
    size, out = q.shape[1] // heads, []
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        out.append(torch.softmax(q[:, at] @ k[:, at].T / math.sqrt(size), -1) @ v[:, at])
    return torch.cat(out, 1)


def score(w: Weights, pixels: Tensor, ids: Sequence[int], heads: int, text_heads: int, cycle: bool) -> float:
    """Of normalised pixels (3, S, S) and the ids of an unpadded text."""
    at = "blip.visual_encoder."
    kernel = w[at + "patch_embed.proj.weight"]
    patches = F.unfold(pixels[None], kernel.shape[-1], stride=kernel.shape[-1])[0].T @ kernel.flatten(1).T + w[at + "patch_embed.proj.bias"]
    x = torch.cat([w[at + "cls_token"][0], patches]) + w[at + "pos_embed"][0]
    for i in range(sum(k.startswith(at) and k.endswith("attn.qkv.bias") for k in w)):
        b = f"{at}blocks.{i}."
        q, k, v = linear(norm(x, w, b + "norm1", 1e-6), w, b + "attn.qkv").split(x.shape[1], 1)
        x = x + linear(attention(q, k, v, heads), w, b + "attn.proj")
        x = x + linear(gelu(linear(norm(x, w, b + "norm2", 1e-6), w, b + "mlp.fc1")), w, b + "mlp.fc2")
    image = norm(x, w, at + "norm", 1e-6)
    at = "blip.text_encoder."
    words, places = w[at + "embeddings.word_embeddings.weight"], w[at + "embeddings.position_embeddings.weight"]
    x = norm(words[torch.tensor(ids)] + places[: len(ids)], w, at + "embeddings.LayerNorm", 1e-12)
    for i in range(sum(k.startswith(at) and k.endswith("intermediate.dense.bias") for k in w)):
        b = f"{at}encoder.layer.{i}."
        for kind, source in (("attention", None), ("crossattention", image)):
            source = x if source is None else source
            mixed = attention(
                *(linear(y, w, f"{b}{kind}.self.{n}") for n, y in (("query", x), ("key", source), ("value", source))), text_heads
            )
            x = norm(x + linear(mixed, w, f"{b}{kind}.output.dense"), w, f"{b}{kind}.output.LayerNorm", 1e-12)
        inner = gelu(linear(x, w, b + "intermediate.dense"))
        x = norm(x + linear(inner, w, b + "output.dense"), w, b + "output.LayerNorm", 1e-12)
    y = x[0]
    for n in (0, 2, 4, 6, 8) if cycle else (0, 2, 4, 6, 7):
        y = linear(gelu(y) if cycle and n else y, w, f"mlp.layers.{n}")
    return float(y[0]) if cycle else (float(y[0]) - 0.16717362830052426) / 1.0333394966054072
