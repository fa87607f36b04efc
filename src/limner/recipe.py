"""A recipe: what a run is made of, as frozen dataclasses.

Option names follow diffusers' and peft's training scripts. `limner run RECIPE --print_config` shows every value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from limner.config import build, read_yaml

BASE = "base"  # the stage of this name (supervised on real images) makes the model that all others start from
BLOCKS = ("all", "down", "mid", "up")  # of a UNet


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pipeline to improve.

    Args:
        path: a diffusers folder, a single-file checkpoint (.safetensors, .ckpt), or `figures` for the embedded one.
        config: for a single-file checkpoint: a diffusers pipeline folder of the same architecture whose configs and tokenizer are used
            ("" = the folder beside the file, called like it without suffix).
        hub: fetch `path` from the model hub as an id.
        mixed_precision: no, bf16 or fp16 (with a scaled loss). Errors are reduced in float32 whatever it is.
        device: auto, cpu, cuda, mps ...
        channels_last: memory format of the UNet; faster on most machines.
    """

    path: str = "figures"
    config: str = ""
    hub: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: str = "auto"
    channels_last: bool = True


@dataclass(frozen=True, kw_only=True)
class Data:
    """Prompts and real images, by split.

    Args:
        train: captions (and, for reconstruction, their real images): .txt, .csv, .tsv, .jsonl, .parquet, an image folder with
            metadata.jsonl, a WebDataset .tar, or `figures`.
        validation: the same; what choices are made on.
        test: the same; read by `evaluate` only.
        max_train_prompts: use the first so many (0 = all).
        max_validation_prompts: use the first so many (0 = all).
        max_test_prompts: use the first so many (0 = all).
        caption_column: its name in tables and metadata ("" = text, caption or prompt, whichever there is).
        image_column: its name in tables ("" = image or file_name).
        resolution: pixels of the shorter side (or of the bucket's square root area).
        crop: center, random or none (none only with images of one size).
        aspect_buckets: widths over heights that images are sorted into, e.g. [0.69, 1.0]; empty = square.
    """

    train: str = "figures"
    validation: str = "figures"
    test: str = "figures"
    max_train_prompts: int = 0
    max_validation_prompts: int = 0
    max_test_prompts: int = 0
    caption_column: str = ""
    image_column: str = ""
    resolution: int = 64
    crop: Literal["center", "random", "none"] = "center"
    aspect_buckets: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """DPM-Solver++ multistep with classifier-free guidance.

    Args:
        num_inference_steps: network steps an image.
        guidance_scale: 1 = no guidance.
        negative_prompt: text of the unconditional branch.
        batch_size: images a batch; filled across prompts.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Images of the training prompts to choose from.

    Args:
        images_per_prompt: N, at least 2 (HG-DPO: 20).
        guidance_scales: of a prompt's images in turn ([1.0, 3.0]: every second one is guided); empty = the sampler's.
        prompts_per_shard: how often work is saved.
        keep_latents: of which images: selected (those that a stage may pick), all, or none.
    """

    images_per_prompt: int = 20
    guidance_scales: list[float] = field(default_factory=list)
    prompts_per_shard: int = 32
    keep_latents: Literal["selected", "all", "none"] = "selected"

    @property
    def turns(self) -> list[float]:
        """The guidance of each of a prompt's images; empty = the sampler's for all."""
        given = self.guidance_scales
        return [given[k % len(given)] for k in range(self.images_per_prompt)] if given else []


ScorerKind = Literal[
    "clip", "dual", "reader", "clip_cosine", "clip_score", "clip_score_w", "hps_v1", "hps_v2", "hps_v2_1", "pickscore", "aesthetic_v1",
    "aesthetic_v2", "clip_iqa_quality", "clip_iqa_sharpness", "image_reward", "cycle_reward", "hps_v3", "judge", "attributes",
    "soundness", "sum",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """Where a scorer's weights lie.

    Args:
        kind: clip (a transformers CLIPModel folder), dual (a `limner scorer` folder), reader, or a published score: clip_cosine, clip_score
            (100 · cosine, at least 0), clip_score_w (2.5 · cosine, at least 0), hps_v1, hps_v2, hps_v2_1, pickscore, aesthetic_v1,
            aesthetic_v2, clip_iqa_quality, clip_iqa_sharpness, image_reward, cycle_reward, hps_v3; or judge (a vision-language
            model); attributes (how likely a figure shows what its caption claims, by the reader in `path`); soundness (how likely
            nothing is wrong with it, by the same); or sum (of other scorers).
        path: a folder, or figures/<name> for an embedded one; of a published score the file or CLIPModel folder of its weights.
        tower: of the aesthetic scores: OpenAI's CLIP ViT-L/14, a folder or file, under the head in `path`; of hps_v3: the folder of
            Qwen2-VL-7B-Instruct.
        tokenizer: folder of the tokenizer of a single file ("" = beside it).
        activation: of a single file for clip_cosine or clip_score: quick_gelu if its weights descend from OpenAI's, gelu if from LAION's.
        model: of a judge whose `path` is the address of an endpoint (http://...): as that calls it.
        template: of a judge: pointwise (1 to 5) or yes (probability that the image shows the prompt).
        of: of a sum: names of other scorers to weights. Scores are added as they are, so their scales matter.
    """

    kind: ScorerKind = "clip"
    path: str = ""
    tower: str = ""
    tokenizer: str = ""
    activation: Literal["", "quick_gelu", "gelu"] = ""
    model: str = ""
    template: Literal["pointwise", "yes"] = "pointwise"
    of: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which images take a role.

    Args:
        source: pool, reconstruction, real, feedback (what raters preferred, see `feedback` of the recipe), or the name of an earlier
            stage. Written `from` in YAML.
        model: of a pool: the earlier stage that draws it ("" = the base model), so that a stage learns from its own start's images.
        pick: best or worst by score.
        by: a scorer's name under `scorers`.
        t: re-noising timesteps of reconstructions to choose from.
        role: of an earlier stage: its winner or its loser.
    """

    source: str = "pool"
    model: str = ""
    pick: Literal["best", "worst"] = "best"
    by: str = ""
    t: list[int] = field(default_factory=list)
    role: Literal["", "winner", "loser"] = ""

    @property
    def key(self) -> str:
        """Names these images among folders and scores: pool, pool-easy (drawn by the stage easy), reconstruction ..."""
        return f"{self.source}-{self.model}" if self.model else self.source


@dataclass(frozen=True, kw_only=True)
class Learn:
    """How a stage learns.

    Args:
        loss: dpo (Diffusion-DPO) or sft (denoising error of the winner).
        beta: of DPO, per mean squared error, with the factor 1/2 of the original code.
        statistics_weight: of HG-DPO's statistics-matching term (eq. 4), which keeps channel means where the base model's are, whatever the
            reference; 0 = off.
        sft_weight: adds the winner's denoising error.
        loser_weight: multiplies the loser's gradient; `safeguard` picks it a sample.
        safeguard: mu of Diffusion-SDPO's loser safeguard; 0 = off.
        reference: base (adapter off) or start (the adapter of the stage before).
        rank: of the LoRA.
        lora_alpha: 0 = rank.
        adapter: continue: the LoRA of the starting stage is trained on.
        layers: what gets the LoRA: attention (its linear layers, as in the paper) or all (every linear layer and convolution).
        blocks: which UNet blocks get the LoRA: all, up, down, mid.
        learning_rate: of AdamW, the largest of the schedule.
        lr_scheduler: constant, or cosine to zero at the last step.
        lr_warmup_steps: steps over which the rate rises to learning_rate.
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of its second moment.
        adam_weight_decay: decoupled decay of the adapter's weights.
        use_8bit_adam: optimiser state in 8 bits (needs bitsandbytes).
        max_grad_norm: gradients are clipped to this norm; 0 = not.
        max_train_steps: optimiser steps.
        train_batch_size: pairs a micro-batch and process.
        gradient_accumulation_steps: micro-batches a step.
        gradient_checkpointing: less memory, about a third more time, the same gradients.
        caption_dropout: share of captions replaced by the empty text (for guidance).
        min_timestep: smallest noise level drawn.
        max_timestep: largest, not included.
        checkpointing_steps: how often the state is saved; it always is after the last step.
        checkpoints_total_limit: how many are kept.
        sample_steps: how often a grid of samples is drawn (0 = never).
    """

    loss: Literal["dpo", "sft"] = "dpo"
    beta: float = 2500.0
    statistics_weight: float = 0.0
    sft_weight: float = 0.0
    loser_weight: float = 1.0
    safeguard: float = 0.0
    reference: Literal["base", "start"] = "base"
    rank: int = 8
    lora_alpha: int = 0
    adapter: Literal["continue"] = "continue"
    layers: Literal["attention", "all"] = "attention"
    blocks: list[str] = field(default_factory=lambda: ["all"])
    learning_rate: float = 1e-5
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    use_8bit_adam: bool = False
    max_grad_norm: float = 1.0
    max_train_steps: int = 1000
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    caption_dropout: float = 0.0
    min_timestep: int = 0
    max_timestep: int = 1000
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    sample_steps: int = 0

    @property
    def needs_base(self) -> bool:
        """Whether the statistics term takes a pass through the base model, which is not the reference."""
        return self.loss == "dpo" and self.reference == "start" and self.statistics_weight != 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a curriculum: which image wins, which loses, what is kept, how to learn, from where to start.

    Args:
        start: the stage whose weights to start from ("" = the base model).
        winner: where the better image comes from (for loss sft: the only one).
        loser: where the worse one comes from; none for loss sft.
        keep: winner_not_worse drops pairs whose winner scores below the loser (HG-DPO eq. 8).
        wins_on: scorers: drops pairs whose winner is not at least as good on all of them and better on one (Pareto dominance).
        learn: loss, strength, optimiser, adapter.
    """

    start: str = ""
    winner: Source = field(default_factory=Source)
    loser: Source | None = None
    keep: Literal["all", "winner_not_worse"] = "all"
    wins_on: list[str] = field(default_factory=list)
    learn: Learn = field(default_factory=Learn)

    @property
    def sources(self) -> list[Source]:
        """Of winner and loser."""
        return [self.winner, *([self.loser] if self.loser else [])]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """How finished stages are used.

    Args:
        lora_scale: strength of the adapter (HG-DPO: 0.5).
        blocks: where the adapter acts: all, up, down, mid (HG-DPO: up for the hard stage).
        stage_blocks: the same for single stages, e.g. {hard: [up]}.
        stage_lora_scale: lora_scale of single stages, e.g. {hard: 0.5}.
    """

    lora_scale: float = 1.0
    blocks: list[str] = field(default_factory=lambda: ["all"])
    stage_blocks: dict[str, list[str]] = field(default_factory=dict)
    stage_lora_scale: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured.

    Args:
        preference: the scorer that selected examples (circular).
        judge: a scorer that selected nothing.
        reader: the reader of figures ("" = no ground truth for attributes, joints and defects).
        features: without a reader, the scorer of the CLIP family whose image vectors are the features of Fréchet distance and diversity
            ("" = neither is measured).
        split: test for a final result, validation for every choice.
        diversity_prompts: prompts with 4 seeds each for diversity (0 = off).
        stages: which to compare (empty = all).
        num_examples: images that improved and worsened most, to show.
    """

    preference: str = ""
    judge: str = ""
    reader: str = ""
    features: str = ""
    split: Literal["test", "validation"] = "test"
    diversity_prompts: int = 64
    stages: list[str] = field(default_factory=list)
    num_examples: int = 8

    @property
    def diverse_prompts(self) -> int:
        """diversity_prompts, where there are features to measure diversity by; else 0."""
        return self.diversity_prompts if self.reader or self.features else 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Args:
        name: of the run, for reports.
        output_dir: every step writes a folder below it.
        feedback: output_dir of a consolidated study (`limner annotate consolidate`), for stages `from: feedback`.
        seed: all randomness follows from it.
        model: the pipeline to improve.
        data: prompts and real images.
        sampler: how images are made.
        pool: how many images to choose from.
        scorers: by the name that stages and evaluation use.
        stages: the curriculum, in order.
        generate: how finished stages are used.
        evaluate: what is measured.
    """

    name: str = ""
    output_dir: str = ""
    feedback: str = ""
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    sampler: Sampler = field(default_factory=Sampler)
    pool: Pool = field(default_factory=Pool)
    scorers: dict[str, ScorerSpec] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    generate: Generate = field(default_factory=Generate)
    evaluate: Evaluate = field(default_factory=Evaluate)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `--stages.easy.learn.beta 500`.

    Raises:
        ValueError: no such file, not YAML, an unknown key (with its dotted path and a near match), a value of the wrong type.
    """
    from limner.checks import check  # knows the classes above

    recipe = build(Recipe, read_yaml(path), overrides, str(path))
    try:
        check(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return recipe
