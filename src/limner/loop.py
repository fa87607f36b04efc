"""The only training loop. It knows batches, a loss, an optimiser and what to do every N steps; nothing of diffusion.

Batches are asked for by step number, so a resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Metrics = dict[str, float]
Every = tuple[int, Callable[[int, Metrics], None]]


@dataclass
class Optimisation:
    """What moves, and how: trainable parameters, optimiser, learning-rate schedule, clipping norm (0 = none), and the loss's scaler, which
    does nothing unless enabled: for networks in fp16, whose small gradients would vanish."""

    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float = 1.0
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        return state | ({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


class Interrupted(SystemExit):
    """Raised after the state was saved on ctrl-C or SIGTERM; exit code 130."""

    def __init__(self, step: int):
        super().__init__(130)
        self.step = step


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying at once: the list holds the signals received."""
    received: list[int] = []
    old = {}
    try:
        for sig in (signal.SIGINT, signal.SIGTERM):
            old[sig] = signal.signal(sig, lambda s, _: received.append(s))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for sig, handler in old.items():
            signal.signal(sig, handler)


def schedule(kind: str, warmup: int, total: int) -> Callable[[int], float]:
    """Learning-rate factor by step: `constant` or `cosine` (to zero at `total`), after a linear warm-up."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
        if kind != "constant":
            raise ValueError(f"lr_scheduler: {kind!r} is unknown; use constant or cosine")
        return 1.0

    return factor


def fit(
    loss: Callable[[Any], tuple[Tensor, Metrics]],
    batches: Callable[[int], Iterable[Any]],
    optimisation: Optimisation,
    *,
    max_train_steps: int,
    start: int = 0,
    every: Sequence[Every] = (),
    save: Callable[[int], None] = lambda step: None,
    synchronise: Callable[[], None] | None = None,
    any_of: Callable[[bool], bool] = bool,
    name: str = "train",
) -> None:
    """Take steps `start` .. `max_train_steps`.

    Args:
        loss: micro-batch to (scalar loss, metrics).
        batches: step number to its micro-batches; their losses are averaged (gradient accumulation).
        every: (n, f): f(steps done, mean metrics of this step) after each n-th step and after the last one.
        save: called with the steps done when a signal asks to stop.
        synchronise: averages gradients over processes, before clipping.
        any_of: whether a thing holds in any process: all stop after the same step, wherever the signal came first.

    Raises:
        RuntimeError: the loss or the gradient is not finite; nothing was updated by that step. With an enabled scaler a gradient that
            overflows only halves the scale, and its step changes nothing, as long as the scale is above 1.
        Interrupted: a signal came; `save` was called.
    """
    o = optimisation
    with (
        stop_signals() as received,
        tqdm(total=max_train_steps, initial=start, desc=name, disable=None, mininterval=1, dynamic_ncols=True) as bar,
    ):
        for step in range(start, max_train_steps):
            began = time.perf_counter()
            o.optimizer.zero_grad(set_to_none=True)
            micro = list(batches(step))
            total: Metrics = {}
            for batch in micro:
                value, metrics = loss(batch)
                loss_value = value.item()
                if not math.isfinite(loss_value):
                    raise RuntimeError(f"{name}: the loss of step {step} is {loss_value}; nothing was updated. {_describe(batch)}")
                o.scaler.scale(value / len(micro)).backward()
                for key, number in {"loss": loss_value, **metrics}.items():
                    total[key] = total.get(key, 0.0) + number / len(micro)
            if synchronise is not None:
                synchronise()
            o.scaler.unscale_(o.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(o.parameters, o.max_grad_norm or math.inf).item()
            if not math.isfinite(norm) and o.scaler.get_scale() <= 1:
                raise RuntimeError(f"{name}: the gradient of step {step} is not finite; nothing was updated. {_describe(micro[-1])}")
            o.scaler.step(o.optimizer)
            o.scaler.update()
            if o.scaler.is_enabled():
                total["loss_scale"] = o.scaler.get_scale()
            total |= {"grad_norm": norm, "lr": float(o.scheduler.get_last_lr()[0]), "seconds": time.perf_counter() - began}
            if math.isfinite(norm):  # else the step was none
                o.scheduler.step()
            done = step + 1
            bar.update()
            bar.set_postfix_str(f"loss {total['loss']:.4g}", refresh=False)
            for n, call in every:
                if n and (done % n == 0 or done == max_train_steps):
                    call(done, total)
            if any_of(bool(received)):
                save(done)
                print(f"{name}: stopped by signal at step {done}; saved. The same command goes on from there.", file=sys.stderr)
                raise Interrupted(done)


def _describe(batch: Any) -> str:
    names = getattr(batch, "names", None)
    return f"Batch: {', '.join(names)}." if names else ""
