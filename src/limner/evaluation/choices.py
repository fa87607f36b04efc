"""Do scores and measures of image sets agree with what people chose? HPS's first question (arXiv 2303.14420), as a command.

A score is judged pair by pair here, a measure of sets in `sets`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from limner.evaluation.sets import find_features, judge_sets
from limner.recipe import ScorerSpec
from limner.records import Choice, Image
from limner.scorers.agreement import accuracy, by_generator, calibration, choose_tie_margin, fit_temperature, judge, top_choice
from limner.scorers.choices import Choices, generators_of
from limner.scorers.protocol import Scorer, count_long, describe
from limner.scorers.steps import keep_answers, score_images
from limner.store import versions, write_atomic

Scores = dict[str, list[list[float]]]  # by scorer: a list of a row's images each
ROWS = 64  # choices in memory at a time


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
        features: of the choices' images: .npz of `files`, `features` (n, D) and, if there, `probabilities` (n, C) by any network; or the
            name of a scorer whose image tower is to look ("" = none).
        reference: real images: .npz of `features`; or, for a scorer's tower, images in any format of `data.train` ("" = none).
        device: of the scorers: auto, cpu, cuda, mps ...
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
    device: str = "auto"


def score_choices(choices: Choices, scorers: Sequence[Scorer]) -> Scores:
    """Scores of all images by every scorer, each image decoded once; NaN where there is none."""
    found: Scores = {s.name: [] for s in scorers}
    for start in range(0, len(choices), ROWS):
        part = choices.rows[start : start + ROWS]
        seen: dict[tuple[str, bytes], int] = {}  # an image of a prompt stands in many rows, and is scored once
        places = [
            [seen.setdefault((row.text, data), len(seen)) for data in choices.encoded(start + i)] for i, row in enumerate(part)
        ]  # fmt: skip
        images = [Image(id=str(n), prompt_id="", text=text, image=data) for (text, data), n in seen.items()]
        values = {(s.scorer, int(s.image_id)): float("nan") if s.score is None else s.score for s in score_images(images, scorers)}
        for name, rows in found.items():
            rows += [[values[name, n] for n in row] for row in places]
    return found


def read_scores(path: Path, rows: Sequence[Choice]) -> Scores:
    """Scores made elsewhere, by file; of a file in several rows the row's own if there is a column `row`.

    Raises:
        ValueError: a column that is not there, or not one image of the rows among its files.
    """
    try:
        table = pq.read_table(path)
    except Exception as error:  # damaged bytes raise Arrow's kinds and the system's
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
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(columns)), sink)
    write_atomic(path, sink.getvalue().to_pybytes())


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


def evaluate_choices(config: EvaluateScorers, scorers: Sequence[Scorer], seen: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Score, judge and write agreement.json; returns its content.

    Args:
        seen: by scorer: the generators of its training choices, where they are known.

    Raises:
        ValueError: nothing to judge, or input that does not fit.
    """
    images = Path(config.images) if config.images else None
    choices = Choices(Path(config.choices), config.limit, images)
    # first all that is read and may be wrong, then hours of scoring
    elsewhere = read_scores(Path(config.scores), choices.rows) if config.scores else {}
    if twice := [s.name for s in scorers if s.name in elsewhere]:
        raise ValueError(f"scores: {config.scores} has scores of {twice[0]}, which is also under scorers; call one of them otherwise")
    if not scorers and not elsewhere and not config.features:
        raise ValueError("scorers: none, and neither scores nor features: nothing to judge")
    trained = generators_of(Choices(Path(config.trained_on)).rows) if config.trained_on else None
    other = Choices(Path(config.validation), images=images) if config.validation else None
    sets: dict[str, Any] | None = None
    if config.features:
        features, probabilities, reference = find_features(config.features, config.reference, choices, {s.name: s for s in scorers})
        sets = {"features": config.features, **judge_sets(choices.rows, features, probabilities, reference, config.seed)}
    cut = count_long(scorers, (row.text for row in choices.rows))
    keep_answers(scorers, Path(config.output_dir))
    folder = Path(config.output_dir)
    scores = (score_choices(choices, scorers) if scorers else {}) | elsewhere
    write_scores(folder / "scores.parquet", choices.rows, scores)
    held_out: tuple[list[Choice], Scores] | None = None
    if other is not None:
        count_long(scorers, (row.text for row in other.rows))
        held_out = (other.rows, score_choices(other, scorers) if scorers else {})
        if elsewhere:
            warnings.warn(f"validation: not used for {', '.join(elsewhere)}, whose scores were made elsewhere", stacklevel=2)
    out: dict[str, Any] = {"rows": len(choices), "tie_policy": config.tie_policy, "average": config.average, "seed": config.seed}
    about = {s.name: {**describe(s), "prompts_cut": cut.get(s.name, 0)} for s in scorers}
    out["scorers"] = {
        name: about.get(name, {}) | judge_scorer(
            choices.rows, found, config, seen=seen.get(name) if trained is None else trained,
            held_out=(held_out[0], held_out[1][name]) if held_out and name in held_out[1] else None,
        )
        for name, found in scores.items()
    }  # fmt: skip
    if sets is not None:
        out["sets"] = sets
    write_atomic(folder / "agreement.json", json.dumps({**out, "versions": versions()}, indent=1) + "\n")
    return out


def table(found: Mapping[str, Any]) -> str:
    """The report for people, best scorer first."""
    lines = [f"{found['rows']} rows; human ties: {found['tie_policy']}; mean over {found['average']}"]
    lines.append(f"{'scorer':24} {'accuracy':>8} {'95 %':>13} {'pairs':>7} {'ties':>6} {'top':>6} {'chance':>6} {'ECE':>6} {'at T':>6}")
    for name, s in sorted(found["scorers"].items(), key=lambda item: -(item[1]["accuracy"]["value"] or 0)):
        a, top, ece, at = s["accuracy"], s["top_choice"], s["calibration"]["ece"], s["calibration"]["temperature"]
        spread = f"{100 * a['low']:.1f}-{100 * a['high']:.1f}" if a["low"] is not None else ""
        lines.append(
            f"{name:24} {_percent(a['value']):>8} {spread:>13} {a['n_pairs']:>7} {a['n_ties']:>6} {_percent(top['value']):>6} "
            f"{_percent(top['chance']):>6} {'' if ece is None else f'{ece:.3f}':>6} {at:>6.3g}"
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
