"""Pairs of random latents for tests of training, and the tiny pipeline that they are prepared for."""

from __future__ import annotations

import torch
from torch import Tensor

from limner.models.stable_diffusion import Pipeline, wrap
from limner.records import Example
from tiny import tiny_pipeline


def fresh(**options: object) -> Pipeline:
    return wrap(tiny_pipeline(), device="cpu", **options)  # type: ignore[arg-type]


def latents(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def examples(count: int = 6, sizes: tuple[tuple[int, int], ...] = ((8, 8),), roles: tuple[str, ...] = ("winner", "loser")) -> list[Example]:
    """Pairs g0, g1 ... of random latents, with three captions and sizes in turn."""
    out = []
    for i in range(count):
        h, w = sizes[i % len(sizes)]
        for j, role in enumerate(roles):
            z = latents(10 * i + j, 4, h, w)
            out.append(
                Example(
                    group=f"g{i}",
                    role=role,
                    image_id=f"{i}/{j}",
                    text=f"a man {i % 3}",
                    image=b"",
                    latents=z.numpy().tobytes(),
                    shape=(4, h, w),
                )
            )
    return out
