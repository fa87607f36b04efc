"""Checkpoints: written whole or not at all, resumed exactly, pruned.

A checkpoint is a folder `checkpoint-N` with `<name>.safetensors` for each group of weights, `optimizer.pt` (tensors only,
read with `weights_only=True`) and `state.json`. Because every random draw of step N is seeded by N, nothing else is needed to
go on as if the run had never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = Mapping[str, Tensor]


def save(folder: Path, step: int, weights: Mapping[str, Weights], optimizer: Any, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `folder/checkpoint-<step>` and remove all but the newest `keep`.

    Args:
        weights: named groups of tensors, e.g. {"adapter": ..., "ema": ...}.
        optimizer: anything with `state_dict()`, or a dict of such state; tensors and numbers only.
        state: JSON values; `step` is added.

    Raises:
        ValueError: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    final, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, tensors in weights.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial / f"{name}.safetensors")
        torch.save(optimizer.state_dict() if hasattr(optimizer, "state_dict") else optimizer, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
        for file in partial.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    except Exception as error:  # a full disk: safetensors, torch and the system each raise their own kind
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"checkpoint {final} cannot be written ({error}); the one before is kept, run the same command again") from error
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"checkpoint-{old}")
    return final


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if (p / "state.json").is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = steps(folder)
    return folder / f"checkpoint-{found[-1]}" if found else None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], Any, dict[str, Any]]:
    """Read what `save` wrote: (weights by name, optimizer state, state).

    Raises:
        ValueError: a file is missing or unreadable; the message names it.
    """
    try:
        weights = {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}
        optimizer = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        state = json.loads((path / "state.json").read_text())
    except Exception as error:  # safetensors, pickle and json each raise their own kind
        raise ValueError(f"checkpoint {path} cannot be read ({error}); remove it to go on from the one before") from error
    return weights, optimizer, state
