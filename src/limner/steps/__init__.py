"""The steps of a recipe, in order. Beside `cli` and `estimate` the only modules that know every folder; each imports what it uses."""

from __future__ import annotations

from limner.checks import check_packages
from limner.config import dump
from limner.recipe import BASE
from limner.steps import judge, make
from limner.steps.learn import train
from limner.steps.processes import by_one
from limner.steps.run import Run, resolve, stage_of
from limner.store import write_atomic

prompts, pool, reconstruct, score = by_one(make.prompts), by_one(make.pool), by_one(make.reconstruct), by_one(make.score)
examples, generate = by_one(make.examples), by_one(judge.generate)
evaluate, report = by_one(judge.evaluate), by_one(judge.report)


def run_all(run: Run) -> None:
    """Every step in order; finished ones are skipped. A stage `base` comes first: pools and references are made with its model."""
    check_packages(run.recipe)
    _keep_recipe(run, False)
    prompts(run, run.splits)
    if BASE in run.recipe.stages:
        examples(run, BASE)
        train(run, BASE)
    if run.uses("pool"):
        pool(run)
    reconstruct(run)
    score(run)
    for name, stage in run.recipe.stages.items():
        if any(source.model for source in stage.sources):  # its start has learned since the first pool: draw with that
            pool(run)
            score(run)
        examples(run, name)
        train(run, name)
    generate(run)
    evaluate(run)
    report(run)
    _keep_recipe(run, True)  # not before: a folder of another configuration refuses this one


@by_one
def _keep_recipe(run: Run, anew: bool) -> None:
    path = run.out / "recipe.yaml"
    if anew or not path.is_file():
        write_atomic(path, dump(run.recipe))


__all__ = [
    "BASE", "Run", "evaluate", "examples", "generate", "pool", "prompts", "reconstruct", "report", "resolve", "run_all", "score",
    "stage_of", "train",
]  # fmt: skip
