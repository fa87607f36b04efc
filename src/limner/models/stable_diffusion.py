"""The Stable Diffusion 1.x / 2.x family: a UNet that predicts noise (or velocity) in a latent, conditioned on CLIP text.

`Pipeline` holds library modules and gives the few operations that the steps need. Image tensors are float [0, 1] NCHW RGB;
latents are already multiplied by the VAE's scaling factor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from limner.models.frozen import forget_inputs

# neither is used, and the feature extractor would need an image library beyond pillow
WITHOUT_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# at once through the VAE: more need the memory of a large card, and leave a CPU's caches, which costs half of its speed
VAE_PIXELS, CPU_VAE_PIXELS = 4 * 512 * 512, 8 * 64 * 64


@dataclass
class Pipeline:
    """A loaded model.

    alphas (T,) are the cumulative products of the training schedule (alpha-bar); `prediction` is epsilon or v_prediction;
    `hash` identifies the weights; `dtype` is what frozen parts compute in (the adapter stays float32).
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: nn.Module
    tokenizer: Any
    alphas: Tensor
    prediction: str
    scheduler_config: dict[str, Any]
    hash: str
    source: str
    device: torch.device
    dtype: torch.dtype

    @property
    def timesteps(self) -> int:
        """Length of the training schedule (1000 for all published models)."""
        return len(self.alphas)

    @property
    def image_scale(self) -> int:
        """Pixels a latent cell is wide."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def released(self) -> bool:
        """Whether VAE and text encoder were dropped."""
        return next(self.vae.parameters()).is_meta

    def release(self) -> None:
        """Drop the weights of VAE and text encoder: training on prepared latents and texts needs the UNet only. Load again to encode."""
        self.move_encoders("meta")

    def move_encoders(self, device: torch.device | str) -> None:
        """Put VAE and text encoder on a device, such as off the accelerator while a stage trains."""
        for module in (self.vae, self.text_encoder):
            nn.Module.to(module, device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts to (B, L, D); each distinct text is encoded once. Longer ones are cut at the tokenizer's length, as the pipelines do."""
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(
            distinct, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        states = torch.cat([self.text_encoder(part.to(self.device))[0] for part in tokens.split(64)])
        place = {t: i for i, t in enumerate(distinct)}
        return states if len(distinct) == len(texts) else states[[place[t] for t in texts]]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents: the mean of the posterior, scaled. Deterministic, so it can be cached."""
        few = self._at_once(images.shape[-2] * images.shape[-1])
        parts = [self.vae.encode((x * 2 - 1).to(self.device, self.dtype)).latent_dist.mean.float() for x in images.split(few)]
        return torch.cat(parts) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in [0, 1], float32."""
        scaled = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        few = self._at_once(latents.shape[-2] * latents.shape[-1] * self.image_scale**2)
        return torch.cat([(self.vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1) for z in scaled.split(few)])

    def predict(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The network's own prediction (noise or velocity), at least float32; gradients flow if enabled."""
        output = self.unet(noisy.to(self.dtype), t, text.to(self.dtype), return_dict=False)[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise; t (B,) int."""
        a = self.alphas[t].view(-1, *[1] * (latents.ndim - 1))
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should give: the noise, or the velocity sqrt(alpha_t) noise - sqrt(1 - alpha_t) x_0."""
        if self.prediction == "epsilon":
            return noise
        a = self.alphas[t].view(-1, *[1] * (latents.ndim - 1))
        return a.sqrt() * noise - (1 - a).sqrt() * latents

    def to_noise(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies."""
        if self.prediction == "epsilon":
            return prediction
        a = self.alphas[t].view(-1, *[1] * (noisy.ndim - 1))
        return a.sqrt() * prediction + (1 - a).sqrt() * noisy

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return int(self.vae.config.latent_channels), height // self.image_scale, width // self.image_scale

    def _at_once(self, pixels: int) -> int:
        """How many images of so many pixels go through the VAE together."""
        return max(1, (CPU_VAE_PIXELS if self.device.type == "cpu" else VAE_PIXELS) // pixels)


def load_pipeline(
    path: str, *, config: str = "", hub: bool = False, mixed_precision: str = "no", device: str = "auto", channels_last: bool = True
) -> Pipeline:
    """Load a diffusers folder, a single-file checkpoint, or (only with `hub=True`) a hub id.

    Everything is frozen and in evaluation mode. `config` is for single files: see `load_single_file`.

    Raises:
        ValueError: nothing there, or not a model of this family; the message says what was looked for.
    """
    source = Path(path)
    if config and not source.is_file():
        raise ValueError(f"model.config: only used with a single-file checkpoint, and model.path {path} is not a file")
    if source.is_dir():
        if not (source / "model_index.json").is_file():
            raise ValueError(f"model.path: {path} is a folder without model_index.json; expected a diffusers pipeline folder")
        loaded = StableDiffusionPipeline.from_pretrained(source, **WITHOUT_CHECKER, local_files_only=True)
    elif source.is_file():
        loaded = load_single_file(source, config=config, hub=hub)
    elif hub:
        loaded = StableDiffusionPipeline.from_pretrained(path, **WITHOUT_CHECKER)
    else:
        raise ValueError(f"model.path: {path} is neither a folder nor a file; for a hub id set model.hub: true")
    return wrap(loaded, source=path, mixed_precision=mixed_precision, device=device, channels_last=channels_last)


def load_single_file(path: Path, *, config: str = "", hub: bool = False) -> StableDiffusionPipeline:
    """A single-file SD checkpoint (original key names) as a pipeline.

    Such a file has weights only. What is missing (widths, the tokenizer, the scheduler with its prediction type) is read from a
    diffusers pipeline folder of the same architecture, whose own weights are not needed: `config`, or else the folder beside the
    file that is called like it without suffix, or else, with `hub=True`, the library's choice on the hub. A .ckpt is read with
    `torch.load(weights_only=True)`, so one that holds other Python objects is refused.

    Raises:
        ValueError: no such folder, or the file does not fit it, or is not such a checkpoint.
    """
    companion = Path(config) if config else path.with_suffix("")
    if (companion / "model_index.json").is_file():
        options: dict[str, Any] = {"config": str(companion), "local_files_only": True}
    elif config or not hub:
        raise ValueError(
            f"model.path: {path} is a single file without configuration, and {companion} is not a diffusers pipeline folder (no "
            "model_index.json). Set model.config to a pipeline folder of the same architecture (its configs and tokenizer are used, "
            f"its weights are not), or put one at {path.with_suffix('')}, or set model.hub: true"
        )
    else:
        options = {}
    try:
        loaded = StableDiffusionPipeline.from_single_file(str(path), **WITHOUT_CHECKER, **options)
    except Exception as error:  # the library raises many kinds
        hint = "" if path.suffix == ".safetensors" else "; a pickled checkpoint must hold tensors only, convert it to .safetensors"
        if "meta tensor" in str(error):
            hint += "; weights that this configuration asks for are not in the file"
        where = f"the configuration in {companion}" if options else "a configuration from the hub"
        reason = str(error).partition("\n")[0]  # the rest is advice on the library's own arguments
        raise ValueError(f"model.path: {path} cannot be loaded as a Stable Diffusion checkpoint with {where}{hint} ({reason})") from error
    for part in (loaded.unet, loaded.vae, loaded.text_encoder):
        missing = [name for name, p in part.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(f"model.path: {path} lacks {len(missing)} weights of the {type(part).__name__}, e.g. {missing[0]}")
    return loaded


def wrap(
    pipe: StableDiffusionPipeline, *, source: str = "memory", mixed_precision: str = "no", device: str = "auto", channels_last: bool = True
) -> Pipeline:
    """Freeze a library pipeline's modules and put them on a device."""
    where = torch.device(pick_device() if device == "auto" else device)
    dtype = DTYPES[mixed_precision]
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        nn.Module.to(module.requires_grad_(False).eval(), where, dtype)  # diffusers' own `to` warns of modules that do not exist
    forget_inputs(pipe.unet)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    config = dict(pipe.scheduler.config)
    # where the last step has no signal at all (zero terminal SNR) a DDPM step from it is none: a trace is left, as in diffusers' solvers
    alphas = DDPMScheduler.from_config(config).alphas_cumprod.clamp_min(2**-24)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"model.path: prediction type {prediction!r} of {source} is not supported; expected epsilon or v_prediction")
    return Pipeline(
        pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, alphas.to(where), prediction, config,
        weights_hash(pipe.unet, pipe.vae, pipe.text_encoder), source, where, dtype,
    )  # fmt: skip


def save_pipeline(pipeline: Pipeline, folder: Path) -> None:
    """Write a pipeline as a diffusers folder that `load_pipeline` and `DiffusionPipeline.from_pretrained` read. No adapter may be on.

    Its scheduler is the one that samples here: another class's would write that class's defaults into the configuration, which would then
    draw at other timesteps.
    """
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler_config)
    StableDiffusionPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)


def pick_device() -> str:
    """cuda, mps or cpu, whichever is there first."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one card a process under `accelerate launch`
    return "mps" if torch.backends.mps.is_available() else "cpu"


def weights_hash(*modules: nn.Module) -> str:
    """Sixteen hex digits that name the weights of modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            flat = value.detach().float().cpu().contiguous()
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(flat.numpy().tobytes())
    return digest.hexdigest()[:16]
