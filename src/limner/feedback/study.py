"""A study: what is looked at, by whom, how often. One YAML file; and the items that it makes of images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import yaml

from limner import seeds
from limner.config import build, to_dict
from limner.feedback.payloads import QUESTIONS
from limner.inputs import iter_prompts
from limner.records import Image, Score
from limner.store import is_complete, read_manifest, read_rows


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Where images come from, and which of them are shown.

    Args:
        source: an image folder, a table, a parquet file, or the folder of a step that makes images. Written `from` in YAML.
        against: task side: the images to compare with, matched by prompt (and by k where there are several).
        each: task choice: images of a prompt in one item, at least 2.
        limit: items (0 = all).
        balance: columns of `table` whose combinations are to occur equally often, e.g. [photorealistic, category].
        table: .csv, .jsonl or .parquet with a column image_id, or a folder of scores (a column for each scorer): a judge's answers.
        bins: numbers with more than so many values are cut into so many equally large bins.
    """

    source: str = ""
    against: str = ""
    each: int = 4
    limit: int = 0
    balance: list[str] = field(default_factory=list)
    table: str = ""
    bins: int = 3


@dataclass(frozen=True, kw_only=True)
class Gold:
    """Items whose answer is known, mixed in for every rater, who is then told.

    Args:
        source: .jsonl with image_id and answer (as `checks.gold_error` reads it), and a message where there is one. `from` in YAML.
        every: after so many other items comes one.
    """

    source: str = ""
    every: int = 10


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where the page listens and what it lets pass.

    Args:
        host: 127.0.0.1 = only this machine.
        port: 0 = any free one.
        public: listen elsewhere than on this machine; needs an admin with a password.
        https: the page is reached by https only (behind a proxy, say): cookies are sent by no other way.
        session_hours: after so long raters sign in again.
        invitation_hours: so long an invitation can be used.
        attempts_per_minute: sign-ins and invitations tried, an address.
        requests_per_second: of one signed-in rater, in the long run; short bursts may be ten times that.
        max_body: bytes of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    public: bool = False
    https: bool = False
    session_hours: float = 72.0
    invitation_hours: float = 168.0
    attempts_per_minute: int = 20
    requests_per_second: float = 10.0
    max_body: int = 262_144


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study.

    Args:
        name: shown to raters.
        output_dir: database, images and what is made of the answers lie below it.
        task: rich (points, words, ratings), choice (best of several, or a ranking), side (two images side by side).
        images: what is shown.
        questions: task rich: which ratings are asked.
        answer: task choice: best or ranking.
        levels: task side: five (much better to much worse) or forced.
        overlap: raters an item.
        order: random or given.
        seed: of order, sampling and sides.
        gold: items with known answers.
        raters: names that get an invitation when the study is first served.
        guidelines: text, or a file of text, shown in the page. A line that starts with # is a heading, with - a list's item.
        lease_minutes: so long an item is kept for a rater who does nothing.
        database: "" = SQLite below output_dir, or a URL such as postgresql+psycopg://user@host/name.
        server: where the page listens.
    """

    name: str = "study"
    output_dir: str = ""
    task: Literal["rich", "choice", "side"] = "rich"
    images: Pictures = field(default_factory=Pictures)
    questions: list[str] = field(default_factory=lambda: list(QUESTIONS))
    answer: Literal["best", "ranking"] = "best"
    levels: Literal["five", "forced"] = "five"
    overlap: int = 3
    order: Literal["random", "given"] = "random"
    seed: int = 0
    gold: Gold = field(default_factory=Gold)
    raters: list[str] = field(default_factory=list)
    guidelines: str = ""
    lease_minutes: float = 30.0
    database: str = ""
    server: Server = field(default_factory=Server)


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


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study and apply overrides such as `--server.port 9000`. A relative path in it is relative to the working directory.

    Raises:
        ValueError: no such file, not YAML, an unknown key, or a value that makes no sense; with the dotted path.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise ValueError(f"no study {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected keys and values, such as `task: rich`")
    study = build(Study, values, overrides, str(path))
    problem = _problem(study)
    if problem:
        raise ValueError(f"{path}: {problem}")
    return study


def _problem(study: Study) -> str:
    """What types cannot say, or ""."""
    if not study.output_dir:
        return "output_dir: not set; database and answers lie below it"
    if not study.images.source:
        return "images.from: not set; a folder, a table or a step's folder"
    if study.task == "side" and not study.images.against:
        return "images.against: not set; task side compares with these"
    if study.task != "side" and study.images.against:
        return f"images.against: {study.images.against}; only task side compares, this is task {study.task}"
    if study.task == "choice" and not 2 <= study.images.each <= 9:
        return f"images.each: {study.images.each}; expected 2 to 9 images to choose from"
    if study.overlap < 1:
        return f"overlap: {study.overlap}; expected at least 1 rater an item"
    if study.images.bins < 2:
        return f"images.bins: {study.images.bins}; expected at least 2"
    if bool(study.images.balance) != bool(study.images.table):
        return "images.balance and images.table: one without the other; the table has the columns to balance"
    if unknown := [q for q in study.questions if q not in QUESTIONS]:
        return f"questions: {', '.join(unknown)}; expected some of {', '.join(QUESTIONS)}"
    if study.task == "rich" and not study.questions:
        return f"questions: empty; expected some of {', '.join(QUESTIONS)}"
    if study.gold.every < 1 or study.lease_minutes <= 0:
        return f"gold.every: {study.gold.every}, lease_minutes: {study.lease_minutes:g}; expected more than 0"
    if len(set(study.raters)) < len(study.raters) or not all(n.strip() and len(n) <= 80 for n in study.raters):
        return "raters: a name is empty, longer than 80 characters, or there twice"
    return ""


def identity(study: Study) -> dict[str, Any]:
    """What decides the items and what is asked of them: it must not change while a study runs. Plain values."""
    values = to_dict(study)
    for name in ("raters", "guidelines", "lease_minutes", "database", "server", "output_dir", "name"):
        values.pop(name)
    return dict(json.loads(json.dumps(values)))


def guidelines(study: Study) -> str:
    """The text of the guidelines: what the study says, or the file that it names."""
    text = study.guidelines
    return Path(text).read_text() if text and "\n" not in text and len(text) < 400 and Path(text).is_file() else text


def iter_images(path: str) -> Iterator[Image]:
    """Images of a step's folder, or of what `limner.inputs` reads.

    Raises:
        ValueError: neither; a step's folder that holds no images or is not complete.
    """
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        for prompt in iter_prompts(folder, "train", need_images=True):
            yield Image(id=prompt.id, prompt_id=prompt.id, text=prompt.text, image=prompt.image or b"")
        return
    if not is_complete(folder):
        raise ValueError(f"{path} is not complete; run the step that makes it to its end first")
    if read_manifest(folder)["kind"] == "prompts":
        raise ValueError(f"{path} holds prompts; expected a step that makes images, such as pool or generate")
    yield from read_rows(folder, Image)


def make_items(study: Study) -> tuple[list[Item], dict[str, int]]:
    """The items of a study in the order in which they are given out, and how many were left out and why.

    Images of side-by-side items: the one from `from` first.

    Raises:
        ValueError: nothing is left, gold about an image that is not shown, or a file that cannot be read.
    """
    named = [replace(i, image=b"") for i in iter_images(study.images.source)]
    ids = [i.id for i in named]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{study.images.source}: image id {next(i for i in ids if ids.count(i) > 1)} is there twice")
    dropped: dict[str, int] = {}
    found = {"rich": _single, "choice": _groups, "side": _sides}[study.task](study, named, dropped)
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


def _single(study: Study, images: list[Image], dropped: dict[str, int]) -> list[Item]:
    return [Item(key=i.id, text=i.text, images=(i.id,)) for i in images]


def _groups(study: Study, images: list[Image], dropped: dict[str, int]) -> list[Item]:
    groups: dict[str, list[Image]] = {}
    for image in images:
        groups.setdefault(image.prompt_id, []).append(image)
    if few := sum(len(g) < 2 for g in groups.values()):
        dropped["fewer than 2 images of a prompt"] = few
    chosen = [g[: study.images.each] for g in groups.values() if len(g) > 1]
    return [Item(key=g[0].id, text=g[0].text, images=tuple(i.id for i in g)) for g in chosen]


def _sides(study: Study, images: list[Image], dropped: dict[str, int]) -> list[Item]:
    other = {(i.prompt_id, i.k): i.id for i in iter_images(study.images.against)}
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
    cuts: dict[str, np.ndarray] = {}
    for name in images.balance:
        numbers = {v for i in known if isinstance(v := columns[i.key].get(name), int | float)}
        if len(numbers) > images.bins:
            values = [float(columns[i.key][name]) for i in known if isinstance(columns[i.key].get(name), int | float)]
            cuts[name] = np.quantile(values, np.linspace(0, 1, images.bins + 1)[1:-1])
    cells: dict[tuple, list[Item]] = {}
    for item in known:
        row = columns[item.key]
        cell = tuple(int(np.searchsorted(cuts[n], row[n])) if n in cuts and row.get(n) is not None else row.get(n) for n in images.balance)
        cells.setdefault(cell, []).append(item)
    names = sorted(cells, key=str)
    if not names:
        return []
    rounds = min(len(c) for c in cells.values()) if not images.limit else max(len(c) for c in cells.values())
    chosen = [cells[names[k]][r] for r in range(rounds) for k in rng.permutation(len(names)) if r < len(cells[names[k]])]
    if len(chosen) < len(known):
        dropped["more of a kind than of the rarest"] = len(known) - len(chosen)
    return chosen


def _read_columns(images: Pictures) -> dict[str, Mapping[str, Any]]:
    """Rows of the table by image id."""
    path, rows = Path(images.table), list[dict[str, Any]]()
    if (path / "manifest.json").is_file():
        scores: dict[str, dict[str, Any]] = {}
        for score in read_rows(path, Score):
            scores.setdefault(score.image_id, {"image_id": score.image_id})[score.scorer] = score.score
        rows = list(scores.values())
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    elif path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        raise ValueError(f"images.table: {path}: expected .csv, .jsonl, .parquet or a folder of scores")
    for name in ("image_id", *images.balance):
        if not rows or not any(name in row for row in rows):
            raise ValueError(f"images.table: {path}: no column {name}; found {', '.join(rows[0]) if rows else 'no rows'}")
    return {str(row["image_id"]): row for row in rows}


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
