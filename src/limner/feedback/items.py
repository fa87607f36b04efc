"""The items of a study, made of images: one, several of a prompt, or two side by side; in order, balanced, with gold."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from limner import inputs, seeds
from limner.feedback.study import Pictures, Study
from limner.records import Image, Score
from limner.store import is_complete, read_manifest, read_rows


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a rater answers at once: one image, several of a prompt, or two. Images are named; their pixels are read when shown.

    gold: the known answer; message: what raters are told of it.
    """

    key: str
    text: str
    images: tuple[str, ...]
    gold: dict[str, Any] | None = None
    message: str = ""


def iter_images(path: str, pixels: bool = True) -> Iterator[Image]:
    """Images of a step's folder, or of what `limner.inputs` reads: there the images of one caption belong together, numbered as they come.

    Args:
        path: of either.
        pixels: without them images are empty, and files are not read.

    Raises:
        ValueError: neither; a step's folder that holds no images or is not complete.
    """
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        counts: Counter[str] = Counter()
        for image in inputs.iter_images(folder, read=(lambda position: True) if pixels else None):
            prompt = image.prompt_id or image.id  # one without a caption stands alone
            yield replace(image, prompt_id=prompt, k=counts[prompt])
            counts[prompt] += 1
        return
    if not is_complete(folder):
        raise ValueError(f"{path} is not complete; run the step that makes it to its end first")
    if read_manifest(folder)["kind"] == "prompts":
        raise ValueError(f"{path} holds prompts; expected a step that makes images, such as pool or generate")
    for image in read_rows(folder, Image):
        yield image if pixels else replace(image, image=b"")


def study_images(study: Study, pixels: bool = True) -> Iterator[tuple[str, Image]]:
    """All images of a study with their source, `from` or `against`. Two models' folders name their images alike: one of `against` whose id
    occurs in `from` is called against/<id>.

    Raises:
        ValueError: as `iter_images`; an id that is twice in a source.
    """
    first = set[str]()
    for source, path in (("from", study.images.source), ("against", study.images.against)):
        own = set[str]()
        for image in iter_images(path, pixels) if path else ():
            if image.id in own:
                raise ValueError(f"{path}: image id {image.id} is there twice")
            own.add(image.id)
            yield source, replace(image, id=f"against/{image.id}") if image.id in first else image
        first = own


def images_of(study: Study, wanted: Container[str]) -> Iterator[Image]:
    """The images of a study whose ids are wanted, as they came, each once.

    Raises:
        ValueError: as `study_images`.
    """
    for _, image in study_images(study):
        if image.id in wanted:
            yield image


def make_items(study: Study) -> tuple[list[Item], dict[str, int]]:
    """The items of a study in the order in which they are given out, and how many were left out and why.

    Images of side-by-side items: the one from `from` first.

    Raises:
        ValueError: nothing is left, gold about an image that is not shown, or a file that cannot be read.
    """
    named: dict[str, list[Image]] = {"from": [], "against": []}
    for source, image in study_images(study, pixels=False):
        named[source].append(image)
    dropped: dict[str, int] = {}
    found = {"rich": _single, "choice": _groups, "side": _sides}[study.task](study, named["from"], named["against"], dropped)
    gold = _read_gold(study)
    if missing := sorted(gold.keys() - {i.key for i in found}):
        raise ValueError(f"{study.gold.source}: {missing[0]!r} is no item of this study ({len(missing)} such)")
    golden = [replace(i, gold=gold[i.key]["answer"], message=str(gold[i.key].get("message", ""))) for i in found if i.key in gold]
    plain = [i for i in found if i.key not in gold]
    rng = np.random.default_rng(seeds.seed_of(study.seed, "study"))
    if study.order == "random":
        plain = [plain[i] for i in rng.permutation(len(plain))]
    if study.images.balance:
        plain = _balanced(plain, study.images, rng, dropped)
    if study.images.limit and len(plain) > study.images.limit:
        dropped["beyond images.limit"] = len(plain) - study.images.limit
        plain = plain[: study.images.limit]
    if not plain:
        raise ValueError(f"no items: {', '.join(f'{why} ({n})' for why, n in dropped.items()) or 'all are gold'}")
    return plain + golden, dropped


def _single(study: Study, images: list[Image], _: list[Image], dropped: dict[str, int]) -> list[Item]:
    return [Item(key=i.id, text=i.text, images=(i.id,)) for i in images]


def _groups(study: Study, images: list[Image], _: list[Image], dropped: dict[str, int]) -> list[Item]:
    groups: dict[str, list[Image]] = {}
    for image in images:
        groups.setdefault(image.prompt_id, []).append(image)
    if few := sum(len(g) < 2 for g in groups.values()):
        dropped["fewer than 2 images of a prompt"] = few
    chosen = [g[: study.images.each] for g in groups.values() if len(g) > 1]
    return [Item(key=g[0].id, text=g[0].text, images=tuple(i.id for i in g)) for g in chosen]


def _sides(study: Study, images: list[Image], against: list[Image], dropped: dict[str, int]) -> list[Item]:
    other = {(i.prompt_id, i.k): i.id for i in against}
    found = [Item(key=i.id, text=i.text, images=(i.id, other[i.prompt_id, i.k])) for i in images if (i.prompt_id, i.k) in other]
    if len(found) < len(images):
        dropped["no image of the prompt in images.against"] = len(images) - len(found)
    return found


def _read_gold(study: Study) -> dict[str, dict[str, Any]]:
    if not study.gold.source:
        return {}
    found = {}
    for i, line in enumerate(Path(study.gold.source).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[str(row["image_id"])] = {**row, "answer": dict(row["answer"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{study.gold.source}: line {i}: expected an object with image_id and answer ({error})") from error
    return found


def _balanced(items: list[Item], images: Pictures, rng: np.random.Generator, dropped: dict[str, int]) -> list[Item]:
    """Items in turns from every combination of the columns' values, so that any beginning of the list is balanced; the rarest ends it."""
    columns = _read_columns(images)
    known = [i for i in items if i.key in columns]
    if len(known) < len(items):
        dropped["not in images.table"] = len(items) - len(known)
    valued = [i for i in known if all(columns[i.key].get(name) is not None for name in images.balance)]
    if len(valued) < len(known):  # no value is not a kind of its own: being rare it would end the list
        dropped["no value in images.table"] = len(known) - len(valued)
        known = valued
    cuts: dict[str, np.ndarray] = {}
    for name in images.balance:
        numbers = {v for i in known if isinstance(v := columns[i.key].get(name), int | float)}
        if len(numbers) > images.bins:
            values = [float(columns[i.key][name]) for i in known if isinstance(columns[i.key].get(name), int | float)]
            cuts[name] = np.quantile(values, np.linspace(0, 1, images.bins + 1)[1:-1])
    cells: dict[tuple, list[Item]] = {}
    for item in known:
        row = columns[item.key]
        cell = tuple(
            int(np.searchsorted(cuts[n], row[n])) if n in cuts and isinstance(row[n], int | float) else row[n] for n in images.balance
        )
        cells.setdefault(cell, []).append(item)
    names = sorted(cells, key=str)
    if not names:
        return []
    rounds = min(len(c) for c in cells.values())  # with a limit too: going on without the rarest would no longer be balanced
    chosen = [cells[names[k]][r] for r in range(rounds) for k in rng.permutation(len(names))]
    if len(chosen) < len(known):
        dropped["more of a kind than of the rarest"] = len(known) - len(chosen)
    return chosen


def _read_columns(images: Pictures) -> dict[str, Mapping[str, Any]]:
    """Rows of the table by image id."""
    path, rows = Path(images.table), list[dict[str, Any]]()
    if not path.exists():
        raise ValueError(f"images.table: there is no {path}")
    if (path / "manifest.json").is_file():
        scores: dict[str, dict[str, Any]] = {}
        for score in read_rows(path, Score):
            scores.setdefault(score.image_id, {"image_id": score.image_id})[score.scorer] = score.score
        rows = list(scores.values())
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{k: v if k == "image_id" else _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    elif path.suffix == ".jsonl":
        rows = list(_lines(path))
    elif path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        raise ValueError(f"images.table: {path}: expected .csv, .jsonl, .parquet or a folder of scores")
    for name in ("image_id", *images.balance):
        if not rows or not any(name in row for row in rows):
            raise ValueError(f"images.table: {path}: no column {name}; found {', '.join(rows[0]) if rows else 'no rows'}")
    return {str(row["image_id"]): row for row in rows if row.get("image_id") is not None}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for i, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"images.table: {path}: line {i}: expected an object ({error})") from error


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text or None
