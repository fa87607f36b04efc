"""Train a small model of the embedded world: resume, fit with checkpoints, let what is finished appear whole; fit a linear one at once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limner import checkpoint
from limner.loop import Every, Metrics, Optimisation, fit, schedule


def logistic_regression(x: Tensor, y: Tensor, penalty: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """The weight (D,) and bias (1,) that make x @ weight + bias the log-odds of y: least mean cross-entropy plus penalty.

    Args:
        x: (N, D) float64.
        y: (N,) float64, probabilities.
        penalty: of the sum of squared weights; the bias goes free.
        intercept: without it the bias is 0.
    """
    weight, bias = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True), torch.zeros(1, dtype=x.dtype, requires_grad=intercept)
    optimizer = torch.optim.LBFGS([weight, bias] if intercept else [weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def cosines(cycles: Sequence[int], warmup: int = 50) -> Callable[[int], float]:
    """Learning-rate factor by step: one cosine to zero a cycle, each half as high as the one before."""

    def factor(step: int) -> float:
        height = 1.0
        for length in cycles:
            if step < length:
                return height * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / length))
            step, height = step - length, height / 2
        return 0.0

    return factor


def resume(folder: Path, model: torch.nn.Module, lr: float, steps: int | Sequence[int], warmup: int = 50) -> tuple[Optimisation, int]:
    """The optimiser of a model and the step to go on from: the folder's newest checkpoint, else 0.

    steps: all of them, or those of each cycle of the learning rate (`cosines`).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    factor = schedule("cosine", warmup, steps) if isinstance(steps, int) else cosines(steps, warmup)
    o = Optimisation(list(model.parameters()), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))
    found = checkpoint.latest(folder)
    if found is None:
        return o, 0
    weights, state, meta = checkpoint.load(found)
    model.load_state_dict(weights["model"])
    o.load_state_dict(state)
    return o, int(meta["step"])


def train(name: str, folder: Path, model: torch.nn.Module, o: Optimisation, start: int, steps: int, loss: Any, batches: Any) -> None:
    """Train to `steps`; a line every 25, a checkpoint every 200. `loss` and `batches` as in `loop.fit`."""

    def save(step: int) -> None:
        checkpoint.save(folder, step, {"model": model.state_dict()}, o, {})

    recent: list[Metrics] = []

    def log(step: int, metrics: Metrics) -> None:
        recent.append(metrics)
        if step % 25 == 0:
            means = {k: sum(m[k] for m in recent[-25:]) / len(recent[-25:]) for k in metrics if k not in ("lr",)}
            print(f"{name} {step} " + " ".join(f"{k} {v:.4g}" for k, v in means.items()), flush=True)

    every: list[Every] = [(1, log), (200, lambda step, _: save(step))]
    fit(loss, batches, o, max_train_steps=steps, start=start, every=every, save=save, name=name)


def save_whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """A finished model appears whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(folder)
