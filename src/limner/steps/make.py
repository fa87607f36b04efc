"""The steps that make images and choose among them: prompts, pool, reconstruct, score, examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from limner.steps.run import Run, resolve
from limner.store import is_complete, open_step, read_manifest

if TYPE_CHECKING:
    from limner.recipe import Recipe
    from limner.records import Image, Score


def prompts(run: Run, splits: Sequence[str] = ("train", "validation", "test")) -> None:
    """Write the captions (and real images in training size) of the splits that the recipe names."""
    from limner.inputs import iter_prompts, locate
    from limner.pool.steps import write_prompts

    data = run.recipe.data
    for split in splits:
        source, limit, folder = getattr(data, split), getattr(data, f"max_{split}_prompts"), run.out / "prompts" / split
        if not source or _has_prompts(run, folder, source, limit):
            continue
        path, columns = resolve(source, split), {"caption_column": data.caption_column, "image_column": data.image_column}
        needed = split == "train" and (run.uses("reconstruction") or run.uses("real"))
        read = partial(iter_prompts, path, split, limit=limit, need_images=needed, **columns)
        write_prompts(read, data, folder, run.recipe.seed, source, limit, where=partial(locate, path, split, **columns))


def _has_prompts(run: Run, folder: Path, source: str, limit: int) -> bool:
    """Whether a split lies there already, found without reading the source again. Another configuration is an error."""
    from limner.pool.steps import prompts_config

    if not is_complete(folder):
        return False
    found = read_manifest(folder)
    config = {**prompts_config(run.recipe.data, source, run.recipe.seed), "rows": found["config"]["rows"]}
    open_step(folder, "prompts", config, found["inputs"])
    return bool(found["counts"].get("limit", limit) == limit)


def pool(run: Run) -> None:
    """Images of the training prompts to choose from: stages by scorers, or people. Pools of stages are drawn once those are trained."""
    for name, model in (run.pools or {"pool": ""}).items():
        if model and not run.identity_of(model).get("adapter"):
            print(f"{name}: drawn when stage {model} is trained")
        else:
            _draw(run, name, model)


def _draw(run: Run, name: str, model: str) -> None:
    from limner.examples.curriculum import selectable
    from limner.pool.steps import make_pool

    r = run.recipe
    prompts(run, ["train"])
    keep = r.pool.keep_latents
    pipeline, identity = run.adapted(model)
    make_pool(
        pipeline, run.out / "prompts/train", run.out / name, kind="pool", sampler=r.sampler, drawn_by=model, model=identity,
        images_per_prompt=r.pool.images_per_prompt, guidance_scales=r.pool.turns, size=run.size, seed=r.seed,
        prompts_per_shard=r.pool.prompts_per_shard, keep_all_latents=keep == "all", part=run.part,
        select=_selector(run, selectable(r.stages, model)) if keep == "selected" else None,
    )  # fmt: skip


def _selector(run: Run, picks: list[tuple[str, str]]) -> Callable[[list[Image]], tuple[set[str], list[Score]]]:
    """Which images of a shard a stage may pick: the best or worst of each prompt by the stages' scorers; and their scores."""
    from limner.records import by_prompt
    from limner.scorers.steps import score_images

    def select(images: list[Image]) -> tuple[set[str], list[Score]]:
        found = score_images(images, [run.scorers[n] for n in choosing(run.recipe)])
        scores = {(s.scorer, s.image_id): s.score for s in found if s.score is not None}
        chosen = set()
        for group in by_prompt(images).values():
            for kind, by in picks:
                known = [(scores[by, i.id], -n, i.id) for n, i in enumerate(group) if (by, i.id) in scores]
                if known:
                    chosen.add(max(known)[2] if kind == "best" else min(known, key=lambda k: (k[0], -k[1]))[2])
        return chosen, found

    return select


def reconstruct(run: Run) -> None:
    """SDRecon of the training images, at the levels that the stages use."""
    from limner.pool.steps import make_reconstructions

    if run.timesteps:
        prompts(run, ["train"])
        r = run.recipe
        make_reconstructions(
            run.fresh(), run.out / "prompts/train", run.out / "reconstruct", timesteps=run.timesteps, sampler=r.sampler,
            seed=r.seed,
            prompts_per_shard=r.pool.prompts_per_shard, part=run.part,
        )  # fmt: skip


def _sources(run: Run, stage: str = "") -> dict[str, Path]:
    """Folders of images by source. Of a stage, without those that only later ones choose from: they may not be there yet."""
    names = list(run.recipe.stages)
    until = [run.recipe.stages[n] for n in (names[: names.index(stage) + 1] if stage else names)]
    known = {r.key for s in until for r in s.sources}
    folders = {name: name for name in run.pools} | ({"reconstruction": "reconstruct"} if run.timesteps else {})
    return {name: run.out / folder for name, folder in folders.items() if name in known}


def choosing(recipe: Recipe) -> list[str]:
    """The scorers that stages choose by."""
    stages = recipe.stages.values()
    return list(dict.fromkeys(n for s in stages for n in (*(r.by for r in s.sources if r.by), *s.wins_on)))


def score(run: Run) -> None:
    """Score pools and reconstructions with the scorers that stages choose by; pools of stages once they are drawn."""
    from limner.scorers.steps import make_scores

    names = choosing(run.recipe)
    for source, folder in _sources(run).items():
        if names and (is_complete(folder) or not run.pools.get(source)):
            make_scores(folder, run.out / "scores" / source, [run.scorers[n] for n in names], part=run.part)


def examples(run: Run, name: str) -> None:
    """Choose the examples of a stage."""
    from limner.examples.curriculum import make_examples
    from limner.scorers.steps import FEEDBACK

    prompts(run, ["train"])
    stage, folder = run.recipe.stages[name], run.out / "examples" / name
    earlier = {r.source for r in stage.sources if r.source in run.recipe.stages}
    by = any(r.by for r in stage.sources) or stage.wins_on
    scores = [p for s in _sources(run, name) if is_complete(p := run.out / "scores" / s)] if by else []
    used = {r.key for r in stage.sources}
    sources = {k: v for k, v in _sources(run, name).items() if k in used}
    if FEEDBACK in used:
        preferred = Path(run.recipe.feedback) / "preferences"
        sources[FEEDBACK], scores = preferred / "images", [*scores, preferred / "scores"]
    counts = make_examples(
        name, stage, folder, prompts=run.out / "prompts/train", sources=sources, scores=scores,
        stages={n: run.out / "examples" / n for n in earlier},
    )  # fmt: skip
    print(f"examples {name}: " + ", ".join(f"{k} {v}" for k, v in counts.most_common()))
