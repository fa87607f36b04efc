"""Stable Diffusion 1.5's true shapes, with random weights, through the steps on a CPU. Opt-in: minutes and about 15 GB.

python -m pytest -m slow -s tests/test_sd15.py
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from limner.images import encode_png
from limner.models.stable_diffusion import wrap
from limner.pool.sample import Request, reconstruct, sample
from limner.recipe import Learn, Sampler
from limner.records import Example, Prompt
from limner.training.stage import peak_memory, prepare, train_stage
from sd15 import sd15_pipeline

SIZE = 512


@pytest.mark.slow
def test_one_image_one_reconstruction_one_step(tmp_path: Path) -> None:
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{what}: {time.monotonic() - began:.0f} s, peak {peak_memory() / 1024:.1f} GB")

    pipeline = wrap(sd15_pipeline(), device="cpu")
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 859_520_964, "as published"
    say("loaded")
    prompt, sampler = Prompt(id="0", text="a woman in a red coat waving"), Sampler(num_inference_steps=1, guidance_scale=1.0, batch_size=1)
    ((image, latents),) = sample(pipeline, [Request(prompt, 0, SIZE, SIZE)], sampler, seed=0)
    assert image.shape == (3, SIZE, SIZE)
    assert latents.shape == (4, SIZE // 8, SIZE // 8)
    say("one pool image")
    ((rebuilt, _),) = reconstruct(pipeline, [prompt], torch.rand(1, 3, SIZE, SIZE), 400, sampler, seed=0)
    assert rebuilt.shape == (3, SIZE, SIZE)
    say("one reconstruction")
    examples = [
        Example(
            group="0",
            role=role,
            image_id=role,
            text=prompt.text,
            image=encode_png(pixels),
            latents=z.numpy().tobytes(),
            shape=tuple(z.shape),
        )
        for role, pixels, z in (("winner", rebuilt, latents + 0.1), ("loser", image, latents))
    ]
    pairs = prepare(pipeline, examples)
    pipeline.release()
    learn = Learn(statistics_weight=1e4, rank=8, max_train_steps=1, train_batch_size=1)
    weights = train_stage(pipeline, pairs, learn, tmp_path, stage="easy", seed=0)
    assert sum(w.numel() for w in weights.values()) == 1_594_368
    assert any(w.abs().sum() > 0 for key, w in weights.items() if ".lora_B." in key), "the step moved it"
    say("one optimisation step")
