"""What people chose: a `Choice` row read as shares or as pairs, and the folder of them that training and evaluation read.

folder/part-00000.parquet   rows of `records.Choice`; pictures in them, or in files below the folder that the manifest names
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from limner import seeds
from limner.images import decode
from limner.records import Choice, from_table, schema
from limner.store import is_complete, read_manifest, read_table, shards

KINDS = ("choice", "ranking")
OPEN_SHARDS = 8  # in memory at a time; rows of so many shards are mixed in an epoch's order
Pair = tuple[int, int, float]  # two images of a row, and how likely the first is preferred


def problem(row: Choice) -> str:
    """What is wrong with a row, in a few words; "" if nothing is."""
    count = len(row.files)
    if not row.text.strip():
        return "empty prompt"
    if count < 2:
        return "fewer than two images"
    if len(row.said) != count or (row.images and len(row.images) != count) or (row.generators and len(row.generators) != count):
        return "as many labels as images expected"
    if not all(math.isfinite(v) for v in row.said):
        return "label is not a number"
    if row.kind == "choice" and (min(row.said) < 0 or abs(sum(row.said) - 1) > 1e-4):
        return "labels do not sum to 1"
    return "" if row.kind in KINDS else f"unknown kind {row.kind}"


def shares(row: Choice) -> list[float]:
    """Each image's share of being the chosen one, sum 1; of a ranking the best ones share alike."""
    if row.kind == "choice":
        return list(row.said)
    best = [float(v == min(row.said)) for v in row.said]
    return [v / sum(best) for v in best]


def pairs(row: Choice) -> list[Pair]:
    """All pairs of which something is known.

    Of a choice p = a / (a + b) for shares a and b (Luce's axiom: what else there was to choose from does not matter), and nothing is
    known of two images that nobody chose. Of a ranking p is 1, 0, or 0.5 where ranks are equal.
    """
    found = []
    for i in range(len(row.said)):
        for j in range(i + 1, len(row.said)):
            a, b = row.said[i], row.said[j]
            if row.kind == "ranking":
                found.append((i, j, 0.5 if a == b else float(a < b)))
            elif a + b > 0:
                found.append((i, j, a / (a + b)))
    return found


class Choices:
    """The rows of a folder without their pictures (`rows`), and their pictures when asked for, a shard at a time."""

    def __init__(self, folder: Path, limit: int = 0, images: Path | None = None):
        """images: where files lie, if elsewhere than at import; limit: the first so many rows (0 = all).

        Raises:
            ValueError: not a finished folder of choices.
        """
        if not is_complete(folder) or read_manifest(folder).get("kind") != "choices":
            raise ValueError(f"{folder} is not a finished folder of choices; make it with `limner scorer import`")
        self.folder = folder
        self.root = images or Path(read_manifest(folder)["config"].get("images") or ".")
        self.rows: list[Choice] = []
        self._at: list[tuple[int, int]] = []
        self._paths = shards(folder)
        self._open: OrderedDict[int, list[tuple[bytes, ...]]] = OrderedDict()
        columns = [n for n in schema(Choice).names if n != "images"]
        for number, path in enumerate(self._paths):
            found = from_table(Choice, pq.read_table(path, columns=columns), str(path))
            self.rows += found
            self._at += [(number, i) for i in range(len(found))]
        self.rows = self.rows[: limit or None]

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, index: int) -> list[bytes]:
        """The encoded pictures of a row.

        Raises:
            ValueError: a file that is not there; names the row.
        """
        shard, row = self._at[index]
        if shard not in self._open:
            table = read_table(self._paths[shard], ["images"])
            self._open[shard] = [tuple(v) for v in table.column("images").to_pylist()]
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        if found := self._open[shard][row]:
            return list(found)
        return [_read(self.root / name, f"{self.folder}: row {self.rows[index].id}") for name in self.rows[index].files]

    def decode(self, index: int, encoded: Sequence[bytes]) -> list[Image.Image]:
        """The pictures of a row from their encoded bytes, RGB.

        Raises:
            ValueError: a picture that cannot be decoded; names row and file.
        """
        return [self.decode_one(index, k, data) for k, data in enumerate(encoded)]

    def decode_one(self, index: int, k: int, data: bytes) -> Image.Image:
        """A row's k-th picture from its encoded bytes; as `decode`."""
        row = self.rows[index]
        return decode(data, f"{self.folder}: row {row.id}: {row.files[k]}")

    def pictures(self, index: int) -> list[Image.Image]:
        """`decode` of `encoded`."""
        return self.decode(index, self.encoded(index))

    def order(self, *key: int | str) -> list[int]:
        """Every row once, in an order decided by the key: blocks of `OPEN_SHARDS` shards by lot, and rows by lot within each."""
        g = seeds.generator(*key)
        blocks: dict[int, list[int]] = {}
        shuffled = torch.randperm(len(self._paths), generator=g).tolist()
        for index in range(len(self.rows)):
            blocks.setdefault(shuffled[self._at[index][0]] // OPEN_SHARDS, []).append(index)
        out: list[int] = []
        for block in sorted(blocks):
            rows = blocks[block]
            out += [rows[i] for i in torch.randperm(len(rows), generator=g).tolist()]
        return out


class Looks:
    """The pictures of some rows, equal ones once. places: of each row, which of them are its images."""

    def __init__(self, choices: Choices, indices: Sequence[int]):
        self.choices = choices
        self.first: dict[bytes, tuple[int, int]] = {}  # encoded picture to the row, and which of its images, where it first stands
        self.places: list[list[int]] = []
        number: dict[bytes, int] = {}
        for index in indices:
            encoded = choices.encoded(index)
            for k, data in enumerate(encoded):
                self.first.setdefault(data, (index, k))
            self.places.append([number.setdefault(data, len(number)) for data in encoded])

    def decode(self) -> list[Image.Image]:
        return [self.choices.decode_one(index, k, data) for data, (index, k) in self.first.items()]


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: {path} cannot be read ({error.strerror}); set images to the folder that files are named from") from None


def generators_of(rows: Sequence[Choice]) -> set[str]:
    """Every generator that made an image of the rows."""
    return {g for row in rows for g in row.generators}


def prompt_weights(rows: Sequence[Choice]) -> np.ndarray:
    """1 over the number of rows with a row's prompt, times the row's own weight, (N,): what PickScore's num_example_per_prompt gives."""
    count: dict[str, int] = {}
    for row in rows:
        count[row.prompt_id] = count.get(row.prompt_id, 0) + 1
    return np.array([row.weight / count[row.prompt_id] for row in rows])
