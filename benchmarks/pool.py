"""Making a pool: `limner.pool.sample.sample` against `pipe(prompt, num_images_per_prompt=N)`, a prompt at a time.

    python benchmarks/pool.py            # the last line is JSON; ratio is the time ratio at N = 2

Same weights, solver, steps, guidance and device, at the size of the embedded figures' model; both give pixels as tensors. Ours fills
batches across prompts, the plain way cannot: at N = 2 its batches hold two images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tokenizer

from limner.figures.base import TRAINING_SCHEDULE, new_text_encoder, new_unet
from limner.models.stable_diffusion import wrap
from limner.pool.sample import Request, make_scheduler, sample
from limner.recipe import Sampler
from limner.records import Prompt
from tiny import tiny_tokenizer

SIZE, GUIDANCE = 64, 5.0


def pipeline() -> StableDiffusionPipeline:
    """The figures' sizes with random weights: 16 x 16 latents, 64 pixels."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=new_text_encoder(tokenizer).eval(), tokenizer=tokenizer, unet=new_unet().eval(),
        scheduler=DPMSolverMultistepScheduler(**TRAINING_SCHEDULE),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16, help="of ours; the plain way's is N; more do not fit a processor's caches")
    parser.add_argument("--steps", type=int, default=5, help="network steps an image")
    parser.add_argument("--images", type=int, default=64, help="at least so many images a measurement")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    sampler = Sampler(num_inference_steps=args.steps, guidance_scale=GUIDANCE, batch_size=args.batch_size)
    plain, ours = pipeline(), wrap(pipeline(), device="cpu")
    plain.scheduler = make_scheduler(ours, sampler)
    figures: dict[str, dict[str, float]] = {}
    for n in (2, 20):
        prompts = [Prompt(id=str(i), text=f"a man in red {i}") for i in range(-(-args.images // n))]
        requests = [Request(p, k, SIZE, SIZE) for p in prompts for k in range(n)]

        def run_ours(requests: list[Request] = requests) -> None:
            sample(ours, requests, sampler, seed=0)

        def run_plain(prompts: list[Prompt] = prompts, n: int = n) -> None:
            for p in prompts:
                plain(
                    p.text, num_images_per_prompt=n, height=SIZE, width=SIZE, num_inference_steps=args.steps, guidance_scale=GUIDANCE,
                    output_type="pt",
                )  # fmt: skip

        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for repetition in range(args.repetitions + 1):
            for name, run in (("ours", run_ours), ("plain", run_plain)):
                began = time.perf_counter()
                run()
                if repetition:  # the first is not timed
                    seconds[name].append(time.perf_counter() - began)
        figures[str(n)] = {name: len(requests) / statistics.median(s) for name, s in seconds.items()}
        print(f"N = {n}: {figures[str(n)]['ours']:.1f} images/s, plain {figures[str(n)]['plain']:.1f}", file=sys.stderr)
    speed = {n: f["ours"] / f["plain"] for n, f in figures.items()}
    result = {
        "name": "pool", "ratio": round(1 / speed["2"], 3), "speed_2": round(speed["2"], 3), "speed_20": round(speed["20"], 3),
        "images_per_second": figures, "batch_size": args.batch_size, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
