"""Scoring: `limner.scorers.steps.score_images` against one image-prompt pair at a time, its text encoded every time.

    python benchmarks/score.py           # the last line is JSON; ratio is ours over the plain way, same images and prompts

A CLIPModel of ViT-B/32's proportions with random weights, 20 images a prompt. The plain way is what published scoring scripts do: open the
image, resize, crop, pad the prompt to 77 tokens, run both towers on the pair. Same weights, same crop; the scores must be equal.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from transformers import CLIPModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tokenizer

from limner.records import Image
from limner.scorers.clip import ClipScorer
from limner.scorers.convert import Tower
from limner.scorers.steps import score_images
from tiny import tiny_tokenizer

PER_PROMPT = 20
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def model() -> CLIPModel:
    """ViT-B/32 with a text tower of 77 tokens; the vocabulary is the tests'."""
    torch.manual_seed(0)
    tower = Tower(
        width=768, layers=12, heads=12, hidden=3072, patch=32, text_width=512, text_layers=12, text_heads=8, text_hidden=2048,
        vocabulary=len(tiny_tokenizer()), joint=512,
    )  # fmt: skip
    return CLIPModel(tower.config("quick_gelu")).eval()


def pictures(prompts: int, side: int) -> list[Image]:
    """JPEG images of noise, 20 a prompt; prompts of about 25 tokens."""
    rng, out = np.random.default_rng(0), []
    for p in range(prompts):
        for k in range(PER_PROMPT):
            buffer = io.BytesIO()
            coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Picture.fromarray(coarse).resize((side, side), Picture.Resampling.BICUBIC).save(buffer, "JPEG")
            out.append(Image(id=f"{p}/{k}", prompt_id=str(p), text=f"a man in red and blue {p}", image=buffer.getvalue()))
    return out


@torch.no_grad()
def plain_score(clip: CLIPModel, tokenizer: object, image: Image) -> float:
    """One pair, as a script without Limner scores it."""
    picture = Picture.open(io.BytesIO(image.image)).convert("RGB")
    w, h = picture.size
    scale = 224 / min(w, h)
    picture = picture.resize((int(w * scale), int(h * scale)), Picture.Resampling.BICUBIC)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    values = torch.from_numpy(((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))[None]
    ids = tokenizer(image.text, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids  # type: ignore[operator]
    return float(clip(input_ids=ids, pixel_values=values).logits_per_image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3, help="of 20 images each")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    clip, tokenizer = model(), tiny_tokenizer()
    images = pictures(args.prompts, args.side)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    worst = 0.0
    for repetition in range(args.repetitions + 1):
        began = time.perf_counter()
        ours = score_images(images, [ClipScorer("clip", clip, tokenizer)], args.batch_size)  # a new one remembers no text
        middle = time.perf_counter()
        plain = [plain_score(clip, tokenizer, i) for i in images]
        if repetition:  # the first is not timed
            seconds["ours"].append(middle - began)
            seconds["plain"].append(time.perf_counter() - middle)
        worst = max(abs((a.score or 0.0) - b) / abs(b) for a, b in zip(ours, plain))
        assert worst < 1e-4, f"scores differ by {worst:.2g} of their size"
        print(f"{middle - began:.2f} s against {time.perf_counter() - middle:.2f} s", file=sys.stderr)
    median = {k: statistics.median(v) for k, v in seconds.items()}
    result = {
        "name": "score", "ratio": round(median["ours"] / median["plain"], 3),
        "images_per_second": {k: len(images) / v for k, v in median.items()},
        "seconds": seconds, "images": len(images), "images_per_prompt": PER_PROMPT, "batch_size": args.batch_size,
        "largest_relative_difference": worst, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
