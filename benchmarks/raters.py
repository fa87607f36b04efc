"""Three simulated raters an image against one: how well heatmaps, words and ratings recover what is true of rendered figures.

    python benchmarks/raters.py --images 240         # needs the extra `figures`; the last line is JSON

Raters answer as in `limner annotate simulate`, without the server. `ratio` is the best single rater's heatmap correlation over that of
all three together; the intervals are of the difference all three minus the best single one, by a bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from limner import seeds
from limner.feedback import checks
from limner.feedback.richhf import tokens
from limner.feedback.simulate import Truth, answer, manner_of, recovery
from limner.feedback.study import Pictures, Study
from limner.figures.raters import rows
from limner.figures.truths import load_truth

RATERS = 3


def rate(images: int, seed: int) -> tuple[list[dict[str, Any]], list[Truth]]:
    """Payloads by kind of every rater and image (rater r of image i at i * RATERS + r), and the truths."""
    study = Study(output_dir="-", images=Pictures(source="-"), seed=seed)
    said, truths = list[dict[str, Any]](), list[Truth]()
    for n, row in enumerate(rows(0, images, seed)):
        truths.append(load_truth(row["truth"]))
        item = {"text": row["text"], "images": [{"token": "t"}]}
        for r in range(RATERS):
            rng = np.random.default_rng(seeds.seed_of(seed, "rater", r, n))
            payload = answer(study, item, [truths[-1]], manner_of(seed, r), rng)
            said.append(checks.interpret(study, payload, row["text"], {"t": row["id"]}))
            assert said[-1]["words"]["tokens"] == tokens(row["text"])
    return said, truths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    said, truths = rate(args.images, args.seed)

    def measured(which: np.ndarray, raters: list[int]) -> dict[str, float]:
        return recovery(said, [truths[i] for i in which], [[int(i) * RATERS + r for r in raters] for i in which])

    everything = np.arange(args.images)
    single = [measured(everything, [r]) for r in range(RATERS)]
    together = measured(everything, list(range(RATERS)))
    best = {k: max(range(RATERS), key=lambda r: single[r][k]) for k in together}
    rng, gains = np.random.default_rng(args.seed), {k: list[float]() for k in together}
    for _ in range(args.draws):
        which = rng.integers(args.images, size=args.images)
        all_of_them, alone = measured(which, list(range(RATERS))), {r: measured(which, [r]) for r in set(best.values())}
        for k in gains:
            gains[k].append(all_of_them[k] - alone[best[k]][k])
    result: dict[str, Any] = {
        "name": "raters",
        "images": args.images,
        "seed": args.seed,
        "ratio": single[best["heatmap"]]["heatmap"] / together["heatmap"],
    }
    for k in together:
        low, high = np.quantile(gains[k], [0.025, 0.975])
        result[k] = {"single": [round(s[k], 3) for s in single], "together": round(together[k], 3), "gain": [round(low, 3), round(high, 3)]}
        print(f"{k:8} single {result[k]['single']}  together {result[k]['together']}  gain {result[k]['gain']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
