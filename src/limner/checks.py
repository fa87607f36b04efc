"""What about a recipe cannot be and its types cannot say: every message has the dotted path of the field and what was expected."""

from __future__ import annotations

import re
import warnings
from functools import reduce
from importlib.util import find_spec
from typing import Any

from limner.recipe import BASE, BLOCKS, Recipe, Source, Stage

CLIPS = ("clip", "clip_cosine", "clip_score", "clip_score_w", "hps_v1", "hps_v2", "hps_v2_1", "pickscore")  # whose images are vectors
AT_LEAST_ONE = ("sampler.num_inference_steps", "sampler.batch_size", "pool.prompts_per_shard")
LEARN_AT_LEAST_ONE = (
    "rank", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit",
)  # fmt: skip
SOURCES = ("pool", "reconstruction", "real", "feedback")  # of a winner or loser; further ones are earlier stages


def check(recipe: Recipe) -> None:
    """What types cannot say.

    Raises:
        ValueError: with the dotted path of the field and what was expected.
    """
    for path in AT_LEAST_ONE:
        value: Any = reduce(getattr, path.split("."), recipe)
        if value < 1:
            raise ValueError(f"{path}: {value}; expected at least 1")
    if recipe.pool.images_per_prompt < 2:
        raise ValueError(f"pool.images_per_prompt: {recipe.pool.images_per_prompt}; a pair needs at least 2")
    if len(recipe.pool.guidance_scales) > recipe.pool.images_per_prompt:
        raise ValueError(f"pool.guidance_scales: {len(recipe.pool.guidance_scales)} for {recipe.pool.images_per_prompt} images a prompt")
    if not recipe.output_dir:
        raise ValueError("output_dir: not set; every step writes below it, e.g. --output_dir runs/mine")
    for split in ("train", recipe.evaluate.split):
        if not getattr(recipe.data, split):
            raise ValueError(f"data.{split}: not set; name a file or folder of captions")
    for name, spec in recipe.scorers.items():
        if (spec.kind == "sum") != bool(spec.of):
            raise ValueError(f"scorers.{name}.of: goes with kind sum, e.g. {{kind: sum, of: {{preference: 1.0, attributes: 2.0}}}}")
        if unknown := [n for n in spec.of if n not in recipe.scorers or recipe.scorers[n].kind in ("sum", "reader")]:
            raise ValueError(f"scorers.{name}.of: {unknown[0]!r} is no scorer that can be added; there are {', '.join(recipe.scorers)}")
    earlier: list[str] = []
    for name, stage in recipe.stages.items():
        at = f"stages.{name}"
        if name in SOURCES:
            raise ValueError(f"{at}: the name {name!r} is that of a source of images; call the stage otherwise")
        if re.fullmatch(r"t\d+", name):
            raise ValueError(f"{at}: the name {name!r} is that of a reconstruction from a timestep; call the stage otherwise")
        _check_start(f"{at}.start", stage, recipe, earlier)
        _check_learn(f"{at}.learn", stage, recipe)
        if stage.learn.loss == "dpo" and stage.loser is None:
            raise ValueError(f"{at}.loser: not set; loss dpo compares a winner with a loser")
        if stage.learn.reference == "start" and not stage.start:
            raise ValueError(f"{at}.learn.reference: start needs {at}.start")
        if stage.learn.sample_steps and not recipe.data.validation:
            raise ValueError(f"data.validation: not set; {at}.learn.sample_steps draws grids of its captions (0 = none)")
        for role, source in (("winner", stage.winner), ("loser", stage.loser)):
            if source is not None:
                _check_source(f"{at}.{role}", source, recipe, earlier)
                if (stage.keep == "winner_not_worse" or stage.wins_on) and not _is_scored(source, recipe):
                    rule = "keep: winner_not_worse" if stage.keep == "winner_not_worse" else "wins_on"
                    raise ValueError(f"{at}.{role}: scorers score pools and reconstructions only, and {rule} needs scores of both")
                if name == BASE and source.source not in ("real", "feedback"):
                    raise ValueError(
                        f"{at}.{role}.from: {source.source}; stage {BASE} learns from real or feedback: all else its model draws"
                    )
        if stage.keep == "winner_not_worse" and not any(s.by for s in stage.sources):
            raise ValueError(f"{at}.keep: winner_not_worse needs a scorer: set {at}.winner.by")
        for scorer in stage.wins_on:
            _check_scorer(f"{at}.wins_on", scorer, recipe)
        earlier.append(name)
    _check_names(recipe)
    for key in ("preference", "judge", "features"):
        _check_scorer(f"evaluate.{key}", getattr(recipe.evaluate, key), recipe)
    if (reader := recipe.evaluate.reader) and (reader not in recipe.scorers or recipe.scorers[reader].kind != "reader"):
        raise ValueError(f"evaluate.reader: no scorer {reader!r} of kind reader under scorers ({', '.join(recipe.scorers) or 'none'})")
    if (features := recipe.evaluate.features) and (kind := recipe.scorers[features].kind) not in CLIPS:
        raise ValueError(f"evaluate.features: {features} is of kind {kind}; expected one of {', '.join(CLIPS)}")
    if features and recipe.evaluate.reader:
        warnings.warn("evaluate.features: ignored; the reader has its own", stacklevel=2)


def _check_names(recipe: Recipe) -> None:
    """Stages and blocks that `learn`, `generate` and `evaluate` name."""
    g = recipe.generate
    chosen = {f"stages.{n}.learn.blocks": s.learn.blocks for n, s in recipe.stages.items()} | {"generate.blocks": g.blocks}
    for at, blocks in (chosen | {f"generate.stage_blocks.{n}": b for n, b in g.stage_blocks.items()}).items():
        if not blocks:
            raise ValueError(f"{at}: empty; expected some of {', '.join(BLOCKS)}")
        if unknown := [b for b in blocks if b not in BLOCKS]:
            raise ValueError(f"{at}: {unknown[0]!r}; expected some of {', '.join(BLOCKS)}")
    stages = [s for s in recipe.stages if s != BASE]
    for at, names in (
        ("generate.stage_blocks", list(g.stage_blocks)),
        ("generate.stage_lora_scale", list(g.stage_lora_scale)),
        ("evaluate.stages", recipe.evaluate.stages),
    ):
        if unknown := [n for n in names if n not in stages]:
            raise ValueError(f"{at}: {unknown[0]!r} is no stage with an adapter of its own; there are {', '.join(stages) or 'none'}")


def check_packages(recipe: Recipe) -> None:
    """That packages which only some recipes need are there, before hours of drawing.

    Raises:
        ValueError: names the field and what to install.
    """
    for name, stage in recipe.stages.items():
        if stage.learn.use_8bit_adam and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"stages.{name}.learn.use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes, or set it to false"
            )


def _check_start(at: str, stage: Stage, recipe: Recipe, earlier: list[str]) -> None:
    if stage.start and stage is recipe.stages.get(BASE):
        raise ValueError(f"{at}: stage {BASE} makes the model that all others start from; leave start out")
    if stage.start == BASE:
        raise ValueError(f"{at}: all stages start from what stage {BASE} makes; leave start out")
    if stage.start and stage.start not in earlier:
        raise ValueError(f"{at}: {stage.start!r} is not an earlier stage ({', '.join(earlier) or 'there is none'})")


def _check_learn(at: str, stage: Stage, recipe: Recipe) -> None:
    learn = stage.learn
    for key in LEARN_AT_LEAST_ONE:
        if getattr(learn, key) < 1:
            raise ValueError(f"{at}.{key}: {getattr(learn, key)}; expected at least 1")
    if not 0 <= learn.min_timestep < learn.max_timestep <= 1000:
        raise ValueError(f"{at}.min_timestep, max_timestep: {learn.min_timestep}, {learn.max_timestep} lie outside the schedule 0..1000")
    if learn.loss == "sft":
        ignored = [k for k in ("statistics_weight", "sft_weight", "safeguard") if getattr(learn, k)]
        if ignored or learn.loser_weight != 1.0:
            warnings.warn(f"{at}: {', '.join(ignored or ['loser_weight'])} ignored: loss sft has no loser", stacklevel=2)
    for key in ("rank", "lora_alpha", "layers", "blocks") if stage.start else ():
        mine, before = getattr(learn, key), getattr(recipe.stages[stage.start].learn, key)
        if mine != before:
            raise ValueError(f"{at}.{key}: {mine}, but stage {stage.start} has {before}; adapter continue trains the same LoRA on")


def _check_source(at: str, source: Source, recipe: Recipe, earlier: list[str]) -> None:
    if source.source not in (*SOURCES, *earlier):
        stages = ", ".join(earlier) or "none"
        raise ValueError(f"{at}.from: {source.source!r}; expected pool, reconstruction, real, feedback or an earlier stage ({stages})")
    if source.model and source.source != "pool":
        raise ValueError(f"{at}.model: {source.model}; only a pool is drawn by a stage, and this is from: {source.source}")
    if source.model and source.model not in earlier:
        raise ValueError(f"{at}.model: {source.model!r} is not an earlier stage ({', '.join(earlier) or 'there is none'})")
    if source.model == BASE:
        raise ValueError(f"{at}.model: a pool is drawn by what stage {BASE} makes anyway; leave model out")
    if source.source == "reconstruction":
        if not source.t:
            raise ValueError(f"{at}.t: empty; name the timesteps to reconstruct from, e.g. [400, 500, 600, 700]")
        for t in source.t:
            if not 0 < t <= 1000:
                raise ValueError(f"{at}.t: {t} lies outside the schedule 1..1000")
    if source.source in earlier and not source.role:
        raise ValueError(f"{at}.role: winner or loser of stage {source.source!r}?")
    if source.role == "loser" and source.source in earlier and recipe.stages[source.source].loser is None:
        raise ValueError(f"{at}.role: stage {source.source!r} has no loser")
    if source.source == "feedback" and not recipe.feedback:
        raise ValueError(f"{at}.from: feedback of which study? Set feedback: to its output_dir")
    if source.source == "feedback" and source.by:
        raise ValueError(f"{at}.by: {source.by}; what raters preferred is the score of from: feedback")
    scored = source.source in ("pool", "reconstruction") and not (source.source == "reconstruction" and len(source.t) == 1)
    if scored and not source.by:
        raise ValueError(f"{at}.by: not set; which scorer picks the {source.pick}?")
    _check_scorer(f"{at}.by", source.by, recipe)


def _is_scored(source: Source, recipe: Recipe) -> bool:
    """Whether scorers score its images: those of an earlier stage are where they come from."""
    if source.source in recipe.stages:
        stage = recipe.stages[source.source]
        origin = stage.loser if source.role == "loser" else stage.winner
        return origin is not None and _is_scored(origin, recipe)
    return source.source in ("pool", "reconstruction")


def _check_scorer(at: str, name: str, recipe: Recipe) -> None:
    """That a name ("" = none) is that of a scorer, which a reader is not."""
    if name and name not in recipe.scorers:
        raise ValueError(f"{at}: no scorer {name!r} under scorers ({', '.join(recipe.scorers) or 'none'})")
    if name and recipe.scorers[name].kind == "reader":
        raise ValueError(f"{at}: {name} is a reader, which gives no score; it only goes under evaluate.reader")
