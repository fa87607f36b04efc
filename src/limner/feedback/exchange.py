"""Feedback rows as JSONL, CSV and parquet, and as Label Studio's JSON, out and in.

In JSONL a payload is an object, in CSV and parquet a string of JSON. Label Studio (docs: labelstud.io/guide/export, /tags) gives points
in percent of the image, and has no place for a word's position or for "looked and found nothing": here words are choices such as
"3: hand", and nothing found is a choice of its own. `LABELING` is the labelling configuration that goes with it; other projects'
configurations are read where their control tags have the same names.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from limner import records
from limner.feedback import payloads
from limner.feedback.richhf import tokens
from limner.images import image_size
from limner.records import Feedback
from limner.store import read_table, write_atomic

FIELDS = tuple(f.name for f in fields(Feedback))
NOTHING = {"points": "nothing wrong in the image", "words": "nothing wrong in the prompt"}
LABELING = (
    '<View>\n  <Image name="image" value="$image"/>\n  <KeyPointLabels name="points" toName="image">\n'
    '    <Label value="artifact" background="red"/>\n    <Label value="misalignment" background="blue"/>\n  </KeyPointLabels>\n'
    '  <Text name="prompt" value="$prompt"/>\n  <Choices name="words" toName="prompt" choice="multiple" value="$words"/>\n'
    '  <Choices name="nothing" toName="image" choice="multiple">\n'
    + "".join(f'    <Choice value="{text}"/>\n' for text in NOTHING.values())
    + "  </Choices>\n"
    + "".join(f'  <Header value="{q}"/>\n  <Rating name="{q}" toName="image" maxRating="5"/>\n' for q in payloads.QUESTIONS)
    + '  <TextArea name="rater" toName="image"/>\n</View>\n'
)


def write_rows(path: Path, rows: Iterable[Feedback]) -> None:
    """Feedback rows to a file, whole or not at all; its name says how: .jsonl, .csv or .parquet.

    Raises:
        ValueError: another ending, or a payload that is not one of its kind.
    """
    rows = list(rows)
    loaded = [payloads.load(row) for row in rows]
    if path.suffix == ".jsonl":
        lines = [json.dumps({**asdict(r), "payload": p}, ensure_ascii=False, allow_nan=False) + "\n" for r, p in zip(rows, loaded)]
        write_atomic(path, "".join(lines))
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\r\n")  # Python quotes a lone \r only if it is in the line's end
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
        write_atomic(path, text.getvalue())
    elif path.suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(records.to_table(Feedback, rows), sink, compression="zstd")
        write_atomic(path, sink.getvalue().to_pybytes())
    else:
        raise _ending(path)


def read_rows(path: Path) -> list[Feedback]:
    """Feedback rows of a .jsonl, .csv or .parquet file; other columns are ignored, payloads are checked.

    Raises:
        ValueError: another ending, a damaged file, a field that is missing or of the wrong kind; names file, row and field.
    """
    if path.suffix == ".jsonl":
        return [_checked(_json_line(line, f"{path}: line {i}"), f"{path}: line {i}") for i, line in _lines(path) if line.strip()]
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_text(path), newline=""))
        try:
            found = [_checked(values, f"{path}: row {i}") for i, values in enumerate(reader, 1)]
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: not CSV ({error})") from error
        if not found and not set(FIELDS[:5]) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: columns {', '.join(reader.fieldnames or ()) or 'none'}; expected {', '.join(FIELDS)}")
        return found
    if path.suffix == ".parquet":
        rows = records.from_table(Feedback, read_table(path), str(path))
        return [_checked(asdict(row), f"{path}: row {i}") for i, row in enumerate(rows)]
    raise _ending(path)


def _ending(path: Path) -> ValueError:
    return ValueError(f"{path}: ends in {path.suffix or 'nothing'}; expected .jsonl, .csv or .parquet")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets write the mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    return enumerate(_text(path).split("\n"), 1)  # not splitlines: JSON strings may hold U+2028 and its like


def _json_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {type(values).__name__}; expected an object with {', '.join(FIELDS)}")
    return {**values, "payload": payloads.dump(values["payload"])} if isinstance(values.get("payload"), dict) else values


def _checked(values: Mapping[str, Any], where: str) -> Feedback:
    for name in FIELDS[:5]:
        if not isinstance(values.get(name), str):
            raise ValueError(f"{where}: {name} is {values.get(name)!r}; expected text")
    try:
        seconds = float(values.get("seconds") or 0)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: seconds is {values['seconds']!r}; expected a number") from None
    row = Feedback(**{name: values[name] for name in FIELDS[:5]}, seconds=seconds)
    try:
        payloads.load(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def to_label_studio(rows: Iterable[Feedback], images: Iterable[records.Image], url: Callable[[str], str]) -> list[dict[str, Any]]:
    """Label Studio tasks, one an image that has feedback, with one annotation a rater.

    Args:
        rows: of kinds points, words and ratings.
        images: those that the rows are about; others get no task.
        url: image id to where Label Studio finds the image.

    Raises:
        ValueError: a row of another kind, about an image that is not there, or words that are not the prompt's.
    """
    said: dict[str, dict[str, list[Feedback]]] = {}
    for row in rows:
        said.setdefault(row.image_id, {}).setdefault(row.rater, []).append(row)
    tasks = list[dict[str, Any]]()
    for image in images:
        raters = said.pop(image.id, None)
        if raters is None:
            continue
        size, words = image_size(image.image, f"image {image.id}"), tokens(image.text)
        annotations = []
        for rater, answers in raters.items():
            result = [_region("rater", "image", "textarea", {"text": [rater]})]
            for row in answers:
                result += _regions(row, size, words)
            nothing = [text for r in result if r["from_name"] == "nothing" for text in r["value"]["choices"]]
            if nothing:  # a control has one result
                result = [r for r in result if r["from_name"] != "nothing"] + [_region("nothing", "image", "choices", {"choices": nothing})]
            annotations.append({"result": result, "lead_time": sum(r.seconds for r in answers)})
        data = {
            "image": url(image.id),
            "image_id": image.id,
            "prompt": image.text,
            "words": [{"value": f"{i}: {word}"} for i, word in enumerate(words)],
        }
        tasks.append({"data": data, "annotations": annotations})
    if said:
        raise ValueError(f"feedback on images that are not there: {', '.join(sorted(said)[:5])}")
    return tasks


def _region(name: str, to: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"from_name": name, "to_name": to, "type": kind, "value": value}


def _regions(row: Feedback, size: tuple[int, int], words: list[str]) -> list[dict[str, Any]]:
    payload = payloads.load(row)
    nothing = _region("nothing", "image", "choices", {"choices": [NOTHING.get(row.kind, "")]})
    if row.kind == "points":
        where = {"original_width": size[0], "original_height": size[1], "image_rotation": 0}
        points = [(mark, x, y) for mark in payloads.MARKS for x, y in payload[mark]]
        found = [
            _region("points", "image", "keypointlabels", {"x": 100 * x, "y": 100 * y, "width": 0.5, "keypointlabels": [mark]}) | where
            for mark, x, y in points
        ]
        return found or [nothing]
    if row.kind == "words":
        if payload["tokens"] != words:
            raise ValueError(f"feedback {row.id}: its words are not those of the prompt of image {row.image_id}")
        marked = [f"{i}: {words[i]}" for i in payload["misaligned"]]
        return [_region("words", "prompt", "choices", {"choices": marked})] if marked else [nothing]
    if row.kind == "ratings":
        return [_region(q, "image", "rating", {"rating": payload[q]}) for q in payloads.QUESTIONS if q in payload]
    raise ValueError(f"feedback {row.id}: kind {row.kind}; Label Studio's JSON takes points, words and ratings")


def from_label_studio(tasks: Any) -> tuple[list[Feedback], dict[str, Any]]:
    """Feedback rows of Label Studio's JSON export (a list of tasks), and a report.

    The image is the task's `image_id`, else its `image`; the rater what the text area `rater` says, else who completed it. An annotation's
    time is divided evenly among its rows. Cancelled (skipped) annotations are counted, not read. Points outside the image by rounding are
    moved to its edge.

    Returns:
        rows; and {"tasks", "annotations", "cancelled", "ignored": {"name (type)": results of controls that Limner does not know}}.

    Raises:
        ValueError: not such an export, or a value that is out of range; names the task.
    """
    if not isinstance(tasks, list):
        raise ValueError(f"Label Studio: {type(tasks).__name__}; expected a list of tasks (the JSON export, not JSON-MIN)")
    rows, counts, ignored = list[Feedback](), {"tasks": len(tasks), "annotations": 0, "cancelled": 0}, dict[str, int]()
    for i, task in enumerate(tasks):
        where = f"Label Studio task {task.get('id', i) if isinstance(task, dict) else i}"
        try:
            data = task["data"]
            image_id = str(data["image_id"] if "image_id" in data else data["image"])
            for annotation in task.get("annotations", []):
                cancelled = bool(annotation.get("was_cancelled"))
                counts["cancelled" if cancelled else "annotations"] += 1
                if not cancelled:
                    rows += _annotation(annotation, image_id, tokens(str(data.get("prompt", ""))), ignored)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{where}: not as Label Studio exports it ({type(error).__name__}: {error})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return rows, {**counts, "ignored": ignored}


def _annotation(annotation: Mapping[str, Any], image_id: str, words: list[str], ignored: dict[str, int]) -> list[Feedback]:
    author = annotation.get("completed_by")
    rater = str(author.get("email", author.get("id")) if isinstance(author, dict) else author)
    found: dict[str, dict[str, Any]] = {}

    def payload(kind: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"points": {m: [] for m in payloads.MARKS}, "words": {"tokens": words, "misaligned": []}, "ratings": {}}
        return found.setdefault(kind, empty[kind])

    for result in annotation["result"]:
        name, kind, value = result.get("from_name"), result.get("type"), result.get("value", {})
        if name == "rater" and kind == "textarea":
            rater = str(value["text"][0])
        elif kind == "keypointlabels" and value["keypointlabels"][0] in payloads.MARKS:
            x, y = (float(value[k]) / 100 for k in "xy")
            inside = [min(max(v, 0.0), 1.0) if -0.01 <= v <= 1.01 else v for v in (x, y)]
            payload("points")[value["keypointlabels"][0]].append(inside)
        elif name == "words" and kind == "choices":
            payload("words")["misaligned"] += [_position(choice, words) for choice in value["choices"]]
        elif name == "nothing" and kind == "choices":
            for part, text in NOTHING.items():
                if text in value["choices"]:
                    payload(part)
        elif name in payloads.QUESTIONS and kind == "rating":
            payload("ratings")[name] = value["rating"]
        else:
            ignored[f"{name} ({kind})"] = ignored.get(f"{name} ({kind})", 0) + 1
    seconds = float(annotation.get("lead_time") or 0) / max(len(found), 1)
    return [payloads.make(image_id, rater, kind, value, seconds) for kind, value in found.items()]


def _position(choice: str, words: list[str]) -> int:
    number, _, word = choice.partition(": ")
    if not number.isdecimal() or int(number) >= len(words) or words[int(number)] != word:
        raise ValueError(f"choice {choice!r} is no word of the prompt; expected e.g. '0: {words[0] if words else ''}'")
    return int(number)
