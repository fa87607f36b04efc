"""`--dry_run`: check what a recipe needs, measure one network call of each kind, and estimate calls, time, memory and disk of every step.

Nothing is written. Time is what this machine would take, alone on it; memory is the peak of this process while the step's largest call ran.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from limner.checks import check_packages
from limner.recipe import Learn, Recipe
from limner.steps.judge import DIVERSITY_SEEDS
from limner.steps.learn import GRID
from limner.store import is_complete

if TYPE_CHECKING:
    from torch import Tensor

    from limner.models.stable_diffusion import Pipeline
    from limner.records import Prompt
    from limner.scorers.protocol import Scorer
    from limner.steps import Run


@dataclass(frozen=True)
class Counts:
    """How much there is: training prompts, evaluation prompts, an image's width and height."""

    train: int
    evaluation: int
    width: int
    height: int


@dataclass(frozen=True)
class Line:
    """A step: network calls (one call is one sample through the network once), images made or scored; seconds, bytes on disk and MB at
    most, once they are measured; done if its folder is finished."""

    step: str
    calls: int
    images: int
    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class Costs:
    """Measured: seconds of a sample's call without adapter and beside each stage's, of a stage's micro-batch, of a decoded and encoded
    image, of a score; bytes of an image file, of latents and of a caption's text states; MB by kind. `folds`: models draw with the adapter
    in the weights."""

    call: float
    beside: dict[str, float]
    folds: bool
    train: dict[str, float]
    image: float
    score: dict[str, float]
    png: int
    latents: int
    text: int
    memory: dict[str, float]
    parameters: dict[str, int]


def sampling_steps(recipe: Recipe, t: int | None = None, schedule: int = 1000) -> int:
    """Network steps of an image, from noise or from timestep t; as `pool.sample` counts them."""
    n = recipe.sampler.num_inference_steps
    return n if t is None else max(1, round(n * t / schedule))


def branches_of(recipe: Recipe) -> int:
    """Samples through the network for a step of an image: with guidance also one without the caption."""
    return 2 if recipe.sampler.guidance_scale != 1.0 else 1


def passes(learn: Learn) -> int:
    """Samples through the network for a training example: winner and loser, each through policy and reference; and, for the statistics
    term of a stage whose reference is another, the winner through the base."""
    return 4 + learn.needs_base if learn.loss == "dpo" else 2


def plan(run: Run, counts: Counts) -> list[Line]:
    """The steps with their calls and images; nothing measured yet."""
    r, out = run.recipe, run.out
    branches = branches_of(r)
    pool = counts.train * r.pool.images_per_prompt
    rebuilt = counts.train * len(run.timesteps)
    lines = []
    each = sum(1 if g == 1.0 else 2 for g in r.pool.turns) or branches * r.pool.images_per_prompt
    for name in run.pools:
        lines.append(Line(name, counts.train * each * sampling_steps(r), pool, done=is_complete(out / name)))
    if rebuilt:
        calls = counts.train * branches * sum(sampling_steps(r, t) for t in run.timesteps)
        lines.append(Line("reconstruct", calls, rebuilt, done=is_complete(out / "reconstruct")))
    if used := choosing(r):
        made = pool * len(run.pools) + rebuilt
        scored = [*run.pools, *(["reconstruction"] if rebuilt else [])]
        lines.append(Line("score", made * len(used), made, done=all(is_complete(out / "scores" / s) for s in scored)))
    for name, stage in r.stages.items():
        batch = stage.learn.train_batch_size * stage.learn.gradient_accumulation_steps
        seen = stage.learn.max_train_steps * batch
        images = seen * (2 if stage.learn.loss == "dpo" else 1)
        lines.append(Line(f"train {name}", seen * passes(stage.learn), images, done=(out / "train" / name / "adapter").is_dir()))
    models, judges = 1 + len(run.compared), judging(r)
    images = models * (counts.evaluation + DIVERSITY_SEEDS * min(r.evaluate.diverse_prompts, counts.evaluation))
    lines.append(Line("generate", images * branches * sampling_steps(r), images))
    images = (models + 1) * counts.evaluation  # the real ones as well
    return [*lines, Line("evaluate", images * len(judges), images)] if judges else lines


def choosing(recipe: Recipe) -> list[str]:
    """The scorers that stages choose by; of sums their parts, which are asked once however many sums they are in."""
    from limner.steps.make import choosing

    return _parts(recipe, choosing(recipe))


def judging(recipe: Recipe) -> list[str]:
    """The scorers that models are measured by."""
    return _parts(recipe, [name for role in ("preference", "judge") if (name := getattr(recipe.evaluate, role))])


def _parts(recipe: Recipe, names: list[str]) -> list[str]:
    return list(dict.fromkeys(part for name in names for part in recipe.scorers[name].of or [name]))


def check_inputs(run: Run) -> tuple[Counts, Prompt]:
    """Read every prompt that will be used; also gives the first training prompt.

    Raises:
        ValueError: no such file, a row that cannot be used, a real image that is needed and missing.
    """
    from limner.images import bucket_sizes, decode
    from limner.inputs import iter_prompts
    from limner.steps import resolve

    r, data = run.recipe, run.recipe.data
    found: dict[str, int] = {}
    first: Prompt | None = None
    check_packages(r)
    for split in run.splits:
        found[split] = 0
        needed = split == "train" and (run.uses("reconstruction") or run.uses("real"))
        for prompt in iter_prompts(
            resolve(getattr(data, split), split), split, caption_column=data.caption_column, image_column=data.image_column,
            limit=getattr(data, f"max_{split}_prompts"), need_images=needed,
        ):  # fmt: skip
            found[split] += 1
            first = first or prompt
    if first is None:
        raise ValueError("data.train: no prompts")
    if first.image is not None:
        decode(first.image, f"image of {first.id}")
    width, height = bucket_sizes(data.resolution, data.aspect_buckets)[0]
    return Counts(found["train"], found[r.evaluate.split], width, height), first


def timed(call: Callable[[], Any]) -> float:
    """Seconds of the second call: the first one also allocates and plans."""
    import torch

    for _ in range(2):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(run: Run, counts: Counts, first: Prompt) -> Costs:
    """Run one call of each kind at the recipe's size and batch: sampling, decoding, scoring, and a training step of each kind of stage."""
    import torch

    from limner.images import decode, encode_png, fit_to, to_tensor
    from limner.models import lora
    from limner.training.stage import POLICY, START, peak_memory

    r, pipeline = run.recipe, run.pipeline
    shape = pipeline.latent_shape(counts.height, counts.width)
    text = pipeline.encode_text([first.text])
    branches = branches_of(r)
    size = r.sampler.batch_size * branches
    memory: dict[str, float] = {}
    noisy = torch.randn(size, *shape, device=pipeline.device)
    denoise = lambda: pipeline.predict(noisy, torch.tensor(500, device=pipeline.device), text.expand(size, -1, -1))  # noqa: E731
    with torch.no_grad():
        call = timed(denoise) / size
        memory["sample"] = peak_memory()
        image = timed(lambda: encode_png(pipeline.decode_latents(noisy[:1])[0].cpu()))
        pixels = pipeline.decode_latents(noisy[:1]).cpu()
    if first.image is not None:  # a photo tells more of file sizes than an unfinished picture
        pixels = to_tensor(fit_to(decode(first.image), counts.width, counts.height, "center"))[None]
    score = {n: timed(lambda n=n: _ask(run.scorers, n, pixels, first.text)) for n in {*choosing(r), *judging(r)}}  # type: ignore[misc]
    train, beside, parameters = {}, {}, {}
    for name, stage in r.stages.items():
        adapter = lora.add_lora(pipeline.unet, POLICY, rank=stage.learn.rank, layers=stage.learn.layers, blocks=stage.learn.blocks)
        parameters[name] = sum(p.numel() for p in adapter)
        with torch.no_grad():
            beside[name] = timed(denoise) / size
        if stage.learn.reference == "start":
            lora.copy_adapter(pipeline.unet, POLICY, START)
        train[name] = timed(lambda learn=stage.learn: _train_step(pipeline, learn, shape, text))  # type: ignore[misc]
        memory[name] = peak_memory()
        lora.remove_adapters(pipeline.unet)
        pipeline.unet.disable_gradient_checkpointing()
    elements = shape[0] * shape[1] * shape[2]
    states = text.element_size() * text[0].numel()
    folds = pipeline.dtype == torch.float32
    return Costs(call, beside, folds, train, image, score, len(encode_png(pixels[0])), 4 * elements, states, memory, parameters)


def _ask(scorers: dict[str, Scorer], name: str, pixels: Tensor, text: str) -> None:
    """Score an image; who is asked over a network, be it for a sum, is asked anew, and the answer kept nowhere."""
    from limner.scorers.steps import keep_answers

    keep_answers(list(scorers.values()), None)
    scorers[name](pixels, [text])


def _train_step(pipeline: Pipeline, learn: Learn, shape: tuple[int, ...], text: Any) -> None:
    """Forward of the reference, forward and backward of the policy, for a micro-batch."""
    import torch

    from limner.models.lora import adapter_as, adapter_off
    from limner.training.errors import Batch
    from limner.training.errors import measure as errors_of
    from limner.training.stage import START

    if learn.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.unet.train()
    n, device = learn.train_batch_size, pipeline.device
    draw = lambda: torch.randn(n, *shape, device=device)  # noqa: E731
    t = torch.full((n,), 500, device=device)
    batch = Batch(draw(), draw() if learn.loss == "dpo" else None, text.expand(n, -1, -1), draw(), t, [])
    with torch.autocast(device.type, pipeline.dtype, enabled=pipeline.dtype != torch.float32):
        off = lambda: adapter_off(pipeline.unet)  # noqa: E731
        start = lambda: adapter_as(pipeline.unet, START)  # noqa: E731
        errors = errors_of(pipeline, batch, start if learn.reference == "start" else off, off if learn.needs_base else None)
    value = errors.winner.mean() - (errors.loser.mean() if errors.loser is not None else 0.0)
    value.backward()
    pipeline.unet.zero_grad(set_to_none=True)
    pipeline.unet.eval()


def priced(run: Run, lines: Sequence[Line], costs: Costs) -> list[Line]:
    """The steps with time, memory and disk."""
    from dataclasses import replace

    from limner.examples.curriculum import selectable

    r, result = run.recipe, []
    branches = branches_of(r)
    for line in lines:
        kind, _, name = line.step.partition(" ")
        memory = costs.memory.get(name, costs.memory["sample"])
        if kind == "train":
            learn = r.stages[name].learn
            micro = learn.max_train_steps * learn.gradient_accumulation_steps
            weights = 4 * costs.parameters[name]  # a checkpoint has them and two moments, the result has them in two namings
            disk = weights * (3 * learn.checkpoints_total_limit + 2)
            # one is also drawn at the last step; the first has the base's row as well
            grids = 1 + math.ceil(learn.max_train_steps / learn.sample_steps) if learn.sample_steps else 0
            drawn = GRID * grids * (sampling_steps(r) * branches * costs.beside[name] + costs.image)
            result.append(replace(line, seconds=micro * costs.train[name] + drawn, memory=memory, disk=disk))
        elif kind in ("score", "evaluate"):
            each = sum(costs.score[n] for n in (choosing if kind == "score" else judging)(r))
            result.append(replace(line, seconds=line.images * each, memory=memory, disk=100 * line.calls if kind == "score" else 0))
        else:
            latents = line.images if kind == "reconstruct" else 0
            if kind in run.pools:
                n = r.pool.images_per_prompt
                selected = len(selectable(r.stages, run.pools[kind]))
                latents = line.images // n * {"all": n, "none": 0, "selected": selected}[r.pool.keep_latents]
            models = ["", *run.compared] if kind == "generate" else [kind.partition("-")[2]]
            calls = [costs.call if costs.folds else costs.beside.get(m, costs.call) for m in models]
            seconds = line.calls * sum(calls) / len(calls) + line.images * costs.image
            result.append(replace(line, seconds=seconds, memory=memory, disk=line.images * costs.png + latents * costs.latents))
    return result


def dry_run(run: Run) -> int:
    """Check inputs, measure, and print the estimate; returns the exit code."""
    from limner.training.losses import equivalent_betas

    counts, first = check_inputs(run)
    run.pipeline, run.scorers  # noqa: B018 - both load here, or say why not
    run.reader()
    costs = measure(run, counts, first)
    lines = priced(run, plan(run, counts), costs)
    console, table = Console(), Table(title=f"{run.recipe.name or run.out}: {counts.train} prompts, {counts.width}x{counts.height}")
    table.add_column("step", no_wrap=True)
    for column in ("network calls", "images", "time", "peak memory", "disk"):
        table.add_column(column, justify="right")
    for line in lines:
        hours = "done" if line.done else duration(line.seconds)
        table.add_row(line.step, f"{line.calls:,}", f"{line.images:,}", hours, f"{line.memory / 1024:.1f} GB", f"{line.disk / 1e9:.2f} GB")
    table.add_section()
    todo = sum(line.seconds for line in lines if not line.done)
    table.add_row(
        "all", "", "", duration(todo), f"{max(x.memory for x in lines) / 1024:.1f} GB", f"{sum(x.disk for x in lines) / 1e9:.2f} GB"
    )
    console.print(table)
    for name, stage in run.recipe.stages.items():
        learn = stage.learn
        batch = learn.train_batch_size * learn.gradient_accumulation_steps
        console.print(f"{name}: effective batch size {batch} a process, {costs.parameters[name]:,} trainable parameters")
        if learn.loss == "dpo":
            betas = equivalent_betas(learn.beta, costs.latents // 4)
            console.print("  beta " + "; ".join(f"{v:g} per {k}" for k, v in betas.items()))
        held = counts.train * (costs.text + (2 if learn.loss == "dpo" else 1) * costs.latents)  # while it trains, in main memory
        if held > 1e9:
            console.print(f"  up to {held / 1e9:.0f} GB of main memory a process for latents and texts")
    return 0


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
