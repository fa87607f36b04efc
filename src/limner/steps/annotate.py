"""`limner annotate`: serve a study, invite, import, export, consolidate, and let simulated raters answer it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.feedback.study import Study
from limner.steps.run import FIGURES, resolve
from limner.store import write_atomic

if TYPE_CHECKING:
    from limner.feedback.simulate import Truth

ACTIONS = {
    "serve": "the page that raters and admins use",
    "invite": "a link that signs somebody in once (--rater, --role)",
    "import": "answers from a file (--file, --expected, --pick_a_pic)",
    "export": "answers to a file (--file)",
    "consolidate": "what raters said together, and how far they agree",
    "simulate": "raters of the embedded world answer through the page's own requests (--count, --reader)",
}


def annotate(action: str, study: Study, dry_run: bool = False, **options: Any) -> None:
    """Do one of `ACTIONS`; options are those of the command line. dry_run: say what the study would ask of raters, and make nothing."""
    if dry_run:
        _plan(study)
        return
    actions: dict[str, Callable[..., None]] = {
        "serve": _serve, "invite": _invite, "import": _import, "export": _export, "consolidate": _consolidate, "simulate": _simulate,
    }  # fmt: skip
    actions[action](_with_figures(study), **options)


def _plan(study: Study) -> None:
    from limner.feedback.items import make_items

    if study.images.source == FIGURES:
        print(f"annotate: {study.images.limit or 60} items of figures, which are drawn when it begins")
        return
    items, dropped = make_items(study)
    gold = sum(i.gold is not None for i in items)
    print(
        f"annotate: {len(items) - gold} items of {len({name for i in items for name in i.images})} images, and {gold} gold ones; "
        f"{study.overlap} raters each: {(len(items) - gold) * study.overlap} answers"
    )
    for why, n in dropped.items():
        print(f"  left out, {why}: {n}")


def _with_figures(study: Study) -> Study:
    """The study with `images.from: figures` drawn below output_dir."""
    if study.images.source != FIGURES:
        return study
    if study.task == "side" and study.images.against != FIGURES:
        raise ValueError(f"images.against: {study.images.against}; figures are compared with figures")
    try:
        from limner.figures.raters import write_comparisons, write_study
    except ImportError as error:
        raise ValueError(f"images.from: figures are drawn with {error.name}; pip install -e '.[figures]'") from None

    count, folder = study.images.limit or 60, Path(study.output_dir) / "figures"
    if study.task == "rich":
        source, against = write_study(folder.with_suffix(".parquet"), count, study.seed), ""
    else:
        write_comparisons(folder, count, study.seed)
        source, against = (folder / "choice", "") if study.task == "choice" else (folder / "ours", str(folder / "base"))
    return replace(study, images=replace(study.images, source=str(source), against=against))


def _serve(study: Study, **_: Any) -> None:
    from limner.feedback.server import serve

    serve(study, os.environ.pop("LIMNER_ADMIN_PASSWORD", ""))


def _invite(study: Study, rater: str = "", role: str = "", **_: Any) -> None:
    from limner.feedback.server import address, invitation, prepare

    if not rater:
        raise ValueError("--rater: not set; who is invited?")
    server = study.server
    if not server.port and not server.address:
        raise ValueError("server.port: 0, so nobody knows where the page is; set the port that it printed, or server.address")
    print(f"annotate: {rater}, once: {invitation(study, prepare(study, begin=False), rater, role, address(server, server.port))}")


def _import(study: Study, file: str = "", expected: int | None = None, pick_a_pic: str = "", **_: Any) -> None:
    from limner.feedback.answers import import_feedback
    from limner.feedback.exports import join_pick_a_pic, read
    from limner.feedback.server import prepare

    path, report = _file(file), dict[str, Any]()
    if pick_a_pic:  # before the study is made: its images may be these
        report = join_pick_a_pic(path, Path(pick_a_pic), Path(study.output_dir), expected)
    database = prepare(study)
    rows, more = read(path, study, database, expected)
    report |= more
    refused: list[dict[str, str]] = []
    counts = import_feedback(study, database, rows, refused)
    for name, value in report.items():
        if value not in ([], {}, 0, None):
            print(f"  {name}: {len(value) if isinstance(value, list | dict) else value}")
    whole = Path(study.output_dir) / f"import-{path.name}.json"
    write_atomic(whole, json.dumps({**report, "answers": counts, "refused": refused}, indent=1, ensure_ascii=False) + "\n")
    print(f"annotate import: wrote {whole}: " + (", ".join(f"{why} {n}" for why, n in counts.items()) or "no rows"))


def _export(study: Study, file: str = "", **_: Any) -> None:
    from limner.feedback.exports import write
    from limner.feedback.server import prepare

    report = write(study, prepare(study, begin=False), _file(file))
    counts = ", ".join(f"{k} {v}" for k, v in report.items() if v not in ([], {}))
    print(f"annotate export: wrote {file}" + (f": {counts}" if counts else ""))


def _consolidate(study: Study, ties_misaligned: bool = False, **_: Any) -> None:
    from limner.feedback.exports import consolidate_study
    from limner.feedback.server import prepare

    report = consolidate_study(study, prepare(study, begin=False), ties_misaligned)
    for name, values in report["agreement"].items():
        alpha = values["alpha"]
        print(f"  {name:13} alpha {'-' if alpha is None else f'{alpha:.3f}'}")
    if "side" in report:
        wins = report["side"]["wins"]
        print(f"  wins {wins['value']:.3f} ({wins['low']:.3f} to {wins['high']:.3f}), p {report['side']['p_value']:.3g}")
    print(f"annotate consolidate: wrote {study.output_dir}/report.json")


def _simulate(study: Study, count: int = 3, reader: str = "", **_: Any) -> None:
    import sqlalchemy
    from sqlmodel import col

    from limner.feedback.database import Picture, reading
    from limner.feedback.server import invitation, prepare, serving
    from limner.feedback.simulate import run_raters

    if count < study.overlap:
        raise ValueError(f"--count: {count} raters cannot give every item {study.overlap} answers (overlap)")
    database = prepare(study)
    with reading(database) as session:
        names = {row[0]: row[1] for row in session.execute(sqlalchemy.select(col(Picture.token), col(Picture.image_id)))}
    truths = _known(study, set(names.values()), reader)
    with serving(study, database) as address:
        links = [invitation(study, database, f"simulated-{n:03d}", "rater", address) for n in range(count)]
        done = run_raters(address, links, study, truths.__getitem__, names)
    print(f"annotate simulate: {count} raters gave {done} answers")


def _known(study: Study, ids: set[str], reader: str) -> dict[str, Truth]:
    """What simulated raters know of images: the truth that was written down, and of the others what the reader sees in them."""
    from limner.feedback.items import images_of
    from limner.figures.truths import read_truths

    truths = read_truths(Path(study.images.source))
    missing = ids - truths.keys()
    if not missing:
        return truths
    if not reader:
        raise ValueError(
            f"no truth is known of {len(missing)} of {len(ids)} images, such as {min(missing)}; for generated figures say with whose eyes "
            "raters see: --reader figures/rater_reader, or the folder of another reader"
        )
    from limner.figures.seen import see_images

    return truths | dict(see_images(images_of(study, missing), resolve(reader, "rater_reader")))


def _file(file: str) -> Path:
    if not file:
        raise ValueError("--file: not set; which file?")
    return Path(file)
