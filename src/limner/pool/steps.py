"""The folder-to-folder steps that make images: prompts, pool (and generate, which is a pool of an adapted model), reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from limner import seeds
from limner.engine import Progress, run_shards, spans
from limner.images import bucket_sizes, choose_bucket, decode, encode_png, fit_to, image_size, to_tensor
from limner.models.stable_diffusion import Pipeline
from limner.pool import sample
from limner.recipe import Data, Sampler
from limner.records import Image, Prompt, Score, to_table
from limner.store import Rows, input_hash, open_step, read_manifest, read_rows

Select = Callable[[list[Image]], tuple[set[str], list[Score]]]
LATENTS = pa.schema([("image_id", pa.string()), ("latents", pa.binary()), ("shape", pa.list_(pa.int64()))])


def prompts_config(data: Data, source: str, seed: int) -> dict[str, Any]:
    """What decides how a split is materialised, apart from its rows."""
    return {
        "source": source, "resolution": data.resolution, "crop": data.crop, "aspect_buckets": data.aspect_buckets, "seed": seed,
        "caption_column": data.caption_column, "image_column": data.image_column,
    }  # fmt: skip


def write_prompts(
    read: Callable[[], Iterable[Prompt]], data: Data, folder: Path, seed: int, source: str, limit: int = 0, per_shard: int = 256,
    where: Callable[[str], str] = "image of {}".format,
) -> None:  # fmt: skip
    """Materialise a split: captions, and real images cut once to the training size (so that nothing later crops).

    Args:
        read: gives the prompts, from their beginning; called twice, so that photos need not fit into memory.
        where: the prompt of an id to where it stands, for messages.

    Raises:
        ValueError: an image cannot be read.
    """
    bucket_sizes(data.resolution, data.aspect_buckets)  # mistakes are said where there is no image to cut, too
    texts, with_image = [], 0
    for prompt in read():
        texts.append(prompt.text)
        with_image += prompt.image is not None
    config = {**prompts_config(data, source, seed), "rows": len(texts)}
    step = open_step(folder, "prompts", config, {"texts": f"{seeds.seed_of(*texts):016x}"})
    prompts, at = iter(read()), 0

    def work(_: int, span: range, progress: Progress) -> dict[str, pa.Table]:
        nonlocal at
        rows = []
        for prompt in islice(prompts, span.start - at, span.stop - at):
            rows.append(cut(prompt, data, seed, where))
            progress(1)
        at = span.stop
        return {"part": to_table(Prompt, rows)}

    if run_shards(step, spans(len(texts), per_shard), work, units=len, name=f"prompts {folder.name}"):
        step.finish({"prompts": len(texts), "limit": limit, "with_image": with_image})


def cut(prompt: Prompt, data: Data, seed: int, where: Callable[[str], str]) -> Prompt:
    """A prompt with its real image, if it has one, cut to the training size of its aspect bucket.

    Raises:
        ValueError: the image cannot be read, or not be cut; begins with `where` the prompt of that id stands.
    """
    if prompt.image is None:
        return prompt
    try:
        picture = decode(prompt.image, "the image")
        width, height = choose_bucket(picture.size, bucket_sizes(data.resolution, data.aspect_buckets))
        if picture.size == (width, height) and prompt.image.startswith(b"\x89PNG"):
            return prompt
        rng = np.random.default_rng(seeds.seed_of(seed, "crop", prompt.id))
        fitted = fit_to(picture, width, height, data.crop, rng)
    except ValueError as error:
        raise ValueError(f"{where(prompt.id)}: {error}") from error
    return replace(prompt, image=encode_png(to_tensor(fitted)))


def make_pool(
    pipeline: Pipeline,
    prompts_folder: Path,
    folder: Path,
    *,
    kind: str,
    sampler: Sampler,
    images_per_prompt: int,
    guidance_scales: Sequence[float] = (),
    size: tuple[int, int],
    seed: int,
    prompts_per_shard: int = 32,
    limit: int = 0,
    select: Select | None = None,
    keep_all_latents: bool = False,
    model: str = "",
    drawn_by: str = "",
    part: tuple[int, int] = (0, 1),
) -> None:
    """Make `images_per_prompt` images of every prompt (of the first `limit`).

    Args:
        kind: pool or generate.
        guidance_scales: of each of a prompt's images; empty = the sampler's.
        size: (width, height) of the images of prompts that have no real one; others are as large as theirs.
        select: image rows of a shard to the ids whose latents are kept (those that a stage may pick), and the scores that say so, which
            are kept beside the images so that nobody asks for them again.
        model: identity of the weights; by default the pipeline's.
        drawn_by: of a pool: the stage whose model this is; keeps its images' ids apart from the base's.
        part: (i, n) of `--shard i/n`.
    """
    prompts = Rows(prompts_folder, Prompt, limit)
    config = {
        "sampler": _decides(sampler), "images_per_prompt": images_per_prompt, "size": list(size), "seed": seed,
        "model": model or pipeline.hash, "prompts_per_shard": prompts_per_shard, "prompts": len(prompts),
        "latents": "all" if keep_all_latents else "selected" if select else "none",
        "dtype": str(pipeline.dtype),
    }  # fmt: skip
    config |= {"guidance_scales": list(guidance_scales)} if guidance_scales else {}
    step = open_step(folder, kind, config, {"prompts": input_hash(prompts_folder)})
    scales: Sequence[float | None] = guidance_scales or [None] * images_per_prompt

    def work(_: int, span: range, progress: Progress) -> dict[str, pa.Table]:
        chosen = prompts.read(span.start, span.stop)
        sizes = [image_size(p.image) if p.image else size for p in chosen]
        requests = [sample.Request(p, k, w, h, scales[k]) for p, (w, h) in zip(chosen, sizes) for k in range(images_per_prompt)]
        made = sample.sample(pipeline, requests, sampler, seed, progress)
        rows = sample.rows(requests, made, sampler, seed, model or pipeline.hash, tag=drawn_by)
        keep, scores = select(rows) if select else ({r.id for r in rows} if keep_all_latents else set(), [])
        tables = {"part": to_table(Image, rows)}
        if scores:
            tables["scores"] = to_table(Score, scores)
        if keep:
            tables["latents"] = latents_table([(r.id, z) for r, (_, z) in zip(rows, made) if r.id in keep])
        return tables

    tasks = spans(len(prompts), prompts_per_shard)
    if run_shards(step, tasks, work, units=lambda p: len(p) * images_per_prompt, name=folder.name, part=part):
        step.finish({"images": len(prompts) * images_per_prompt, "prompts": len(prompts)})


def _decides(sampler: Sampler) -> dict[str, Any]:
    """A sampler without its batch size, which only changes how fast and with how much memory images are made."""
    return {k: v for k, v in asdict(sampler).items() if k != "batch_size"}


def make_reconstructions(
    pipeline: Pipeline, prompts_folder: Path, folder: Path, *, timesteps: Sequence[int], sampler: Sampler, seed: int,
    prompts_per_shard: int = 32, limit: int = 0, part: tuple[int, int] = (0, 1),
) -> None:  # fmt: skip
    """SDRecon of every prompt's real image at each timestep; latents are kept (there are few).

    Raises:
        ValueError: a prompt has no real image, or a timestep lies outside the schedule.
    """
    prompts = Rows(prompts_folder, Prompt, limit)
    if read_manifest(prompts_folder)["counts"]["with_image"] < len(prompts):
        bare = next(p.id for p in read_rows(prompts_folder, Prompt) if p.image is None)
        raise ValueError(f"reconstruct: prompt {bare} has no real image; give data.train a source with images")
    config = {
        "sampler": _decides(sampler), "timesteps": sorted(timesteps), "seed": seed, "model": pipeline.hash, "prompts": len(prompts),
        "prompts_per_shard": prompts_per_shard, "dtype": str(pipeline.dtype),
    }  # fmt: skip
    step = open_step(folder, "reconstruct", config, {"prompts": input_hash(prompts_folder)})

    def work(_: int, span: range, progress: Progress) -> dict[str, pa.Table]:
        chosen = prompts.read(span.start, span.stop)
        rows: list[Image] = []
        latents: list[tuple[str, Tensor]] = []
        by_size: dict[tuple[int, int], list[Prompt]] = {}
        for p in chosen:
            by_size.setdefault(image_size(p.image or b""), []).append(p)
        for t in sorted(timesteps):
            for (width, height), same in by_size.items():
                real = torch.stack([to_tensor(decode(p.image or b"", p.id)) for p in same])
                made = sample.reconstruct(pipeline, same, real, t, sampler, seed, progress)
                requests = [sample.Request(p, 0, width, height) for p in same]
                new = sample.rows(requests, made, sampler, seed, pipeline.hash, t, tag=f"t{t}")
                rows += new
                latents += [(r.id, z) for r, (_, z) in zip(new, made)]
        return {"part": to_table(Image, rows), "latents": latents_table(latents)}

    tasks = spans(len(prompts), prompts_per_shard)
    if run_shards(step, tasks, work, units=lambda p: len(p) * len(timesteps), name=folder.name, part=part):
        step.finish({"images": len(prompts) * len(timesteps), "timesteps": sorted(timesteps)})


def latents_table(latents: Sequence[tuple[str, Tensor]]) -> pa.Table:
    """(image id, latents (C, h, w)) pairs as a table of `LATENTS`."""
    rows: list[dict[str, Any]] = [{"image_id": i, "latents": z.contiguous().numpy().tobytes(), "shape": list(z.shape)} for i, z in latents]
    return pa.Table.from_pylist(rows, schema=LATENTS)
