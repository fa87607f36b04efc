"""Run one stage of a curriculum: examples in, an adapter out.

The policy is the adapter `policy`; the reference is the same network with it off (`reference: base`) or with a frozen copy of
what the stage started from (`reference: start`). Text and latents are prepared once; a step touches the UNet only.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner import checkpoint, seeds
from limner.images import decode_batch, image_size
from limner.loop import Every, Metrics, Optimisation, fit, schedule
from limner.models.lora import adapter_as, adapter_off, adapter_state, add_lora, copy_adapter, load_adapter_state
from limner.models.stable_diffusion import Pipeline
from limner.recipe import Learn
from limner.records import Example
from limner.store import write_atomic
from limner.training import losses
from limner.training.errors import Batch, Errors, Network, measure

POLICY, START = "policy", "start"


@dataclass
class Pairs:
    """Examples ready to learn from: latents (C, h, w) a row by role, text states (T, L, D) and which a row has, the empty text's."""

    names: list[str]
    winner: list[Tensor]
    loser: list[Tensor] | None
    states: Tensor
    text: Tensor
    empty: Tensor

    def __len__(self) -> int:
        return len(self.names)


def prepare(pipeline: Pipeline, examples: Iterable[Example], batch_size: int = 16) -> Pairs:
    """Group examples into pairs, encode each distinct caption once, and encode the images that brought no latents.

    Raises:
        ValueError: no examples, a group without a winner, groups that disagree on having a loser, a pair of two sizes.
    """
    groups: dict[str, dict[str, Example]] = {}
    for e in examples:  # pictures that brought their latents are not kept
        groups.setdefault(e.group, {})["winner" if e.role == "target" else e.role] = e if e.latents is None else replace(e, image=b"")
    if not groups:
        raise ValueError("no examples to train on")
    with_loser = ["loser" in g for g in groups.values()]
    for name, group in groups.items():
        if "winner" not in group:
            raise ValueError(f"group {name} has no winner")
        if ("loser" in group) != with_loser[0]:
            raise ValueError(f"group {name} {'has' if 'loser' in group else 'lacks'} a loser, others are the other way round")
    texts = list(dict.fromkeys(g["winner"].text for g in groups.values()))
    place = {t: i for i, t in enumerate(texts)}
    winner = _latents(pipeline, [g["winner"] for g in groups.values()], batch_size)
    loser = _latents(pipeline, [g["loser"] for g in groups.values()], batch_size) if with_loser[0] else None
    for name, w, l in zip(groups, winner, loser or winner):  # noqa: E741
        if w.shape != l.shape:
            raise ValueError(f"group {name}: winner and loser differ in size, latents {tuple(w.shape)} and {tuple(l.shape)}")
    text = torch.tensor([place[g["winner"].text] for g in groups.values()])
    return Pairs(list(groups), winner, loser, _text_states(pipeline, texts), text, pipeline.encode_text([""]).cpu())


def _text_states(pipeline: Pipeline, texts: Sequence[str], at_once: int = 1024) -> Tensor:
    """Text states (N, L, D) in main memory, where there is room for those of all captions, each there once."""
    first = pipeline.encode_text(texts[:1]).cpu()
    states = first.new_empty((len(texts), *first.shape[1:]))
    for i in range(0, len(texts), at_once):
        states[i : i + at_once] = pipeline.encode_text(texts[i : i + at_once]).cpu()
    return states


def _latents(pipeline: Pipeline, examples: Sequence[Example], batch_size: int) -> list[Tensor]:
    """Latents of the examples: those they brought, the others encoded in batches of one size."""
    out = [
        torch.from_numpy(np.frombuffer(e.latents, np.float32).copy()).view(*e.shape) if e.latents is not None else None for e in examples
    ]
    todo = sorted((i for i, z in enumerate(out) if z is None), key=lambda i: image_size(examples[i].image))
    for _, same in groupby(todo, key=lambda i: image_size(examples[i].image)):
        for part in batched(list(same), batch_size):
            for i, z in zip(part, pipeline.encode_images(decode_batch([examples[i].image for i in part])).cpu()):
                out[i] = z
    return [z for z in out if z is not None]


def batched(rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows in pieces of at most `size`."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


class Draw:
    """Which examples, noise and timesteps a step sees: decided by (seed, stage, step, position in the global batch) alone.

    Every example comes once an epoch, in an order of its own; a batch, which the processes share, holds latents of one size,
    and one that the size's examples do not fill is filled from its beginning.
    """

    def __init__(self, pairs: Pairs, learn: Learn, seed: int, stage: str, process: int = 0, processes: int = 1):
        self.pairs, self.learn, self.key = pairs, learn, (seed, stage)
        self.process, self.processes = process, processes
        self.epoch, self.batches = -1, self._epoch(0)

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of this process at a step."""
        accumulation = self.learn.gradient_accumulation_steps
        return [self._batch(step * accumulation + m) for m in range(accumulation)]

    def _epoch(self, epoch: int) -> list[list[int]]:
        g = seeds.generator(*self.key, "order", epoch)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for row in torch.randperm(len(self.pairs), generator=g).tolist():
            by_size.setdefault(tuple(self.pairs.winner[row].shape), []).append(row)
        size = self.learn.train_batch_size * self.processes
        full = [(part * size)[:size] for rows in by_size.values() for part in batched(rows, size)]
        return [full[i] for i in torch.randperm(len(full), generator=g).tolist()] if len(by_size) > 1 else full

    def _batch(self, number: int) -> Batch:
        epoch, index = divmod(number, len(self.batches))
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self._epoch(epoch)
        size = self.learn.train_batch_size
        p, rows = self.pairs, self.batches[index][self.process * size :][:size]
        first = (number * self.processes + self.process) * size  # so that one large batch draws what several small ones do
        generators = [seeds.generator(*self.key, "draw", first + i) for i in range(len(rows))]
        low, high = self.learn.min_timestep, self.learn.max_timestep
        t = torch.stack([torch.randint(low, high, (), generator=g) for g in generators])
        dropped = torch.stack([torch.rand((), generator=g) < self.learn.caption_dropout for g in generators])
        winner = torch.stack([p.winner[r] for r in rows])
        noise = torch.stack([torch.randn(winner.shape[1:], generator=g) for g in generators])
        text = torch.where(dropped.view(-1, 1, 1), p.empty, p.states[p.text[rows]])
        loser = torch.stack([p.loser[r] for r in rows]) if p.loser is not None and self.learn.loss == "dpo" else None
        return Batch(winner, loser, text, noise, t, [p.names[r] for r in rows])


def compute_loss(errors: Errors, t: Tensor, learn: Learn, alphas: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A stage's loss from its errors: the chosen family, the statistics term, the anchor and the loser's safeguard. (B,) each."""
    if learn.loss == "sft" or errors.loser is None or errors.loser_reference is None or errors.loser_residual is None:
        return losses.sft(errors.winner, errors.winner_reference)
    loser = errors.loser
    factor: Tensor | float = learn.loser_weight
    if learn.safeguard:
        factor = factor * losses.safeguard(errors.winner_residual, errors.loser_residual, mu=learn.safeguard)
    if isinstance(factor, Tensor) or factor != 1.0:
        loser = losses.scale_gradient(loser, factor)
    loss, metrics = losses.dpo(errors.winner, loser, errors.winner_reference, errors.loser_reference, beta=learn.beta)
    if learn.statistics_weight:
        term = losses.statistics(errors.policy_noise, errors.base_noise, t, alphas)
        loss = loss + learn.statistics_weight * term
        metrics["statistics"] = learn.statistics_weight * term.detach()
    if learn.sft_weight:
        loss = loss + learn.sft_weight * errors.winner
        metrics["sft"] = errors.winner.detach()
    return loss, metrics


def train_stage(
    pipeline: Pipeline,
    pairs: Pairs,
    learn: Learn,
    folder: Path,
    *,
    stage: str,
    seed: int,
    start: dict[str, Tensor] | None = None,
    samples: Callable[[int], None] | None = None,
    accelerator: Any = None,
) -> dict[str, Tensor]:
    """Train the adapter of a stage and return its weights; checkpoints, resumes and logs (`log.jsonl`) in `folder`.

    Args:
        start: the adapter of the stage to start from, or None for the base model.
        samples: called with the step every `sample_steps` to draw a grid.
        accelerator: of accelerate, for several processes; None = one.

    Raises:
        RuntimeError: the loss is not finite; names the groups, nothing was updated.
    """
    unet = pipeline.unet
    own = seeds.seed_of(seed, stage, "lora") % 2**31
    parameters = add_lora(unet, POLICY, rank=learn.rank, alpha=learn.lora_alpha, layers=learn.layers, blocks=learn.blocks, seed=own)
    if start is not None:
        load_adapter_state(unet, POLICY, start)
    reference: Network = lambda: adapter_off(unet)  # noqa: E731
    base: Network | None = None  # the reference
    if learn.reference == "start":
        copy_adapter(unet, POLICY, START)
        base = reference if learn.needs_base else None
        reference = lambda: adapter_as(unet, START)  # noqa: E731
    if learn.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    optimisation = _optimisation(parameters, learn, half=pipeline.dtype == torch.float16)
    processes = accelerator.num_processes if accelerator else 1
    begin = 0
    if found := checkpoint.latest(folder):
        weights, state, meta = checkpoint.load(found)
        if meta.get("processes", processes) != processes:
            raise ValueError(
                f"{found} is of {meta['processes']} processes, and this is {processes}: go on with as many, or remove {folder}"
            )
        load_adapter_state(unet, POLICY, weights["adapter"])
        optimisation.load_state_dict(state)
        begin = meta["step"]
    device = pipeline.device
    cast: Callable[[], AbstractContextManager[Any]] = (
        nullcontext if pipeline.dtype == torch.float32 else lambda: torch.autocast(device.type, pipeline.dtype)
    )

    def loss(batch: Batch) -> tuple[Tensor, Metrics]:
        moved = Batch(
            batch.winner.to(device), None if batch.loser is None else batch.loser.to(device), batch.text.to(device), batch.noise.to(device),
            batch.t.to(device), batch.names,
        )  # fmt: skip
        with cast():
            errors = measure(pipeline, moved, reference, base)
        value, metrics = compute_loss(errors, moved.t, learn, pipeline.alphas)
        return value.mean(), {k: v.mean().item() for k, v in metrics.items()}

    main = accelerator is None or accelerator.is_main_process
    draw = Draw(pairs, learn, seed, stage, accelerator.process_index if accelerator else 0, processes)
    per_step = learn.train_batch_size * learn.gradient_accumulation_steps * processes
    write = (
        _logger(folder / "log.jsonl", begin, per_step, len(pairs), 2 if learn.loss == "dpo" else 1)
        if main
        else (lambda step, metrics: None)
    )

    def record(step: int, metrics: Metrics) -> None:
        write(step, _average_metrics(metrics, accelerator) if processes > 1 else metrics)

    def save(step: int) -> None:
        if main:
            about = {"stage": stage, "processes": processes}
            checkpoint.save(folder, step, {"adapter": adapter_state(unet, POLICY)}, optimisation, about, keep=learn.checkpoints_total_limit)

    every: list[Every] = [(1, record), (learn.checkpointing_steps or learn.max_train_steps, lambda step, _: save(step))]
    if samples is not None and main:
        every.append((learn.sample_steps, lambda step, _: samples(step)))
    fit(
        loss, draw, optimisation, max_train_steps=learn.max_train_steps, start=begin, every=every, save=save, name=f"train {stage}",
        synchronise=(lambda: _average_gradients(parameters, accelerator)) if processes > 1 else None,
        any_of=(lambda here: bool(accelerator.reduce(torch.tensor(float(here), device=device)) > 0)) if processes > 1 else bool,
    )  # fmt: skip
    if learn.gradient_checkpointing:
        unet.disable_gradient_checkpointing()
        unet.eval()
    return adapter_state(unet, POLICY)


def _optimisation(parameters: list[torch.nn.Parameter], learn: Learn, half: bool) -> Optimisation:
    betas = (learn.adam_beta1, learn.adam_beta2)
    if learn.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as AdamW
        except ImportError:
            raise ValueError("learn.use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes, or set it to false") from None
    else:
        from torch.optim import AdamW
    optimizer = AdamW(parameters, lr=learn.learning_rate, betas=betas, weight_decay=learn.adam_weight_decay)
    factor = schedule(learn.lr_scheduler, learn.lr_warmup_steps, learn.max_train_steps)
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=half)
    return Optimisation(parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor), learn.max_grad_norm, scaler)


def _average_gradients(parameters: Sequence[torch.nn.Parameter], accelerator: Any) -> None:
    """One mean over processes of all gradients at once. A LoRA's are small, so this is cheaper and simpler than wrapping the network."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for p, mean in zip(parameters, flat.split([g.numel() for g in gradients])):
        p.grad = mean.view_as(p)


def _average_metrics(metrics: Metrics, accelerator: Any) -> Metrics:
    """The mean over processes of each number, so that the log speaks of the global batch."""
    means = accelerator.reduce(torch.tensor(list(metrics.values()), device=accelerator.device), reduction="mean")
    return dict(zip(metrics, means.tolist()))


def _logger(path: Path, begin: int, per_step: int, examples: int, images: int) -> Callable[[int, Metrics], None]:
    """Append a line a step to `path`; lines from `begin` on, left by an interrupted run, are dropped first."""
    written = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in written if line.endswith("\n")]  # the last one may have been cut by a kill
    write_atomic(path, "".join(line for line in whole if json.loads(line)["step"] <= begin))

    def log(step: int, metrics: Metrics) -> None:
        row = {"step": step, **metrics, "images_per_second": images * per_step / metrics["seconds"], "epoch": step * per_step / examples}
        row["peak_memory_mb"] = peak_memory()
        with path.open("a") as f:
            f.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    return log


def peak_memory() -> float:
    """MB, of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)
