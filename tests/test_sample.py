"""Sampling against diffusers' own pipeline, and what batches, seeds and timesteps may and may not change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from limner import seeds
from limner.models.stable_diffusion import Pipeline, wrap
from limner.pool.sample import Request, denoise, make_scheduler, reconstruct, rows, sample
from limner.recipe import Sampler
from limner.records import Prompt
from tiny import tiny_pipeline

TEXTS = ["a man in red", "a woman in blue", "two people", "a man in red"]
PROMPTS = [Prompt(id=f"p{i}", text=text) for i, text in enumerate(TEXTS)]
SAMPLER = Sampler(num_inference_steps=4, guidance_scale=3.0, batch_size=3)


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return wrap(tiny_pipeline(), device="cpu")


def requests(count: int = 2, size: tuple[int, int] = (16, 16)) -> list[Request]:
    return [Request(p, k, *size) for p in PROMPTS for k in range(count)]


def close(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]], tolerance: float = 1e-4) -> bool:
    return all(torch.allclose(x, y, atol=tolerance) for one, other in zip(a, b, strict=True) for x, y in zip(one, other))


@pytest.mark.parametrize(
    ("prediction", "guidance", "negative"), [("epsilon", 3.0, ""), ("v_prediction", 5.0, "blue"), ("epsilon", 1.0, "")]
)
def test_equals_diffusers_own_pipeline(prediction: str, guidance: float, negative: str) -> None:
    """The library's call with the same solver, latents, guidance and steps."""
    pipe = tiny_pipeline(prediction=prediction)
    training = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(training.config, algorithm_type="dpmsolver++", solver_order=2)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.stack([torch.randn(4, 8, 12, generator=seeds.generator(5, "pool", p.id, 0)) for p in PROMPTS])
    wanted = pipe(
        TEXTS, negative_prompt=[negative] * 4, height=16, width=24, latents=latents, guidance_scale=guidance,
        num_inference_steps=6, output_type="np",
    ).images  # fmt: skip
    pipe.scheduler = training
    sampler = Sampler(num_inference_steps=6, guidance_scale=guidance, negative_prompt=negative)
    made = sample(wrap(pipe, device="cpu"), [Request(p, 0, 24, 16) for p in PROMPTS], sampler, 5)
    assert torch.allclose(torch.stack([x for x, _ in made]), torch.from_numpy(wanted).permute(0, 3, 1, 2), atol=1e-4)


def test_a_request_can_have_its_own_guidance(tiny: Pipeline) -> None:
    """Of a mixed list each image is what a list of its guidance alone gives, and its record says which that was."""
    mixed = [replace(r, guidance_scale=[None, 1.0][r.k]) for r in requests()]
    made = sample(tiny, mixed, SAMPLER, 0)
    guided, plain = (sample(tiny, requests(), replace(SAMPLER, guidance_scale=g), 0) for g in (3.0, 1.0))
    assert close(made[0::2], guided[0::2])
    assert close(made[1::2], plain[1::2])
    assert not close(made[1::2], guided[1::2], 1e-2)
    assert [json.loads(i.sampler)["guidance_scale"] for i in rows(mixed, made, SAMPLER, 0, "")] == [3.0, 1.0] * 4


def test_decoded_latents_are_the_pixels(tiny: Pipeline) -> None:
    made = sample(tiny, requests(1), SAMPLER, 0)
    assert all(torch.allclose(tiny.decode_latents(z[None])[0], x, atol=1e-5) for x, z in made)
    assert all(x.min() >= 0 and x.max() <= 1 for x, _ in made)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batch_size_does_not_change_an_image(tiny: Pipeline, batch_size: int) -> None:
    other = Sampler(num_inference_steps=4, guidance_scale=3.0, batch_size=batch_size)
    assert close(sample(tiny, requests(), SAMPLER, 0), sample(tiny, requests(), other, 0))


def test_order_and_mates_do_not_change_an_image(tiny: Pipeline) -> None:
    """Also not mates of another size, which make batches of their own."""
    all_of_them = sample(tiny, requests(), SAMPLER, 0)
    assert close(sample(tiny, requests()[::-1], SAMPLER, 0)[::-1], all_of_them)
    assert close(sample(tiny, requests()[3:4], SAMPLER, 0), all_of_them[3:4])
    mixed = [r for pair in zip(requests(), requests(size=(24, 16))) for r in pair]
    both = sample(tiny, mixed, SAMPLER, 0)
    assert close(both[::2], all_of_them)
    assert {tuple(x.shape) for x, _ in both[1::2]} == {(3, 16, 24)}


def test_seed_prompt_and_k_each_give_another_image(tiny: Pipeline) -> None:
    """p0 and p3 have one text but are two prompts."""
    made = sample(tiny, requests(), SAMPLER, 0) + sample(tiny, requests(), SAMPLER, 1)
    pixels = torch.stack([z for _, z in made]).flatten(1)
    distance = torch.cdist(pixels, pixels) + torch.eye(len(pixels)) * 1e9
    assert distance.min() > 1


def test_progress_counts_images(tiny: Pipeline) -> None:
    counted: list[int] = []
    sample(tiny, requests(), SAMPLER, 0, counted.append)
    assert counted == [3, 3, 2]


def test_a_hook_sees_each_step_and_can_change_it(tiny: Pipeline) -> None:
    """Latents set to zero before the last step make all images of one text equal."""
    seen: list[int] = []

    def hook(step: int, t: Tensor, x: Tensor) -> Tensor:
        seen.append(int(t))
        return x

    one = Sampler(num_inference_steps=4, guidance_scale=1.0, batch_size=8)
    plain = sample(tiny, requests(), one, 0)
    assert close(plain, sample(tiny, requests(), one, 0, hook=hook), 0)
    assert seen == [int(t) for t in make_scheduler(tiny, one).timesteps]
    blank = sample(tiny, [Request(PROMPTS[0], k, 16, 16) for k in range(2)], Sampler(num_inference_steps=1), 0, hook=lambda i, t, x: x * 0)
    assert torch.equal(blank[0][0], blank[1][0])


# -- reconstructions ---------------------------------------------------------------------------------------------------


def images(count: int = 4, size: int = 16) -> Tensor:
    """Smooth pictures: noise of 4x4 enlarged."""
    g = torch.Generator().manual_seed(1)
    return torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=g), size=(size, size), mode="bilinear").clamp(0, 1)


class Oracle:
    """In place of the UNet: the noise that leads from x_t to the clean latents it was made with, so a perfect denoiser."""

    def __init__(self, tiny: Pipeline, clean: Tensor):
        self.alphas, self.clean, self.conv_in = tiny.alphas, clean, tiny.unet.conv_in

    def __call__(self, noisy: Tensor, t: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        a = self.alphas[t]
        return ((noisy - a.sqrt() * self.clean.repeat(len(noisy) // len(self.clean), 1, 1, 1)) / (1 - a).sqrt(),)


@pytest.mark.parametrize("t", [1, 40, 100, 400, 700, 1000])
def test_a_perfect_denoiser_reconstructs_the_image(t: int) -> None:
    """Whatever the timestep: if schedule, timesteps or noise level disagreed, the result would be off."""
    tiny = wrap(tiny_pipeline(), device="cpu")
    clean = tiny.encode_images(images())
    tiny.unet = Oracle(tiny, clean)  # type: ignore[assignment]
    made = reconstruct(tiny, PROMPTS, images(), t, Sampler(num_inference_steps=20, guidance_scale=3.0, batch_size=4), 0)
    assert torch.allclose(torch.stack([z for _, z in made]), clean, atol=2e-3)


def test_small_timesteps_stay_nearer_to_the_real_image(tiny: Pipeline) -> None:
    clean = tiny.encode_images(images())
    off = []
    for t in (1, 100, 400, 700):
        made = reconstruct(tiny, PROMPTS, images(), t, Sampler(num_inference_steps=10, guidance_scale=1.0), 0)
        off.append((torch.stack([z for _, z in made]) - clean).square().mean().item())
    assert off == sorted(off)
    assert off[0] < 0.02 * off[-1]


def test_reconstructions_do_not_depend_on_batches(tiny: Pipeline) -> None:
    small = Sampler(num_inference_steps=4, guidance_scale=3.0, batch_size=1)
    assert close(reconstruct(tiny, PROMPTS, images(), 400, SAMPLER, 0), reconstruct(tiny, PROMPTS, images(), 400, small, 0))
    one = reconstruct(tiny, PROMPTS[2:3], images()[2:3], 400, SAMPLER, 0)
    assert close(one, reconstruct(tiny, PROMPTS, images(), 400, SAMPLER, 0)[2:3])


@pytest.mark.parametrize("t", [0, -1, 1001])
def test_a_timestep_outside_the_schedule(tiny: Pipeline, t: int) -> None:
    with pytest.raises(ValueError, match=rf"t = {t} lies outside the schedule 1\.\.1000"):
        reconstruct(tiny, PROMPTS, images(), t, SAMPLER, 0)


def test_denoise_takes_the_share_of_steps_below_its_start(tiny: Pipeline) -> None:
    """25 steps from t = 400 of 1000: 10 of them, the first at 400."""
    taken: list[int] = []
    text = tiny.encode_text(["a man"])
    sampler = Sampler(num_inference_steps=25)
    denoise(tiny, torch.zeros(1, 4, 8, 8), text, text, sampler, start=400, hook=lambda i, t, x: (taken.append(int(t)), x)[1])
    assert (len(taken), taken[0]) == (10, 400)
    assert taken == sorted(taken, reverse=True)
    assert DDPMScheduler.from_config(tiny.scheduler_config).config.num_train_timesteps == 1000
