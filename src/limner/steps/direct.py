"""Commands that need no recipe: `limner score --images`, `limner score --serve`, `limner caption`. Each imports what it uses."""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from limner.engine import parse_part
from limner.recipe import ScorerKind, ScorerSpec
from limner.steps import run

if TYPE_CHECKING:
    from limner.scorers.protocol import Scorer

SCORERS = "NAME=WEIGHTS[,kind=KIND][,tower=...][,tokenizer=...][,activation=...]"


def score_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="limner score", description="Score images with several scorers in one pass. NAME is a kind, such as hps_v2_1; else set kind=."
    )  # fmt: skip
    p.add_argument("--images", help="a folder of images, with or without captions; .parquet, .jsonl, .csv, .tar; one image", metavar="PATH")
    p.add_argument("--scorers", nargs="+", required=True, metavar="SCORER", help=SCORERS)
    p.add_argument("--output_dir", help="where the scores are written; the same command goes on where it was stopped")
    p.add_argument("--prompt", default="", help="of the images that have no caption")
    p.add_argument("--caption_column", default="", help="of tables (default: text, caption or prompt)")
    p.add_argument("--image_column", default="", help="of tables (default: image or file_name)")
    p.add_argument("--combine", nargs="+", default=[], metavar="NAME=WEIGHT", help="also columns `combined` and `pareto` of these scores")
    p.add_argument("--combine_by", choices=("zscore", "rank", "zscore_all"), default="zscore",
                   help="the common scale: z-scores or ranks within each prompt, or z-scores over all images (zscore_all)")  # fmt: skip
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--images_per_shard", type=int, default=256, help="how often work is saved")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps ...")
    p.add_argument("--shard", default="0/1", help="i/n: this process takes every n-th shard from the i-th")
    p.add_argument("--serve", action="store_true", help="answer over HTTP instead: POST /score, GET /health, GET /metrics")
    p.add_argument("--host", default="127.0.0.1", help="of --serve; 0.0.0.0 = reachable from other machines, without any password")
    p.add_argument("--port", type=int, default=8700, help="of --serve")
    p.add_argument("--queue", type=int, default=256, help="of --serve: images that may wait; beyond them the answer is 503")
    return p


def score_files(argv: Sequence[str]) -> int:
    """`limner score --images PATH --scorers NAME=WEIGHTS ... --output_dir OUT`."""
    from limner.scorers import files

    args = score_parser().parse_args(argv)
    if args.serve:
        return serve(args)
    if not args.images or not args.output_dir:
        raise ValueError("--images and --output_dir: what to score, and where to write the scores")
    for name in ("batch_size", "images_per_shard"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: {getattr(args, name)}; expected at least 1")
    source = files.Source(
        path=Path(args.images), caption_column=args.caption_column, image_column=args.image_column, prompt=args.prompt.strip()
    )
    part = parse_part(args.shard)
    scorers = load_scorers(args.scorers, args.device)
    out = Path(args.output_dir)
    if files.score_files(
        source, out, scorers, batch_size=args.batch_size, images_per_shard=args.images_per_shard, part=part,
        weights=parse_weights(args.combine), scale=args.combine_by,
    ):  # fmt: skip
        files.print_summary(out, scorers)
        print(f"wrote {out / 'scores.csv'}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """`limner score --serve --scorers NAME=WEIGHTS ...`."""
    try:
        import uvicorn

        from limner.scorers.serve import make_app
    except ImportError as error:
        raise ValueError(f"--serve needs {error.name}: pip install -e '.[serve]'") from None
    app = make_app(load_scorers(args.scorers, args.device), batch_size=args.batch_size, limit=args.queue)
    print(f"http://{args.host}:{args.port}/score answers; stop with ctrl-C", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def caption_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="limner caption", description="Caption photos with a vision-language model; the result is what data.train reads."
    )  # fmt: skip
    p.add_argument("--images", required=True, metavar="PATH", help="a folder of images; .parquet, .jsonl, .csv, .tar; one image")
    p.add_argument(
        "--output_dir", required=True, help="where prompts and photos are written; the same command goes on where it was stopped"
    )
    p.add_argument(
        "--backend", required=True, metavar="URL|FOLDER", help="an endpoint such as http://localhost:8000/v1, or a model's folder"
    )
    p.add_argument("--model", default="", help="of an endpoint: as it calls it")
    p.add_argument("--split", default="train", help="of the prompts; give training and test photos different models")
    p.add_argument("--question", default="", help="instead of ours")
    p.add_argument("--image_column", default="", help="of tables (default: image or file_name)")
    p.add_argument("--device", default="auto", help="of a local model")
    p.add_argument("--shard", default="0/1", help="i/n: this process takes every n-th shard from the i-th")
    return p


def caption(argv: Sequence[str]) -> int:
    """`limner caption --images PATH --backend URL --model NAME --output_dir OUT`."""
    from limner.scorers.backends import load_backend
    from limner.scorers.caption import QUESTION, caption_files
    from limner.scorers.files import Source

    args = caption_parser().parse_args(argv)
    backend = load_backend("caption", args.backend, args.model)
    run.to_device([backend], args.device)
    source = Source(path=Path(args.images), image_column=args.image_column)
    counts = caption_files(
        source, Path(args.output_dir), backend, split=args.split, question=args.question or QUESTION, part=parse_part(args.shard)
    )
    if counts is not None:
        for reason, count in counts.most_common():
            print(f"{count} {reason}" if reason == "captioned" else f"  {count} without: {reason}")
        print(f"wrote {args.output_dir}; a recipe reads it as data.{args.split}")
    return 0


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """`NAME=WEIGHT` to numbers.

    Raises:
        ValueError: not of that form.
    """
    try:
        return {name: float(weight) for name, weight in (t.split("=") for t in texts)}
    except ValueError:
        raise ValueError(f"--combine {' '.join(texts)}: expected NAME=WEIGHT, such as pickscore=1 aesthetic_v2=0.5") from None


def load_scorers(texts: Sequence[str], device: str = "auto") -> list[Scorer]:
    """Scorers of the command line's texts."""
    specs: dict[str, ScorerSpec] = {}
    for text in texts:
        name, spec = parse_scorer(text)
        if name in specs:
            raise ValueError(f"--scorers {name}: given twice")
        specs[name] = spec
    return list(run.load_scorers(specs, device).values())


def parse_scorer(text: str) -> tuple[str, ScorerSpec]:
    """`hps_v2_1=weights/HPS_v2.1_compressed.pt` or `mine=weights/x.pt,kind=hps_v2,tokenizer=clip` to a name and what it means.

    Raises:
        ValueError: not of that form, a kind or an option that there is not.
    """
    options = {f.name for f in fields(ScorerSpec)} - {"path", "of"}
    name, equals, rest = text.partition("=")
    path, *more = re.split(r",(?=\w+=)", rest)
    if not equals or not path or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"--scorers {text}: expected {SCORERS}")
    values = dict(m.split("=", 1) for m in more)
    if unknown := [k for k in values if k not in options]:
        raise ValueError(f"--scorers {name}: no option {unknown[0]}; known: {', '.join(sorted(options))}")
    kinds = typing.get_args(ScorerKind)
    kind = values.setdefault("kind", name)
    kinds = tuple(k for k in kinds if k not in ("reader", "sum"))
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, 1)
        hint = f"did you mean {near[0]}?" if near else f"{name}=...,kind=KIND with one of {', '.join(kinds)}"
        raise ValueError(f"--scorers {name}: no kind of scorer {kind!r}; {hint}")
    return name, ScorerSpec(path=path, **typing.cast("dict[str, typing.Any]", values))
