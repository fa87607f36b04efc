"""The pipeline wrapper against diffusers, and single-file checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler
from safetensors.torch import save_file

from limner.models.stable_diffusion import Pipeline, load_pipeline, save_pipeline, wrap
from limner.pool.sample import make_scheduler
from limner.recipe import Sampler
from tiny import original_weights, save_tiny, tiny_pipeline, to_single_file

Draws = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Pipeline:
    return load_pipeline(str(folder), device="cpu")


@pytest.fixture
def draws() -> Draws:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g), torch.tensor([0, 250, 700, 999])


def test_loaded_is_frozen_and_described(tiny: Pipeline) -> None:
    assert not any(p.requires_grad for part in (tiny.unet, tiny.vae, tiny.text_encoder) for p in part.parameters())
    assert (tiny.timesteps, tiny.prediction, tiny.image_scale) == (1000, "epsilon", 2)
    assert tiny.latent_shape(16, 24) == (4, 8, 12)
    assert tiny.hash == wrap(tiny_pipeline(), device="cpu").hash != wrap(tiny_pipeline(1), device="cpu").hash


def test_encode_text_encodes_each_text_once(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    forward = tiny.text_encoder.forward
    monkeypatch.setattr(tiny.text_encoder, "forward", lambda ids, **kw: (batches.append(len(ids)), forward(ids, **kw))[1])
    states = tiny.encode_text(["a man", "", "a man", "red hat"])
    assert batches == [3]
    assert states.shape == (4, 16, 16)
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])
    assert torch.allclose(states[3:], tiny.encode_text(["red hat"]), atol=1e-6)
    assert tiny.encode_text(["man " * 50]).shape == (1, 16, 16)  # longer than the tokenizer's length: cut


def test_encode_text_equals_the_library_pipeline(tiny: Pipeline) -> None:
    theirs, _ = tiny_pipeline().encode_prompt("a red man", "cpu", 1, False)
    assert torch.allclose(tiny.encode_text(["a red man"]), theirs, atol=1e-6)


def test_images_and_latents(tiny: Pipeline) -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = tiny.encode_images(images)
    assert latents.shape == (2, *tiny.latent_shape(16, 24))
    expected = tiny.vae.encode(images * 2 - 1).latent_dist.mode() * tiny.vae.config.scaling_factor
    assert torch.allclose(latents, expected, atol=1e-6)
    decoded = tiny.decode_latents(latents * 50)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_equal_those_of_diffusers(prediction: str, draws: Draws) -> None:
    pipe = tiny_pipeline(prediction=prediction)
    ours, oracle = wrap(pipe, device="cpu"), DDPMScheduler.from_config(pipe.scheduler.config)
    latents, noise, t = draws
    noisy = ours.add_noise(latents, noise, t)
    assert torch.allclose(noisy, oracle.add_noise(latents, noise, t), atol=1e-6)
    target = ours.target(latents, noise, t)
    assert torch.allclose(target, noise if prediction == "epsilon" else oracle.get_velocity(latents, noise, t), atol=1e-6)
    assert torch.allclose(ours.to_noise(target, noisy, t), noise, atol=1e-5)


def test_a_pipeline_that_is_saved_draws_at_the_same_timesteps(tmp_path: Path) -> None:
    """SD 1.5 comes with PNDM's configuration, which leaves the spacing to whoever reads it; and what it says not is not made up."""
    pipe = tiny_pipeline()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "timestep_spacing"}
    before = replace(wrap(pipe, device="cpu"), scheduler_config=config)
    save_pipeline(before, tmp_path / "model")
    after = load_pipeline(str(tmp_path / "model"), device="cpu")
    sampler = Sampler(num_inference_steps=5)
    assert make_scheduler(after, sampler).timesteps.tolist() == make_scheduler(before, sampler).timesteps.tolist()
    assert torch.equal(after.alphas, before.alphas)
    assert not json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text()).get("clip_sample")


def test_predict_is_float32_and_lets_gradients_through(draws: Draws) -> None:
    ours = wrap(tiny_pipeline(), device="cpu", mixed_precision="bf16")
    latents, _, t = draws
    text = ours.encode_text(["a man"] * 4)
    out = ours.predict(latents.requires_grad_(), t, text)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert latents.grad is not None


def test_single_file_equals_the_folder(folder: Path, tiny: Pipeline, draws: Draws, tmp_path: Path) -> None:
    to_single_file(tiny_pipeline(), tmp_path / "other.safetensors")
    beside = folder.with_suffix(".safetensors")  # model.safetensors beside model/
    beside.write_bytes((tmp_path / "other.safetensors").read_bytes())
    torch.save({"state_dict": original_weights(tiny_pipeline())}, tmp_path / "pickled.ckpt")
    latents, _, t = draws
    for path, config in ((beside, ""), (tmp_path / "other.safetensors", str(folder)), (tmp_path / "pickled.ckpt", str(folder))):
        single = load_pipeline(str(path), config=config, device="cpu")
        assert single.hash == tiny.hash
        assert single.prediction == tiny.prediction
        assert torch.equal(single.alphas, tiny.alphas)
        text = single.encode_text(["a red man"] * 4)
        assert torch.equal(text, tiny.encode_text(["a red man"] * 4))
        assert torch.equal(single.predict(latents, t, text), tiny.predict(latents, t, text))
        assert torch.equal(single.decode_latents(latents), tiny.decode_latents(latents))


def test_single_file_of_three_blocks(tmp_path: Path) -> None:
    pipe = tiny_pipeline(3, widths=(8, 8, 16))
    pipe.save_pretrained(tmp_path / "model")
    to_single_file(pipe, tmp_path / "model.safetensors")
    assert load_pipeline(str(tmp_path / "model.safetensors"), device="cpu").hash == wrap(pipe, device="cpu").hash


def test_single_file_errors(folder: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    to_single_file(pipe, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"Set model.config to a pipeline folder .* or set model.hub: true"):
        load_pipeline(str(tmp_path / "alone.safetensors"))
    with pytest.raises(ValueError, match=r"nowhere is not a diffusers pipeline folder"):
        load_pipeline(str(tmp_path / "alone.safetensors"), config=str(tmp_path / "nowhere"))
    tiny_pipeline(widths=(16, 32)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"cannot be loaded as a Stable Diffusion checkpoint with the configuration in .*expected shape"):
        load_pipeline(str(tmp_path / "alone.safetensors"), config=str(tmp_path / "wide"))
    weights = original_weights(pipe)
    text = "cond_stage_model.transformer.text_model.encoder.layers.0"
    for left_out, message in (
        ("model.diffusion_model.out.2.bias", "weights that this configuration asks for are not in the file"),
        ("first_stage_model.decoder.conv_out.bias", "weights that this configuration asks for are not in the file"),
        (text, "lacks 16 weights of the CLIPTextModel"),
        ("model.", "Failed to load UNet2DConditionModel"),
        ("cond_stage_model.", "Failed to load CLIPTextModel"),  # not taken from the folder, though it has weights
    ):
        save_file({k: v for k, v in weights.items() if not k.startswith(left_out)}, tmp_path / "part.safetensors")
        with pytest.raises(ValueError, match=rf"model.path: .*part.safetensors .*{message}"):
            load_pipeline(str(tmp_path / "part.safetensors"), config=str(folder))


class Touch:
    """Unpickling makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": original_weights(tiny_pipeline()), "more": Touch(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"must hold tensors only, convert it to .safetensors"):
        load_pipeline(str(tmp_path / "evil.ckpt"), config=str(folder))
    assert not (tmp_path / "ran").exists()


def test_paths_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without model_index.json"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match=r"set model.hub: true"):
        load_pipeline(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"model.config: only used with a single-file checkpoint"):
        load_pipeline(str(folder), config=str(folder))
