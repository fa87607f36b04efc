"""A study: what is looked at, by whom, how often. One YAML file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from limner.config import build, read_yaml, to_dict
from limner.feedback.payloads import QUESTIONS


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
        address: what links begin with where that is not host and port: behind a proxy, say, https://rate.example.org.
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
    address: str = ""
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


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study and apply overrides such as `--server.port 9000`. A relative path in it is relative to the working directory.

    Raises:
        ValueError: no such file, not YAML, an unknown key, or a value that makes no sense; with the dotted path.
    """
    study = build(Study, read_yaml(path, "study", "task: rich"), overrides, str(path))
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
    """The text of the guidelines: what the study says, or the file that it names.

    Raises:
        ValueError: what looks like a file's name is none.
    """
    text = study.guidelines
    if isfile(text):  # also where the text is longer than any name may be
        return Path(text).read_text()
    if Path(text).suffix in (".txt", ".md") and not any(c.isspace() for c in text):
        raise ValueError(f"guidelines: {text}: no such file; name one, or write them here")
    return text
