"""How well scores agree with what people chose: accuracy over pairs, calibration, and both by generator. Arrays in, numbers out.

Accuracy is not one number. ImageReward and MPS pool all pairs, leave human ties out and call predicted ties wrong; HPSv2's rank accuracy
counts human ties as right whatever is predicted, and averages over prompts; Pick-a-Pic gives half for a tie on one side only, with a
threshold for predicted ties chosen on validation. So `tie_policy` and `average` are always said, and counts come with the number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from limner.records import Choice
from limner.scorers.choices import pairs, shares
from limner.statistics import bootstrap

TiePolicy = Literal["drop", "half", "right"]
Average = Literal["pairs", "prompts"]
Array = NDArray[np.float64]
DRAWS = 500


@dataclass(frozen=True, eq=False)
class Judged:
    """N pairs of images of a prompt.

    preference: probability that people prefer the first, 0.5 a tie; margin: the first's score less the second's; prompt: number of the
    prompt; generators: (N, 2) names, "" unknown; missing: pairs left out because an image has no score. All (N,) but the last two.
    """

    preference: Array
    margin: Array
    prompt: NDArray[np.int64]
    generators: NDArray
    missing: int = 0

    def __len__(self) -> int:
        return len(self.preference)

    def take(self, chosen: NDArray[np.bool_]) -> Judged:
        return Judged(self.preference[chosen], self.margin[chosen], self.prompt[chosen], self.generators[chosen])


def judge(rows: Sequence[Choice], scores: Sequence[Sequence[float]]) -> Judged:
    """All pairs of which something is known, with the scores of their images; NaN is a missing score.

    Raises:
        ValueError: another number of scores than of images; names the row.
    """
    numbers: dict[str, int] = {}
    preference, margin, prompt, generators, missing = [], [], [], [], 0
    for row, values in zip(rows, scores, strict=True):
        if len(values) != len(row.files):
            raise ValueError(f"row {row.id}: {len(values)} scores for {len(row.files)} images")
        for i, j, p in pairs(row):
            if not np.isfinite(values[i]) or not np.isfinite(values[j]):
                missing += 1
                continue
            preference.append(p)
            margin.append(values[i] - values[j])
            prompt.append(numbers.setdefault(row.prompt_id, len(numbers)))
            generators.append((row.generators[i], row.generators[j]) if row.generators else ("", ""))
    return Judged(
        np.array(preference, float), np.array(margin, float), np.array(prompt, np.int64), np.array(generators, str).reshape(-1, 2), missing
    )


def accuracy(
    judged: Judged,
    *,
    tie_policy: TiePolicy = "drop",
    average: Average = "pairs",
    tie_margin: float = 0.0,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Share of pairs whose order the scores tell, with a bootstrap interval over prompts.

    Args:
        tie_policy: of human ties: drop leaves them out; half gives 1 for a predicted tie, else 0.5 (and 0.5 for a predicted tie where
            people decided, Pick-a-Pic); right counts them as right (HPSv2's rank accuracy). Predicted ties are wrong but for half.
        average: pairs pools all; prompts takes the mean over prompts of their shares.
        tie_margin: scores no further apart are a predicted tie.
        draws: of the bootstrap.

    Returns:
        value, low, high (None with one prompt or no pair), n_pairs counted, n_ties (human ones, counted or not), n_predicted_ties,
        n_prompts, n_missing.
    """
    credit, counted = _credit(judged, tie_policy, tie_margin)
    tied = judged.preference == 0.5
    found: dict[str, Any] = {"value": None, "low": None, "high": None}
    table = _by_prompt(credit[counted], judged.prompt[counted])
    if len(table):
        interval = bootstrap(table, _pooled if average == "pairs" else _averaged, seed, draws) if len(table) > 1 else None
        found["value"] = (_pooled if average == "pairs" else _averaged)(table)
        found |= {"low": interval.low, "high": interval.high} if interval else {}
    return found | {
        "n_pairs": int(counted.sum()), "n_ties": int(tied.sum()), "n_predicted_ties": int((np.abs(judged.margin) <= tie_margin).sum()),
        "n_prompts": len(table), "n_missing": judged.missing, "tie_policy": tie_policy, "average": average,
    }  # fmt: skip


def accuracy_difference(
    ours: Judged, theirs: Judged, *, tie_policy: TiePolicy = "drop", average: Average = "pairs", seed: int = 0, draws: int = DRAWS
) -> dict[str, Any]:
    """Accuracy of one scorer less another's on the same pairs, bootstrapped over prompts: what a prompt adds to both cancels.

    Raises:
        ValueError: not the same pairs, or fewer than two prompts.
    """
    if not np.array_equal(ours.preference, theirs.preference) or not np.array_equal(ours.prompt, theirs.prompt):
        raise ValueError("the scorers were judged on different pairs; leave out images that one of them has no score of")
    parts = []
    for judged in (ours, theirs):
        credit, counted = _credit(judged, tie_policy, 0.0)
        parts.append(_by_prompt(credit[counted], judged.prompt[counted]))
    mean = _pooled if average == "pairs" else _averaged
    spread = bootstrap(np.concatenate(parts, 1), lambda x: mean(x[:, :2]) - mean(x[:, 2:]), seed, draws)
    return {"value": spread.value, "low": spread.low, "high": spread.high, "n_prompts": len(parts[0])}


def _credit(judged: Judged, tie_policy: TiePolicy, tie_margin: float) -> tuple[Array, NDArray[np.bool_]]:
    """What each pair counts, and whether it counts."""
    human_tie, predicted_tie = judged.preference == 0.5, np.abs(judged.margin) <= max(tie_margin, 0.0)
    right = ((judged.margin > 0) == (judged.preference > 0.5)) & ~predicted_tie
    if tie_policy == "half":
        credit = np.where(human_tie, np.where(predicted_tie, 1.0, 0.5), np.where(predicted_tie, 0.5, right))
    else:
        credit = np.where(human_tie, 1.0, right)
    return credit.astype(float), ~human_tie if tie_policy == "drop" else np.ones(len(judged), bool)


def _by_prompt(credit: Array, prompt: NDArray[np.int64]) -> Array:
    """(P, 2): credit and pairs of each prompt that has any."""
    _, place = np.unique(prompt, return_inverse=True)
    return np.stack([np.bincount(place, credit), np.bincount(place)], 1) if len(prompt) else np.empty((0, 2))


def _pooled(table: Array) -> float:
    return float(table[:, 0].sum() / table[:, 1].sum())


def _averaged(table: Array) -> float:
    return float((table[:, 0] / table[:, 1]).mean())


def choose_tie_margin(judged: Judged) -> float:
    """The margin up to which a predicted tie is best, by accuracy with `tie_policy` half: Pick-a-Pic's threshold, for validation pairs."""
    size = np.abs(judged.margin)
    order = np.argsort(size, kind="stable")
    apart, _ = _credit(judged, "half", 0.0)
    together = np.where(judged.preference == 0.5, 1.0, 0.5)
    gain = np.concatenate([[0.0], np.cumsum((together - apart)[order])])  # with the k smallest margins called ties
    ends = np.concatenate([[True], size[order][1:] != size[order][:-1], [True]])  # equal margins go together
    best = int(np.argmax(np.where(ends, gain, -np.inf)))
    return float(size[order][best - 1]) if best else 0.0


def fit_temperature(judged: Judged) -> float:
    """T for which sigmoid(margin / T) tells preferences best (log loss); for validation pairs.

    Raises:
        ValueError: no pairs, or margins that are all 0.
    """
    if not len(judged) or not judged.margin.any():
        raise ValueError("no pair with different scores: no temperature fits")
    unit = float(np.abs(judged.margin).mean())

    def loss(log_t: float) -> float:
        z = judged.margin / (unit * np.exp(log_t))
        return float(-(judged.preference * log_expit(z) + (1 - judged.preference) * log_expit(-z)).mean())

    return unit * float(np.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))


def calibration(judged: Judged, *, temperature: float = 1.0, bins: int = 10) -> dict[str, Any]:
    """Whether the preferred image is preferred as often as sigmoid(margin / temperature) says: expected calibration error, and its table.

    Each pair is turned so that the scores prefer the first; chances then lie in 0.5 to 1, in bins of equal width. Ties and shares of votes
    count as such.

    Returns:
        ece (mean |predicted - preferred| over pairs), temperature, table of low, high, n, predicted, preferred.
    """
    predicted = expit(np.abs(judged.margin) / temperature)
    preferred = np.where(judged.margin >= 0, judged.preference, 1 - judged.preference)
    place = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        chosen = place == b
        if n := int(chosen.sum()):
            means = float(predicted[chosen].mean()), float(preferred[chosen].mean())
            error += n * abs(means[0] - means[1]) / len(judged)
            row = {"low": 0.5 + b / (2 * bins), "high": 0.5 + (b + 1) / (2 * bins), "n": n, "predicted": means[0], "preferred": means[1]}
            table.append(row)
    return {"ece": error if len(judged) else None, "temperature": temperature, "table": table}


def by_generator(judged: Judged, seen: Collection[str] | None, **how: Any) -> dict[str, Any]:
    """Accuracy on the pairs that each generator takes part in; and, where it is known which were seen in training, on pairs of two seen, of
    one, and of none (HPS's fourth question: do preferences carry over to models that nobody chose among?).

    Args:
        seen: generators of the training choices; None = not known.
        how: as for `accuracy`.
    """
    names = sorted({str(g) for g in judged.generators.ravel()} - {""})
    found: dict[str, Any] = {}
    for name in names:
        among = (judged.generators == name).any(1)
        found[name] = {**accuracy(judged.take(among), **how), "seen": None if seen is None else name in seen}
    groups: dict[str, Any] = {}
    if seen is not None and names:
        known = np.isin(judged.generators, sorted(seen)).sum(1)
        there = (judged.generators != "").all(1)
        for label, count in (("both seen", 2), ("one seen", 1), ("none seen", 0)):
            if (chosen := there & (known == count)).any():
                groups[label] = accuracy(judged.take(chosen), **how)
    return {"generators": found, "groups": groups}


def top_choice(rows: Sequence[Choice], scores: Sequence[Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """How often the best-scored image is the chosen one (HPS v1's accuracy), and how often chance would hit it.

    Any of equally good ones will do; equal scores choose by lot.
    """
    table, chance = [], []
    for row, values in zip(rows, scores, strict=True):
        if np.isfinite(values).all():
            best = np.array(shares(row)) == max(shares(row))
            table.append(float(best[np.array(values) == max(values)].mean()))
            chance.append(float(best.mean()))
    if len(table) < 2:
        return {"value": None, "low": None, "high": None, "n": len(table), "chance": None}
    spread = bootstrap(np.array(table), lambda x: float(x.mean()), seed, DRAWS)
    return {"value": spread.value, "low": spread.low, "high": spread.high, "n": len(table), "chance": float(np.mean(chance))}
