"""What HPS on figures shows: who agrees with raters that nobody learned from, by how much, and how far there is to go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limner.evaluation.choices import EvaluateScorers, Scores, judge_scorer, score_choices, table
from limner.evaluation.sets import judge_sets
from limner.figures.candidates import REAL, Hps, hidden_quality, read_candidates
from limner.figures.choosers import by_lot, ceilings, fit_linear
from limner.images import decode_batch
from limner.records import Choice
from limner.scorers import dual
from limner.scorers.agreement import accuracy, accuracy_difference, judge
from limner.scorers.choices import Choices, generators_of
from limner.store import versions, write_atomic

AESTHETIC, DOMAIN, TOWER = "aesthetic head", "domain only", "contrastive tower"


def report(config: Hps, tower: Path, trained: Mapping[str, Path]) -> dict[str, Any]:
    """Measure everything on the test choices, write hps.json, print the table."""
    out = Path(config.output_dir)
    sets = {split: Choices(out / "choices" / split) for split in config.splits}
    rows = {split: choices.rows for split, choices in sets.items()}
    scorers = {TOWER: dual.load_scorer(tower, TOWER), **{name: dual.load_scorer(path, name) for name, path in trained.items()}}
    baselines = {AESTHETIC: _tower_features(sets, scorers[TOWER]), DOMAIN: _domain_features(rows)}
    scores: dict[str, Scores] = {s: score_choices(sets[s], list(scorers.values())) for s in ("validation", "test")}
    rng = np.random.default_rng([config.seed, 73])
    for name, features in baselines.items():
        vector = fit_linear(rows["train"], features["train"])
        for split, found in scores.items():
            found[name] = [by_lot(f @ vector, rng) for f in features[split]]
    how: dict[str, Any] = {"tie_policy": "drop", "average": "pairs", "seed": config.seed}
    policy, seen = EvaluateScorers(seed=config.seed), generators_of(rows["train"])
    result: dict[str, Any] = {"rows": len(rows["test"]), "tie_policy": "drop", "average": "pairs"}
    result["scorers"] = {
        name: judge_scorer(rows["test"], found, policy, seen=seen, held_out=(rows["validation"], scores["validation"][name]))
        for name, found in scores["test"].items()
    }
    candidates = {c["file"]: c for c in read_candidates(config, "test")}
    hidden = [np.array([hidden_quality(config, candidates[f]) for f in row.files]) for row in rows["test"]]
    result["ceilings"] = ceilings(rows["test"], hidden, config.noise, **how)
    judged = {name: judge(rows["test"], found) for name, found in scores["test"].items()}
    result["gains"] = {
        name: {f"over {other}": accuracy_difference(judged[name], judged[other], **how) for other in (TOWER, AESTHETIC, DOMAIN)}
        for name in trained
    }
    # pairs of one generator: of these its name says nothing
    result["within_generator"] = {name: accuracy(j.take(j.generators[:, 0] == j.generators[:, 1]), **how) for name, j in judged.items()}
    seen_as, classes = ({f: np.array(c[name]) for f, c in candidates.items()} for name in ("features", "classes"))
    real = np.array([c["features"] for c in candidates.values() if c["generator"] == REAL])
    result["sets"] = judge_sets(rows["test"], seen_as, classes, real, config.seed)
    write_atomic(out / "hps.json", json.dumps({**result, "versions": versions()}, indent=1) + "\n")
    print(table(result))
    c = result["ceilings"]
    print(f"one more rater {100 * c['single_rater']['value']:.1f}, hidden quality itself {100 * c['quality']['value']:.1f}")
    for name, gains in result["gains"].items():
        for other, g in gains.items():
            print(f"{name} {other}: {100 * g['value']:+.1f} points ({100 * g['low']:.1f} to {100 * g['high']:.1f})")
    return result


Features = dict[str, list[NDArray]]  # by split: (K, D) a row


@torch.no_grad()
def _tower_features(sets: Mapping[str, Choices], scorer: dual.DualScorer) -> Features:
    """The frozen tower's image vectors; a picture stands in many choices and is looked at once."""
    found: Features = {}
    for split, choices in sets.items():
        seen: dict[str, NDArray] = {}
        for i, row in enumerate(choices.rows):
            if any(file not in seen for file in row.files):
                seen |= zip(row.files, scorer.model.encode_images(decode_batch(choices.encoded(i))).numpy().astype(float))
        found[split] = [np.stack([seen[file] for file in row.files]) for row in choices.rows]
    return found


def _domain_features(rows: Mapping[str, Sequence[Choice]]) -> Features:
    """One-hot generators of training; one that it never saw is nothing at all."""
    names = sorted(generators_of(rows["train"]))
    return {split: [np.array([[float(g == n) for n in names] for g in row.generators]) for row in found] for split, found in rows.items()}
