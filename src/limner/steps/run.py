"""A run: a recipe, its folders, and what it names (model, scorers, data), loaded when first used.

prompts/<split>  ->  pool, pool-<stage>, reconstruct  ->  scores/<source>  ->  examples/<stage>  ->  train/<stage>
                 ->  generate/<split>/<model>  ->  metrics.json, report.html
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.recipe import BASE, Recipe, ScorerSpec, Stage

if TYPE_CHECKING:
    from limner.models.stable_diffusion import Pipeline
    from limner.scorers.protocol import Scorer
    from limner.scorers.reader import FigureReader

FIGURES = "figures"


class Run:
    """A recipe with its folders and what was loaded for it."""

    def __init__(self, recipe: Recipe, command: str = "", part: tuple[int, int] = (0, 1)):
        self.recipe, self.part = recipe, part
        self.out = Path(recipe.output_dir)
        self.command = command or shlex.join(["limner", *sys.argv[1:]])
        self._pipeline: Pipeline | None = None
        self._source = ""

    @property
    def tuned_base(self) -> Path:
        """Where the model of a stage `base` is kept, a diffusers folder."""
        return self.out / "train" / BASE / "model"

    @property
    def pipeline(self) -> Pipeline:
        """The base model, loaded on first use: the recipe's own, or what the stage `base` made of it."""
        source = str(self.tuned_base) if BASE in self.recipe.stages and self.identity_of(BASE).get("adapter") else ""
        if self._pipeline is None or self._pipeline.released or source != self._source:
            self._pipeline = None  # so that there are never two
            self._pipeline, self._source = load_model(self.recipe, source), source
        return self._pipeline

    def fresh(self, tuning: bool = False) -> Pipeline:
        """The base model without any adapter.

        Args:
            tuning: for the stage `base` itself, which is not trained yet.

        Raises:
            ValueError: the base model is what the stage `base` makes, and that is not trained.
        """
        from limner.models.lora import remove_adapters

        if BASE in self.recipe.stages and not tuning and not self.identity_of(BASE).get("adapter"):
            raise ValueError(
                f"stage {BASE} is not trained, and its model makes all else; run `limner examples` and `limner train` with --stage {BASE}"
            )
        remove_adapters(self.pipeline.unet)
        self.pipeline.move_encoders(self.pipeline.device)
        return self.pipeline

    def adapted(self, stage: str, scale: float = 1.0, blocks: Sequence[str] = ("all",)) -> tuple[Pipeline, str]:
        """The model of a trained stage ("" or base: without adapter), and what identifies its weights ("" = the base model's).

        Raises:
            ValueError: the stage is not trained.
        """
        from limner.models.lora import fuse_adapter, set_adapter_scale
        from limner.models.lora_file import load_lora

        pipeline = self.fresh()
        if stage in ("", BASE):
            return pipeline, ""
        load_lora(pipeline.unet, self.out / "train" / stage / "adapter", "policy")
        set_adapter_scale(pipeline.unet, "policy", scale, list(blocks))
        fuse_adapter(pipeline.unet, "policy")
        return pipeline, f"{stage}:{self.identity_of(stage).get('adapter', '')}:{scale:g}:{'+'.join(blocks)}"

    def strength(self, stage: str) -> tuple[float, list[str]]:
        """How strongly, and in which blocks, a stage's adapter is used once it is trained; that of the stage `base` is merged whole."""
        if stage == BASE:
            return 1.0, ["all"]
        g = self.recipe.generate
        return g.stage_lora_scale.get(stage, g.lora_scale), g.stage_blocks.get(stage, g.blocks)

    def identity_of(self, stage: str) -> dict[str, Any]:
        """What decided a stage's weights, and `adapter` once it is trained."""
        path = self.out / "train" / stage / "identity.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The recipe's scorers (readers are not scorers)."""
        from limner.scorers.steps import keep_answers

        found = load_scorers({n: s for n, s in self.recipe.scorers.items() if s.kind != "reader"}, self.recipe.model.device)
        keep_answers(list(found.values()), self.out / "answers")
        return found

    @property
    def timesteps(self) -> list[int]:
        """The re-noising levels that any stage uses: no others are made."""
        return sorted({t for s in self.recipe.stages.values() for r in s.sources if r.source == "reconstruction" for t in r.t})

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of images of prompts that have no real one: the first bucket's."""
        from limner.images import bucket_sizes

        return bucket_sizes(self.recipe.data.resolution, self.recipe.data.aspect_buckets)[0]

    @property
    def splits(self) -> list[str]:
        """The splits that any step reads; grids of samples are drawn of validation captions."""
        grids = any(stage.learn.sample_steps for stage in self.recipe.stages.values())
        return list(dict.fromkeys(["train", *(["validation"] if grids else []), self.recipe.evaluate.split]))

    def uses(self, source: str) -> bool:
        return any(r.source == source for s in self.recipe.stages.values() for r in s.sources)

    @property
    def pools(self) -> dict[str, str]:
        """The pools that stages choose from: their folders' names, and the stages that draw them ("" = the base model)."""
        return {r.key: r.model for s in self.recipe.stages.values() for r in s.sources if r.source == "pool"}

    @property
    def compared(self) -> list[str]:
        """The stages that are generated from and measured."""
        return self.recipe.evaluate.stages or [s for s in self.recipe.stages if s != BASE]

    def reader(self) -> FigureReader | None:
        """The reader that the recipe names, if it names one."""
        from limner.scorers.reader import load_reader

        name = self.recipe.evaluate.reader
        return load_reader(resolve(self.recipe.scorers[name].path, name)) if name else None


def resolve(path: str, name: str) -> Path:
    """A path of a recipe: `figures` is the embedded world's part of that name, `figures/<part>` another part; hub:owner/name is fetched."""
    if path.startswith("hub:"):
        from limner.scorers.weights import from_hub

        return from_hub(path, name)
    if path == FIGURES or path.startswith(FIGURES + "/"):
        from limner.figures.assets import find

        return find(name if path == FIGURES else path.removeprefix(FIGURES + "/"))
    return Path(path)


def load_model(recipe: Recipe, source: str = "") -> Pipeline:
    """The pipeline that a recipe names, or the one in the folder `source`."""
    from limner.models.stable_diffusion import load_pipeline

    m = recipe.model
    path = source or (str(resolve(m.path, "base")) if m.path == FIGURES else m.path)
    config = "" if source else m.config  # that of a single file
    return load_pipeline(path, config=config, hub=m.hub, mixed_precision=m.mixed_precision, device=m.device, channels_last=m.channels_last)


def load_scorer(name: str, spec: ScorerSpec) -> Scorer:
    """A scorer that a recipe names, but for sums of others."""
    from limner.scorers import backends, blip, clip, dual, hpsv3, judge

    if spec.kind == "judge":
        return judge.JudgeScorer(name, backends.load_backend(f"scorers.{name}", spec.path, spec.model), spec.template)
    path = resolve(spec.path, name)
    if spec.kind == "dual":
        return dual.load_scorer(path, name)
    if spec.kind in ("attributes", "soundness"):
        from limner.figures.seen import AttributeScorer, SoundnessScorer
        from limner.scorers.reader import load_reader

        return (AttributeScorer if spec.kind == "attributes" else SoundnessScorer)(name, load_reader(path))
    tower, tokenizer = (resolve(p, name) if p else None for p in (spec.tower, spec.tokenizer))
    if spec.kind in blip.REWARDS:
        return blip.load_scorer(path, name, spec.kind, tokenizer=tokenizer)
    if spec.kind == "hps_v3":
        return hpsv3.load_scorer(path, name, tower=tower, tokenizer=tokenizer)
    return clip.load_scorer(path, name, spec.kind, tower=tower, tokenizer=tokenizer, activation=spec.activation or None)


def load_scorers(specs: Mapping[str, ScorerSpec], device: str = "cpu") -> dict[str, Scorer]:
    """Scorers by name on a device; those of one CLIP's weights share them."""
    from limner.scorers.clip import share_towers
    from limner.scorers.combine import SumScorer

    found = {name: load_scorer(name, spec) for name, spec in specs.items() if spec.kind != "sum"}
    share_towers(list(found.values()))
    to_device(list(found.values()), device)
    sums = {
        name: SumScorer(name, [found[n] for n in spec.of], list(spec.of.values())) for name, spec in specs.items() if spec.kind == "sum"
    }
    return {name: (found | sums)[name] for name in specs}


def to_device(movable: Sequence[object], device: str) -> None:
    """Put the scorers or backends that can be moved on a device; auto: the best there is."""
    from limner.models.stable_diffusion import pick_device

    for each in movable:
        if hasattr(each, "to_device"):
            each.to_device(pick_device() if device == "auto" else device)


def stage_of(recipe: Recipe, name: str) -> Stage:
    """A stage by name.

    Raises:
        ValueError: there is none; lists what there is.
    """
    if name not in recipe.stages:
        raise ValueError(f"--stage {name}: the recipe has {', '.join(recipe.stages) or 'no stages'}")
    return recipe.stages[name]
