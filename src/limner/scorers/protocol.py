"""The one protocol of everything that turns images and prompts into numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


class Scorer(Protocol):
    """Images and prompts in, one number each out.

    Batch size and batch mates change a score by less than 1e-5 of its size.

    Attributes:
        name: as in the recipe.
        range: smallest and largest score that can occur.
        higher_is_better: the direction.
        comparable_across_prompts: whether scores of different prompts may be compared or averaged.
        needs_prompt: whether the prompt is read.
        revision: SHA-256 (16 digits) of the weights, behind `metric@` where one file serves several metrics.
    """

    name: str
    range: tuple[float, float]
    higher_is_better: bool
    comparable_across_prompts: bool
    needs_prompt: bool
    revision: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to scores (B,), float32."""
        ...


class PictureScorer(Scorer, Protocol):
    """A scorer that takes decoded pictures of unequal sizes in one batch, or that may have no answer; not all do."""

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float | str]:
        """Of each RGB picture its score, or the reason why there is none."""
        ...


class Reads:
    """How many tokens of a prompt a scorer reads: its attribute `reads`, where it cuts longer prompts."""

    def __init__(self, limit: int, tokenizer: Any, prefix: str = ""):
        """prefix: put before every prompt."""
        self.limit, self._tokenizer, self._prefix, self._long = limit, tokenizer, prefix, dict[str, bool]()

    def count_long(self, prompts: Iterable[str], who: str = "the scorer", stacklevel: int = 2) -> int:
        """How many distinct prompts are longer than that.

        Warns:
            UserWarning: how many of those that were not counted before.
        """
        distinct = set(prompts)
        new = distinct - self._long.keys()
        self._long |= {p: len(tokens(self._tokenizer, self._prefix + p)) > self.limit for p in new}
        if cut := sum(self._long[p] for p in new):
            message = f"{cut} of {len(new)} prompts are longer than the {self.limit} tokens that {who} reads; their ends are cut"
            warnings.warn(message, stacklevel=stacklevel + 1)
        return sum(self._long[p] for p in distinct)


def tokens(tokenizer: Any, text: str) -> list[int]:
    """A text's ids from start to end token, however many."""
    return list(tokenizer(text, truncation=False, verbose=False).input_ids)


def parts_of(scorers: Iterable[Any]) -> list[Any]:
    """The scorers that are asked: of a sum its parts."""
    return [part for s in scorers for part in getattr(s, "parts", [s])]


def count_long(scorers: Iterable[Any], prompts: Iterable[str]) -> dict[str, int]:
    """Of each scorer (of a sum: of its parts) that cuts any of the distinct prompts how many.

    Warns:
        UserWarning: the count; here, and not again at every batch.
    """
    distinct, found = set(prompts), dict[str, int]()
    for scorer in parts_of(scorers):
        if scorer.needs_prompt and (reads := getattr(scorer, "reads", None)) and (long := reads.count_long(distinct, scorer.name)):
            found[scorer.name] = long
    return found


def describe(scorer: Scorer) -> dict[str, Any]:
    """What a manifest keeps of a scorer: what its numbers mean, and the SHA-256 of the files that made them."""
    return {
        "revision": scorer.revision, "metric": getattr(scorer, "metric", ""), 
        "range": [float(f"{x:.6g}") if math.isfinite(x) else None for x in scorer.range],
        "higher_is_better": scorer.higher_is_better, "comparable_across_prompts": scorer.comparable_across_prompts,
        "needs_prompt": scorer.needs_prompt, "files": dict(getattr(scorer, "files", {})),
    }  # fmt: skip


def checked_prompts(name: str, metric: str, prompts: Sequence[str | None] | None, count: int) -> list[str]:
    """The prompts of `count` images.

    Raises:
        ValueError: one is missing, or there is another number of them; names the scorer and the image.
    """
    found = [p for p in prompts or () if p is not None]
    if prompts is None or len(found) < len(prompts):
        at = "" if prompts is None else f" (image {list(prompts).index(None)} has none)"
        raise ValueError(f"scorer {name}: {metric} needs a prompt for every image{at}; give one, or choose a scorer without")
    if len(found) != count:
        raise ValueError(f"scorer {name}: {count} images but {len(found)} prompts; expected one each")
    return found
