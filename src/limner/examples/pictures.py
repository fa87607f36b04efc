"""Where the pictures of candidates lie. Stages choose by numbers; only what was chosen is read, a shard at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from limner.records import Example
from limner.store import read_table

Place = tuple[Path, int]  # a shard and a row of it
OPEN_SHARDS = 8  # in memory at a time


class Pictures:
    """Images and latents by source and image id: what people saw may be another run's picture of the same id."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, str], Place] = {}
        self._latents: dict[tuple[str, str], Place] = {}
        self._open: OrderedDict[Path, pa.Table] = OrderedDict()

    def add_images(self, source: str, path: Path, ids: Iterable[str]) -> None:
        """The images of a shard, whose column is `image`; `source` as examples of it name it."""
        self._images |= {(source, id): (path, row) for row, id in enumerate(ids)}

    def add_latents(self, source: str, path: Path, ids: Iterable[str | None]) -> None:
        """The latents of a shard, in columns `latents` and `shape`; None: a row that has none."""
        self._latents |= {(source, id): (path, row) for row, id in enumerate(ids) if id is not None}

    def fill(self, example: Example) -> Example:
        """An example with its picture, and with its latents if any are kept."""
        key = (example.source, example.image_id)
        filled = replace(example, image=self._value(self._images[key], "image"))
        if place := self._latents.get(key):
            return replace(filled, latents=self._value(place, "latents"), shape=tuple(self._value(place, "shape")))
        return filled

    def _value(self, place: Place, column: str) -> Any:
        path, row = place
        if path not in self._open:
            self._open[path] = read_table(path)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[path].column(column)[row].as_py()
