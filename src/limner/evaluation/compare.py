"""From what was measured on each image to metrics.json. Nothing is generated, scored or read here: equal arrays give equal numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner import statistics
from limner.evaluation.distances import Projection, diversity, frechet, mean_hue, signed_turn
from limner.statistics import Interval
from limner.store import versions

# +1: higher is better, -1: lower is better, 0: neither by itself (HG-DPO's collapsed models are its sharpest). In the order of reports.
DIRECTION: dict[str, int] = {
    "frechet": -1, "frechet_ratio": -1, "attribute_accuracy": 1, "joint_plausibility": 1, "defect_rate": -1, "preference": 1, "judge": 1,
    "hue_shift": -1, "sharpness": 0, "diversity": 1,
}  # fmt: skip
PER_IMAGE = ("attribute_accuracy", "joint_plausibility", "defect_rate", "preference", "judge", "sharpness")
YES_OR_NO = ("joint_plausibility", "defect_rate")

Array = NDArray[np.float64]
Numbers = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What was measured on the n images of one model (one a prompt), in the same order of prompts and seeds for all models.

    Args:
        name: real, base or a stage's name.
        scores: metric of PER_IMAGE to (n,) numbers, NaN where there is no answer. attribute_accuracy: share of the caption's attributes
            that are right; joint_plausibility: 0 or 1; defect_rate: 0 or 1, or a probability (over 0.5 counts as a defect).
        features: (n, D), before projection.
        diversity_features: (P, 4, D), four seeds of each of P prompts.
        hue: (n, 2), `hue_vectors` of the images.
        images: encoded, for the report; not looked at here.
    """

    name: str
    scores: Mapping[str, NDArray] = field(default_factory=dict)
    features: NDArray | None = None
    diversity_features: NDArray | None = None
    hue: NDArray | None = None
    images: Sequence[bytes] | None = None


def compare(
    real: Measured | None,
    base: Measured,
    stages: Sequence[Measured],
    pca: Projection | None,
    circular: Collection[str],
    seed: int,
    command: str = "",
    reference: NDArray | None = None,
) -> dict[str, Any]:
    """The content of metrics.json.

    A metric that could not be measured is absent. `frechet` is the distance to `reference`, or without it to `real`,
    which then has none itself; `frechet_ratio` is a
    stage's over base's, drawn pairwise; `hue_shift` is against base. `differences` (stage - base, raw) and `wins` (share of prompts on
    which the stage is better; for sharpness: sharper; ties count half) are paired by prompt and seed.

    Args:
        pca: of a reference set of real images; None uses the features as they are.
        circular: metrics whose scorer selected training examples.
        seed: of bootstrap and subsampling draws.
        command: what was run.
        reference: features (n, D) of as many other real images, so that the row real shows how near real is to real.

    Raises:
        ValueError: a wrong or repeated name, an unknown metric, or models measured on different numbers of images.
    """
    everyone = [m for m in (real, base, *stages) if m is not None]
    _check(real, base, everyone, circular)
    models: dict[str, Numbers] = {}
    truth = reference if reference is not None else real.features if real else None
    for m in everyone:
        models[m.name] = {
            **(_distances(m, truth, base, pca, seed) if reference is not None or m is not real else {}),
            **{metric: _number(_one(metric, v)) for metric, v in _per_image(m).items() if len(v[np.isfinite(v)]) > 1},
            **_hue(m, base, seed),
            **_diversity(m),
        }
    return {
        "final": stages[-1].name if stages else base.name,
        "models": models,
        "wins": {m.name: _wins(m, base) for m in stages},
        "differences": {m.name: _differences(m, base) for m in stages},
        "circular": sorted(circular),
        "seed": seed,
        "command": command,
        "versions": versions(),
    }


def _check(real: Measured | None, base: Measured, everyone: Sequence[Measured], circular: Collection[str]) -> None:
    names = [m.name for m in everyone]
    if len(set(names)) != len(names) or base.name != "base" or (real is not None and real.name != "real"):
        raise ValueError(f"models {', '.join(names)}: expected real (if any), base and stages, each name once")
    if unknown := sorted({s for m in everyone for s in m.scores} - set(PER_IMAGE)) + sorted(set(circular) - set(DIRECTION)):
        raise ValueError(f"unknown metric {', '.join(unknown)}; known per image: {', '.join(PER_IMAGE)}")
    sizes = {
        f"{m.name} {k}": len(v) for m in everyone for k, v in {**m.scores, "features": m.features, "hue": m.hue}.items() if v is not None
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"models were measured on different images: {', '.join(f'{k}: {n}' for k, n in sizes.items())}")


def _per_image(m: Measured) -> dict[str, Array]:
    return {
        metric: _yes_or_no(m.name, metric, np.asarray(m.scores[metric], dtype=np.float64)) for metric in PER_IMAGE if metric in m.scores
    }


def _yes_or_no(model: str, metric: str, values: Array) -> Array:
    known = values[np.isfinite(values)]
    if metric == "joint_plausibility" and not np.isin(known, (0, 1)).all():
        raise ValueError(f"{model}: joint_plausibility must be 0 or 1 for each image, found {known[~np.isin(known, (0, 1))][0]}")
    return np.where(np.isfinite(values), values > 0.5, np.nan) if metric == "defect_rate" else values


def _one(metric: str, values: Array) -> Interval:
    known = values[np.isfinite(values)]
    return statistics.share_interval(float(known.sum()), len(known)) if metric in YES_OR_NO else statistics.mean_interval(known)


def _distances(m: Measured, reference: NDArray | None, base: Measured, pca: Projection | None, seed: int) -> Numbers:
    """Fréchet distance to the reference, and for a stage its ratio to base's, both on the same random halves of prompts."""
    if reference is None or m.features is None or len(m.features) < 4:
        return {}
    project = pca or (lambda x: x)
    ours, truth = project(m.features), project(reference)
    found = {"frechet": _number(statistics.half_subsample_interval(lambda i: frechet(ours[i], truth[i]), len(ours), seed), least=0.0)}
    if m.name not in ("base", "real") and base.features is not None:
        theirs = project(base.features)
        if frechet(theirs, truth) > 0:
            ratio = statistics.half_subsample_interval(lambda i: frechet(ours[i], truth[i]) / frechet(theirs[i], truth[i]), len(ours), seed)
            found["frechet_ratio"] = _number(ratio, least=0.0)
    return found


def _hue(m: Measured, base: Measured, seed: int) -> Numbers:
    """|Circular mean hue - base's|, bootstrapped over prompts as a signed turn: folding each draw would never let the interval reach 0."""
    if m is base or m.hue is None or base.hue is None or len(m.hue) < 2:
        return {}
    both = np.concatenate([m.hue, base.hue], axis=1)  # (n, 4), so that a draw takes a prompt's two images together
    shift = signed_turn(mean_hue(both[:, :2]), mean_hue(both[:, 2:]))
    if not np.isfinite(shift):
        return {}
    # Turns are taken relative to the observed one, else draws around 180° would lie at both ends.
    around = statistics.bootstrap(both, lambda x: signed_turn(signed_turn(mean_hue(x[:, :2]), mean_hue(x[:, 2:])), shift), seed)
    low, high = shift + around.low, shift + around.high
    ends = sorted((abs(low), abs(high)))
    interval = Interval(abs(shift), 0.0 if low <= 0 <= high else ends[0], min(180.0, ends[1]), len(both))
    return {"hue_shift": _number(interval)}


def _diversity(m: Measured) -> Numbers:
    if m.diversity_features is None or len(m.diversity_features) < 2:
        return {}
    return {"diversity": _number(statistics.mean_interval(diversity(m.diversity_features)))}


def _wins(m: Measured, base: Measured) -> Numbers:
    found = {}
    for metric, ours, theirs in _paired(m, base):
        sign = DIRECTION[metric] or 1
        wins, p = statistics.paired_wins(sign * ours, sign * theirs), statistics.sign_test(sign * ours, sign * theirs)
        found[metric] = {**_number(wins), "p": p}
    return found


def _differences(m: Measured, base: Measured) -> Numbers:
    found = {metric: _number(statistics.paired_difference(ours, theirs)) for metric, ours, theirs in _paired(m, base)}
    a, b = m.diversity_features, base.diversity_features
    if a is not None and b is not None and len(a) == len(b) > 1:
        found["diversity"] = _number(statistics.paired_difference(diversity(a), diversity(b)))
    return found


def _paired(m: Measured, base: Measured) -> list[tuple[str, Array, Array]]:
    """Metrics that both have, on the images where both have an answer (two or more)."""
    ours, theirs = _per_image(m), _per_image(base)
    found = []
    for metric in PER_IMAGE:
        if metric in ours and metric in theirs:
            both = np.isfinite(ours[metric]) & np.isfinite(theirs[metric])
            if both.sum() > 1:
                found.append((metric, ours[metric][both], theirs[metric][both]))
    return found


def _number(interval: Interval, least: float = -np.inf) -> dict[str, Any]:
    """As in metrics.json; `least` is where a distance ends."""
    return {"value": interval.value, "low": max(least, interval.low), "high": interval.high, "n": interval.n}
