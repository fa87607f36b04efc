"""CLIP in plain torch on a raw checkpoint of OpenAI's naming. Imports neither limner nor transformers, which are compared with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Weights = dict[str, Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def names_and_shapes(
    width: int, layers: int, patch: int, grid: int, text_width: int, text_layers: int, context: int, vocabulary: int, joint: int
) -> dict[str, tuple[int, ...]]:
    """A checkpoint as OpenAI and open_clip write it; MLPs are four times as wide."""
    out: dict[str, tuple[int, ...]] = {
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, joint),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid * grid + 1, width),
        "visual.proj": (width, joint),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,),
        "token_embedding.weight": (vocabulary, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
    }
    for side, count, w in (("visual.", layers, width), ("", text_layers, text_width)):
        for i in range(count):
            block = {
                "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,),
                "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,),
                "ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
                "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,), "mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,),
            }  # fmt: skip
            out |= {f"{side}transformer.resblocks.{i}.{k}": s for k, s in block.items()}
    return out


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Weights that keep activations of the order of 1; norms are not 1, biases not 0."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        if key == "logit_scale":
            out[key] = torch.tensor(2.0)
        elif ".ln_" in key or key.startswith("ln_"):
            out[key] = noise * 0.1 + (1.0 if key.endswith("weight") else 0.0)
        else:
            out[key] = noise / math.sqrt(shape[-1]) if len(shape) == 2 else noise * 0.3
    return out


def preprocess(image: Image.Image, size: int, down: bool) -> Tensor:
    """(3, size, size). `down`: odd rests are cut as transformers does."""
    w, h = image.size
    short = min(w, h)
    image = image.resize((int(size * w / short), int(size * h / short)), Image.Resampling.BICUBIC)
    over = [s - size for s in image.size]
    x, y = (o // 2 if down else round(o / 2) for o in over)
    pixels = np.asarray(image, dtype=np.float32)[y : y + size, x : x + size] / 255
    return torch.from_numpy(((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))


def activation(x: Tensor, name: str) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x: Tensor, w: Weights, at: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w[at + ".weight"] + w[at + ".bias"]


def transformer(x: Tensor, w: Weights, at: str, heads: int, act: str, causal: bool) -> Tensor:
    """(L, width) to the same, block after block."""
    length, width = x.shape
    wall = torch.full((length, length), -math.inf).triu(1) if causal else torch.zeros(length, length)
    for i in range(sum(k.startswith(at) and k.endswith("in_proj_bias") for k in w)):
        b = f"{at}{i}."
        packed = norm(x, w, b + "ln_1") @ w[b + "attn.in_proj_weight"].T + w[b + "attn.in_proj_bias"]
        q, k, v = (p.reshape(length, heads, width // heads).transpose(0, 1) for p in packed.split(width, -1))
        attention = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width // heads) + wall, -1)
        mixed = (attention @ v).transpose(0, 1).reshape(length, width)
        x = x + mixed @ w[b + "attn.out_proj.weight"].T + w[b + "attn.out_proj.bias"]
        inner = activation(norm(x, w, b + "ln_2") @ w[b + "mlp.c_fc.weight"].T + w[b + "mlp.c_fc.bias"], act)
        x = x + inner @ w[b + "mlp.c_proj.weight"].T + w[b + "mlp.c_proj.bias"]
    return x


def image_vector(w: Weights, pixels: Tensor, heads: int, act: str) -> Tensor:
    """Of one normalised image (3, S, S): a unit vector."""
    w = {k: v.float() for k, v in w.items()}
    kernel = w["visual.conv1.weight"]
    patches = F.unfold(pixels[None], kernel.shape[-1], stride=kernel.shape[-1])[0].T @ kernel.flatten(1).T
    x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
    x = transformer(norm(x, w, "visual.ln_pre"), w, "visual.transformer.resblocks.", heads, act, False)
    out = norm(x[0], w, "visual.ln_post") @ w["visual.proj"]
    return out / out.norm()


def text_vector(w: Weights, ids: Sequence[int], heads: int, act: str) -> Tensor:
    """Of one text, padded with 0 to the context: a unit vector, taken where the largest id is."""
    w = {k: v.float() for k, v in w.items()}
    padded = torch.zeros(len(w["positional_embedding"]), dtype=torch.long)
    padded[: len(ids)] = torch.tensor(ids)
    x = w["token_embedding.weight"][padded] + w["positional_embedding"]
    x = norm(transformer(x, w, "transformer.resblocks.", heads, act, True), w, "ln_final")
    out = x[padded.argmax()] @ w["text_projection"]
    return out / out.norm()
