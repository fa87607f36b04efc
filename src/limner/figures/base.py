"""Train the embedded base model: a small latent text-to-image diffusion model made of library classes only.

UNet2DConditionModel (4.8 M parameters, 0.37 GFLOP a call at 16×16) and a CLIP text encoder of two layers with an own small
vocabulary, trained together: v-prediction, SD's scaled-linear schedule, caption dropout for guidance, an exponential moving
average of the weights. `DiffusionPipeline.from_pretrained(folder)` loads the result. It is meant to be good but flawed: the
curriculum needs room.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from limner import checkpoint
from limner.figures.autoencoder import to_signed
from limner.loop import Every, Metrics, Optimisation, fit, schedule

LENGTH = 32  # tokens of a caption
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|unknown|>", "pad_token": "<|pad|>"}
TRAINING_SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "steps_offset": 1,
}  # fmt: skip


def make_tokenizer(captions: Sequence[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learned from the captions, so that each of their words is one token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"], end_of_word_suffix="</w>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(pattern=Regex(r"\w+|[^\w\s]+"), behavior="removed", invert=True)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=list(SPECIAL.values()), initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    pieces.train_from_iterator(list(captions) + letters, trainer)
    model = json.loads(pieces.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) if isinstance(m, list) else m for m in model["merges"]) + "\n"
    )
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, **SPECIAL)


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 2) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=LENGTH, projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def new_unet(cross_attention_dim: int = 128) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(48, 80, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


class _Both(nn.Module):
    """The two trained modules under one name, for one optimiser and one average."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Latents (2N, 4, 16, 16) of images and of their mirror images (captions never say left or right)."""
    parts = []
    for flipped in (False, True):
        for i in range(0, len(images), 64):
            batch = images[i : i + 64, :, ::-1] if flipped else images[i : i + 64]
            parts.append(vae.encode(to_signed(batch)).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(parts)


def train_base(
    images: np.ndarray,
    captions: Sequence[str],
    vae: AutoencoderKL,
    folder: Path,
    *,
    max_train_steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    dropout: float = 0.1,
    decay: float = 0.998,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Train on images (N, 64, 64, 3) uint8 and their captions; checkpoints into `folder`, resumes from the newest one."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(captions, folder / "tokenizer")
    both = _Both(new_unet().to(memory_format=torch.channels_last), new_text_encoder(tokenizer))
    average = {k: v.detach().clone() for k, v in both.state_dict().items()}
    optimizer = torch.optim.AdamW(both.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    o = Optimisation(
        list(both.parameters()), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("cosine", 100, max_train_steps))
    )
    start = 0
    if found := checkpoint.latest(folder):
        weights, state, meta = checkpoint.load(found)
        both.load_state_dict(weights["model"])
        average = weights["ema"]
        o.load_state_dict(state)
        start = meta["step"]
    latents = encode_all(vae.eval(), images)
    encode = lambda texts: tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids  # noqa: E731
    tokens, empty = encode(list(captions)), encode([""])
    noiser = DPMSolverMultistepScheduler(**TRAINING_SCHEDULE)

    def batches(step: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(latents), (batch,), generator=g)
        text = tokens[rows % len(tokens)].clone()
        text[torch.rand(batch, generator=g) < dropout] = empty
        t = torch.randint(1000, (batch,), generator=g)
        return [(latents[rows], text, t, torch.randn(batch, *latents.shape[1:], generator=g))]

    alphas = noiser.alphas_cumprod

    def loss(item: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Metrics]:
        x, text, t, noise = item
        a = alphas[t].view(-1, 1, 1, 1)
        noisy, velocity = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        states = both.text_encoder(text)[0]
        output = both.unet(noisy.contiguous(memory_format=torch.channels_last), t, states, return_dict=False)[0]
        return (output - velocity).square().mean(), {}

    def update_average(step: int, _: Metrics) -> None:
        rate = min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in both.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - rate)

    seen: list[float] = []

    def log(step: int, m: Metrics) -> None:
        seen.append(m["loss"])
        if step % 50 == 0:
            print(f"base {step} loss {sum(seen[-50:]) / len(seen[-50:]):.4f} {m['seconds']:.2f}s", flush=True)

    def save(step: int) -> None:
        checkpoint.save(folder, step, {"model": both.state_dict(), "ema": average}, o, {})

    every: list[Every] = [(1, update_average), (1, log), (200, lambda step, _: save(step))]
    fit(loss, batches, o, max_train_steps=max_train_steps, start=start, every=every, save=save, name="base")
    return assemble(both, average, vae, tokenizer)


def assemble(both: nn.Module, average: dict[str, Tensor], vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline of the averaged weights."""
    both.load_state_dict(average)
    scheduler = DPMSolverMultistepScheduler(**TRAINING_SCHEDULE)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=both.text_encoder, tokenizer=tokenizer, unet=both.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
