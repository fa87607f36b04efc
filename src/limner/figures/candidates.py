"""The pictures that simulated people choose among: drawn by several generators for one caption, and how good each is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from limner import seeds
from limner.config import to_dict
from limner.engine import Progress, run_shards
from limner.feedback.simulate import Truth
from limner.figures.latent import qualities
from limner.figures.seen import blurs
from limner.figures.truths import decode_array
from limner.images import encode_png, to_uint8
from limner.recipe import Sampler
from limner.records import Prompt
from limner.scorers.objective import NewDual, TrainScorer
from limner.store import input_hash, is_complete, open_step, read_table, shards

REAL, UNSEEN = "real", "few_steps"  # not among the training choices
TASTES = ("plausibility", "alignment", "aesthetics")  # of `latent.qualities`
SHARD = 50
Row = dict[str, Any]
Paint = Callable[[Sequence[Row]], dict[tuple[str, int], Tensor]]  # rows of a split to (generator, k): pictures (n, 3, H, W)
Know = Callable[[Tensor, Sequence[str]], list[Truth]]  # pictures (n, 3, H, W) and captions to what people know of them
Look = Callable[[Tensor], dict[str, NDArray]]  # pictures to features (n, D) and classes (n, C), by which sets are measured
DECIDES = ("seed", "world", "base", "early", "early_steps", "raters", "reader", "sampler", "few_steps", "reconstruct")  # what is written


@dataclass(frozen=True, kw_only=True)
class Hps:
    """HPS on figures.

    Args:
        output_dir: every part is written below it.
        seed: of everything.
        world: the output folder of `limner figures make`: pictures.
        base: the pipeline late in training, whose autoencoder all use; figures/base is the embedded one.
        early: the pipeline early in training ("" = trained here).
        early_steps: of the base model trained here.
        raters: the reader whose eyes people see with.
        reader: another one, by which sets of pictures are measured.
        splits: choices' split to the world's split that captions come from.
        prompts: captions a split.
        choices_per_prompt: each with another rater and other pictures.
        taste: what people go by: weights of the latent qualities, whose sum is a picture's hidden quality.
        noise: of a rater, in units of hidden quality.
        tie: a rater whose best two are less than this apart cannot decide.
        sampler: of the pictures.
        few_steps: network steps of the generator that training never sees.
        reconstruct: timesteps of the reconstructions.
        dual: shape of the tower.
        tower_steps: of contrastive pre-training.
        tower_batch: pictures a step.
        train: what both objectives share.
    """

    output_dir: str = "runs/hps"
    seed: int = 0
    world: str = "runs/world"
    base: str = "figures/base"
    early: str = ""
    early_steps: int = 800
    raters: str = "figures/rater_reader"
    reader: str = "figures/reader"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "scorer", "validation": "judge", "test": "raters"})
    prompts: dict[str, int] = field(default_factory=lambda: {"train": 2000, "validation": 200, "test": 500})
    choices_per_prompt: int = 2
    taste: dict[str, float] = field(default_factory=lambda: {"plausibility": 0.4, "alignment": 0.35, "aesthetics": 0.25})
    noise: float = 0.1
    tie: float = 0.03
    sampler: Sampler = field(default_factory=lambda: Sampler(num_inference_steps=16, guidance_scale=2.0, batch_size=50))
    few_steps: int = 5
    reconstruct: list[int] = field(default_factory=lambda: [300, 600])
    dual: NewDual = field(default_factory=lambda: NewDual(channels=[32, 64, 128]))
    tower_steps: int = 1500
    tower_batch: int = 64
    train: TrainScorer = field(default_factory=TrainScorer)


def hidden_quality(config: Hps, candidate: Row) -> float:
    """What everybody would say of a picture without noise; 0 to 1 where the weights add up to 1.

    Raises:
        ValueError: a weight of something that is no latent quality.
    """
    if unknown := [name for name in config.taste if name not in TASTES]:
        raise ValueError(f"taste: {', '.join(unknown)} unknown; expected some of {', '.join(TASTES)}")
    return sum(weight * float(candidate[name]) for name, weight in config.taste.items())


def resolve(path: str) -> Path:
    """`figures/<part>` is an embedded part."""
    from limner.figures.assets import find

    return find(path.removeprefix("figures/")) if path.startswith("figures/") else Path(path)


def world_rows(config: Hps, split: str, columns: list[str], limit: int = 0) -> list[Row]:
    """Rows of a split of the world."""
    folder = Path(config.world) / "images" / split
    if not is_complete(folder):
        raise ValueError(f"world: {folder} is not complete; make it with `limner figures make --only '[images]'`")
    rows: list[Row] = []
    for path in shards(folder):
        rows += pq.read_table(path, columns=columns).to_pylist()
        if limit and len(rows) >= limit:
            break
    return rows[: limit or None]


def pixels(data: Sequence[bytes]) -> Tensor:
    """Encoded pictures of one size to (n, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.array(Image.open(io.BytesIO(d)).convert("RGB")) for d in data])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def early_pipeline(config: Hps) -> Path:
    """The base model early in training, made here if it is not given."""
    from diffusers import AutoencoderKL

    from limner.figures.base import train_base
    from limner.figures.fitting import save_whole

    if config.early:
        return resolve(config.early)
    done = Path(config.output_dir) / "early/pipeline"
    if not done.is_dir():
        rows = world_rows(config, "train", ["image", "prompt"])
        images = (pixels([r["image"] for r in rows]) * 255).byte().permute(0, 2, 3, 1).numpy()
        autoencoder = AutoencoderKL.from_pretrained(resolve(config.base) / "vae")
        pipe = train_base(
            images, [r["prompt"] for r in rows], autoencoder, done.parent, max_train_steps=config.early_steps, seed=config.seed + 5
        )
        save_whole(done, pipe.save_pretrained)
    return done


def painter(config: Hps) -> Paint:
    """What draws the candidates: the base late and early in training, its reconstructions, defects through its autoencoder."""
    from limner.models.stable_diffusion import load_pipeline
    from limner.pool.sample import Request, denoise, sample

    late, early = load_pipeline(str(resolve(config.base))), load_pipeline(str(early_pipeline(config)))
    few = replace(config.sampler, num_inference_steps=config.few_steps)

    @torch.no_grad()
    def paint(rows: Sequence[Row]) -> dict[tuple[str, int], Tensor]:
        real, defective = pixels([r["image"] for r in rows]), pixels([r["defective_image"] for r in rows])
        out = {(REAL, 0): real, ("defect", 0): late.decode_latents(late.encode_images(defective)).cpu()}
        prompts = [Prompt(id=r["id"], text=r["prompt"]) for r in rows]
        side = real.shape[-1]
        for name, pipeline, sampler, count in (
            ("late", late, config.sampler, 2),
            ("early", early, config.sampler, 2),
            (UNSEEN, late, few, 1),
        ):
            for k in range(count):
                # other numbers than 0 and 1 for few_steps: else it would be the same picture with fewer steps
                requests = [Request(p, k if name != UNSEEN else 2, side, side) for p in prompts]
                out[name, k] = torch.stack([x for x, _ in sample(pipeline, requests, sampler, config.seed)])
        latents, text, empty = late.encode_images(real), late.encode_text([p.text for p in prompts]), late.encode_text([""])
        for k, t in enumerate(config.reconstruct):
            noise = seeds.noise(latents.shape[1:], [(config.seed, "hps", p.id, k) for p in prompts]).to(latents)
            noisy = late.add_noise(latents, noise, torch.full((len(latents),), t))
            out["reconstruction", k] = late.decode_latents(denoise(late, noisy, text, empty, config.sampler, start=t)).cpu()
        return out

    return paint


def observer(config: Hps) -> Look:
    """What measures of sets look with: the features of the reader that neither raters nor scorers see with, and poses as classes."""
    from limner.scorers.reader import load_reader

    reader = load_reader(resolve(config.reader))
    names = list(reader.model.attributes)
    before = sum(len(reader.model.attributes[n]) for n in names[: names.index("pose")])
    poses = slice(before, before + len(reader.model.attributes["pose"]))

    def look(images: Tensor) -> dict[str, NDArray]:
        features = reader.read(images).features
        return {"features": features, "classes": features[:, poses]}

    return look


def make_images(config: Hps, paint: Callable[[], Paint], know: Callable[[], Know], look: Callable[[], Look]) -> None:
    """Draw the candidates of every split and see how good they are.

    Args:
        paint, know, look: make the tools, when first needed.
    """
    tools: list[tuple[Paint, Know, Look]] = []
    for split, source in config.splits.items():
        folder = Path(config.output_dir) / "images" / split
        decides = {k: v for k, v in to_dict(config).items() if k in DECIDES}
        inputs = {"world": input_hash(Path(config.world) / "images" / source)}
        step = open_step(folder, "hps_images", {**decides, "split": source, "prompts": config.prompts[split]}, inputs)
        if is_complete(folder):
            continue
        if not tools:
            tools.append((paint(), know(), look()))
        columns = ["id", "prompt", "image", "defective_image", "defect_mask", "parts"]
        rows = world_rows(config, source, columns, config.prompts[split])
        draw = partial(_shard, *tools[0], split == "test")
        tasks = [rows[i : i + SHARD] for i in range(0, len(rows), SHARD)]
        if run_shards(step, tasks, draw, units=len, name=f"images {split}"):
            step.finish({"prompts": len(rows)})


def _shard(
    paint: Paint, know: Know, look: Look, with_unseen: bool, _: int, rows: list[Row], progress: Progress
) -> dict[str, pa.Table]:  # fmt: skip
    table = pa.Table.from_pylist(_candidates(rows, paint, know, look, with_unseen))
    progress(len(rows))
    return {"part": table}


def _candidates(rows: list[Row], paint: Paint, know: Know, look: Look, with_unseen: bool) -> list[Row]:
    """One line a picture: prompt, generator, k, the picture, its latent qualities, and what sets are measured by."""
    painted, texts = paint(rows), [r["prompt"] for r in rows]
    out = []
    for (generator, k), images in painted.items():
        if generator == UNSEEN and not with_unseen:
            continue
        seen = look(images)
        latent = _known(rows, images) if generator == "defect" else [t.qualities for t in know(images, texts)]
        for i, r in enumerate(rows):
            out.append({
                "prompt_id": r["id"], "text": r["prompt"], "generator": generator, "k": k, "image": encode_png(images[i]), **latent[i],
                "features": seen["features"][i].astype(float).tolist(), "classes": seen["classes"][i].astype(float).tolist(),
            })  # fmt: skip
    return out


def _known(rows: Sequence[Row], images: Tensor) -> list[dict[str, float]]:
    """The latent qualities of defective figures with their own captions: where they are and what is wrong with them is known."""
    masks = [[decode_array(r[name]) > 0 for name in ("parts", "defect_mask")] for r in rows]
    return [qualities(p, person, wrong, 0.0, blur=b) for p, (person, wrong), b in zip(to_uint8(images), masks, blurs(images))]


def read_candidates(config: Hps, split: str) -> list[Row]:
    """The lines of `_candidates`, each with its file name."""
    rows = [r for path in shards(Path(config.output_dir) / "images" / split) for r in read_table(path).to_pylist()]
    return [{**r, "file": f"{r['prompt_id']}/{r['generator']}/{r['k']}"} for r in rows]
