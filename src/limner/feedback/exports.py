"""A study's answers as files: what each rater said, what they said together, and every revision."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from limner.feedback import answers, exchange, richhf
from limner.feedback.consolidate import agreement, consolidate, side_answers, side_by_side
from limner.feedback.database import Database
from limner.feedback.preferences import write_preferences
from limner.feedback.progress import answer_table
from limner.feedback.study import Study, identity
from limner.formats import IMAGES
from limner.records import Feedback, Image, to_table
from limner.statistics import Interval, krippendorff
from limner.store import is_complete, open_step, read_table, sha256, shards, write_atomic

FORMATS = {
    "feedback.jsonl": "what each rater said, a row a line", "feedback.csv": "the same as a table", "feedback.parquet": "the same",
    "history.jsonl": "every revision with raw points, clicks and times", "label-studio.json": "for Label Studio",
    "label-studio.xml": "its labelling configuration", "richhf.tfrecord": "consolidated, in RichHF-18K's format",
}  # fmt: skip
RICH_ONLY = (".json", ".xml", ".tfrecord")
JOINED = 500  # images of Pick-a-Pic a shard


def write(study: Study, database: Database, path: Path) -> dict[str, Any]:
    """Write the answers so far to a file; its name says how: one of `FORMATS`, or another with one of these endings.

    Beside a .json for Label Studio goes a .xml of the same name: the labelling configuration without which it shows no answers.
    What an admin settled decides the consolidated .tfrecord; in the others stands what each rater said of such an item as well as of any.

    Raises:
        ValueError: another ending, or a task that the format has no place for.
    """
    if path.name.endswith("history.jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answers.history(database)]
        write_atomic(path, "".join(lines))
        return {"rows": len(lines)}
    rows = answers.feedback(answers.given(study, database, settled=path.suffix == ".tfrecord"))
    if path.suffix in RICH_ONLY and study.task != "rich":
        raise ValueError(f"{path.name}: task {study.task} has no place in this format; take .jsonl, .csv or .parquet")
    if path.suffix == ".xml":
        write_atomic(path, exchange.LABELING)
        return {}
    if path.suffix == ".json":
        tasks = exchange.to_label_studio(rows, answers.images(study, database), lambda image_id: f"images/{image_id}")
        write_atomic(path, json.dumps(tasks, ensure_ascii=False, indent=1))
        write_atomic(path.with_suffix(".xml"), exchange.LABELING)
        return {"rows": len(rows), "tasks": len(tasks)}
    if path.suffix == ".tfrecord":
        found, report = consolidate(rows, answers.images(study, database))
        names = record_names(study, database)
        found = [replace(row, image_id=names[row.image_id]) for row in found]
        return {**richhf.write(path, found), "other_words": report["other_words"]}
    exchange.write_rows(path, rows)
    return {"rows": len(rows)}


def record_names(study: Study, database: Database) -> dict[str, str]:
    """What a .tfrecord calls the study's images, by id: its names end at the first dot and begin behind the last slash, so that an image of
    a folder loses its suffix, and one of a pool has _ for /.

    Raises:
        ValueError: two images would have one name.
    """
    names, ids = dict[str, str](), dict[str, str]()
    for image in answers.images(study, database):
        known = image.id[: -len(suffix)] if (suffix := Path(image.id).suffix).lower() in IMAGES else image.id
        name = known.replace("/", "_").replace(".", "_")
        if ids.setdefault(name, image.id) != image.id:
            raise ValueError(f"images {ids[name]} and {image.id} would both be called {name} in a .tfrecord; take .jsonl, .csv or .parquet")
        names[image.id] = name
    return names


def read(path: Path, study: Study, database: Database, expected: int | None = None) -> tuple[list[Feedback], dict[str, Any]]:
    """Feedback rows of a file to import: .jsonl, .csv, .parquet, Label Studio's .json, or RichHF-18K's .tfrecord.

    Args:
        expected: records of a .tfrecord; only their number tells that one was cut between two of them.

    Raises:
        ValueError: another ending or a damaged file, or another number of records.
    """
    if expected is not None and path.suffix != ".tfrecord":
        raise ValueError(f"--expected: {expected}; {path.name} is no .tfrecord, and of those only records are counted")
    if path.suffix == ".json":
        try:
            return exchange.from_label_studio(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
    if path.suffix == ".tfrecord":
        rows, report = richhf.read(path, expected)
        ids = {name: id for id, name in record_names(study, database).items()}
        rows = [replace(row, image_id=ids.get(row.image_id, row.image_id)) for row in rows]
        prompts = {image.id: image.text for image in answers.images(study, database)}
        joined, more = richhf.join(rows, prompts)
        return [f for row in joined for f in richhf.to_feedback(row)], report | more
    return exchange.read_rows(path), {}


def join_pick_a_pic(path: Path, source: Path, out: Path, expected: int | None = None) -> dict[str, Any]:
    """Give RichHF-18K's rows their images and captions out of Pick-a-Pic, by image id: two step folders below `out`, `pick_a_pic` (Image
    rows, for `images.from` of a study) and `richhf` (rows of RichFeedback with prompts and maps, of images that were found).

    Args:
        path: the .tfrecord.
        source: a parquet file of Pick-a-Pic v1, or a folder of them; the images that are there already are not looked for again.
        expected: as `read`.

    Returns:
        {"images": how many were found, "without_image": ids of rows without a partner,
        "labels_not_of_caption": [[image id, words, labels]] (rows kept without labels)}.

    Raises:
        ValueError: as `read` and `richhf.pick_a_pic`, no file in the folder, no image found, or `out` holds another join.
    """
    if path.suffix != ".tfrecord":
        raise ValueError(f"--pick_a_pic: {source}; it is joined with a .tfrecord of RichHF-18K, and {path.name} is none")
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"--pick_a_pic: {source}: no .parquet in it")
    rows, _ = richhf.read(path, expected)
    made_of = {"tfrecord": sha256(path), "pick_a_pic": [[f.name, f.stat().st_size if f.is_file() else 0] for f in files]}
    step = open_step(out / "pick_a_pic", "images", made_of, {})
    if not is_complete(step.folder):
        found = richhf.pick_a_pic(files, {r.image_id for r in rows})
        number = 0
        while part := list(islice(found, JOINED)):
            step.write(number, to_table(Image, part))
            number += 1
        if not number:
            raise ValueError(f"{source}: no image of the {len(rows)} of {path.name}")
        step.finish({})
    texts = {row["id"]: row["text"] for shard in shards(step.folder) for row in read_table(shard, ["id", "text"]).to_pylist()}
    joined, report = richhf.join(rows, texts)
    table = richhf.to_table(row for row in joined if row.prompt is not None)
    step = open_step(out / "richhf", "richhf", made_of, {})
    step.write(0, table)
    step.finish({"rows": table.num_rows})
    return {"images": len(texts), "without_image": report["without_prompt"], "labels_not_of_caption": report["mismatched"]}


def consolidate_study(study: Study, database: Database, ties_misaligned: bool = False) -> dict[str, Any]:
    """Write what raters said together below output_dir: `feedback` (rows of each rater), `counted` (the rows that count: of a settled item
    the admin's alone), `preferences` (images and scores, for stages with `from: feedback`) and, for task rich, `rich` (maps, words,
    ratings), all as step folders made anew each time; and report.json with agreement and, for side by side, levels, wins and a sign test.

    Agreement is that of the raters, on settled items too: those are the ones they disagreed on, and leaving them out would raise it.

    Raises:
        ValueError: nobody has answered yet.
    """
    out, counted = Path(study.output_dir), answers.given(study, database)
    rows, said = answers.feedback(counted), answers.feedback(answers.given(study, database, settled=False))
    if not rows:
        raise ValueError(f"{study.name}: no answers to consolidate yet")
    made_of = {"study": identity(study), "ties_misaligned": ties_misaligned}
    report: dict[str, Any] = {
        "task": study.task, "answers": len(said), "settled": sum(a.final for a in counted),
        "agreement": _plain(agreement(said, study.seed)),
    }  # fmt: skip
    if study.task != "rich":
        alpha = krippendorff(answer_table(said, study.task), "interval" if study.task == "side" else "nominal")
        report["agreement"][study.task] = {"alpha": _plain(alpha)}
    tables = {"feedback": to_table(Feedback, said), "counted": to_table(Feedback, rows)}
    if study.task == "rich":
        found, more = consolidate(rows, answers.images(study, database), ties_misaligned=ties_misaligned)
        tables["rich"] = richhf.to_table(found)
        report["consolidated"] = {k: v for k, v in more.items() if k != "raters"} | {"raters": len({r.rater for r in rows})}
    if study.task == "side":
        said_of, pairs = side_answers(rows)
        report["side"] = _plain(side_by_side(said_of, pairs))
    for name, table in tables.items():
        folder = out / name
        if (folder / "manifest.json").is_file():
            shutil.rmtree(folder)
        step = open_step(folder, name, made_of, {})
        step.write(0, table)
        step.finish({"rows": table.num_rows})
    shutil.rmtree(out / "preferences", ignore_errors=True)
    report["preferences"] = write_preferences(study, rows, out / "preferences")
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def read_consolidated(folder: Path) -> list[richhf.RichFeedback]:
    """The rows of a consolidated study's folder `rich`."""
    return richhf.from_table(read_table(folder / "part-00000.parquet"))


def _plain(value: Any) -> Any:
    """Intervals as objects, keys as text, nan as null: JSON."""
    if isinstance(value, Interval):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if value == value else None
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
