"""The steps that show whether it helped: generate, evaluate, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from limner.config import dump
from limner.steps.make import choosing, prompts
from limner.steps.run import FIGURES, Run, resolve
from limner.store import is_complete, write_atomic

if TYPE_CHECKING:
    from limner.evaluation.measure import Look
    from limner.records import Prompt, Score
    from limner.scorers.clip import ClipScorer
    from limner.scorers.reader import FigureReader

DIVERSITY_SEEDS = 4


def generate(run: Run, only: Sequence[str] = ()) -> None:
    """One image of every evaluation prompt from the base and from each stage, at equal seeds; more of some, for diversity."""
    from limner.pool.steps import make_pool

    r, split = run.recipe, run.recipe.evaluate.split
    prompts(run, [split])
    for model in ["base", *run.compared]:
        if only and model not in only:
            continue
        jobs = [(run.out / "generate" / split / model, 1, 0)]
        if r.evaluate.diverse_prompts:
            jobs.append((run.out / "generate" / f"{split}-diversity" / model, DIVERSITY_SEEDS, r.evaluate.diverse_prompts))
        pipeline, name = run.adapted(model, *run.strength(model))
        for folder, count, limit in jobs:
            make_pool(
                pipeline, run.out / "prompts" / split, folder, kind="generate", sampler=r.sampler, images_per_prompt=count,
                size=run.size, seed=r.seed + 1, limit=limit, model=name, prompts_per_shard=64,
            )  # fmt: skip


def evaluate(run: Run) -> dict[str, Any]:
    """Measure every model, compare with the base, write metrics.json."""
    from limner.evaluation.compare import compare
    from limner.evaluation.distances import principal_components
    from limner.evaluation.measure import measure_images, measure_real
    from limner.records import Image, Prompt
    from limner.scorers.protocol import count_long
    from limner.store import read_rows

    e, split, reader = run.recipe.evaluate, run.recipe.evaluate.split, run.reader()
    prompts = {p.id: p for p in read_rows(run.out / "prompts" / split, Prompt)}
    scorers = {role: run.scorers[n] for role in ("preference", "judge") if (n := getattr(e, role))}
    count_long(scorers.values(), (p.text for p in prompts.values()))
    look = look_of(run, reader)
    measured = []
    for model in ["base", *run.compared]:
        print(f"evaluate: {model}")
        made, more = (run.out / "generate" / folder / model for folder in (split, f"{split}-diversity"))
        if not is_complete(made) or (e.diverse_prompts and not is_complete(more)):
            raise ValueError(f"{made if not is_complete(made) else more} is not complete; run `limner generate` first")
        images = list(read_rows(made, Image))
        diverse = list(read_rows(more, Image)) if e.diverse_prompts else []
        measured.append(measure_images(model, images, prompts, scorers, reader, diverse, look))
    n = len(measured[0].images or [])
    real, reference = measure_real(list(prompts.values()), n, scorers, reader, look), None
    pca = None
    if look is not None:
        others = _other_real(run, split, set(prompts), n)
        reference = look([p.image or b"" for p in others]) if len(others) == n else None
        training = [p.image for p, _ in zip(read_rows(run.out / "prompts/train", Prompt), range(1000)) if p.image]
        if len(training) > 2:
            seen = look(training)
            pca = principal_components(seen, min(64, len(training) - 1, seen.shape[1]))
        else:
            print("evaluate: data.train has no images to find principal components from; the Fréchet distance is one of all features")
        if reference is None and real is not None:
            print(f"evaluate: data.{split} has no {n} further images to compare real ones with; set data.max_{split}_prompts to leave some")
    metrics = compare(real, measured[0], measured[1:], pca, circular(run), run.recipe.seed, run.command, reference)
    write_atomic(run.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


def look_of(run: Run, reader: FigureReader | None) -> Look | None:
    """What Fréchet distance and diversity look with: the reader, else the CLIP that the recipe names, else nothing."""
    from limner.evaluation.measure import clip_look, reader_look

    name = run.recipe.evaluate.features
    return reader_look(reader) if reader is not None else clip_look(cast("ClipScorer", run.scorers[name])) if name else None


def circular(run: Run) -> set[str]:
    """The metrics of `evaluate` that weights measure which chose training examples: they are better than what they show."""
    e = run.recipe.evaluate
    chose = set().union(*(weights_of(run, name) for name in choosing(run.recipe)))
    looks = {"frechet", "frechet_ratio", "diversity"}
    reads = looks | {"attribute_accuracy", "joint_plausibility", "defect_rate"}
    measured = {"preference": {"preference"}, "judge": {"judge"}, "reader": reads, "features": set() if e.reader else looks}
    found = [metrics for role, metrics in measured.items() if (name := getattr(e, role)) and weights_of(run, name) & chose]
    return set().union(*found)


def weights_of(run: Run, name: str) -> set[tuple[str, str]]:
    """What tells the weights of a scorer from others, whatever its kind: where they lie, or the endpoint's model; of a sum all."""
    spec = run.recipe.scorers[name]
    if spec.kind == "sum":
        return set().union(*(weights_of(run, part) for part in spec.of))
    return {(spec.path if spec.kind == "judge" else str(resolve(spec.path, name)), spec.model)}


def _other_real(run: Run, split: str, used: set[str], n: int) -> list[Prompt]:
    """n real images of the split that no evaluated prompt belongs to, cut as those are: what real is compared with."""
    from limner.inputs import iter_prompts, locate
    from limner.pool.steps import cut

    data = run.recipe.data
    path = resolve(getattr(data, split), split)
    columns: dict[str, Any] = {"caption_column": data.caption_column, "image_column": data.image_column}
    others = islice((p for p in iter_prompts(path, split, **columns) if p.id not in used and p.image is not None), n)
    return [cut(p, data, run.recipe.seed, partial(locate, path, split, **columns)) for p in others]


def report(run: Run) -> None:
    """Write report.html and a sheet of samples, and print the table."""
    from limner.evaluation.report import FIGURES_NOTE, print_table, read_curves, sheet, write_report
    from limner.models.card import add_evaluation
    from limner.records import Image, Prompt
    from limner.scorers.steps import score_images
    from limner.store import read_rows

    try:
        metrics = json.loads((run.out / "metrics.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run.out}/metrics.json: not there; run `limner evaluate` first") from None
    split, e = run.recipe.evaluate.split, run.recipe.evaluate
    prompts = list(read_rows(run.out / "prompts" / split, Prompt))
    made = {m: list(read_rows(run.out / "generate" / split / m, Image)) for m in ["base", *run.compared]}
    pictures = {m: [i.image for i in images] for m, images in made.items()}
    if all(p.image for p in prompts):
        pictures = {"real": [p.image or b"" for p in prompts], **pictures}
    judged: dict[str, list[Score]] = {m: score_images(i, [run.scorers[e.judge]]) for m, i in made.items()} if e.judge else {}
    write_report(
        run.out / "report.html", metrics=metrics, images=pictures, prompts=[p.text for p in prompts],
        curves=read_curves({s: run.out / "train" / s / "log.jsonl" for s in run.compared}),
        judge_scores={m: [s.score if s.score is not None else float("nan") for s in scores] for m, scores in judged.items()},
        command=metrics["command"], recipe_yaml=dump(run.recipe), note=FIGURES_NOTE if run.recipe.model.path == FIGURES else "",
        title=f"Limner: {run.recipe.name or run.out.name}", num_examples=e.num_examples,
    )  # fmt: skip
    sheet({m: x[:6] for m, x in pictures.items()}, [p.text for p in prompts[:6]], run.out / "samples.png")
    for stage in run.compared:
        card = run.out / "train" / stage / "adapter/README.md"
        if stage in metrics["models"] and card.is_file():
            scale, blocks = run.strength(stage)
            add_evaluation(card, {m: metrics["models"][m] for m in ("base", stage)}, stage=stage, scale=scale, blocks=blocks)
    print_table(metrics)
    print(f"wrote {run.out / 'report.html'} and {run.out / 'metrics.json'}")
