"""The command line: one subcommand a step. Parse, call, exit code.

Exit codes: 0 done, 2 unusable input (one line says what), 130 stopped by ctrl-C or SIGTERM after saving.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COMMANDS: dict[str, str] = {
    "run": "all steps of a recipe; finished ones are skipped",
    "pool": "images of the training prompts to choose from",
    "reconstruct": "real images noised and denoised (SDRecon)",
    "score": "score pool and reconstructions; or, without a recipe, --images PATH --scorers NAME=WEIGHTS ... --output_dir OUT",
    "caption": "caption photos with a vision-language model; needs no recipe",
    "examples": "choose winners and losers (--stage)",
    "train": "train a stage (--stage)",
    "scorer": "preference scorers of your own: import, judge, export, train, evaluate",
    "generate": "images of the evaluation prompts from base and stages",
    "evaluate": "measure and compare; metrics.json",
    "report": "report.html and the table",
    "annotate": "people look at images: serve, invite, import, export, consolidate, simulate",
    "figures": "the embedded world: make, hps",
    "env": "versions, for bug reports",
}

VALUES = {"env": ""} | dict.fromkeys(("annotate", "scorer", "figures"), "Any value of the file can be set: --output_dir runs/mine")
DRY_RUN = {
    "annotate": "say how many items the study makes, and stop",
    "scorer": "train, judge: check inputs, say how much it is, and stop",
    "figures": "there is none: parts that are made are kept",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="limner", description="Makes text-to-image models draw people right.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        c = commands.add_parser(
            name, help=text, description=text, epilog=VALUES.get(name, "Any value of the recipe can be set: --stages.easy.learn.beta 500")
        )
        if name == "env":
            continue
        if name == "annotate":
            c.add_argument("action", choices=["serve", "invite", "import", "export", "consolidate", "simulate"])
            c.add_argument(
                "--file", default="", help="import, export: .jsonl, .csv, .parquet, .json (Label Studio) or .tfrecord (RichHF-18K)"
            )
            c.add_argument("--expected", type=int, help="import: records that a .tfrecord should have; tells whether its end is missing")
            c.add_argument("--pick_a_pic", default="", help="import: parquet file or folder with the images and captions of a .tfrecord")
            c.add_argument("--rater", default="", help="invite: who")
            c.add_argument("--role", default="", choices=["rater", "admin"], help="invite: as what (default: rater, or as before)")
            c.add_argument("--count", type=int, default=3, help="simulate: how many")
            c.add_argument("--reader", default="", help="simulate: of images without a known truth, what this reader sees is known")
            c.add_argument("--ties_misaligned", action="store_true", help="consolidate: words marked by half of the raters are misaligned")
        if name == "scorer":
            c.add_argument("action", choices=["import", "judge", "export", "train", "evaluate"])
        if name == "figures":
            c.add_argument("action", choices=["make", "hps"])
        c.add_argument("recipe", nargs="?", help="a YAML file")
        c.add_argument("--config", help="the same")
        c.add_argument("--print_config", action="store_true", help="print every value and stop")
        c.add_argument(
            "--dry_run", action="store_true", help=DRY_RUN.get(name, "check inputs, estimate calls, time, memory and disk, and stop")
        )
        if name in ("examples", "train"):
            c.add_argument("--stage", help="which stage (default: all)")
        if name in ("pool", "reconstruct", "score"):
            c.add_argument("--shard", default="0/1", help="i/n: this process takes every n-th shard from the i-th")
    return p


WITHOUT_RECIPE = ("--images", "--scorers", "--serve")  # options of `limner score` that say so
OPTIONS = ("--help", "--config", "--print_config", "--dry_run", "--stage", "--shard")
# options of `limner annotate`; others set the study's values
ANNOTATE = ("file", "expected", "pick_a_pic", "rater", "role", "count", "reader", "ties_misaligned")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of the command line, and those that set a value of the recipe: argparse would take an unknown option's value for the recipe."""
    own: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    options = (*OPTIONS, *(f"--{name}" for name in ANNOTATE)) if words[:1] == ["annotate"] else OPTIONS
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in options:
            own.append(word)
            continue
        overrides.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            overrides.append(words.pop(0))
    return own, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, overrides = split_overrides(words)
    without_recipe = words[:1] == ["caption"] or (words[:1] == ["score"] and any(w.partition("=")[0] in WITHOUT_RECIPE for w in words))
    args = argparse.Namespace(command=words[0]) if without_recipe else parser().parse_args(own)
    try:
        return direct(words) if without_recipe else dispatch(args, overrides)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"limner {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def direct(words: Sequence[str]) -> int:
    """Commands without a recipe."""
    from limner.steps import direct

    quiet_libraries()
    return (direct.caption if words[0] == "caption" else direct.score_files)(words[1:])


def dispatch(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from limner.config import dump
    from limner.engine import parse_part
    from limner.recipe import load_recipe

    if args.command == "env":
        return print_environment()
    path = args.recipe or args.config
    if args.command in ("scorer", "figures") and not args.print_config:
        quiet_libraries()
    if args.command == "scorer":
        from limner.steps.scorer import scorer

        return scorer(args.action, path, overrides, print_config=args.print_config, dry_run=args.dry_run)
    if not path:
        raise ValueError("which recipe? e.g. limner run recipes/figures/demo.yaml")
    if args.command == "figures":
        if args.dry_run:
            raise ValueError(f"--dry_run: figures {args.action} has none; parts that are made are kept, --print_config shows what it makes")
        if args.action == "hps":
            from limner.figures.hps import run_hps

            return run_hps(Path(path), overrides, print_config=args.print_config)
        from limner.figures.world import make_world

        return make_world(Path(path), overrides, print_config=args.print_config)
    if args.command == "annotate":
        return dispatch_annotate(args, path, overrides)
    recipe = load_recipe(path, overrides)
    if args.print_config:
        print(dump(recipe))
        return 0

    from limner import steps

    quiet_libraries()
    run = steps.Run(recipe, part=parse_part(getattr(args, "shard", "0/1")))
    if args.dry_run:
        from limner.estimate import dry_run

        return dry_run(run)
    if args.command in ("examples", "train"):
        if args.stage:
            steps.stage_of(recipe, args.stage)
        for stage in [args.stage] if args.stage else recipe.stages:
            (steps.examples if args.command == "examples" else steps.train)(run, stage)
        return 0
    actions: dict[str, Callable[[steps.Run], object]] = {
        "run": steps.run_all, "pool": steps.pool, "reconstruct": steps.reconstruct, "score": steps.score, "generate": steps.generate,
        "evaluate": steps.evaluate, "report": steps.report,
    }  # fmt: skip
    actions[args.command](run)
    return 0


def dispatch_annotate(args: argparse.Namespace, path: str, overrides: Sequence[str]) -> int:
    from limner.config import dump
    from limner.feedback.study import load_study

    study = load_study(path, overrides)
    if args.print_config:
        print(dump(study))
        return 0
    try:
        from limner.steps.annotate import annotate
    except ImportError as error:
        raise ValueError(f"annotate needs the extra `annotate` (pip install -e '.[annotate]'): {error}") from error
    annotate(args.action, study, dry_run=args.dry_run, **{name: getattr(args, name) for name in ANNOTATE})
    return 0


def quiet_libraries() -> None:
    """Only our own bars and warnings: loading a pipeline would draw three bars, and warn of libraries that nothing needs."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for module in (diffusers.utils.logging, transformers.utils.logging):
        module.disable_progress_bar()
        module.set_verbosity_error()


def print_environment() -> int:
    """Versions and devices, for bug reports."""
    import platform

    import torch

    from limner.store import versions

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, version in versions().items():
        print(f"{name} {version}")
    print(f"threads {torch.get_num_threads()}, cuda {torch.cuda.is_available()}, devices {torch.cuda.device_count()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
