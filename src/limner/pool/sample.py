"""Prompts become images: DPM-Solver++ multistep with classifier-free guidance, batches filled across prompts.

HG-DPO eq. 1: N images of each training caption from the base model, each from its own seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from limner import seeds
from limner.images import encode_png
from limner.models.stable_diffusion import Pipeline
from limner.recipe import Sampler
from limner.records import Image, Prompt

Hook = Callable[[int, Tensor, Tensor], Tensor]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """One image to make: image k of a prompt, in a size; guidance_scale: None = the sampler's."""

    prompt: Prompt
    k: int
    width: int
    height: int
    guidance_scale: float | None = None

    @property
    def id(self) -> str:
        return f"{self.prompt.id}/{self.k}"

    def sampler(self, default: Sampler) -> Sampler:
        """How this image is made."""
        return default if self.guidance_scale is None else replace(default, guidance_scale=self.guidance_scale)


@torch.no_grad()
def denoise(
    pipeline: Pipeline, noisy: Tensor, text: Tensor, empty: Tensor, sampler: Sampler, *, start: int | None = None, hook: Hook | None = None
) -> Tensor:
    """Latents from noise (or from latents noised to timestep `start`): (B, C, h, w) to the same shape.

    Args:
        text: (B, L, D) of the prompts; empty: (1, L, D) of the negative prompt.
        start: the timestep that `noisy` was noised to; None = pure noise. The steps are then
            `num_inference_steps * start / 1000` of them, evenly spread below it.
        hook: called as hook(step, t, latents) before each network call; returns the latents to go on with.
    """
    scheduler = make_scheduler(pipeline, sampler, start)
    guided = sampler.guidance_scale != 1.0
    states = torch.cat([empty.expand_as(text), text]) if guided else text
    x = noisy.to(pipeline.device)
    for i, t in enumerate(scheduler.timesteps):
        if hook is not None:
            x = hook(i, t, x)
        both = torch.cat([x, x]) if guided else x
        output = pipeline.predict(_channels_last(both, pipeline), t.to(pipeline.device), states)
        if guided:
            plain, conditioned = output.chunk(2)
            output = plain + sampler.guidance_scale * (conditioned - plain)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def _channels_last(x: Tensor, pipeline: Pipeline) -> Tensor:
    weight = pipeline.unet.conv_in.weight
    return x.contiguous(memory_format=torch.channels_last) if weight.is_contiguous(memory_format=torch.channels_last) else x


def make_scheduler(pipeline: Pipeline, sampler: Sampler, start: int | None = None) -> DPMSolverMultistepScheduler:
    """The solver on the model's own noise schedule, its timesteps set; `start` shortens the way (SDEdit)."""
    # the whole config: its private part says which values are only defaults of the model's own scheduler, not this one's
    scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler_config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=False, use_exponential_sigmas=False,
        use_beta_sigmas=False, use_lu_lambdas=False, use_flow_sigmas=False,
    )  # fmt: skip
    if start is None:
        scheduler.set_timesteps(sampler.num_inference_steps, device="cpu")
    else:
        steps = max(1, round(sampler.num_inference_steps * start / pipeline.timesteps))
        spread = torch.linspace(start, start / steps, steps).round().long().clamp(1, pipeline.timesteps - 1)
        scheduler.set_timesteps(timesteps=spread.tolist(), device="cpu")
    return scheduler


def sample(
    pipeline: Pipeline,
    requests: Sequence[Request],
    sampler: Sampler,
    seed: int,
    progress: Progress = lambda n: None,
    hook: Hook | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Images of the requests, in order: (pixels (3, H, W) in [0, 1], latents (C, h, w)), both on the CPU.

    Image (prompt, k) starts from noise seeded by (seed, "pool", prompt id, k); texts are encoded once; batches hold any
    prompts of one size and guidance.
    """
    texts = list(dict.fromkeys(r.prompt.text for r in requests))
    states = dict(zip(texts, pipeline.encode_text(texts)))
    empty = pipeline.encode_text([sampler.negative_prompt])
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in _batches(requests, sampler.batch_size):
        chosen = [requests[i] for i in batch]
        shape = pipeline.latent_shape(chosen[0].height, chosen[0].width)
        noise = seeds.noise(shape, [(seed, "pool", r.prompt.id, r.k) for r in chosen])
        text = torch.stack([states[r.prompt.text] for r in chosen])
        latents = denoise(pipeline, noise, text, empty, chosen[0].sampler(sampler), hook=hook)
        for i, pixels, z in zip(batch, pipeline.decode_latents(latents).cpu(), latents.float().cpu()):
            results[i] = (pixels, z)
        progress(len(batch))
    return [results[i] for i in range(len(requests))]


def _batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Indices by size of image and guidance, cut into batches."""
    alike: dict[tuple[int, int, float | None], list[int]] = {}
    for i, r in enumerate(requests):
        alike.setdefault((r.width, r.height, r.guidance_scale), []).append(i)
    return [group[j : j + size] for group in alike.values() for j in range(0, len(group), size)]


def reconstruct(
    pipeline: Pipeline, prompts: Sequence[Prompt], images: Tensor, t: int, sampler: Sampler, seed: int, progress: Progress = lambda n: None
) -> list[tuple[Tensor, Tensor]]:
    """SDRecon (HG-DPO eq. 5): real images noised to timestep t and denoised with the model and their captions.

    Args:
        images: (B, 3, H, W) in [0, 1], the prompts' real images in the training size.
        t: 1 .. schedule length; the noise of an image is seeded by (seed, "reconstruct", prompt id, t).

    Returns:
        As `sample`. The paper leaves the sampler of this step open; here it is the pool's.

    Raises:
        ValueError: t lies outside the schedule.
    """
    if not 0 < t <= pipeline.timesteps:
        raise ValueError(f"t = {t} lies outside the schedule 1..{pipeline.timesteps}")
    states = pipeline.encode_text([p.text for p in prompts])
    empty = pipeline.encode_text([sampler.negative_prompt])
    out: list[tuple[Tensor, Tensor]] = []
    for i in range(0, len(prompts), sampler.batch_size):
        part = prompts[i : i + sampler.batch_size]
        clean = pipeline.encode_images(images[i : i + len(part)])
        noise = seeds.noise(clean.shape[1:], [(seed, "reconstruct", p.id, t) for p in part]).to(clean)
        noisy = pipeline.add_noise(clean, noise, torch.full((len(part),), min(t, pipeline.timesteps - 1), device=clean.device))
        latents = denoise(pipeline, noisy, states[i : i + len(part)], empty, sampler, start=t)
        out += zip(pipeline.decode_latents(latents).cpu(), latents.float().cpu())
        progress(len(part))
    return out


def rows(
    requests: Sequence[Request],
    made: Sequence[tuple[Tensor, Tensor]],
    sampler: Sampler,
    seed: int,
    model: str,
    timestep: int | None = None,
    tag: str = "",
) -> list[Image]:
    """Image records of what was made; ids are those of the requests, with @tag if there is one."""
    encoded = [encode_png(pixels) for pixels, _ in made]
    return [
        Image(
            id=f"{r.id}@{tag}" if tag else r.id,
            prompt_id=r.prompt.id,
            text=r.prompt.text,
            image=data,
            k=r.k,
            seed=seed,
            timestep=timestep,
            sampler=json.dumps({"scheduler": "DPMSolverMultistep", **asdict(r.sampler(sampler))}, sort_keys=True),
            model=model,
        )
        for r, data in zip(requests, encoded)
    ]
