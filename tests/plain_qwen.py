"""HPS v3's network in plain torch on a raw checkpoint, a picture and its tokens at a time. Imports neither limner nor transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Weights = dict[str, Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# as published: Qwen2-VL-7B-Instruct with one token more
PUBLISHED = {"depth": 32, "embed": 1280, "layers": 28, "width": 3584, "heads": 28, "kv": 4, "inner": 18944, "vocabulary": 151658}


def names_and_shapes(depth: int, embed: int, layers: int, width: int, heads: int, kv: int, inner: int, vocabulary: int) -> dict[str, Any]:
    """HPSv3.safetensors, written in the names of transformers 4.45."""
    out: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (embed, 3, 2, 14, 14), "visual.merger.ln_q.weight": (embed,), "visual.merger.ln_q.bias": (embed,),
        "model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width),
    }  # fmt: skip
    biased = {"visual.merger.mlp.0": (4 * embed, 4 * embed), "visual.merger.mlp.2": (width, 4 * embed)}
    biased |= {"rm_head.0": (1024, width), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    for i in range(depth):
        b = f"visual.blocks.{i}."
        biased |= {b + "attn.qkv": (3 * embed, embed), b + "attn.proj": (embed, embed)}
        biased |= {b + "mlp.fc1": (4 * embed, embed), b + "mlp.fc2": (embed, 4 * embed)}
        out |= {f"{b}norm{n}.{p}": (embed,) for n in (1, 2) for p in ("weight", "bias")}
    size = width // heads
    for i in range(layers):
        b = f"model.layers.{i}."
        biased |= {f"{b}self_attn.q_proj": (width, width)} | {f"{b}self_attn.{n}_proj": (kv * size, width) for n in "kv"}
        out |= {b + "self_attn.o_proj.weight": (width, width), b + "mlp.down_proj.weight": (width, inner)}
        out |= {f"{b}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        out |= {f"{b}{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    return out | {f"{k}.weight": s for k, s in biased.items()} | {f"{k}.bias": s[:1] for k, s in biased.items()}


def random_weights(shapes: dict[str, Any], seed: int = 0) -> Weights:
    g, out = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        if "norm" in key or "ln_q" in key:
            out[key] = noise * 0.1 + (1.0 if key.endswith("weight") else 0.0)
        elif key == "model.embed_tokens.weight":
            out[key] = noise
        else:
            out[key] = noise / math.sqrt(math.prod(shape[1:])) * 1.5 if len(shape) > 1 else noise * 0.3
    return out


def linear(x: Tensor, w: Weights, at: str) -> Tensor:
    return x @ w[at + ".weight"].T + w.get(at + ".bias", torch.zeros(()))


def norm(x: Tensor, w: Weights, at: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[at + ".weight"] + w[at + ".bias"]


def root(x: Tensor, w: Weights, at: str) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[at + ".weight"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """x (L, D) whose channels i and i + D/2 are a pair, turned by angles (L, D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kv: int, angles: Tensor, causal: bool) -> Tensor:
    size, out = q.shape[1] // heads, []
    wall = torch.full((len(q), len(q)), -math.inf).triu(1) if causal else torch.zeros(len(q), len(q))
    for h in range(heads):
        mine, shared = slice(h * size, (h + 1) * size), slice(h * kv // heads * size, (h * kv // heads + 1) * size)
        scores = turn(q[:, mine], angles) @ turn(k[:, shared], angles).T / math.sqrt(size)
        out.append(torch.softmax(scores + wall, -1) @ v[:, shared])
    return torch.cat(out, 1)


def patches(picture: Image.Image, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Patches (N, 1176) of a picture resized to (width, height), four neighbours after another, and their rows and columns (N, 2)."""
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    x = torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)
    rows, places = [], []
    for top in range(0, height // 14, 2):
        for left in range(0, width // 14, 2):
            for y, z in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                part = x[:, y * 14 : y * 14 + 14, z * 14 : z * 14 + 14]
                rows.append(torch.stack([part, part], 1).flatten())  # twice: Qwen2-VL takes a picture for two frames
                places.append([y, z])
    return torch.stack(rows), torch.tensor(places).float()


def score(
    w: Weights, picture: Image.Image, size: tuple[int, int], ids: Sequence[int], image_token: int, heads: int, kv: int, vision_heads: int
) -> tuple[float, float]:  # fmt: skip
    """Mean and deviation's logarithm; the reward token is the last of `ids`."""
    values, places = patches(picture, *size)
    x = values @ w["visual.patch_embed.proj.weight"].flatten(1).T
    quarter = x.shape[1] // vision_heads // 4
    steps = 1 / 10000 ** (torch.arange(quarter) / quarter)
    angles = torch.cat([places[:, :1] * steps, places[:, 1:] * steps], 1)
    for i in range(sum(k.startswith("visual.") and k.endswith("attn.qkv.bias") for k in w)):
        b = f"visual.blocks.{i}."
        q, k, v = linear(norm(x, w, b + "norm1"), w, b + "attn.qkv").split(x.shape[1], 1)
        x = x + linear(attention(q, k, v, vision_heads, vision_heads, angles, False), w, b + "attn.proj")
        inner = linear(norm(x, w, b + "norm2"), w, b + "mlp.fc1")
        x = x + linear(inner * torch.sigmoid(1.702 * inner), w, b + "mlp.fc2")
    merged = norm(x, w, "visual.merger.ln_q").reshape(-1, 4 * x.shape[1])
    image = linear(gelu(linear(merged, w, "visual.merger.mlp.0")), w, "visual.merger.mlp.2")

    tokens = torch.tensor(ids)
    x = w["model.embed_tokens.weight"][tokens].clone()
    x[tokens == image_token] = image
    half = x.shape[1] // heads // 2
    angles = torch.arange(len(ids))[:, None] / 1e6 ** (torch.arange(half) / half)
    for i in range(sum(k.endswith("input_layernorm.weight") for k in w)):
        b = f"model.layers.{i}."
        y = root(x, w, b + "input_layernorm")
        q, k, v = (linear(y, w, f"{b}self_attn.{n}_proj") for n in "qkv")
        x = x + linear(attention(q, k, v, heads, kv, angles, True), w, b + "self_attn.o_proj")
        y = root(x, w, b + "post_attention_layernorm")
        gate = linear(y, w, b + "mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(y, w, b + "mlp.up_proj"), w, b + "mlp.down_proj")
    y = root(x, w, "model.norm")[-1]
    for at in ("rm_head.0", "rm_head.3"):
        y = linear(y, w, at).clamp(min=0)
    mean, deviation = linear(y, w, "rm_head.5").tolist()
    return mean, deviation
