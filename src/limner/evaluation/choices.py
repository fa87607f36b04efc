"""Do scores and measures of image sets agree with what people chose? HPS's first question (arXiv 2303.14420, sec. 3), as a command.

A score is judged pair by pair. A measure of a set (Fréchet distance, Inception Score's formula) says nothing of a pair: it is asked whether
it prefers the set of the chosen images to that of the rejected ones of the same prompts, and whether it can tell them apart at all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from limner.config import ScorerSpec
from limner.evaluation.distances import class_score, frechet, principal_components
from limner.records import Choice, Image
from limner.scorers.agreement import accuracy, by_generator, calibration, choose_tie_margin, fit_temperature, judge, top_choice
from limner.scorers.choices import Choices, generators_of, shares
from limner.scorers.protocol import Scorer
from limner.scorers.steps import score_images
from limner.statistics import Interval, half_subsample_interval
from limner.store import versions, write_atomic

Scores = dict[str, list[list[float]]]  # by scorer: a list of a row's images each
ROWS = 64  # choices in memory at a time
SHUFFLES = 200


@dataclass(frozen=True, kw_only=True)
class EvaluateScorers:
    """`limner scorer evaluate`.

    Args:
        output_dir: agreement.json and scores.parquet are written there.
        seed: of bootstrap draws.
        choices: the held-out choices, a folder that `limner scorer import` wrote.
        validation: other choices, on which tie margin and temperature are chosen ("" = 0 and 1).
        images: where files of the choices lie, if elsewhere than at import.
        limit: use the first so many rows (0 = all).
        scorers: by the name of the report.
        scores: parquet of scores made elsewhere, with columns file, scorer, score (as scores.parquet); "" = none.
        trained_on: choices that the scorers learned from, for generators seen and not ("" = what each scorer's training.json says).
        tie_policy: drop (ImageReward, MPS), half (Pick-a-Pic), right (HPSv2's rank accuracy).
        average: pairs (pooled) or prompts.
        features: .npz of `files`, `features` (n, D) and, if there, `probabilities` (n, C), of the choices' images by any network ("" =
            none).
        reference: .npz of `features` of real images ("" = none).
    """

    output_dir: str = ""
    seed: int = 0
    choices: str = ""
    validation: str = ""
    images: str = ""
    limit: int = 0
    scorers: dict[str, ScorerSpec] = field(default_factory=dict)
    scores: str = ""
    trained_on: str = ""
    tie_policy: Literal["drop", "half", "right"] = "drop"
    average: Literal["pairs", "prompts"] = "pairs"
    features: str = ""
    reference: str = ""


def score_choices(choices: Choices, scorers: Sequence[Scorer]) -> Scores:
    """Scores of all images by every scorer, each image decoded once; NaN where there is none."""
    found: Scores = {s.name: [] for s in scorers}
    for start in range(0, len(choices), ROWS):
        span = range(start, min(start + ROWS, len(choices)))
        images = [
            Image(id=f"{i}/{k}", prompt_id=choices.rows[i].prompt_id, text=choices.rows[i].text, image=data)
            for i in span
            for k, data in enumerate(choices.encoded(i))
        ]
        values = {(s.scorer, s.image_id): s.score for s in score_images(images, scorers)}
        for name, rows in found.items():
            for i in span:
                row = [values[name, f"{i}/{k}"] for k in range(len(choices.rows[i].files))]
                rows.append([float("nan") if v is None else v for v in row])
    return found


def read_scores(path: Path, rows: Sequence[Choice]) -> Scores:
    """Scores made elsewhere, by file; of a file in several rows the row's own if there is a column `row`.

    Raises:
        ValueError: a column that is not there, or not one image of the rows among its files.
    """
    try:
        table = pq.read_table(path)
    except Exception as error:
        raise ValueError(f"scores: {path} cannot be read as parquet ({error})") from error
    if missing := [c for c in ("file", "scorer", "score") if c not in table.column_names]:
        raise ValueError(f"scores: {path} has no column {', '.join(missing)} (found: {', '.join(table.column_names)})")
    known: dict[tuple[str, str, str], float] = {}
    for r in table.to_pylist():
        if r["score"] is not None:
            known[r["scorer"], str(r.get("row") or ""), r["file"]] = float(r["score"])
    names = list(dict.fromkeys(name for name, _, _ in known))
    found = {
        name: [[known.get((name, row.id, f), known.get((name, "", f), float("nan"))) for f in row.files] for row in rows] for name in names
    }
    if not any(np.isfinite(v).any() for scores in found.values() for v in scores):
        raise ValueError(
            f"scores: {path} has no score of any image of the choices; its files are called {table.column('file')[:2].to_pylist()}"
        )
    return found


def write_scores(path: Path, rows: Sequence[Choice], scores: Scores) -> None:
    """One line an image and scorer: row, file, scorer, score."""
    lines = [
        {"row": row.id, "file": file, "scorer": name, "score": value}
        for name, found in scores.items()
        for row, values in zip(rows, found)
        for file, value in zip(row.files, values)
    ]
    columns = [("row", pa.string()), ("file", pa.string()), ("scorer", pa.string()), ("score", pa.float64())]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(columns)), path)


def judge_scorer(
    rows: Sequence[Choice], scores: Sequence[Sequence[float]], config: EvaluateScorers, *, seen: Collection[str] | None,
    held_out: tuple[Sequence[Choice], Sequence[Sequence[float]]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one scorer: accuracy, top choice, calibration, by generator.

    Args:
        held_out: rows and scores on which tie margin and temperature are chosen; None: 0 and 1.
    """
    judged = judge(rows, scores)
    margin, temperature = 0.0, 1.0
    if held_out is not None:
        other = judge(*held_out)
        margin = choose_tie_margin(other) if config.tie_policy == "half" and len(other) else 0.0
        temperature = fit_temperature(other) if len(other) and other.margin.any() else 1.0
    how: dict[str, Any] = {"tie_policy": config.tie_policy, "average": config.average, "tie_margin": margin, "seed": config.seed}
    return {
        "accuracy": {**accuracy(judged, **how), "tie_margin": margin},
        "top_choice": top_choice(rows, scores, config.seed),
        "calibration": calibration(judged, temperature=temperature),
        "by_generator": by_generator(judged, seen, **how),
    }


def chosen_and_rejected(rows: Sequence[Choice], seed: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, image) of the chosen image and of a rejected one, for each row with one best image.

    Of a ranking the worst is the rejected one; of a choice, where nothing is known of the others, one by lot.
    """
    chosen, rejected = [], []
    rng = np.random.default_rng([seed, 41])
    for n, row in enumerate(rows):
        share = shares(row)
        best = max(share)
        if share.count(best) > 1:
            continue
        winner = share.index(best)
        others = [k for k in range(len(share)) if k != winner]
        if row.kind == "ranking":
            others = [k for k in others if row.said[k] == max(row.said)]
        chosen.append((n, winner))
        rejected.append((n, others[int(rng.integers(len(others)))]))
    return chosen, rejected


def judge_sets(
    rows: Sequence[Choice], features: Mapping[str, NDArray], probabilities: Mapping[str, NDArray] | None, reference: NDArray | None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Do measures of sets prefer what people chose?

    Args:
        features: of an image by its file, (D,); rows with an image that has none are left out.
        probabilities: of classes, by file, (C,).
        reference: features of real images (m, D).

    Returns:
        rows; frechet_between: distance of chosen and rejected set, its mean with both swapped by lot within prompts, and how often that is
        as large (p); frechet_to_reference and class_score: chosen, rejected, and their difference with an interval. `prefers` says which
        set the measure prefers if its interval says so, else "neither".

    Raises:
        ValueError: fewer than four rows with features.
    """
    known = [row for row in rows if all(f in features for f in row.files)]
    places = list(zip(*chosen_and_rejected(known, seed)))
    n = len(places)
    if n < 4:
        raise ValueError(f"features: only {n} rows have features of all their images and one best image; expected 4 or more")
    files = [tuple(known[r].files[k] for r, k in place) for place in places]
    winners, losers = (np.stack([features[f[side]] for f in files]).astype(float) for side in (0, 1))
    most = min(64, 2 * n - 1, winners.shape[1])
    pca = principal_components(reference if reference is not None and len(reference) > most else np.concatenate([winners, losers]), most)
    a, b = pca(winners), pca(losers)
    found: dict[str, Any] = {"rows": n, "dimensions": most, "frechet_between": _between(a, b, seed)}
    if reference is not None:
        m = min(n, len(reference))
        real = pca(reference[:m])

        def difference(i: NDArray[np.intp]) -> float:
            return frechet(a[i], real[i]) - frechet(b[i], real[i])

        found["frechet_to_reference"] = {
            "chosen": frechet(a[:m], real), "rejected": frechet(b[:m], real), "n": m,
            **_verdict(half_subsample_interval(difference, m, seed), lower_is_better=True),
        }  # fmt: skip
    if probabilities is not None:
        p, q = (np.stack([probabilities[f[side]] for f in files]).astype(float) for side in (0, 1))
        interval = half_subsample_interval(lambda i: class_score(p[i]) - class_score(q[i]), n, seed)
        found["class_score"] = {"chosen": class_score(p), "rejected": class_score(q), "n": n, **_verdict(interval, lower_is_better=False)}
    return found


def _between(a: NDArray, b: NDArray, seed: int) -> dict[str, float]:
    rng = np.random.default_rng([seed, 43])
    observed, drawn = frechet(a, b), []
    for _ in range(SHUFFLES):
        swap = (rng.random(len(a)) < 0.5)[:, None]
        drawn.append(frechet(np.where(swap, b, a), np.where(swap, a, b)))
    return {"value": observed, "by_lot": float(np.mean(drawn)), "p": (1 + sum(d >= observed for d in drawn)) / (1 + SHUFFLES)}


def _verdict(difference: Interval, lower_is_better: bool) -> dict[str, Any]:
    low, high = (-difference.high, -difference.low) if lower_is_better else (difference.low, difference.high)
    prefers = "chosen" if low > 0 else "rejected" if high < 0 else "neither"
    return {"difference": difference.value, "low": difference.low, "high": difference.high, "prefers": prefers}


def read_features(path: Path, key: str = "features") -> tuple[dict[str, NDArray], dict[str, NDArray] | None]:
    """features and probabilities by file of an .npz.

    Raises:
        ValueError: unreadable, or arrays of other names or lengths.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            there = {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise ValueError(f"{key}: {path} cannot be read as .npz without pickled objects ({error})") from error
    if "features" not in there or there["features"].ndim != 2:
        raise ValueError(f"{key}: {path} has no array features (n, D); found: {', '.join(there)}")
    files = [str(f) for f in there.get("files", np.arange(len(there["features"])))]
    if len(files) != len(there["features"]) or len(there.get("probabilities", files)) != len(files):
        raise ValueError(f"{key}: {path}: files, features and probabilities differ in length")
    probabilities = dict(zip(files, there["probabilities"])) if "probabilities" in there else None
    return dict(zip(files, there["features"])), probabilities


def evaluate_choices(config: EvaluateScorers, scorers: Sequence[Scorer], seen: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Score, judge and write agreement.json; returns its content.

    Args:
        seen: by scorer: the generators of its training choices, where they are known.

    Raises:
        ValueError: nothing to judge, or input that does not fit.
    """
    images = Path(config.images) if config.images else None
    choices = Choices(Path(config.choices), config.limit, images)
    scores = score_choices(choices, scorers) if scorers else {}
    scores |= read_scores(Path(config.scores), choices.rows) if config.scores else {}
    if not scores and not config.features:
        raise ValueError("scorers: none, and neither scores nor features: nothing to judge")
    trained = generators_of(Choices(Path(config.trained_on)).rows) if config.trained_on else None
    held_out: tuple[list[Choice], Scores] | None = None
    if config.validation:
        other = Choices(Path(config.validation), images=images)
        held_out = (other.rows, score_choices(other, scorers))
    out: dict[str, Any] = {"rows": len(choices), "tie_policy": config.tie_policy, "average": config.average, "seed": config.seed}
    out["scorers"] = {
        name: judge_scorer(
            choices.rows, found, config, seen=seen.get(name) if trained is None else trained,
            held_out=(held_out[0], held_out[1][name]) if held_out and name in held_out[1] else None,
        )
        for name, found in scores.items()
    }  # fmt: skip
    if config.features:
        features, probabilities = read_features(Path(config.features))
        reference = np.stack(list(read_features(Path(config.reference), "reference")[0].values())) if config.reference else None
        out["sets"] = judge_sets(choices.rows, features, probabilities, reference, config.seed)
    folder = Path(config.output_dir)
    write_scores(folder / "scores.parquet", choices.rows, scores)
    write_atomic(folder / "agreement.json", json.dumps({**out, "versions": versions()}, indent=1) + "\n")
    return out


def table(found: Mapping[str, Any]) -> str:
    """The report for people, best scorer first."""
    lines = [f"{found['rows']} rows; human ties: {found['tie_policy']}; mean over {found['average']}"]
    lines.append(f"{'scorer':24} {'accuracy':>8} {'95 %':>13} {'pairs':>7} {'ties':>6} {'top':>6} {'chance':>6} {'ECE':>6}")
    for name, s in sorted(found["scorers"].items(), key=lambda item: -(item[1]["accuracy"]["value"] or 0)):
        a, top, ece = s["accuracy"], s["top_choice"], s["calibration"]["ece"]
        spread = f"{100 * a['low']:.1f}-{100 * a['high']:.1f}" if a["low"] is not None else ""
        lines.append(
            f"{name:24} {_percent(a['value']):>8} {spread:>13} {a['n_pairs']:>7} {a['n_ties']:>6} {_percent(top['value']):>6} "
            f"{_percent(top['chance']):>6} {'' if ece is None else f'{ece:.3f}':>6}"
        )
        for label, group in s["by_generator"]["groups"].items():
            lines.append(f"  generators {label:21} {_percent(group['value']):>8} {'':>5} {group['n_pairs']:>7} pairs")
    for name, s in found.get("sets", {}).items():
        if name == "frechet_between":
            lines.append(f"chosen and rejected set: Fréchet {s['value']:.4g}, swapped by lot {s['by_lot']:.4g} (p {s['p']:.3f})")
        elif isinstance(s, dict):
            lines.append(f"{name}: chosen {s['chosen']:.4g}, rejected {s['rejected']:.4g}; prefers {s['prefers']}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
