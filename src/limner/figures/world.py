"""Make the embedded world from nothing: pictures, autoencoder, base model, preference scorer, judge, readers; then ship them.

One command, `limner figures make --config recipes/figures/world.yaml`, hours on a CPU; every part resumes where it was stopped.
`--only '[base]'` makes one part. Parts and their folders below `output_dir`, then `ship` and `measure`:

    images/<split>   autoencoder   base   preference   judge   reader   rater_reader
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from limner.config import build, dump, read_yaml
from limner.engine import Progress, run_shards, spans
from limner.figures.assets import DATA, SPLITS
from limner.figures.fitting import save_whole
from limner.figures.make import draw, reword, row
from limner.recipe import Sampler
from limner.store import is_complete, open_step, shards

if TYPE_CHECKING:
    from limner.figures.lessons import Lessons
    from limner.models.stable_diffusion import Pipeline


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Figures drawn a split. Those of scorer, judge and reader are each painted twice and come with defective copies.

    Args:
        train: shipped; base model, pools and reconstructions.
        validation: shipped; every choice is made on it.
        test: shipped; read by evaluate only.
        scorer: bodies that the preference scorer learns from.
        judge: bodies that the judge and the raters' reader learn from.
        reader: bodies that the reader learns from.
        raters: bodies that nothing learns from; the judges are measured on them.
    """

    train: int = 6000
    validation: int = 500
    test: int = 1000
    scorer: int = 2000
    judge: int = 2000
    reader: int = 3000
    raters: int = 500


@dataclass(frozen=True, kw_only=True)
class World:
    """How the embedded world is made.

    Args:
        output_dir: where the parts are made.
        ship_dir: where finished parts are copied for use; "" = into the package.
        seed: of everything.
        size: of the pictures, pixels.
        counts: figures a split.
        autoencoder_steps: of training, a number a cycle of the learning rate.
        base_steps: of training.
        scorer_steps: of training, for the preference scorer.
        judge_steps: of training, for the judge.
        reader_steps: of training, for the reader, a number a cycle of the learning rate.
        rater_reader_steps: the same, for the raters' reader.
        batch_size: of the base model.
        only: parts to make (empty = all).
    """

    output_dir: str = "runs/world"
    ship_dir: str = ""
    seed: int = 0
    size: int = 64
    counts: Counts = field(default_factory=Counts)
    autoencoder_steps: list[int] = field(default_factory=lambda: [3000, 5000])
    base_steps: int = 6000
    scorer_steps: int = 1500
    judge_steps: int = 1500
    reader_steps: list[int] = field(default_factory=lambda: [2000])
    rater_reader_steps: list[int] = field(default_factory=lambda: [2000])
    batch_size: int = 64
    only: list[str] = field(default_factory=list)


PARTS = ("images", "autoencoder", "base", "preference", "judge", "reader", "rater_reader", "ship", "measure")
SAMPLER = Sampler(num_inference_steps=16, guidance_scale=1.0)  # of the lessons' reconstructions: short ways, so no guidance


def make_world(path: Path, overrides: Sequence[str], *, print_config: bool = False) -> int:
    """The `figures make` command. Returns the exit code.

    Raises:
        ValueError: unknown keys, or a part that needs one that is not made yet.
    """
    world = build(World, read_yaml(path), overrides, str(path))
    if print_config:
        print(dump(world))
        return 0
    unknown = [p for p in world.only if p not in PARTS]
    if unknown:
        raise ValueError(f"only: {', '.join(unknown)} unknown; expected some of {', '.join(PARTS)}")
    makers: dict[str, Callable[[World], None]] = {
        "images": make_images, "autoencoder": make_autoencoder, "base": make_base, "preference": make_preference, "judge": make_judge,
        "reader": make_reader, "rater_reader": make_rater_reader, "ship": ship, "measure": measure_world,
    }  # fmt: skip
    for part in PARTS:
        if not world.only or part in world.only:
            makers[part](world)
    return 0


def make_images(world: World) -> None:
    """Draw every split. A figure depends on (seed, split, number) only."""
    for split, count in asdict(world.counts).items():
        taught = split not in SPLITS
        config = {"count": count, "size": world.size, "seed": world.seed, "defects": taught, "paints": 2 if taught else 1}
        step = open_step(_folder(world, f"images/{split}"), "figures", config, {})

        def work(_: int, span: range, progress: Progress, split: str = split, taught: bool = taught) -> dict[str, pa.Table]:
            rows = []
            for drawn in draw(split, span.start, span.stop, seed=world.seed, size=world.size, defects=taught, paints=2 if taught else 1):
                rows.append(row(split, drawn))
                progress(1)
            return {"part": pa.Table.from_pylist(rows)}

        tasks = spans(count, 250)
        if run_shards(step, tasks, work, units=lambda span, n=2 if taught else 1: len(span) * n, name=f"images {split}"):  # type: ignore[misc]
            step.finish({"figures": count})


def _folder(world: World, part: str) -> Path:
    return Path(world.output_dir) / part


def _read(world: World, split: str, columns: list[str]) -> list[dict[str, Any]]:
    folder = _folder(world, f"images/{split}")
    if not is_complete(folder):
        raise ValueError(f"{folder} is not complete; make the part images first")
    return [r for path in shards(folder) for r in pq.read_table(path, columns=columns).to_pylist()]


def _pixels(rows: list[dict[str, Any]], column: str = "image") -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(r[column]))) for r in rows])


def make_autoencoder(world: World) -> None:
    from limner.figures.autoencoder import train_autoencoder

    done = _folder(world, "autoencoder/model")
    if done.is_dir():
        return
    rows = _read(world, "train", ["image", "parts"])
    model = train_autoencoder(_pixels(rows), _pixels(rows, "parts") > 0, done.parent, cycles=world.autoencoder_steps, seed=world.seed)
    save_whole(done, model.save_pretrained)


def make_base(world: World) -> None:
    from diffusers import AutoencoderKL

    from limner.figures.base import train_base

    done = _folder(world, "base/pipeline")
    if done.is_dir():
        return
    rows = _read(world, "train", ["image", "prompt"])
    autoencoder = AutoencoderKL.from_pretrained(_folder(world, "autoencoder/model"))
    pipe = train_base(
        _pixels(rows),
        [r["prompt"] for r in rows],
        autoencoder,
        done.parent,
        max_train_steps=world.base_steps,
        batch=world.batch_size,
        seed=world.seed,
    )
    save_whole(done, pipe.save_pretrained)


def _lessons(world: World, split: str) -> tuple[Lessons, Pipeline]:
    """A split's lessons with all paths, and the base pipeline."""
    from limner.figures.lessons import add_paths, load_lessons
    from limner.models.stable_diffusion import load_pipeline

    if not is_complete(_folder(world, f"images/{split}")):
        raise ValueError(f"{_folder(world, f'images/{split}')} is not complete; make the part images first")
    pipeline = load_pipeline(str(_folder(world, "base/pipeline")))
    lessons = load_lessons(shards(_folder(world, f"images/{split}")))
    add_paths(lessons, pipeline, _folder(world, f"paths/{split}-{pipeline.hash}"), world.seed, SAMPLER)  # of another base they are others
    return lessons, pipeline


def make_preference(world: World) -> None:
    """The scorer that selects: convolutions, then attention over the grid."""
    _make_scorer(world, "preference", "scorer", {"channels": (32, 64, 128), "attention_layers": 2}, world.scorer_steps, world.seed)


def make_judge(world: World) -> None:
    """The scorer that judges: other people, another seed, convolutions only."""
    _make_scorer(
        world,
        "judge",
        "judge",
        {"channels": (24, 48, 96, 160), "attention_layers": 0, "text_layers": 1},
        world.judge_steps,
        world.seed + 17,
    )


def _make_scorer(world: World, part: str, split: str, shape: dict[str, Any], steps: int, seed: int) -> None:
    from limner.figures.teach import train_scorer
    from limner.scorers.dual import DualConfig, save_scorer

    done = _folder(world, f"{part}/model")
    if done.is_dir():
        return
    lessons, pipeline = _lessons(world, split)
    model = train_scorer(lessons, pipeline.tokenizer, done.parent, DualConfig(**shape), steps=steps, seed=seed)
    save_whole(done, lambda folder: save_scorer(model, pipeline.tokenizer, folder, half=True))


def make_reader(world: World) -> None:
    """The reader that evaluates. It also learns from samples of the base model that were labelled by eye."""
    _make_reader(world, "reader", "reader", world.reader_steps, world.seed, by_eye=True, mirror=True)


def make_rater_reader(world: World) -> None:
    """What simulated raters know of generated pictures: other people, another seed, so that they do not err as the reader does.

    Its verdict on soundness learns from samples of its own, too."""
    _make_reader(world, "rater_reader", "judge", world.rater_reader_steps, world.seed + 31)


def _make_reader(
    world: World, part: str, split: str, cycles: Sequence[int], seed: int, *, by_eye: bool = False, mirror: bool = False
) -> None:
    from limner.figures.lessons import attribute_indices
    from limner.figures.quality import labelled_samples, rated_samples
    from limner.figures.teach import finish_reader, train_reader
    from limner.scorers.reader import save_reader

    done = _folder(world, f"{part}/model")
    if done.is_dir():
        return
    lessons = _lessons(world, split)[0]
    labelled = labelled_samples("train")[:2] if by_eye else None
    model = train_reader(lessons, done.parent, cycles=cycles, seed=seed, labelled=labelled)
    rows = _read(world, "train", ["image", "attributes"])[:2000]
    attributes = attribute_indices([json.loads(r["attributes"]) for r in rows])
    finished = finish_reader(model, _pixels(rows), attributes, mirror=mirror, labelled=labelled or rated_samples())
    save_whole(done, lambda folder: save_reader(finished, folder, half=True))


def ship(world: World) -> None:
    """Copy what users need into the package: float16 weights, and the three public splits with their truth."""
    import torch
    from diffusers import DiffusionPipeline

    target = Path(world.ship_dir) if world.ship_dir else DATA
    target.mkdir(parents=True, exist_ok=True)
    taken = {
        r["prompt"] for split in ("scorer", "judge") for r in _read(world, split, ["prompt"])
    }  # scorers memorise what they learned from
    for split in SPLITS:
        rows = _read(world, split, ["id", "prompt", "split", "image", "attributes", "claimed", "joints", "visible", "parts"])
        for r in rows:
            reword(r, taken)
            r["truth"] = json.dumps({"attributes": json.loads(r.pop("attributes")), "claimed": r.pop("claimed")})
        pq.write_table(pa.Table.from_pylist(rows), target / f"{split}.parquet", compression="zstd")
    pipe = DiffusionPipeline.from_pretrained(_folder(world, "base/pipeline")).to(torch.float16)
    shutil.rmtree(target / "base", ignore_errors=True)
    pipe.save_pretrained(target / "base")
    _load_in_float32(target / "base/text_encoder/config.json")
    for part in ("preference", "judge", "reader", "rater_reader"):
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(_folder(world, f"{part}/model"), target / part)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 2**20
    print(f"wrote {target}: {size:.1f} MB")


def _load_in_float32(config: Path) -> None:
    """transformers loads weights in the type that their config names, diffusers in float32: a pipeline of both must agree."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def measure_world(world: World) -> None:
    """Measure what was shipped and write `quality.json` and the sheets of base samples into the output folder."""
    from limner.figures.assets import find
    from limner.figures.lessons import load_lessons
    from limner.figures.quality import measure
    from limner.models.stable_diffusion import load_pipeline
    from limner.scorers.dual import load_scorer
    from limner.scorers.reader import load_reader

    held_out, data = load_lessons(shards(_folder(world, "images/raters"))), Path(world.ship_dir) if world.ship_dir else DATA
    scorers = {name: load_scorer(find(name, data), name) for name in ("preference", "judge")}
    base, reader = load_pipeline(str(find("base", data))), load_reader(find("reader", data))
    found = measure(base, reader, scorers, held_out, Path(world.output_dir), data)
    (Path(world.output_dir) / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    for part, numbers in found.items():
        for name, n in numbers.items():
            print(f"{part}: {name} {n['value']:.3f} ({n['low']:.3f} to {n['high']:.3f}, n {n['n']})")
