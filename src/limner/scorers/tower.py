"""The CLIP tower that every CLIP scorer looks through: images and texts to unit vectors.

Images as the reference implementations do: 8 bits, shorter side resized with Pillow (bicubic, antialiased), centre crop, CLIP's mean and
deviation. For gradients the same with an antialiased tensor resize, which differs by about 0.001 a pixel. Texts as transformers' tokenizer
splits them: OpenAI's and open_clip's also repair broken encodings (ftfy) and unescape HTML, so prompts with `&amp;` differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from limner.images import in_threads, resize_tensor, to_uint8
from limner.scorers.protocol import tokens

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CACHED_TEXTS = 50_000  # of 4 KB at most
QUICK = 1.702  # of QuickGELU
CACHE = 10 << 20  # bytes of a layer's widest activations that stay in the caches of a processor's core


# What is over after the resize is cut from both sides; where it is odd, OpenAI's code (torchvision) rounds the first cut to the nearest
# even number, transformers' rounds it down.
Crop = Literal["openai", "transformers"]


class ClipTower:
    """A `CLIPModel` with its tokenizer; remembers the texts that it encoded."""

    def __init__(self, model: Any, tokenizer: Any = None, crop: Crop = "transformers"):
        self.model, self.tokenizer, self.crop = model.eval().requires_grad_(False), tokenizer, crop
        self.size = int(model.config.vision_config.image_size)
        self.context = int(model.config.text_config.max_position_embeddings)
        self._texts: dict[str, Tensor] = {}
        self._seen: dict[tuple[int, ...], tuple[weakref.ref[Image.Image], Tensor]] | None = None

    def share(self, first: ClipTower) -> None:
        """Look through the weights of `first`, which are the same, from now on: each picture and text goes through them once for both."""
        self.model, first._seen = first.model, {} if first._seen is None else first._seen
        self._seen = first._seen
        if self.tokenizer and first.tokenizer and self.tokenizer.get_vocab() == first.tokenizer.get_vocab():
            self._texts = first._texts

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.logit_scale.device

    def to_device(self, device: str) -> None:
        """Move the weights, and forget texts."""
        self.model.to(device)
        self._texts.clear()

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())

    def encode_images(self, images: Tensor | Sequence[Image.Image], differentiable: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], or B pictures of any sizes, to unit vectors (B, D)."""
        if isinstance(images, Tensor):
            return self._encode(preprocess(images, self.size, self.crop, differentiable))
        if self._seen is None:
            return self._encode(preprocess_pictures(images, self.size, self.crop))
        for key in [k for k, (picture, _) in self._seen.items() if picture() is None]:
            del self._seen[key]
        keys = [(id(p), *_place(*p.size, self.size, self.crop)) for p in images]
        if new := {k: p for k, p in zip(keys, images) if k not in self._seen}:
            vectors = self._encode(preprocess_pictures(list(new.values()), self.size, self.crop))
            self._seen.update((k, (weakref.ref(p), v)) for (k, p), v in zip(new.items(), vectors))
        return torch.stack([self._seen[k][1] for k in keys])

    def _encode(self, pixels: Tensor) -> Tensor:
        """Input (B, 3, S, S) to unit vectors (B, D); on a processor as many at a time as its caches hold: 3 to 8 % faster."""
        vision, count = self.model.config.vision_config, len(pixels)
        if self.device.type == "cpu":
            each = 4 * ((self.size // vision.patch_size) ** 2 + 1) * vision.intermediate_size
            count = max(1, CACHE * torch.get_num_threads() // each)
        vectors = [image_features(self.model, part.to(self.device)) for part in pixels.split(count)]
        return F.normalize(torch.cat(vectors), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors (B, D); one that was seen before is not encoded again.

        A text is encoded alone and unpadded: what stands behind the end token never reaches it, most texts are far shorter than the
        context, and so neither batch mates nor what the cache holds (after a restart: less) can change a digit.
        Texts longer than the context lose their ends.
        """

        def encode(text: str) -> Tensor:
            ids = tokens(self.tokenizer, text)
            ids = ids if len(ids) <= self.context else [*ids[: self.context - 1], ids[-1]]
            vector = _vector(self.model.get_text_features(input_ids=torch.tensor([ids], device=self.device)))
            return F.normalize(vector, dim=-1)[0]

        return each_once(texts, self._texts, encode)

    def check_tokenizer(self, where: str) -> None:
        """Check that the tokenizer is of these weights.

        Raises:
            ValueError: it ends texts with another token than the weights do, or knows tokens that they do not.
        """
        text = self.model.config.text_config
        # configs older than transformers 4.31 say 2, and mean the largest id
        end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        if self.tokenizer.eos_token_id != end or len(self.tokenizer) > text.vocab_size:
            raise ValueError(
                f"{where}: the tokenizer has {len(self.tokenizer)} tokens and ends texts with {self.tokenizer.eos_token_id}; "
                f"the weights have {text.vocab_size} and expect {end}. Is it the tokenizer of another model?"
            )


def each_once(texts: Sequence[str], cache: dict[str, Tensor], encode: Callable[[str], Tensor]) -> Tensor:
    """Vectors (D,) of texts as (B, D); those in the cache are taken from there, the others encoded, and kept in place of the oldest."""
    found = {t: cache[t] for t in texts if t in cache}
    for text in dict.fromkeys(texts):
        if text not in found:
            found[text] = cache[text] = encode(text)
            if len(cache) > CACHED_TEXTS:
                cache.pop(next(iter(cache)))
    return torch.stack([found[t] for t in texts])


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """What `CLIPModel.get_image_features` gives of pixels (B, 3, S, S).

    Of its last layer only the class token is read, so only that is made: 7 % of a tower of twelve layers is saved.
    """
    tower = model.vision_model
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    *layers, last = tower.encoder.layers
    for layer in layers:
        x = x + layer.self_attn(layer.layer_norm1(x), attention_mask=None)[0]
        x = x + _mlp(layer.mlp, layer.layer_norm2(x))
    attention, normed = last.self_attn, last.layer_norm1(x)
    q, k, v = (
        project(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project, tokens in ((attention.q_proj, normed[:, :1]), (attention.k_proj, normed), (attention.v_proj, normed))
    )
    first = x[:, 0] + attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
    first = first + _mlp(last.mlp, last.layer_norm2(first))
    return model.visual_projection(tower.post_layernorm(first))


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """A layer's two linears. x · sigmoid(1.702 x), QuickGELU, is silu(1.702 x) / 1.702: one pass over the widest tensor, not three."""
    if mlp.config.hidden_act != "quick_gelu" or torch.is_grad_enabled():
        return mlp(x)
    hidden = F.silu(F.linear(x, mlp.fc1.weight).add_(mlp.fc1.bias).mul_(QUICK), inplace=True)
    return F.linear(hidden, mlp.fc2.weight).div_(QUICK).add_(mlp.fc2.bias)


def preprocess(images: Tensor, size: int, crop: Crop, differentiable: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to a model's input (B, 3, size, size), normalised.

    Args:
        images: any size.
        size: of the input; the shorter side is resized to it and the longer one cut.
        crop: how odd rests are cut.
        differentiable: an antialiased tensor resize, which passes gradients, instead of Pillow's exact one.
    """
    if not differentiable:
        return preprocess_pictures([Image.fromarray(i) for i in to_uint8(images)], size, crop)
    h, w = images.shape[-2:]
    width, height, left, top = _place(w, h, size, crop)
    x = resize_tensor(images.float(), (width, height)) if (h, w) != (height, width) else images.float()
    return (x[..., top : top + size, left : left + size] - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def preprocess_pictures(pictures: Sequence[Image.Image], size: int, crop: Crop) -> Tensor:
    """The same of RGB pictures, whose sizes may differ."""
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)

    def ready(picture: Image.Image) -> np.ndarray:
        width, height, left, top = _place(*picture.size, size, crop)
        cut = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        return (np.asarray(cut, np.float32) / np.float32(255) - mean) / std

    return torch.from_numpy(np.stack(in_threads(ready, pictures))).permute(0, 3, 1, 2)


def _place(w: int, h: int, size: int, crop: Crop) -> tuple[int, int, int, int]:
    """Width and height after the resize, left and top of the crop."""
    width, height = (int(size * w / h), size) if h <= w else (size, int(size * h / w))
    return width, height, _cut(width - size, crop), _cut(height - size, crop)


def _cut(over: int, crop: Crop) -> int:
    return round(over / 2) if crop == "openai" else over // 2


def _vector(output: Any) -> Tensor:
    """transformers 5 wraps the projected vector in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def find_tokenizer(path: Path, given: Path | None, where: str) -> CLIPTokenizer:
    """The tokenizer of weights: `given`, or in the folder of the weights, or a folder `tokenizer` in it.

    Args:
        path: the folder, or the file of the weights.
        given: where it lies instead; None = not said.
        where: what errors begin with: scorers.<name>.

    Raises:
        ValueError: there is none; says which files to give.
    """
    folder = path if path.is_dir() else path.parent
    for place in [given] if given else [folder, folder / "tokenizer"]:
        # asked for a folder without these files transformers would make an empty vocabulary
        if (place / "tokenizer.json").is_file() or ((place / "vocab.json").is_file() and (place / "merges.txt").is_file()):
            return CLIPTokenizer.from_pretrained(place, local_files_only=True)
    raise ValueError(
        f"{where}.tokenizer: {given or folder} has no tokenizer; give a folder with tokenizer.json, or with vocab.json and merges.txt, "
        "of CLIP's vocabulary, as published beside any CLIPModel (all published CLIP scorers share one)"
    )
