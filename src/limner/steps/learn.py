"""The step that trains a stage, and what tells whether it is done."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.config import dump, to_dict
from limner.recipe import BASE, Learn
from limner.steps.make import prompts
from limner.steps.processes import make_accelerator
from limner.steps.run import Run, load_model
from limner.store import differences, input_hash, write_atomic

GRID = 8  # prompts of a grid of samples

if TYPE_CHECKING:
    from limner.models.stable_diffusion import Pipeline


def train(run: Run, name: str) -> None:
    """Train a stage's adapter and write it in both LoRA formats, with a model card."""
    from limner.records import Example
    from limner.store import read_rows
    from limner.training.losses import equivalent_betas
    from limner.training.stage import prepare, train_stage

    stage, folder = run.recipe.stages[name], run.out / "train" / name
    identity = _stage_identity(run, name)
    if _trained(run, name):
        return
    _refuse_other(run, name, identity)
    accelerator = make_accelerator()
    main = accelerator is None or accelerator.is_main_process  # the one process that writes
    pipeline = run.fresh(tuning=name == BASE)
    pairs = prepare(pipeline, read_rows(run.out / "examples" / name, Example), run.recipe.sampler.batch_size)
    start = _adapter_weights(run, stage.start) if stage.start else None
    learn = stage.learn
    per_step = learn.train_batch_size * learn.gradient_accumulation_steps * (accelerator.num_processes if accelerator else 1)
    print(f"train {name}: {len(pairs)} examples, {per_step} a step, {learn.max_train_steps} steps, rank {learn.rank}")
    if learn.loss == "dpo":
        betas = equivalent_betas(learn.beta, pairs.winner[0].numel())
        print("  beta " + "; ".join(f"{v:g} per {k}" for k, v in betas.items()))
    if main:
        write_atomic(folder / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
    samples = _sampler_grid(run, pipeline, folder / "samples") if learn.sample_steps and main else None
    if samples is None:  # pairs are prepared: from here on only the UNet is needed
        pipeline.release()
    else:
        pipeline.move_encoders("cpu")
    train_stage(
        pipeline, pairs, learn, folder, stage=name, seed=run.recipe.seed, start=start, samples=samples, accelerator=accelerator,
    )  # fmt: skip
    if main:
        _write_adapter(run, name, pipeline, identity)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # the next stage starts from what the main process wrote


def _write_adapter(run: Run, name: str, pipeline: Pipeline, identity: dict[str, Any]) -> None:
    """The trained adapter in both formats, its card, and of the stage `base` the model; then the stage counts as trained."""
    from limner import seeds
    from limner.models.card import write_card
    from limner.models.lora_file import save_lora
    from limner.training.stage import POLICY

    folder = run.out / "train" / name
    save_lora(folder / "adapter", pipeline.unet, POLICY, metadata={"stage": name, "recipe": run.recipe.name, "base": pipeline.hash})
    grids = sorted((folder / "samples").glob("*.png"))
    scale, blocks = run.strength(name)
    write_card(
        folder / "adapter", base_model=run.recipe.model.path, tuned=name != BASE and BASE in run.recipe.stages, scale=scale, blocks=blocks,
        command=run.command, recipe_yaml=dump(run.recipe), stage=name, samples=grids[-1] if grids else None,
    )  # fmt: skip
    if name == BASE:
        _save_tuned_base(run)
    # last: from here on the stage counts as trained
    identity["adapter"] = f"{seeds.seed_of((folder / 'adapter/pytorch_lora_weights.safetensors').read_bytes().hex()):016x}"
    write_atomic(folder / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
    print(f"train {name}: wrote {folder / 'adapter'}")


def _save_tuned_base(run: Run) -> None:
    """Merge the adapter of the stage `base` into the model and keep that as a diffusers folder: all later stages start from it.

    In float32, whatever it was trained in: half of a bf16 weight's last digit is more than many of the adapter's changes.
    """
    from limner.models.lora import merge_adapter
    from limner.models.lora_file import load_lora
    from limner.models.stable_diffusion import save_pipeline

    pipeline = load_model(replace(run.recipe, model=replace(run.recipe.model, mixed_precision="no", device="cpu")))
    load_lora(pipeline.unet, run.out / "train" / BASE / "adapter", "tuned")
    merge_adapter(pipeline.unet, "tuned")
    partial = run.tuned_base.with_name(".model.partial")
    for left in (partial, run.tuned_base):  # of a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    try:
        save_pipeline(pipeline, partial)
    except Exception as error:  # safetensors raises its own kind when the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"cannot write {run.tuned_base} ({error}); free some space and run the same command again") from error
    partial.rename(run.tuned_base)


def _stage_identity(run: Run, name: str) -> dict[str, Any]:
    """What decides a stage's weights."""
    stage = run.recipe.stages[name]
    started = run.identity_of(stage.start).get("adapter", "") if stage.start else ""
    tuned = {"base": run.identity_of(BASE).get("adapter", "")} if name != BASE and BASE in run.recipe.stages else {}
    return tuned | {
        "learn": _deciding(stage.learn),
        "start": started,
        "examples": input_hash(run.out / "examples" / name),
        "seed": run.recipe.seed,
        "model": run.recipe.model.path,
        "mixed_precision": run.recipe.model.mixed_precision,
    }


def _deciding(learn: Learn) -> dict[str, Any]:
    """The options that change the result."""
    without = ("checkpointing_steps", "checkpoints_total_limit", "sample_steps", "gradient_checkpointing")
    return {k: v for k, v in to_dict(learn).items() if k not in without}


def _found_identity(run: Run, name: str) -> dict[str, Any]:
    """What decided a stage's weights. An option that is younger than they are has its default, which does what was done before."""
    found = run.identity_of(name)
    return found | {"learn": _deciding(Learn()) | found["learn"]} if found else {}


def _trained(run: Run, name: str) -> bool:
    found = _found_identity(run, name)
    return "adapter" in found and {k: v for k, v in found.items() if k != "adapter"} == json.loads(json.dumps(_stage_identity(run, name)))


def _refuse_other(run: Run, name: str, identity: dict[str, Any]) -> None:
    """A folder of another configuration is an error, not something to overwrite; one without a checkpoint takes any."""
    from limner import checkpoint

    folder = run.out / "train" / name
    if found := _found_identity(run, name):
        trained = found.pop("adapter", None) or checkpoint.latest(folder)
        wanted = json.loads(json.dumps(identity))
        if trained and found != wanted:
            raise ValueError(
                f"{folder} was trained with another configuration:\n  "
                + "\n  ".join(differences(found, wanted))
                + "\nRemove it or choose another output_dir."
            )


def _adapter_weights(run: Run, name: str) -> dict[str, Any]:
    """The final adapter of a stage, as `load_adapter_state` takes it."""
    from limner import checkpoint

    found = checkpoint.latest(run.out / "train" / name)
    if not run.identity_of(name).get("adapter"):
        raise ValueError(f"stage {name} is not trained; run `limner train` with --stage {name} first")
    if found is None:
        raise ValueError(
            f"stage {name} is trained, but {run.out / 'train' / name} has no checkpoint to go on from; remove the folder and train it again"
        )
    return checkpoint.load(found)[0]["adapter"]


def _sampler_grid(run: Run, pipeline: Pipeline, folder: Path) -> Callable[[int], None]:
    """Draws grids of fixed prompts and seeds during training: the base's row above, the policy's below."""
    import torch

    from limner.images import grid
    from limner.models.lora import adapter_off
    from limner.pool.sample import Request, sample
    from limner.records import Prompt
    from limner.store import read_rows

    prompts(run, ["validation"])
    chosen = [p for p, _ in zip(read_rows(run.out / "prompts/validation", Prompt), range(GRID))]
    requests = [Request(replace(p, image=None), 0, *run.size) for p in chosen]
    before: list[Any] = []

    def draw(step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.move_encoders(pipeline.device)
        with torch.no_grad():
            if not before:
                with adapter_off(pipeline.unet):
                    before.extend(x for x, _ in sample(pipeline, requests, run.recipe.sampler, run.recipe.seed))
            after = [x for x, _ in sample(pipeline, requests, run.recipe.sampler, run.recipe.seed)]
        pipeline.move_encoders("cpu")
        sheet = io.BytesIO()
        grid(torch.stack([*before, *after]), len(before)).save(sheet, "PNG")
        write_atomic(folder / f"step-{step:06d}.png", sheet.getvalue())

    return draw
