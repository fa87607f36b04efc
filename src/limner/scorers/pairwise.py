"""`limner scorer judge`: a vision-language model compares two images of a prompt at a time, and its choices are rows like people's.

folder/part-00000.parquet        rows of `Choice`, two images each: what `scorer train`, `evaluate` and `export` read
folder/pairs-00000.parquet       every pair: how it was answered in either order, or why there is no answer (`PAIRS`)
folder/pairs.answers.jsonl       what was answered, as it arrived
folder/preferences/              images and their share of comparisons won: what a recipe's stage `from: feedback` reads
folder/report.json               counts, reasons, how the place an image is shown at decides, wins of one set over another

Each pair is asked in both orders, since models favour a place (MT-Bench, arXiv 2306.05685, section 3.3); the mean of both is the label, so
a model that goes by place alone gives ties.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from limner import seeds
from limner.engine import Progress, run_shards, spans
from limner.images import decode, in_threads
from limner.records import Choice, Image, to_table
from limner.scorers.backends import Backend, Journal
from limner.scorers.files import Source, files_hash, outside
from limner.scorers.judge import PAIRWISE, both_orders, png
from limner.scorers.rows import prompt_id
from limner.scorers.steps import write_preferences
from limner.statistics import bootstrap
from limner.store import open_step, read_rows, read_table, shards, write_atomic

# said_first, said_second: how far `first` was preferred (1, 0.5 or 0) when shown as image 1, and as image 2; null: no answer, see reason
PAIRS = pa.schema(
    [
        ("id", pa.string()), ("prompt_id", pa.string()), ("first", pa.string()), ("second", pa.string()), ("said_first", pa.float64()),
        ("said_second", pa.float64()), ("reason", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JudgePairs:
    """`limner scorer judge`.

    Args:
        images: a step's folder such as a pool, or images with captions in any format that `limner score --images` reads.
        against: the same; if set, each image is compared with the one at its place among the other set's of the prompt, instead of
            images of one set with each other.
        output_dir: where the choices are written; the same command goes on where it was stopped.
        backend: an endpoint such as http://localhost:8000/v1, or a model's folder.
        model: of an endpoint: as it calls it.
        device: of a local model.
        pairs_per_prompt: so many pairs of a prompt, drawn by lot (0 = all). Two questions each.
        seed: of the lot.
        prompt: of the images that have no caption.
        caption_column: its name in tables ("" = text, caption or prompt).
        image_column: its name in tables ("" = image or file_name).
        pairs_per_shard: how often work is saved (answers are kept one by one).
    """

    images: str = ""
    against: str = ""
    output_dir: str = ""
    backend: str = ""
    model: str = ""
    device: str = "auto"
    pairs_per_prompt: int = 0
    seed: int = 0
    prompt: str = ""
    caption_column: str = ""
    image_column: str = ""
    pairs_per_shard: int = 64


@dataclass(frozen=True)
class Shown:
    """An image of a pair: which source's, at which position, its id there, prompt, and what made it ("" = not known)."""

    source: int
    position: int
    name: str
    prompt_id: str
    text: str
    generator: str


Pair = tuple[Shown, Shown]
Both = tuple[float | str, float | str]  # how far the first image of a pair is preferred as image 1 and as image 2, or why that is not known


def plan(config: JudgePairs) -> tuple[list[Source], list[Pair], Counter[str]]:
    """What is to be compared: sources, pairs in the order of the images, and how many images take no part, by reason.

    Raises:
        ValueError: not one pair; rows that make no sense.
    """
    if not config.images:
        raise ValueError("images: not set; what is to be compared?")
    if config.pairs_per_prompt < 0 or config.pairs_per_shard < 1:
        raise ValueError(f"pairs_per_prompt, pairs_per_shard: {config.pairs_per_prompt}, {config.pairs_per_shard}; expected at least 0, 1")
    sources = [
        Source(path=Path(p), caption_column=config.caption_column, image_column=config.image_column, prompt=config.prompt.strip())
        for p in (config.images, config.against) if p
    ]  # fmt: skip
    groups: list[dict[str, list[Shown]]] = [{} for _ in sources]
    left = Counter[str]()
    for number, source in enumerate(sources):
        made, prefix = _generators(source.path), ("", "") if len(sources) == 1 else ("images/", "against/")
        for position, image in enumerate(source.images()):
            if not image.text:
                left["no prompt"] += 1
                continue
            generator = made.get(image.id, "") or ("" if len(sources) == 1 else source.path.name)
            shown = Shown(number, position, prefix[number] + image.id, image.prompt_id, image.text, generator)
            groups[number].setdefault(prompt_id(image.text), []).append(shown)  # ids of prompts are each source's own
    pairs: list[Pair] = []
    for key in dict.fromkeys(k for group in groups for k in group):
        sides = [group.get(key, []) for group in groups]
        found = list(zip(*sides)) if len(sides) == 2 else list(combinations(sides[0], 2))
        alone = sum(map(len, sides)) - 2 * len(found) if len(sides) == 2 else len(sides[0]) * (not found)
        left["nothing to compare it with"] += alone
        if 0 < config.pairs_per_prompt < len(found):
            drawn = torch.randperm(len(found), generator=seeds.generator(config.seed, "judge", key))[: config.pairs_per_prompt]
            found = [found[i] for i in sorted(drawn.tolist())]
        pairs += [(a, b) for a, b in found]
    if not pairs:
        why = ", ".join(f"{n} images: {reason}" for reason, n in left.items() if n)
        raise ValueError(f"{config.images}: no two images of one prompt to compare ({why})")
    return sources, pairs, +left


def _generators(path: Path) -> dict[str, str]:
    """What made the images of a step's folder, by id."""
    found: dict[str, str] = {}
    for shard in shards(path) if path.is_dir() else []:
        if {"id", "model"} <= set(pq.read_schema(shard).names):
            table = pq.read_table(shard, columns=["id", "model"])
            found |= dict(zip(table.column("id").to_pylist(), table.column("model").to_pylist()))
    return found


def judge_pairs(config: JudgePairs, backend: Backend) -> dict[str, Any]:
    """Compare, write the choices, and return the report.

    Raises:
        ValueError: as `plan`; an endpoint that stays away (what was answered is kept); not one answer.
    """
    sources, pairs, left = plan(config)
    folder = Path(config.output_dir)
    for source in sources:
        outside(folder, source.path)
    decides = {
        "model": backend.model, "revision": backend.revision, "files": backend.files, "question": PAIRWISE.text,
        **{k: getattr(config, k) for k in ("pairs_per_prompt", "seed", "prompt", "caption_column", "image_column", "pairs_per_shard")},
        "pairs": len(pairs),
    }  # fmt: skip
    step = open_step(folder, "choices", decides, {n: files_hash(s.path) for n, s in zip(("images", "against"), sources)})
    journal = Journal(folder / "pairs.answers.jsonl", backend)

    def work(_: int, task: range, progress: Progress) -> dict[str, pa.Table]:
        asked = [pairs[i] for i in task]
        encoded = _encoded(sources, asked)
        answers = _answers(asked, encoded, backend, journal)
        progress(len(asked))
        rows, lines = [], []
        for number, (a, b), (one, other) in zip(task, asked, answers):
            reason = next((v for v in (one, other) if isinstance(v, str)), None)
            said = (None, None) if reason else (one, other)
            lines.append([f"judge-{number:07d}", a.prompt_id, a.name, b.name, *said, reason])
            if not isinstance(one, str) and not isinstance(other, str):
                share = (one + other) / 2
                rows.append(Choice(
                    id=f"judge-{number:07d}", prompt_id=prompt_id(a.text), text=a.text, kind="choice", said=(share, 1 - share),
                    files=(a.name, b.name), images=(encoded[a], encoded[b]), rater=backend.model,
                    generators=(a.generator, b.generator) if a.generator and b.generator else (),
                ))  # fmt: skip
        return {"part": to_table(Choice, rows), "pairs": pa.Table.from_pylist([dict(zip(PAIRS.names, x)) for x in lines], schema=PAIRS)}

    run_shards(step, spans(len(pairs), config.pairs_per_shard), work, units=len, name="judge")
    report = {**summary([r for p in shards(folder, "pairs") for r in read_table(p).to_pylist()], bool(config.against)), "left_out": left}
    if not report["judged"]:
        why = "; ".join(f"{count}: {reason}" for reason, count in report["missing"].items())
        raise ValueError(f"{config.images}: not one pair has an answer ({why}); what was answered is in {folder}")
    write_preferences(folder / "preferences", *_preferences(folder, pairs))
    write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    step.finish({k: report[k] for k in ("pairs", "judged", "ties")})
    return report


def _encoded(sources: Sequence[Source], pairs: Sequence[Pair]) -> dict[Shown, bytes]:
    """The files of the images of some pairs."""
    found: dict[Shown, bytes] = {}
    for number, source in enumerate(sources):
        wanted = {s.position: s for pair in pairs for s in pair if s.source == number}
        last = max(wanted, default=-1)
        for position, image in enumerate(source.images(1, frozenset(wanted))):
            if position in wanted:
                found[wanted[position]] = image.image
            if position >= last:
                break
    return found


def _answers(
    pairs: Sequence[Pair], encoded: dict[Shown, bytes], backend: Backend, journal: Journal
) -> list[tuple[float | str, float | str]]:
    """Of each pair what was said in both orders, or why nothing was."""

    def shown(item: tuple[Shown, bytes]) -> bytes | str:
        try:
            return png(decode(item[1], item[0].name))
        except ValueError as error:
            return str(error)

    files = dict(zip(encoded, in_threads(shown, list(encoded.items()))))
    problems = [next((p for p in (files[a], files[b]) if isinstance(p, str)), "") for a, b in pairs]
    sound = [
        (x, y, a.text) for a, b in pairs if not isinstance(x := files[a], str) and not isinstance(y := files[b], str)
    ]  # fmt: skip
    answered = iter(both_orders(backend, journal, *map(list, zip(*sound))) if sound else [])
    return [(problem, problem) if problem else next(answered) for problem in problems]


def summary(lines: Sequence[dict[str, Any]], sets: bool) -> dict[str, Any]:
    """Counts, reasons, and what place does.

    Args:
        lines: rows of `PAIRS`.
        sets: the first image of each pair is of one set and the second of another.

    Returns:
        pairs, prompts, judged, ties, missing (pairs by reason); first_place: share of answers for the image shown first, 0.5 without any
        bias; same_in_both_orders: share of pairs whose answer does not turn with the order; wins: share of pairs that the first set wins.
        Shares have bootstrap intervals over prompts, ties count one half.
    """
    answered = [x for x in lines if x["reason"] is None]
    known, prompts = [(x["said_first"], x["said_second"]) for x in answered], [x["prompt_id"] for x in answered]
    out: dict[str, Any] = {
        "pairs": len(lines), "prompts": len({x["prompt_id"] for x in lines}), "judged": len(known),
        "ties": sum(a + b == 1 for a, b in known), "missing": dict(Counter(x["reason"] for x in lines if x["reason"]).most_common()),
        "first_place": _share([(a + 1 - b) / 2 for a, b in known], prompts),
        "same_in_both_orders": _share([float(a == b) for a, b in known], prompts),
    }  # fmt: skip
    return out | ({"wins": _share([(a + b) / 2 for a, b in known], prompts)} if sets else {})


def _share(values: Sequence[float], prompts: Sequence[str]) -> dict[str, float | None] | None:
    """The mean of values of pairs, with an interval if there are two prompts; None of nothing."""
    sums: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts):
        of = sums.setdefault(prompt, [0.0, 0.0])
        of[0], of[1] = of[0] + value, of[1] + 1
    if len(sums) < 2:
        return {"value": sum(values) / len(values), "low": None, "high": None, "n": len(values)} if values else None
    found = bootstrap(np.array(list(sums.values())), lambda x: float(x[:, 0].sum() / x[:, 1].sum()))
    return {"value": found.value, "low": found.low, "high": found.high, "n": len(values)}


def _preferences(folder: Path, pairs: Sequence[Pair]) -> tuple[Iterator[Image], dict[str, float]]:
    """Images that were compared, and the share of its comparisons that each won."""
    shares: dict[str, list[float]] = {}
    for table in (read_table(p) for p in shards(folder, "pairs")):
        for line in table.to_pylist():
            if line["reason"] is None:
                share = (line["said_first"] + line["said_second"]) / 2
                shares.setdefault(line["first"], []).append(share)
                shares.setdefault(line["second"], []).append(1 - share)
    shown = {s.name: s for pair in pairs for s in pair}

    def images() -> Iterator[Image]:
        done = set[str]()
        for row in read_rows(folder, Choice):
            for name, data in zip(row.files, row.images):
                if name not in done:
                    done.add(name)
                    of = shown[name]
                    yield Image(id=name, prompt_id=of.prompt_id, text=of.text, image=data, model=of.generator)

    return images(), {name: sum(values) / len(values) for name, values in shares.items()}
