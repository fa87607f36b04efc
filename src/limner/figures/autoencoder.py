"""Train the embedded world's autoencoder: a diffusers `AutoencoderKL`, 64×64 pixels to a 16×16×4 latent.

Loss = L1 + L1 of image gradients (keeps edges) + a faint KL. No adversary: at this size it invents what is not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from limner import checkpoint
from limner.loop import Metrics, Optimisation, fit, schedule


def new_autoencoder() -> AutoencoderKL:
    """The architecture with fresh weights, 1.6 M parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def reconstruction_loss(image: Tensor, output: Tensor) -> Tensor:
    """L1 plus L1 of horizontal and vertical differences; images (B, 3, H, W) in [-1, 1]."""
    dx = (output.diff(dim=-1) - image.diff(dim=-1)).abs().mean()
    dy = (output.diff(dim=-2) - image.diff(dim=-2)).abs().mean()
    return (output - image).abs().mean() + 0.5 * (dx + dy)


def train_autoencoder(images: np.ndarray, folder: Path, *, max_train_steps: int, batch: int = 8, lr: float = 1.5e-3, seed: int = 0) -> AutoencoderKL:
    """Train on images (N, H, W, 3) uint8, checkpointing into `folder`; returns the trained model.

    Its `scaling_factor` is set so that latents have unit variance. Resumes from the newest checkpoint.
    """
    torch.manual_seed(seed)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    o = Optimisation(list(model.parameters()), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("cosine", 50, max_train_steps)))
    start = 0
    if found := checkpoint.latest(folder):
        weights, state, meta = checkpoint.load(found)
        model.load_state_dict(weights["model"])
        o.load_state_dict(state)
        start = meta["step"]

    def batches(step: int) -> list[Tensor]:
        rng = np.random.default_rng([seed, 1, step])
        chosen = images[rng.integers(len(images), size=batch)]
        flip = rng.random(batch) < 0.5
        chosen = np.where(flip[:, None, None, None], chosen[:, :, ::-1], chosen)
        return [to_signed(chosen).contiguous(memory_format=torch.channels_last)]

    def loss(image: Tensor) -> tuple[Tensor, Metrics]:
        posterior = model.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(int(image[0, 0, 0, 0] * 1e6) % 2**31))
        output = model.decode(posterior.mean + posterior.std * noise).sample
        value = reconstruction_loss(image, output) + 1e-5 * posterior.kl().mean()
        return value, {"psnr": (10 * torch.log10(4 / F.mse_loss(output, image))).item()}

    save = lambda step: checkpoint.save(folder, step, {"model": model.state_dict()}, o, {})  # noqa: E731
    log = lambda step, m: print(f"autoencoder {step} loss {m['loss']:.4f} psnr {m['psnr']:.2f} {m['seconds']:.2f}s", flush=True)  # noqa: E731
    fit(loss, batches, o, max_train_steps=max_train_steps, start=start, every=[(50, log), (250, lambda s, _: save(s))], save=save, name="autoencoder")  # type: ignore[arg-type, return-value]
    with torch.no_grad():
        latents = model.eval().encode(to_signed(images[:256])).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return model


def to_signed(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
