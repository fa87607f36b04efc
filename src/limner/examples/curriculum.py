"""Numbers become examples: sources, picks and filters of a curriculum's stages (HG-DPO, arXiv 2405.20216, eq. 3, 7-9)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from limner.engine import Progress, run_shards
from limner.examples.pictures import Pictures
from limner.recipe import Source, Stage
from limner.records import Example, Image, Prompt, Row, Score, from_table, to_table
from limner.scorers.combine import dominates
from limner.scorers.steps import FEEDBACK  # also the name of the source: what raters or a judge saw
from limner.store import input_hash, is_complete, open_step, read_manifest, read_rows, read_table, shards

SHARD = 256  # groups


@dataclass
class Candidates:
    """What a stage can choose from, in memory: prompts, images by source and prompt, scores by image id.

    images: {"pool", "pool-easy", "reconstruction" or "feedback": {prompt id: images}}; scores: {(scorer, image id): score};
    stages: examples of earlier stages, {stage: {(group, role): example}}; pictures: where the bytes of those read by `load_candidates`
    lie, which are b"" here.
    """

    prompts: dict[str, Prompt]
    images: dict[str, dict[str, list[Image]]]
    scores: dict[tuple[str, str], float]
    stages: dict[str, dict[tuple[str, str], Example]] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=Pictures)


def load_candidates(prompts: Path, sources: Mapping[str, Path], scores: Sequence[Path], stages: Mapping[str, Path]) -> Candidates:
    """Read the folders that stages choose from, without the pictures; `stages` are the example folders of earlier ones."""
    pictures = Pictures()
    known: dict[str, Prompt] = {}
    for path, part, there in _read_without(prompts, Prompt, "image"):
        known |= {p.id: replace(p, image=b"" if has else None) for p, has in zip(part, there)}
        pictures.add_images("real", path, [f"{p.id}/real" for p in part])
    images: dict[str, dict[str, list[Image]]] = {}
    for name, folder in sources.items():
        groups, source = images.setdefault(name, {}), name.partition("-")[0]  # pool-easy is a pool
        for path, some, _ in _read_without(folder, Image, "image"):
            for image in some:
                groups.setdefault(image.prompt_id, []).append(image)
            pictures.add_images(source, path, [i.id for i in some])
        for path in shards(folder, "latents"):
            pictures.add_latents(source, path, read_table(path, ["image_id"]).column("image_id").to_pylist())
    numbers = {(s.scorer, s.image_id): s.score for folder in scores for s in read_rows(folder, Score) if s.score is not None}
    earlier: dict[str, dict[tuple[str, str], Example]] = {}
    for name, folder in stages.items():
        found = earlier.setdefault(name, {})
        for path, examples, _ in _read_without(folder, Example, "image", "latents"):
            found |= {(e.group, e.role): e for e in examples}
            pictures.add_images(name, path, [e.image_id for e in examples])
            pictures.add_latents(name, path, [e.image_id if e.shape else None for e in examples])
    return Candidates(known, images, numbers, earlier, pictures)


def _read_without(folder: Path, kind: type[Row], image: str, *more: str) -> Iterator[tuple[Path, list[Row], list[bool]]]:
    """The shards of a folder: their rows, in which a column of pictures is b"" (further ones are left out), and whether there is one."""
    for path in shards(folder):
        table = read_table(path)
        there = table.column(image).is_valid().to_pylist()
        place = table.schema.get_field_index(image)
        empty = pa.array([b""] * len(table), pa.binary())
        yield path, from_table(kind, table.set_column(place, image, empty).drop_columns(list(more)), str(path)), there


def pick(source: Source, prompt_id: str, candidates: Candidates, role: str) -> Example | str:
    """The image that takes `role` for a prompt, as an example; or the reason why there is none.

    Ties go to the earlier image. Reconstructions are chosen among the source's timesteps.
    """
    c, prompt = candidates, candidates.prompts[prompt_id]
    new = partial(Example, group=prompt_id, role=role, text=prompt.text)
    if source.source in c.stages:
        known = c.stages[source.source]  # whose only image, where it compares none, is a target
        found = known.get((prompt_id, source.role)) or (known.get((prompt_id, "target")) if source.role == "winner" else None)
        return (
            replace(found, group=prompt_id, role=role, text=prompt.text, source=source.source)
            if found
            else f"no example of stage {source.source}"
        )
    if source.source == "real":
        if prompt.image is None:
            return "no real image"
        return new(image_id=f"{prompt_id}/real", image=prompt.image, source="real")
    images = c.images.get(source.key, {}).get(prompt_id, [])
    if source.source == "reconstruction":
        images = [i for i in images if i.timestep in source.t]
    if not images:
        return f"no image from {source.source}"
    by = source.by or (FEEDBACK if source.source == FEEDBACK else "")
    if not by:
        image, score = images[0], None
    else:
        scored = [(c.scores[by, i.id], n) for n, i in enumerate(images) if (by, i.id) in c.scores]
        if not scored:
            return f"no score by {by}"
        sign = 1 if source.pick == "best" else -1
        score, n = max(scored, key=lambda s: (sign * s[0], -s[1]))
        image = images[n]
    return new(image_id=image.id, image=image.image, score=score, source=source.source)


def build_stage(stage: Stage, candidates: Candidates, prompt_ids: Sequence[str]) -> tuple[list[Example], Counter[str]]:
    """Examples of a stage for the prompts, and how many groups were kept or dropped and why.

    A pair is dropped when a role has no image, when both roles are the same image, when the scores tie in an easy pair, or by
    the stage's `keep` rule: `winner_not_worse` keeps a pair whose winner scores at least as high as its loser (eq. 8); by `wins_on`, whose
    scorers must all find the winner at least as good, and one better.
    """
    counts: Counter[str] = Counter()
    examples: list[Example] = []
    by = next((s.by for s in (stage.winner, stage.loser) if s is not None and s.by), "")
    for prompt_id in prompt_ids:
        winner = pick(stage.winner, prompt_id, candidates, "winner" if stage.loser else "target")
        loser = pick(stage.loser, prompt_id, candidates, "loser") if stage.loser else None
        reason = _refusal(stage, winner, loser, candidates, by)
        counts[reason or "kept"] += 1
        if not reason:
            examples += [e for e in (winner, loser) if isinstance(e, Example)]
    return examples, counts


def _refusal(stage: Stage, winner: Example | str, loser: Example | str | None, candidates: Candidates, by: str) -> str:
    """Why a pair is dropped, or "" to keep it."""
    for role, found in (("winner", winner), ("loser", loser)):
        if isinstance(found, str):
            return f"{role}: {found}"
    if not isinstance(winner, Example) or not isinstance(loser, Example):
        return ""
    if winner.image_id == loser.image_id:
        return "winner and loser are the same image"
    if winner.source == loser.source and winner.score is not None and winner.score == loser.score:
        return "winner and loser score the same"
    if stage.keep == "winner_not_worse":
        first, second = (candidates.scores.get((by, e.image_id)) for e in (winner, loser))
        if first is None or second is None:
            return f"no score by {by}"
        if first < second:
            return "winner scores below loser"
    if stage.wins_on:
        known = candidates.scores
        for name in stage.wins_on:
            if (name, winner.image_id) not in known or (name, loser.image_id) not in known:
                return f"no score by {name}"
        if not dominates(*([known[n, e.image_id] for n in stage.wins_on] for e in (winner, loser))):
            return "winner does not win on all"
    return ""


def make_examples(
    name: str, stage: Stage, folder: Path, *, prompts: Path, sources: Mapping[str, Path], scores: Sequence[Path], stages: Mapping[str, Path]
) -> Counter[str]:
    """Write the examples of a stage; the manifest's counts say what was dropped and why.

    Raises:
        ValueError: nothing was kept; the message lists the reasons. The images are of other prompts; it names one of each.
    """
    inputs = {k: input_hash(v) for k, v in {"prompts": prompts, **sources, **{f"stage {k}": v for k, v in stages.items()}}.items()}
    inputs |= {f"scores {p.name}": input_hash(p) for p in scores}
    rule: dict[str, object] = {"winner": asdict(stage.winner), "loser": asdict(stage.loser) if stage.loser else None, "keep": stage.keep}
    rule |= {"wins_on": stage.wins_on} if stage.wins_on else {}
    step = open_step(folder, "examples", rule, inputs)

    if is_complete(folder):
        return Counter(read_manifest(folder)["counts"])
    candidates = load_candidates(prompts, sources, scores, stages)
    ids = [p for p in candidates.prompts if not sources or any(p in groups for groups in candidates.images.values())]
    if not ids:
        theirs = next((p for groups in candidates.images.values() for p in groups), "none")
        ours = next(iter(candidates.prompts), "none")
        raise ValueError(
            f"stage {name}: no image of {', '.join(sources)} belongs to a training prompt; those are {ours} ..., the images' {theirs} ..."
        )
    examples, counts = build_stage(stage, candidates, ids)
    if not counts["kept"]:
        raise ValueError(f"stage {name}: no example is left; dropped: {', '.join(f'{k} ({v})' for k, v in counts.items())}")

    def work(_: int, part: Sequence[Example], progress: Progress) -> dict[str, pa.Table]:
        filled = []
        for example in part:
            filled.append(candidates.pictures.fill(example))
            progress(1)
        return {"part": to_table(Example, filled)}

    a_shard = SHARD * (2 if stage.loser else 1)
    run_shards(step, [examples[i : i + a_shard] for i in range(0, len(examples), a_shard)], work, units=len, name=f"examples {name}")
    step.finish(dict(counts))
    return counts


def selectable(stages: Mapping[str, Stage], model: str = "") -> list[tuple[str, str]]:
    """(pick, scorer) of every stage that chooses from the pool of a model ("" = the base): only their latents need keeping."""
    found = [(s.pick, s.by) for stage in stages.values() for s in stage.sources if s.source == "pool" and s.model == model]
    return list(dict.fromkeys(found))
