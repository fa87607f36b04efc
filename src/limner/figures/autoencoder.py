"""Train the embedded world's autoencoder: a diffusers `AutoencoderKL`, 64×64 pixels to a 16×16×4 latent.

Loss = L1 + L1 of image gradients (keeps edges) + a faint KL. No adversary: at this size it invents what is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from limner import checkpoint
from limner.figures.fitting import cosines
from limner.loop import Every, Metrics, Optimisation, fit

# Of the KL summed over the latent. At 1e-5 whole channels collapse and people lose the colours of their clothes.
KL_WEIGHT = 1e-8


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


def reconstruction_loss(image: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    """L1 plus L1 of horizontal and vertical differences; images (B, 3, H, W) in [-1, 1], weight (B, 1, H, W) of each pixel."""
    difference = output - image
    dx = (difference.diff(dim=-1) * weight[..., 1:]).abs().mean()
    dy = (difference.diff(dim=-2) * weight[..., 1:, :]).abs().mean()
    return (difference * weight).abs().mean() + 0.5 * (dx + dy)


def train_autoencoder(
    images: np.ndarray, figure: np.ndarray, folder: Path, *, cycles: Sequence[int], batch: int = 8, lr: float = 2e-3, seed: int = 0
) -> AutoencoderKL:
    """Train on images (N, H, W, 3) uint8 and where the person is, figure (N, H, W) bool; checkpoints into `folder`.

    Args:
        cycles: steps of each cosine of the learning rate; every further one begins at half the height of the one before.

    A person covers a tenth of the picture and is what it is about: those pixels weigh four times.

    Latents come out whitened a channel. Resumes from the newest checkpoint.
    """
    torch.manual_seed(seed)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    o = Optimisation(list(model.parameters()), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosines(cycles)))
    start = 0
    if found := checkpoint.latest(folder):
        weights, state, meta = checkpoint.load(found)
        model.load_state_dict(weights["model"])
        o.load_state_dict(state)
        start = meta["step"]

    def batches(step: int) -> list[tuple[Tensor, Tensor, int]]:
        rng = np.random.default_rng([seed, 1, step])
        rows, flip = rng.integers(len(images), size=batch), rng.random(batch) < 0.5
        chosen = np.where(flip[:, None, None, None], images[rows, :, ::-1], images[rows])
        weight = 1 + 3.0 * np.where(flip[:, None, None], figure[rows, :, ::-1], figure[rows])
        return [(to_signed(chosen).contiguous(memory_format=torch.channels_last), torch.from_numpy(weight[:, None]).float(), step)]

    def loss(item: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Metrics]:
        image, weight, step = item
        posterior = model.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        output = model.decode(posterior.mean + posterior.std * noise).sample
        value = reconstruction_loss(image, output, weight) + KL_WEIGHT * posterior.kl().mean()
        return value, {"psnr": (10 * torch.log10(4 / F.mse_loss(output, image))).item()}

    def save(step: int) -> None:
        checkpoint.save(folder, step, {"model": model.state_dict()}, o, {})

    def log(step: int, m: Metrics) -> None:
        print(f"autoencoder {step} loss {m['loss']:.4f} psnr {m['psnr']:.2f} {m['seconds']:.2f}s", flush=True)

    every: list[Every] = [(50, log), (250, lambda step, _: save(step))]
    fit(loss, batches, o, max_train_steps=sum(cycles), start=start, every=every, save=save, name="autoencoder")
    return whiten(model.eval(), images[:512])


@torch.no_grad()
def whiten(model: AutoencoderKL, images: np.ndarray) -> AutoencoderKL:
    """Fold a shift and a scale into the two 1×1 convolutions around the latent, so that each channel has mean 0 and variance 1.

    Left alone, channels differ five-fold in spread and the diffusion model sees mostly the loud ones. The scaling factor becomes 1.
    """
    latents = torch.cat([model.encode(to_signed(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    n = len(mean)
    outward, inward = model.quant_conv, model.post_quant_conv
    outward.weight[:n] /= std.view(-1, 1, 1, 1)
    outward.bias[:n] = (outward.bias[:n] - mean) / std
    outward.bias[n:] -= 2 * std.log()
    inward.bias += inward.weight[:, :, 0, 0] @ mean
    inward.weight *= std.view(1, -1, 1, 1)
    model.register_to_config(scaling_factor=1.0)
    return model


def to_signed(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
