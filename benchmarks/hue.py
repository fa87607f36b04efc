"""How much less hues turn with the statistics term: a run with it against the same run without, on images of equal prompts and seeds.

    limner run recipes/figures/hgdpo.yaml
    limner run recipes/figures/hgdpo.yaml --output_dir runs/without --stages.easy.learn.statistics_weight 0 ...  # of each stage that has it
    python benchmarks/hue.py runs/hgdpo runs/without --stage hard      # the last line is JSON

Takes what `generate` drew: an image of every test prompt, and more of those that diversity is measured on. Shifts are those of `evaluate`
(circular mean hue against base, degrees); the intervals come from a bootstrap over prompts. `ratio` is the shift with over the one without.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from limner.evaluation.distances import hue_vectors, mean_hue, signed_turn
from limner.images import decode_batch
from limner.records import Image
from limner.statistics import bootstrap
from limner.store import is_complete, read_rows

BATCH = 64


def hues(run: Path, split: str, model: str) -> dict[str, NDArray]:
    """The sum of the hue vectors of a prompt's images (2,), by prompt."""
    found: dict[str, NDArray] = {}
    for folder in (run / "generate" / split / model, run / "generate" / f"{split}-diversity" / model):
        if not is_complete(folder):
            raise SystemExit(f"{folder}: not drawn, or not to the end; `limner generate` draws it")
        images = list(read_rows(folder, Image))
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            for image, vector in zip(part, hue_vectors(decode_batch([i.image for i in part]))):
                found[image.prompt_id] = found.get(image.prompt_id, np.zeros(2)) + vector
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="with the term")
    p.add_argument("without", type=Path, help="without it")
    p.add_argument("--stage", default="hard")
    p.add_argument("--split", default="test")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    base, with_it, without = (
        hues(folder, args.split, model) for folder, model in ((args.run, "base"), (args.run, args.stage), (args.without, args.stage))
    )
    other = hues(args.without, args.split, "base")
    if base.keys() != other.keys() or any(not np.allclose(base[k], other[k], atol=0.02) for k in base):
        raise SystemExit(f"{args.run} and {args.without} have other base images: their prompts, seeds or samplers differ")
    rows = np.array([[base[k], with_it[k], without[k]] for k in base])

    def shift(x: NDArray, model: int) -> float:
        return abs(signed_turn(mean_hue(x[:, model]), mean_hue(x[:, 0])))

    found = {
        "with": bootstrap(rows, lambda x: shift(x, 1), args.seed), "without": bootstrap(rows, lambda x: shift(x, 2), args.seed),
        "less": bootstrap(rows, lambda x: shift(x, 2) - shift(x, 1), args.seed),
    }  # fmt: skip
    for name, n in found.items():
        print(f"{name:8} {n.value:.2f} ({n.low:.2f} to {n.high:.2f}) degrees, {n.n} prompts")
    print(json.dumps({"ratio": found["with"].value / found["without"].value, **{k: n._asdict() for k, n in found.items()}}))


if __name__ == "__main__":
    main()
