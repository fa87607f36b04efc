"""Scoring: `limner.scorers.steps.score_images` against one image-prompt pair at a time, its text encoded every time.

    python benchmarks/score.py           # the last line is JSON; ratio is ours over the plain way, same images and prompts

A CLIPModel of ViT-B/32's proportions with random weights, 20 images a prompt. The plain way is what a user runs without Limner:
transformers' CLIPProcessor and CLIPModel on a pair. Scores must be equal. The ways take turns, a prompt each, so that whatever else the
machine does slows all; ratios are of medians.

`ratio` has prompts padded to CLIP's 77 tokens, as OpenAI's and open_clip's tokenizers, and so the HPS packages, do; `ratio_unpadded` has
them at their own length, as PickScore's example does. Multiplications bound both from below: of a pair padded to 77 tokens the image has
three fifths, which batching makes faster, not fewer.

`several`: five scorers of one tower's weights in one pass against the same five one after another, and how often an image was decoded.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image as Picture
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tokenizer

from limner.images import decode
from limner.records import Image, Score
from limner.scorers import steps
from limner.scorers.clip import ClipScorer, share_towers
from limner.scorers.convert import Tower
from limner.scorers.steps import score_images
from tiny import tiny_tokenizer

PER_PROMPT = 20
CONTEXT = 77  # tokens
SEVERAL = ("clip", "clip_score", "clip_cosine", "clip_iqa_quality", "clip_iqa_sharpness")


def model() -> CLIPModel:
    """ViT-B/32 with a text tower of 77 tokens; the vocabulary is the tests'."""
    torch.manual_seed(0)
    tower = Tower(
        width=768, layers=12, heads=12, hidden=3072, patch=32, text_width=512, text_layers=12, text_heads=8, text_hidden=2048,
        vocabulary=len(tiny_tokenizer()), joint=512,
    )  # fmt: skip
    return CLIPModel(tower.config("quick_gelu")).eval()


def pictures(prompts: int, side: int) -> list[list[Image]]:
    """JPEG images of noise, 20 a prompt; prompts of about 25 tokens."""
    rng, out = np.random.default_rng(0), []
    for p in range(prompts):
        out.append(list[Image]())
        for k in range(PER_PROMPT):
            buffer = io.BytesIO()
            coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Picture.fromarray(coarse).resize((side, side), Picture.Resampling.BICUBIC).save(buffer, "JPEG")
            out[p].append(Image(id=f"{p}/{k}", prompt_id=str(p), text=f"a man in red and blue {p}", image=buffer.getvalue()))
    return out


def plain_scores(clip: CLIPModel, processor: Any, images: Sequence[Image], padding: str | bool) -> list[float]:
    """One pair at a time, as a script without Limner scores them."""
    found = []
    for image in images:
        picture = Picture.open(io.BytesIO(image.image))
        inputs = processor(text=[image.text], images=picture, padding=padding, truncation=True, max_length=CONTEXT, return_tensors="pt")
        with torch.no_grad():
            found.append(clip(**inputs).logits_per_image.item())
    return found


class Clock:
    """Seconds of a wall clock and of all our threads, by what was done; the first time of each is left out."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[..., Any], *given: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        out = work(*given)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        return out

    def ratio(self, ours: str, plain: str, cpu: bool = False) -> float:
        found = self.cpu if cpu else self.wall
        return round(statistics.median(found[ours][1:]) / statistics.median(found[plain][1:]), 3)


def scorers_of(clip: CLIPModel, kinds: Sequence[str]) -> list[ClipScorer]:
    """New ones, which remember no text; of one file."""
    found = [ClipScorer(kind, clip, tiny_tokenizer(), kind=kind) for kind in kinds]
    for scorer in found:
        scorer.files = {"model.safetensors": "0"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3, help="of 20 images each")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    clip, tokenizer, clock = model(), tiny_tokenizer(), Clock()
    processor = CLIPProcessor(CLIPImageProcessorPil(), tokenizer)
    worst = 0.0
    for images in pictures(args.prompts, args.side) * args.repetitions:
        ours: list[Score] = clock.time("ours", score_images, images, scorers_of(clip, ["clip"]), args.batch_size)
        for name, padding in (("plain", "max_length"), ("unpadded", True)):
            plain = clock.time(name, plain_scores, clip, processor, images, padding)
            worst = max([worst, *(abs((a.score or 0.0) - b) / abs(b) for a, b in zip(ours, plain))])
        assert worst < 1e-4, f"scores differ by {worst:.2g} of their size"
        print(", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in clock.wall.items()), file=sys.stderr)
    result = {
        "name": "score", "ratio": clock.ratio("ours", "plain"), "ratio_cpu": clock.ratio("ours", "plain", cpu=True),
        "ratio_unpadded": clock.ratio("ours", "unpadded"),
        "images_per_second": {n: PER_PROMPT / statistics.median(s[1:]) for n, s in clock.wall.items()},
        "largest_relative_difference": worst, "several": several(clip, pictures(3, args.side), args.batch_size),
        "seconds": clock.wall, "cpu_seconds": clock.cpu,
        "images_per_prompt": PER_PROMPT, "batch_size": args.batch_size, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(result))


def several(clip: CLIPModel, groups: Sequence[Sequence[Image]], batch_size: int) -> dict[str, Any]:
    """Scorers of one tower in one pass against one after another: ratio of times, and decodes an image in the pass."""
    clock, decodes = Clock(), 0
    for images in groups:
        together, alone = scorers_of(clip, SEVERAL), scorers_of(clip, SEVERAL)
        share_towers(together)
        with patch.object(steps, "decode", wraps=decode) as counted:
            found = clock.time("one pass", score_images, images, together, batch_size)
        decodes += counted.call_count
        by_one = clock.time("each alone", each_alone, images, alone, batch_size)
        by_name = {(s.scorer, s.image_id): s.score or 0.0 for s in by_one}
        assert all(abs((s.score or 0.0) - by_name[s.scorer, s.image_id]) <= 1e-5 * abs(by_name[s.scorer, s.image_id]) for s in found)
    each = decodes / sum(map(len, groups))
    assert each == 1
    return {"scorers": len(SEVERAL), "ratio": clock.ratio("one pass", "each alone"), "decodes_per_image": each}


def each_alone(images: Sequence[Image], scorers: Sequence[ClipScorer], batch_size: int) -> list[Score]:
    return [score for scorer in scorers for score in score_images(images, [scorer], batch_size)]


if __name__ == "__main__":
    main()
