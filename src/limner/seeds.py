"""All randomness: generators seeded by what the number is for, never by what happened before.

`generator(seed, "noise", prompt_id, k)` gives the same stream in every process, order and batch; so resuming needs no saved
state, and the number of processes does not change a picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed of a key such as (run seed, stream name, index)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key. Noise is always drawn on the CPU, so devices agree."""
    return torch.Generator().manual_seed(seed_of(*key))


def noise(shape: Sequence[int], keys: Sequence[tuple[int | str, ...]]) -> Tensor:
    """Standard normal noise (len(keys), *shape): row i comes from key i alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])
