"""The steps of a recipe, in order: which folder each reads, which it writes, and the functions that do it.

    prompts/<split>  ->  pool, reconstruct  ->  scores/<source>  ->  examples/<stage>  ->  train/<stage>
                     ->  generate/<split>/<model>  ->  metrics.json, report.html

Beside `cli`, this is the only module that knows every folder; each is imported where it is used.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.config import Recipe, Stage, dump
from limner.store import input_hash, is_complete, open_step, read_manifest, write_atomic

if TYPE_CHECKING:
    from limner.models.stable_diffusion import Pipeline
    from limner.records import Image, Prompt
    from limner.scorers.protocol import Scorer
    from limner.scorers.reader import FigureReader

FIGURES = "figures"
DIVERSITY_SEEDS = 4


class Run:
    """A recipe with its folders and what was loaded for it."""

    def __init__(self, recipe: Recipe, command: str = "", part: tuple[int, int] = (0, 1)):
        self.recipe, self.part = recipe, part
        self.out = Path(recipe.output_dir)
        self.command = command or shlex.join(["limner", *sys.argv[1:]])
        self._pipeline: Pipeline | None = None

    @property
    def pipeline(self) -> Pipeline:
        """The base model, loaded on first use."""
        if self._pipeline is None or self._pipeline.released:
            self._pipeline = None  # so that there are never two
            self._pipeline = load_model(self.recipe)
        return self._pipeline

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The recipe's scorers (readers are not scorers)."""
        return {n: load_scorer(n, s.kind, s.path) for n, s in self.recipe.scorers.items() if s.kind != "reader"}

    @property
    def timesteps(self) -> list[int]:
        """The re-noising levels that any stage uses: no others are made."""
        return sorted(
            {t for s in self.recipe.stages.values() for r in (s.winner, s.loser) if r and r.source == "reconstruction" for t in r.t}
        )

    def uses(self, source: str) -> bool:
        return any(r.source == source for s in self.recipe.stages.values() for r in (s.winner, s.loser) if r)

    def run(self) -> None:
        """Every step in order; finished ones are skipped."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / "recipe.yaml", dump(self.recipe))
        self.prompts(["train", self.recipe.evaluate.split])
        self.pool()
        self.reconstruct()
        self.score()
        for stage in self.recipe.stages:
            self.examples(stage)
            self.train(stage)
        self.generate()
        self.evaluate()
        self.report()

    # -- prompts, pool, reconstruct ------------------------------------------------------------------------------------

    def prompts(self, splits: Sequence[str] = ("train", "validation", "test")) -> None:
        """Write the captions (and real images in training size) of the splits that the recipe names."""
        from limner.inputs import read_prompts
        from limner.pool.steps import write_prompts

        data = self.recipe.data
        for split in splits:
            source, limit, folder = getattr(data, split), getattr(data, f"max_{split}_prompts"), self.out / "prompts" / split
            if not source or self._has_prompts(folder, source, limit):
                continue
            found = read_prompts(
                resolve(source, split), split, caption_column=data.caption_column, image_column=data.image_column, limit=limit,
                need_images=split == "train" and (self.uses("reconstruction") or self.uses("real")),
            )  # fmt: skip
            write_prompts(found, data, folder, self.recipe.seed, source, limit)

    def _has_prompts(self, folder: Path, source: str, limit: int) -> bool:
        """Whether a split lies there already, found without reading the source again. Another configuration is an error."""
        from limner.pool.steps import prompts_config

        if not is_complete(folder):
            return False
        found = read_manifest(folder)
        config = {**prompts_config(self.recipe.data, source, self.recipe.seed), "rows": found["config"]["rows"]}
        open_step(folder, "prompts", config, found["inputs"])
        return bool(found["counts"].get("limit", limit) == limit)

    def pool(self) -> None:
        """Images of the training prompts to choose from."""
        from limner.examples.curriculum import selectable
        from limner.pool.steps import make_pool

        r = self.recipe
        if not self.uses("pool"):
            return
        self.prompts(["train"])
        keep = r.pool.keep_latents
        make_pool(
            self.pipeline, self.out / "prompts/train", self.out / "pool", kind="pool", sampler=r.sampler,
            images_per_prompt=r.pool.images_per_prompt, resolution=r.data.resolution, seed=r.seed,
            prompts_per_shard=r.pool.prompts_per_shard, keep_all_latents=keep == "all", part=self.part,
            select=self._selector(selectable(r.stages)) if keep == "selected" else None,
        )  # fmt: skip

    def _selector(self, picks: list[tuple[str, str]]) -> Callable[[list[Image]], set[str]]:
        """Which images of a shard a stage may pick: the best or worst of each prompt by the stages' scorers."""
        from limner.records import by_prompt
        from limner.scorers.steps import score_images

        def select(images: list[Image]) -> set[str]:
            names = list(dict.fromkeys(by for _, by in picks))
            scores = {
                (s.scorer, s.image_id): s.score for s in score_images(images, [self.scorers[n] for n in names]) if s.score is not None
            }
            chosen = set()
            for group in by_prompt(images).values():
                for kind, by in picks:
                    known = [(scores[by, i.id], -n, i.id) for n, i in enumerate(group) if (by, i.id) in scores]
                    if known:
                        chosen.add(max(known)[2] if kind == "best" else min(known, key=lambda k: (k[0], -k[1]))[2])
            return chosen

        return select

    def reconstruct(self) -> None:
        """SDRecon of the training images, at the levels that the stages use."""
        from limner.pool.steps import make_reconstructions

        if self.timesteps:
            self.prompts(["train"])
            r = self.recipe
            make_reconstructions(
                self.pipeline, self.out / "prompts/train", self.out / "reconstruct", timesteps=self.timesteps, sampler=r.sampler,
                seed=r.seed,
                prompts_per_shard=r.pool.prompts_per_shard, part=self.part,
            )  # fmt: skip

    # -- scores, examples, training ------------------------------------------------------------------------------------

    def _sources(self) -> dict[str, Path]:
        found = {"pool": self.out / "pool"} if self.uses("pool") else {}
        return found | ({"reconstruction": self.out / "reconstruct"} if self.timesteps else {})

    def score(self) -> None:
        """Score pool and reconstructions with the scorers that stages choose by."""
        from limner.scorers.steps import make_scores

        names = list(dict.fromkeys(r.by for s in self.recipe.stages.values() for r in (s.winner, s.loser) if r and r.by))
        for source, folder in self._sources().items():
            if names:
                make_scores(folder, self.out / "scores" / source, [self.scorers[n] for n in names], part=self.part)

    def examples(self, name: str) -> None:
        """Choose the examples of a stage."""
        from limner.examples.curriculum import make_examples

        stage, folder = self.recipe.stages[name], self.out / "examples" / name
        earlier = {r.source for r in (stage.winner, stage.loser) if r and r.source in self.recipe.stages}
        scores = [p for s in self._sources() if is_complete(p := self.out / "scores" / s)]
        counts = make_examples(
            name, stage, folder, prompts=self.out / "prompts/train", sources=self._sources(), scores=scores,
            stages={n: self.out / "examples" / n for n in earlier},
        )  # fmt: skip
        print(f"examples {name}: " + ", ".join(f"{k} {v}" for k, v in counts.most_common()))

    def train(self, name: str) -> None:
        """Train a stage's adapter and write it in both LoRA formats, with a model card."""
        from limner import seeds
        from limner.models import lora
        from limner.models.card import write_card
        from limner.records import Example
        from limner.store import read_rows
        from limner.training.losses import equivalent_betas
        from limner.training.stage import POLICY, prepare, train_stage

        stage, folder = self.recipe.stages[name], self.out / "train" / name
        identity = self._stage_identity(name)
        if self._trained(name):
            return
        self._refuse_other(folder, identity)
        accelerator = make_accelerator()
        pipeline = self._fresh()
        pairs = prepare(pipeline, list(read_rows(self.out / "examples" / name, Example)), self.recipe.sampler.batch_size)
        start = self._adapter_weights(stage.start) if stage.start else None
        learn = stage.learn
        per_step = learn.train_batch_size * learn.gradient_accumulation_steps
        print(f"train {name}: {len(pairs)} examples, {per_step} a step, {learn.max_train_steps} steps, rank {learn.rank}")
        if learn.loss == "dpo":
            betas = equivalent_betas(learn.beta, pairs.winner[0].numel())
            print("  beta " + "; ".join(f"{v:g} per {k}" for k, v in betas.items()))
        write_atomic(folder / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
        samples = self._sampler_grid(pipeline, folder / "samples") if learn.sample_steps else None
        if samples is None:  # pairs are prepared: from here on only the UNet is needed
            pipeline.release()
        else:
            pipeline.move_encoders("cpu")
        train_stage(
            pipeline, pairs, learn, folder, stage=name, seed=self.recipe.seed, start=start, samples=samples, accelerator=accelerator,
        )  # fmt: skip
        if accelerator is not None and not accelerator.is_main_process:
            return
        lora.save_lora(
            folder / "adapter", pipeline.unet, POLICY, metadata={"stage": name, "recipe": self.recipe.name, "base": pipeline.hash}
        )
        grids = sorted((folder / "samples").glob("*.png"))
        write_card(
            folder / "adapter", base_model=self.recipe.model.path, command=self.command, recipe_yaml=dump(self.recipe), stage=name,
            samples=grids[-1] if grids else None,
        )  # fmt: skip
        identity["adapter"] = f"{seeds.seed_of((folder / 'adapter/pytorch_lora_weights.safetensors').read_bytes().hex()):016x}"
        write_atomic(folder / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
        print(f"train {name}: wrote {folder / 'adapter'}")

    def _stage_identity(self, name: str) -> dict[str, Any]:
        """What decides a stage's weights."""
        from limner.config import to_dict

        stage = self.recipe.stages[name]
        learn = to_dict(stage.learn)
        for key in ("checkpointing_steps", "checkpoints_total_limit", "sample_steps", "gradient_checkpointing"):
            learn.pop(key)  # do not change the result
        started = self._identity(stage.start).get("adapter", "") if stage.start else ""
        return {
            "learn": learn,
            "start": started,
            "examples": input_hash(self.out / "examples" / name),
            "seed": self.recipe.seed,
            "model": self.recipe.model.path,
            "mixed_precision": self.recipe.model.mixed_precision,
        }

    def _identity(self, name: str) -> dict[str, Any]:
        path = self.out / "train" / name / "identity.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def _trained(self, name: str) -> bool:
        found = self._identity(name)
        return "adapter" in found and {k: v for k, v in found.items() if k != "adapter"} == json.loads(
            json.dumps(self._stage_identity(name))
        )

    def _refuse_other(self, folder: Path, identity: dict[str, Any]) -> None:
        """A folder of another configuration is an error, not something to overwrite."""
        path = folder / "identity.json"
        if path.is_file():
            found = {k: v for k, v in json.loads(path.read_text()).items() if k != "adapter"}
            wanted = json.loads(json.dumps(identity))
            if found != wanted:
                from limner.store import differences

                raise ValueError(
                    f"{folder} was trained with another configuration:\n  "
                    + "\n  ".join(differences(found, wanted))
                    + "\nRemove it or choose another output_dir."
                )

    def _fresh(self) -> Pipeline:
        """The base model without any adapter."""
        from limner.models.lora import remove_adapters

        remove_adapters(self.pipeline.unet)
        self.pipeline.move_encoders(self.pipeline.device)
        return self.pipeline

    def _adapter_weights(self, name: str) -> dict[str, Any]:
        """The final adapter of a stage, as `load_adapter_state` takes it."""
        from limner import checkpoint

        found = checkpoint.latest(self.out / "train" / name)
        if found is None or not self._identity(name).get("adapter"):
            raise ValueError(f"stage {name} is not trained; run `limner train` with --stage {name} first")
        return checkpoint.load(found)[0]["adapter"]

    def _sampler_grid(self, pipeline: Pipeline, folder: Path) -> Callable[[int], None]:
        """Draws grids of fixed prompts and seeds during training: the base's row above, the policy's below."""
        import torch

        from limner.images import grid
        from limner.models.lora import adapter_off
        from limner.pool.sample import Request, sample
        from limner.records import Prompt
        from limner.store import read_rows

        self.prompts(["validation"])
        prompts = [p for p, _ in zip(read_rows(self.out / "prompts/validation", Prompt), range(8))]
        side = self.recipe.data.resolution
        requests = [Request(replace(p, image=None), 0, side, side) for p in prompts]
        before: list[Any] = []

        def draw(step: int) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            pipeline.move_encoders(pipeline.device)
            with torch.no_grad():
                if not before:
                    with adapter_off(pipeline.unet):
                        before.extend(x for x, _ in sample(pipeline, requests, self.recipe.sampler, self.recipe.seed))
                after = [x for x, _ in sample(pipeline, requests, self.recipe.sampler, self.recipe.seed)]
            pipeline.move_encoders("cpu")
            grid(torch.stack([*before, *after]), len(before)).save(folder / f"step-{step:06d}.png")

        return draw

    # -- generate, evaluate, report ------------------------------------------------------------------------------------

    @property
    def compared(self) -> list[str]:
        return self.recipe.evaluate.stages or list(self.recipe.stages)

    def generate(self, only: Sequence[str] = ()) -> None:
        """One image of every evaluation prompt from the base and from each stage, at equal seeds; more of some, for diversity."""
        from limner.models.lora import load_lora, set_adapter_scale
        from limner.pool.steps import make_pool

        r, split = self.recipe, self.recipe.evaluate.split
        self.prompts([split])
        for model in ["base", *self.compared]:
            if only and model not in only:
                continue
            jobs = [(self.out / "generate" / split / model, 1, 0)]
            if r.evaluate.diversity_prompts:
                jobs.append((self.out / "generate" / f"{split}-diversity" / model, DIVERSITY_SEEDS, r.evaluate.diversity_prompts))
            pipeline, name = self._fresh(), "base"
            if model != "base":
                scale = r.generate.stage_lora_scale.get(model, r.generate.lora_scale)
                blocks = r.generate.stage_blocks.get(model, r.generate.blocks)
                load_lora(pipeline.unet, self.out / "train" / model / "adapter", "policy")
                set_adapter_scale(pipeline.unet, "policy", scale, blocks)
                name = f"{model}:{self._identity(model).get('adapter', '')}:{scale:g}:{'+'.join(blocks)}"
            for folder, count, limit in jobs:
                make_pool(
                    pipeline, self.out / "prompts" / split, folder, kind="generate", sampler=r.sampler, images_per_prompt=count,
                    resolution=r.data.resolution, seed=r.seed + 1, limit=limit, model=name if model != "base" else "", prompts_per_shard=64,
                )  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        """Measure every model, compare with the base, write metrics.json."""
        from limner.evaluation.compare import compare
        from limner.evaluation.distances import principal_components
        from limner.evaluation.measure import features_of, measure_images, measure_real
        from limner.records import Image, Prompt
        from limner.store import read_rows

        e, split, reader = self.recipe.evaluate, self.recipe.evaluate.split, self.reader()
        prompts = {p.id: p for p in read_rows(self.out / "prompts" / split, Prompt)}
        scorers = {role: self.scorers[n] for role in ("preference", "judge") if (n := getattr(e, role))}
        measured = []
        for model in ["base", *self.compared]:
            images = list(read_rows(self.out / "generate" / split / model, Image))
            more = self.out / "generate" / f"{split}-diversity" / model
            diverse = list(read_rows(more, Image)) if e.diversity_prompts else []
            measured.append(measure_images(model, images, prompts, scorers, reader, diverse))
        n = len(measured[0].images or [])
        real, reference = measure_real(list(prompts.values()), n, scorers, reader), None
        pca = None
        if reader is not None:
            others = self._other_real(split, set(prompts), n)
            reference = features_of(others, reader) if len(others) == n else None
            training = [p for p, _ in zip(read_rows(self.out / "prompts/train", Prompt), range(1000)) if p.image]
            pca = principal_components(features_of(training, reader), min(64, len(training) - 1)) if len(training) > 2 else None
        circular = {"preference"} if "preference" in scorers else set()
        metrics = compare(real, measured[0], measured[1:], pca, circular, self.recipe.seed, self.command, reference)
        write_atomic(self.out / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        return metrics

    def _other_real(self, split: str, used: set[str], n: int) -> list[Prompt]:
        """n real images of the split that no evaluated prompt belongs to: what real is compared with."""
        from limner.inputs import read_prompts
        from limner.records import Prompt

        data = self.recipe.data
        found = read_prompts(
            resolve(getattr(data, split), split), split, caption_column=data.caption_column, image_column=data.image_column
        )
        others = [p for p in found if p.id not in used and p.image is not None]
        return [Prompt(id=p.id, text=p.text, split=p.split, image=p.image, truth=p.truth) for p in others[:n]]

    def report(self) -> None:
        """Write report.html and a sheet of samples, and print the table."""
        from limner.evaluation.report import FIGURES_NOTE, print_table, read_curves, sheet, write_report
        from limner.records import Image, Prompt, Score
        from limner.scorers.steps import score_images
        from limner.store import read_rows

        try:
            metrics = json.loads((self.out / "metrics.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.out}/metrics.json: not there; run `limner evaluate` first") from None
        split, e = self.recipe.evaluate.split, self.recipe.evaluate
        prompts = list(read_rows(self.out / "prompts" / split, Prompt))
        made = {m: list(read_rows(self.out / "generate" / split / m, Image)) for m in ["base", *self.compared]}
        pictures = {m: [i.image for i in images] for m, images in made.items()}
        if all(p.image for p in prompts):
            pictures = {"real": [p.image or b"" for p in prompts], **pictures}
        judged: dict[str, list[Score]] = {m: score_images(i, [self.scorers[e.judge]]) for m, i in made.items()} if e.judge else {}
        write_report(
            self.out / "report.html", metrics=metrics, images=pictures, prompts=[p.text for p in prompts],
            curves=read_curves({s: self.out / "train" / s / "log.jsonl" for s in self.compared}),
            judge_scores={m: [s.score if s.score is not None else float("nan") for s in scores] for m, scores in judged.items()},
            command=metrics["command"], recipe_yaml=dump(self.recipe), note=FIGURES_NOTE if self.recipe.model.path == FIGURES else "",
            title=f"Limner: {self.recipe.name or self.out.name}", num_examples=e.num_examples,
        )  # fmt: skip
        sheet({m: x[:6] for m, x in pictures.items()}, [p.text for p in prompts[:6]], self.out / "samples.png")
        print_table(metrics)
        print(f"wrote {self.out / 'report.html'} and {self.out / 'metrics.json'}")

    def reader(self) -> FigureReader | None:
        """The reader that the recipe names, if it names one."""
        from limner.scorers.reader import load_reader

        name = self.recipe.evaluate.reader
        return load_reader(resolve(self.recipe.scorers[name].path, name)) if name else None


def resolve(path: str, name: str) -> Path:
    """A path of a recipe: `figures` is the embedded world's part of that name, `figures/<part>` another part."""
    if path == FIGURES or path.startswith(FIGURES + "/"):
        from limner.figures.assets import find

        return find(name if path == FIGURES else path.removeprefix(FIGURES + "/"))
    return Path(path)


def load_model(recipe: Recipe) -> Pipeline:
    """The pipeline that a recipe names."""
    from limner.models.stable_diffusion import load_pipeline

    m = recipe.model
    path = str(resolve(m.path, "base")) if m.path == FIGURES else m.path
    return load_pipeline(
        path, config=m.config, hub=m.hub, mixed_precision=m.mixed_precision, device=m.device, channels_last=m.channels_last
    )


def load_scorer(name: str, kind: str, path: str) -> Scorer:
    """A scorer that a recipe names."""
    from limner.scorers import clip, dual

    folder = resolve(path, name)
    return dual.load_scorer(folder, name) if kind == "dual" else clip.load_scorer(folder, name)


def make_accelerator() -> Any:
    """An Accelerator under `accelerate launch` with several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator()


def stage_of(recipe: Recipe, name: str) -> Stage:
    """A stage by name.

    Raises:
        ValueError: there is none; lists what there is.
    """
    if name not in recipe.stages:
        raise ValueError(f"--stage {name}: the recipe has {', '.join(recipe.stages) or 'no stages'}")
    return recipe.stages[name]
