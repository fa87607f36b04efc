"""Train a scorer of choices: a folder of `Choice` rows in, a folder that `limner score` loads out.

output_dir/checkpoint-N   what is trained, and the optimiser; goes on exactly
output_dir/log.jsonl      a line a step, and one for each validation
output_dir/model          the scorer: config, weights, tokenizer, training.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limner import checkpoint
from limner.config import to_dict
from limner.loop import Every, Metrics, Optimisation, fit, schedule
from limner.scorers.agreement import accuracy, judge
from limner.scorers.choices import Choices, Looks, generators_of
from limner.scorers.learner import Learner, choose_parameters, training_mode
from limner.scorers.objective import Batch, Draw, TrainScorer, compute_loss, encode, units_of, usable
from limner.store import differences, input_hash, write_atomic

NOT_IDENTITY = (
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "validation_rows", "validation", "device",
    "dataloader_num_workers", "gradient_checkpointing",
)  # fmt: skip


@torch.no_grad()
def score_rows(learner: Learner, choices: Choices, rows_at_once: int = 64) -> list[list[float]]:
    """Scores of the images of all rows, as the saved scorer gives them."""
    training_mode(learner, False)
    found: list[list[float]] = []
    for start in range(0, len(choices), rows_at_once):
        part = choices.rows[start : start + rows_at_once]
        looks = Looks(choices, range(start, start + len(part)))
        images = learner.images(learner.prepare(looks.decode()).to(learner.device))
        texts = learner.texts([row.text for row in part])
        found += [(learner.scale() * (images[places] @ said)).float().tolist() for said, places in zip(texts, looks.places)]
    return found


def train_scorer(config: TrainScorer, learner: Learner, *, revision: str) -> Path:
    """Train, or go on; returns the folder of the scorer.

    Args:
        learner: what to start from.
        revision: of its weights; it and the choices are what a run may go on with.

    Raises:
        ValueError: no rows that the loss learns from; a folder of another configuration.
        RuntimeError: the loss is not finite; names the rows, nothing was updated.
    """
    out = Path(config.output_dir)
    images = Path(config.images) if config.images else None
    choices = Choices(Path(config.choices), images=images)
    held_out = Choices(Path(config.validation), config.validation_rows, images) if config.validation else None
    chosen = usable(choices.rows, config.loss)
    if not chosen:
        raise ValueError(f"{config.choices}: {len(choices)} rows, but none that {config.loss} learns from: all are ties")
    identity = refuse_other(config, revision)
    write_atomic(out / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
    names = choose_parameters(
        learner, vision_layers=config.vision_layers, text_layers=config.text_layers, train_scale=config.train_scale
    )  # fmt: skip
    learner.reads.count_long(choices.rows[i].text for i in chosen)
    print(f"train {out.name}: {len(chosen)} of {len(choices)} rows, {len(names)} tensors train, loss {config.loss}")
    device = torch.device(_device(config.device))
    learner.model.to(device)
    if config.gradient_checkpointing:
        if learner.kind != "clip":
            raise ValueError("gradient_checkpointing: only a CLIP has it; leave it out")
        learner.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    spread: torch.nn.Linear | None = None
    if config.loss == "gaussian":
        spread = torch.nn.Linear(learner.width, 1).to(device)  # all equally sure at first
        nn.init.zeros_(spread.weight)
        nn.init.zeros_(spread.bias)
    trained = _trained(learner, spread, names)
    o = _optimisation(config, learner, spread, names)
    begin = _resume(out, trained, o)
    cast: Callable[[], AbstractContextManager[Any]] = (
        (lambda: torch.autocast(device.type, torch.bfloat16)) if config.mixed_precision == "bf16" else nullcontext
    )

    def loss(batch: Batch) -> tuple[Tensor, Metrics]:
        with cast():
            seen, said = (v.float() for v in encode(learner, batch))
        log_sigma = spread(seen * said * learner.width**0.5)[:, 0] if spread is not None else None
        value, metrics = compute_loss(config, batch, learner.scale().float() * (seen * said).sum(1), log_sigma)
        return value, {**metrics, "scale": learner.scale().item()}

    record = _log(out / "log.jsonl", begin)

    def validate(step: int, _: Metrics) -> None:
        if held_out is not None:
            found = accuracy(judge(held_out.rows, score_rows(learner, held_out)))
            record(step, {f"validation_{k}": found[k] for k in ("value", "low", "high", "n_pairs")})
            value = "not known" if found["value"] is None else f"{found['value']:.3f}"
            print(f"step {step}: validation accuracy {value} of {found['n_pairs']} pairs")
        training_mode(learner, True)

    def save(step: int) -> None:
        checkpoint.save(out, step, {"trained": trained()}, o, {}, keep=config.checkpoints_total_limit)

    every: list[Every] = [
        (1, record), (config.checkpointing_steps or config.max_train_steps, lambda step, _: save(step)),
        (config.validation_steps or config.max_train_steps, validate),
    ]  # fmt: skip
    training_mode(learner, True)
    draw = Draw(choices, chosen, learner, config)
    fit(loss, draw, o, max_train_steps=config.max_train_steps, start=begin, every=every, save=save, name=f"train {out.name}")
    training_mode(learner, False)
    return _write(out / "model", learner, spread, config, choices, revision)


def describe(config: TrainScorer, learner: Learner) -> str:
    """What training would be, for --dry_run: rows, updates, images, and memory of weights and optimiser."""
    choices = Choices(Path(config.choices), images=Path(config.images) if config.images else None)
    chosen = usable(choices.rows, config.loss)
    names = set(
        choose_parameters(learner, vision_layers=config.vision_layers, text_layers=config.text_layers, train_scale=config.train_scale)
    )
    choices.pictures(chosen[0])
    units = units_of(choices.rows, chosen, config)
    count = config.train_batch_size * config.gradient_accumulation_steps
    rows = count * len(chosen) / len(units)
    images = count * sum(len({f for i in unit for f in choices.rows[i].files}) for unit in units) / len(units)
    sizes = {n: p.numel() for n, p in learner.model.named_parameters()}
    moving = sum(v for n, v in sizes.items() if n in names)
    megabytes = (4 * sum(sizes.values()) + 12 * moving) / 2**20  # float32 weights; gradient and Adam's two moments
    return (
        f"{len(chosen)} of {len(choices)} rows; an update sees {rows:.3g} rows, about {images:.0f} images; {config.max_train_steps} "
        f"updates are {config.max_train_steps * rows / len(chosen):.2g} epochs\n{moving / 1e6:.3g} M of {sum(sizes.values()) / 1e6:.3g} M "
        f"parameters train; weights and optimiser {megabytes:.0f} MB, without activations"
    )


def _identity(config: TrainScorer, revision: str) -> dict[str, Any]:
    """What decides the weights."""
    decides = {k: v for k, v in to_dict(config).items() if k not in NOT_IDENTITY}
    decides["start"] = {**decides["start"], "revision": revision}
    return json.loads(json.dumps({**decides, "choices": input_hash(Path(config.choices))}))


def refuse_other(config: TrainScorer, revision: str) -> dict[str, Any]:
    """What decides the weights of a run; `revision` is that of its start.

    Raises:
        ValueError: its folder holds a run of another configuration; lists the differences.
    """
    folder, identity = Path(config.output_dir), _identity(config, revision)
    path = folder / "identity.json"
    if path.is_file() and (found := json.loads(path.read_text())) != identity:
        changed = "\n  ".join(differences(found, identity))
        raise ValueError(f"{folder} was trained with another configuration:\n  {changed}\nRemove it or choose another output_dir.")
    return identity


def _device(name: str) -> str:
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _trained(learner: Learner, spread: nn.Linear | None, names: Sequence[str]) -> Callable[[], dict[str, Tensor]]:
    """A function that gives what training changes, by name: trained parameters, running means of batch norms, the head of sigma."""

    def tensors() -> dict[str, Tensor]:
        state = learner.model.state_dict(keep_vars=True)
        buffers = {n for n, _ in learner.model.named_buffers() if n in state}
        found = {n: v for n, v in state.items() if n in buffers or n in set(names)}
        return found | ({f"spread.{n}": v for n, v in spread.named_parameters()} if spread is not None else {})

    return tensors


def _optimisation(config: TrainScorer, learner: Learner, spread: nn.Linear | None, names: Sequence[str]) -> Optimisation:
    by_name = dict(learner.model.named_parameters())
    parameters = [by_name[n] for n in names] + (list(spread.parameters()) if spread is not None else [])
    # norms, biases and the scale are not drawn towards 0
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))
    factor = schedule(config.lr_scheduler, config.lr_warmup_steps, config.max_train_steps)
    return Optimisation(parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor), config.max_grad_norm)


def _resume(folder: Path, trained: Callable[[], dict[str, Tensor]], o: Optimisation) -> int:
    found = checkpoint.latest(folder)
    if found is None:
        return 0
    weights, state, meta = checkpoint.load(found)
    with torch.no_grad():
        for name, tensor in trained().items():
            tensor.copy_(weights["trained"][name])
    o.load_state_dict(state)
    return int(meta["step"])


def _log(path: Path, begin: int) -> Callable[[int, Metrics], None]:
    """Append lines to `path`; those behind `begin`, left by an interrupted run, are dropped first."""
    written = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in written if line.endswith("\n")]  # the last one may have been cut by a kill
    write_atomic(path, "".join(line for line in whole if json.loads(line)["step"] <= begin))

    def log(step: int, metrics: Metrics) -> None:
        with path.open("a") as f:
            f.write(json.dumps({"step": step, **{k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()}}) + "\n")

    return log


def _write(
    folder: Path, learner: Learner, spread: nn.Linear | None, config: TrainScorer, choices: Choices, revision: str
) -> Path:  # fmt: skip
    """The finished scorer appears whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    learner.model.to("cpu")
    learner.write(partial)
    if spread is not None:  # scores are the means; this says how sure they are
        save_file({n: p.detach().cpu().contiguous() for n, p in spread.named_parameters()}, partial / "log_sigma.safetensors")
    about = {"kind": learner.kind, "start": revision, "choices": len(choices), "generators": sorted(generators_of(choices.rows))}
    write_atomic(partial / "training.json", json.dumps({**about, "config": to_dict(config)}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
