"""The actions of `limner scorer`: import, judge, export, train, evaluate. Each has a config of its own, of a YAML file or options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from limner.config import build, dump, read_yaml, to_dict
from limner.steps.run import load_scorer, load_scorers, resolve, to_device

if TYPE_CHECKING:
    from limner.evaluation.choices import EvaluateScorers
    from limner.records import Choice
    from limner.scorers.exchange import Import
    from limner.scorers.objective import TrainScorer
    from limner.scorers.pairwise import JudgePairs
    from limner.scorers.rows import Dropped

T = TypeVar("T")


def scorer(action: str, path: str | None, overrides: Sequence[str], *, print_config: bool = False, dry_run: bool = False) -> int:
    """Run an action; returns the exit code.

    Args:
        dry_run: of train and judge: check what it is given, say how much it is, and stop.

    Raises:
        ValueError: unknown keys, unusable input.
    """
    from limner.evaluation.choices import EvaluateScorers
    from limner.scorers import exchange
    from limner.scorers.objective import TrainScorer
    from limner.scorers.pairwise import JudgePairs

    kinds: dict[str, Any] = {
        "import": exchange.Import, "judge": JudgePairs, "export": exchange.Export, "train": TrainScorer, "evaluate": EvaluateScorers,
    }  # fmt: skip
    config = read_config(kinds[action], path, overrides)
    if print_config:
        print(dump(config))
    elif dry_run and action not in ("train", "judge"):
        raise ValueError(f"--dry_run: {action} has none; it checks every row as it goes, and finished shards are kept")
    elif action == "import":
        found = _feedback(config) if config.format == "feedback" else None
        print_report(exchange.import_choices(config, found), config.output_dir)
    elif action == "judge":
        judge(config, dry_run=dry_run)
    elif action == "export":
        print(f"wrote {exchange.export_choices(config)} pairs to {config.output_dir}")
    elif action == "train":
        train(config, dry_run=dry_run)
    elif action == "evaluate":
        evaluate(config)
    return 0


def _feedback(config: Import) -> Iterator[Choice | Dropped]:
    """The choices in a file of feedback, with the images of the step's folder that raters saw."""
    from limner.feedback.choices import to_choices
    from limner.feedback.exchange import read_rows as read_feedback
    from limner.records import Image
    from limner.store import read_rows

    if not config.source or not config.images:
        raise ValueError(f"{'source' if not config.source else 'images'}: not set")
    return to_choices(read_feedback(Path(config.source)), {i.id: i for i in read_rows(Path(config.images), Image)})


def judge(config: JudgePairs, *, dry_run: bool = False) -> dict[str, Any]:
    """Let a judge compare pairs of images; returns the report."""
    from limner.scorers.backends import load_backend
    from limner.scorers.pairwise import judge_pairs, plan

    if dry_run:
        _, pairs, left = plan(config)
        print(f"{len(pairs)} pairs of {len({a.prompt_id for a, _ in pairs})} prompts, {2 * len(pairs)} questions")
        for reason, count in left.items():
            print(f"  {count} images left out: {reason}")
        return {}
    for key in ("output_dir", "backend"):
        if not getattr(config, key):
            raise ValueError(f"{key}: not set")
    backend = load_backend("judge", config.backend, config.model)
    to_device([backend], config.device)
    found = judge_pairs(config, backend)
    print(f"{found['judged']} of {found['pairs']} pairs of {found['prompts']} prompts judged, {found['ties']} ties")
    for name, text in (
        ("wins", "the images win"), ("first_place", "image 1 is preferred (0.5: place does not matter)"),
        ("same_in_both_orders", "the answer is the same in both orders"),
    ):  # fmt: skip
        if share := found.get(name):
            spread = f" [{share['low']:.3f}, {share['high']:.3f}]" if share["low"] is not None else ""
            print(f"  {text}: {share['value']:.3f}{spread}")
    for reason, count in [*found["missing"].items(), *found["left_out"].items()]:
        print(f"  {count} without: {reason}")
    print(f"wrote {config.output_dir}: choices for `limner scorer train` and `evaluate`; a recipe's `feedback: {config.output_dir}`")
    return found


def train(config: TrainScorer, *, dry_run: bool = False) -> Path:
    """Train a scorer, or go on; returns its folder, which recipes name as {kind: clip or dual, path: folder}."""
    from limner.scorers import learn, learner
    from limner.scorers.dual import DualConfig

    for key in ("output_dir", "choices"):
        if not getattr(config, key):
            raise ValueError(f"{key}: not set")
    if config.start.kind == "dual" and not config.start.path:
        tokenizer = resolve(config.start.tokenizer, "tokenizer")
        shape = to_dict(config.dual)
        start = learner.new_dual(DualConfig(**{**shape, "channels": tuple(shape["channels"])}), tokenizer, config.seed)
        revision = f"new dual, seed {config.seed}"
    else:
        loaded = load_scorer("start", config.start)
        start, revision = learner.learner_of(loaded), loaded.revision
    if dry_run:
        print(learn.describe(config, start))
        return Path(config.output_dir) / "model"
    folder = learn.train_scorer(config, start, revision=revision)
    print(f"wrote {folder}; in recipes: {{kind: {start.kind}, path: {folder}}}")
    return folder


def evaluate(config: EvaluateScorers) -> dict[str, Any]:
    """Judge scorers, scores made elsewhere and measures of sets by what people chose."""
    from limner.evaluation.choices import evaluate_choices, table

    for key in ("output_dir", "choices"):
        if not getattr(config, key):
            raise ValueError(f"{key}: not set")
    seen: dict[str, Any] = {}
    for name, spec in config.scorers.items():
        about = resolve(spec.path, name) / "training.json"
        if about.is_file():
            seen[name] = json.loads(about.read_text())["generators"]
    found = evaluate_choices(config, list(load_scorers(config.scorers, config.device).values()), seen)
    print(table(found))
    print(f"wrote {config.output_dir}/agreement.json and scores.parquet")
    return found


def read_config(kind: type[T], path: str | None, overrides: Sequence[str]) -> T:
    """A config of a YAML file, if there is one, and of options such as `--output_dir runs/mine`."""
    return build(kind, read_yaml(path) if path else {}, overrides, path or "config")


def print_report(report: dict[str, Any], folder: str) -> None:
    """What an import kept and dropped."""
    print(f"wrote {report['rows']} rows to {folder}: {report['images']} images, {report['prompts']} prompts, {report['raters']} raters")
    print(f"  pairs: {report['pairs']}, of them ties: {report['ties']}; rows without any order: {report['without_any_order']}")
    for reason, found in report["dropped"].items():
        print(f"  dropped {found['rows']}: {reason} ({', '.join(found['first'])}{' ...' if found['rows'] > len(found['first']) else ''})")
