"""What users bring: every format to the same prompts, and every mistake to a sentence that names file, row and field."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chain import photo_folder
from limner import records
from limner.inputs import iter_images, iter_prompts, read_prompts

CAPTIONS = ["a woman in a red coat", 'two men, one says "hi"', "ein Mädchen läuft"]


def photo(colour: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, form)
    return buffer.getvalue()


PHOTOS = [photo(c) for c in ("red", "lime", "blue")]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_photos(folder: Path, names: list[str]) -> None:
    for name, data in zip(names, PHOTOS, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def fails(message: str, path: Path, split: str = "train", **options: Any) -> None:
    """Reading fails with this message (a literal, {} stands for the path)."""
    with pytest.raises(ValueError, match=re.escape(message.replace("{}", str(path)))):
        read_prompts(path, split, **options)


# Formats


def make(kind: str, folder: Path) -> Path:
    """The three captions in a format that holds text alone."""
    rows = [{"text": c} for c in CAPTIONS]
    match kind:
        case "txt":
            path = folder / "p.txt"
            path.write_text("\ufeff" + CAPTIONS[0] + "\r\n\n  \n" + "\n".join(CAPTIONS[1:]), encoding="utf-8")
            return path
        case "csv":
            return write_csv(folder / "p.csv", rows)
        case "tsv":
            return write_csv(folder / "P.TSV", rows, "\t")
        case "jsonl":
            return write_jsonl(folder / "p.jsonl", rows)
    return write_parquet(folder / "p.parquet", text=CAPTIONS)


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_text_formats(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    assert read_prompts(path, "validation") == [
        records.Prompt(id=f"validation-00000{i}", text=c, split="validation") for i, c in enumerate(CAPTIONS)
    ]
    assert [p.text for p in read_prompts(str(path), "validation", limit=2)] == CAPTIONS[:2]


def make_with_images(kind: str, folder: Path) -> Path:
    """The three captions with their images."""
    names = ["b.png", "sub/a.png", "c.png"]
    match kind:
        case "metadata.jsonl" | "named metadata.jsonl":
            write_photos(folder, names)
            path = write_jsonl(folder / "metadata.jsonl", [{"file_name": n, "text": c} for n, c in zip(names, CAPTIONS, strict=True)])
            return folder if kind == "metadata.jsonl" else path
        case "metadata.csv":
            write_photos(folder, names)
            write_csv(folder / kind, [{"file_name": n, "caption": c} for n, c in zip(names, CAPTIONS, strict=True)])
            return folder
        case "csv of paths":
            write_photos(folder, names)
            return write_csv(folder / "p.csv", [{"image": n, "prompt": c} for n, c in zip(names, CAPTIONS, strict=True)])
        case "kohya":
            write_photos(folder, ["a.png", "b.png", "c/a.png"])
            for name, caption in zip(("a.txt", "b.txt", "c/a.txt"), CAPTIONS, strict=True):
                (folder / name).write_text(caption + "\n", encoding="utf-8")
            (folder / "README.txt").write_text("not a caption")
            (folder / "._a.png").write_bytes(b"what a Mac leaves")
            return folder
        case "tar":
            members = {}
            for i, (image, caption) in enumerate(zip(PHOTOS, CAPTIONS, strict=True)):
                members |= {f"d/{i}.png": image, f"d/{i}.txt": caption.encode(), f"d/{i}.seg.png": b"a mask, not the image"}
            return write_tar(folder / "p.tar", members | {"d/._2.png": b"what a Mac leaves"})
        case "tar of json":
            pairs = enumerate(zip(PHOTOS, CAPTIONS, strict=True))
            samples = [{f"{i}.json": json.dumps({"caption": c, "width": 8}).encode(), f"{i}.jpg": image} for i, (image, c) in pairs]
            return write_tar(folder / "p.tar", {k: v for sample in samples for k, v in sample.items()})
        case "folder of tars":
            for i, (image, caption) in enumerate(zip(PHOTOS, CAPTIONS, strict=True)):
                write_tar(folder / f"{i:05d}.tar", {"0.png": image, "0.txt": caption.encode()})
            return folder
        case "parquet of bytes":
            return write_parquet(folder / "p.parquet", image=PHOTOS, text=CAPTIONS)
        case "parquet of paths":
            write_photos(folder, names)
            return write_parquet(folder / "p.parquet", file_name=names, text=CAPTIONS)
    structs = [{"bytes": PHOTOS[0], "path": "gone.png"}, {"bytes": None, "path": "b.png"}, {"bytes": PHOTOS[2], "path": None}]
    (folder / "b.png").write_bytes(PHOTOS[1])
    write_parquet(folder / "part-0.parquet", image=pa.array(structs[:2]), text=CAPTIONS[:2], other=[1, 2])
    write_parquet(folder / "part-1.parquet", image=pa.array(structs[2:], structs_type()), text=CAPTIONS[2:])
    return folder


def structs_type() -> pa.DataType:
    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


KINDS = [
    "metadata.jsonl", "named metadata.jsonl", "metadata.csv", "csv of paths", "kohya", "tar", "tar of json", "folder of tars",
    "parquet of bytes", "parquet of paths", "parquet shards of structs",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("need_images", [True, False])
def test_image_formats_keep_the_files_bytes(kind: str, need_images: bool, tmp_path: Path) -> None:
    prompts = read_prompts(make_with_images(kind, tmp_path), "train", need_images=need_images)
    assert [(p.id, p.text, p.image) for p in prompts] == [
        (f"train-00000{i}", c, image) for i, (c, image) in enumerate(zip(CAPTIONS, PHOTOS, strict=True))
    ]


def test_our_own_rows_come_back(tmp_path: Path) -> None:
    rows = [records.Prompt(id=f"x{i}", text=c, image=p, truth='{"a": 1}') for i, (c, p) in enumerate(zip(CAPTIONS, PHOTOS, strict=True))]
    pq.write_table(records.to_table(records.Prompt, rows), tmp_path / "part-00000.parquet")
    assert read_prompts(tmp_path, "train", need_images=True) == rows


def test_an_image_folder_reads_as_datasets_does(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = make_with_images("metadata.jsonl", tmp_path / "photos")
    rows = datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    theirs = {row["text"]: row["image"].tobytes() for row in rows}
    ours = {p.text: Image.open(io.BytesIO(p.image or b"")).tobytes() for p in read_prompts(path, "train")}
    assert ours == theirs
    assert len(ours) == 3


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).map(str.strip).filter(bool), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_any_caption_survives_every_table(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    rows = [{"id": str(i), "text": c} for i, c in enumerate(captions)]
    for path in (write_csv(folder / "h.csv", rows), write_csv(folder / "h.tsv", rows, "\t"), write_jsonl(folder / "h.jsonl", rows)):
        assert [p.text for p in read_prompts(path, "train")] == captions
    assert [p.text for p in read_prompts(write_parquet(folder / "h.parquet", text=captions), "train")] == captions


# Columns


def test_columns_id_split_and_truth(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "text": "a", "split": "train", "truth": {"hat": "red"}},
        {"id": "b", "text": "b", "split": "test", "truth": "x"},
        {"id": "c", "text": "c", "split": "train", "truth": None},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    assert [(p.id, p.text, p.truth) for p in read_prompts(path, "train")] == [("7", "a", '{"hat": "red"}'), ("c", "c", None)]
    assert [(p.id, p.truth) for p in read_prompts(path, "test")] == [("b", "x")]
    fails("{}: no prompts of split 'validation' (the column split has train: 2, test: 1)", path, "validation")


def test_positions_count_within_the_split(tmp_path: Path) -> None:
    rows = [{"text": c, "split": "train" if c in "bd" else "test"} for c in "abcd"]
    path = write_csv(tmp_path / "p.csv", rows)
    assert [(p.id, p.text) for p in read_prompts(path, "train")] == [("train-000000", "b"), ("train-000001", "d")]


def test_named_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", text=["no"], long=["yes"], image=[b"no"], photo=[PHOTOS[0]])
    (prompt,) = read_prompts(path, "train", caption_column="long", image_column="photo", need_images=True)
    assert (prompt.text, prompt.image) == ("yes", PHOTOS[0])
    fails("{}: no caption column words (found: text, long, image, photo); set --data.caption_column", path, caption_column="words")
    fails("no image column x (found: text, long, image, photo); set --data.image_column", path, image_column="x", need_images=True)
    (tmp_path / "p.txt").write_text("one setting serves all splits\n")
    assert len(read_prompts(tmp_path / "p.txt", "test", caption_column="long")) == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_wrong_columns_are_listed(kind: str, tmp_path: Path) -> None:
    row = {"url": "u", "words": "w"}
    match kind:
        case "csv":
            path = write_csv(tmp_path / "p.csv", [row])
        case "jsonl":
            path = write_jsonl(tmp_path / "p.jsonl", [row])
        case _:
            path = write_parquet(tmp_path / "p.parquet", url=["u"], words=["w"])
    fails("{}: no caption column text or caption or prompt (found: url, words); set --data.caption_column", path)


def test_shards_named_for_a_split_do_not_leak(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / f"{name}.parquet", text=[name])
    assert [p.text[:11] for p in read_prompts(tmp_path, "train")] == ["train-00000", "train-00001"]
    assert [p.text[:10] for p in read_prompts(tmp_path, "test")] == ["test-00000"]
    fails("{}: no shards of split 'validation' (names say: test, train); name a file instead", tmp_path, "validation")
    assert len(read_prompts(tmp_path / "test-00000-of-00001.parquet", "validation")) == 1


def test_shards_stream(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part-0.parquet", text=["a", "b"])
    (tmp_path / "part-1.parquet").write_bytes(b"damaged, and not reached")
    assert [p.text for p in itertools.islice(iter_prompts(tmp_path, "train"), 2)] == ["a", "b"]
    assert len(read_prompts(tmp_path, "train", limit=2)) == 2
    fails("part-1.parquet cannot be read as parquet", tmp_path)


def test_images_of_a_table_are_optional_unless_needed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "p.csv", [{"image": "https://example.org/" + "long" * 99, "text": "a"}, {"image": "", "text": "b"}])
    assert [p.image for p in read_prompts(path, "train")] == [None, None]
    fails("{}:2: image names https://example.org/", path, need_images=True)


# Mistakes


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    fails("{}: no such file or folder", tmp_path / "gone.csv")
    (tmp_path / "p.docx").write_bytes(b"PK")
    fails("{}: unknown format '.docx'; expected .txt, .csv, .tsv, .jsonl, .parquet or .tar;", tmp_path / "p.docx")
    fails("{}: nothing here that can be read as prompts; expected .txt, .csv", tmp_path)
    fails("limit: -1; expected 0 (all) or more", tmp_path, limit=-1)


@pytest.mark.parametrize(
    ("name", "content"), [("p.txt", " \n\n"), ("p.csv", "text\n"), ("q.csv", ""), ("p.jsonl", ""), ("p.tsv", "text\n\n")]
)
def test_zero_prompts(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    fails("{}: no prompts", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "id,text\n1,a\n2,  \n", "{}:3: text is empty; every row needs a caption"),
        ("p.csv", "id,text\n1\n", "{}:2: text is empty"),
        ("p.csv", "text,id\na woman, running,1\n", "{}:2: more fields than the header has; put captions that hold the separator in quotes"),
        ("p.csv", 'text\n"a\nb\n', "{}:2: unexpected end of data; is a quote left open in this row?"),
        ("p.csv", "id,text\n1,a\n2,b\n1,c\n", "{}:4: id '1' was used before, at {}:2; ids must differ"),
        ("p.csv", "id,text\n,a\n", "{}:2: id is empty"),
        ("p.tsv", "caption\timage\n\tx.png\n", "{}:2: caption is empty"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "{}:3: not JSON"),
        ("p.jsonl", '["a"]\n', "{}:1: list; expected a JSON object with a caption"),
        ("p.jsonl", '{"text": "a"}\n{"caption": "b"}\n', "{}:2: text is empty"),
        ("p.jsonl", '{"text": ["a", "b"]}\n', "{}:1: text is list; expected text"),
        ("p.jsonl", '{"text": "a", "image": 5}\n', "{}:1: image is int; expected an image's bytes or its path"),
    ],
)
def test_mistakes_in_text_name_the_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    fails(message, tmp_path / name)


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_other_encodings_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("text\nMädchen\n".encode("latin-1"))
    fails("{}: not UTF-8 text (byte 6); save it as UTF-8", tmp_path / name)


def test_text_has_no_images(tmp_path: Path) -> None:
    fails("{}:1: image is empty; every row needs an image here", make("txt", tmp_path), need_images=True)
    fails("no image column image or file_name (found: text); set --data.image_column", make("csv", tmp_path), need_images=True)


def test_parquet_names_the_row(tmp_path: Path) -> None:
    fails("{}: row 1: text is empty", write_parquet(tmp_path / "a.parquet", text=["a", None]))
    path = write_parquet(tmp_path / "b.parquet", text=["a", "b", "c"], image=[PHOTOS[0], b"not an image", None])
    assert [p.image for p in read_prompts(path, "train")] == [PHOTOS[0], b"not an image", None]
    fails("{}: row 1: image: not a readable image (of no known format)", path, need_images=True)
    path = write_parquet(tmp_path / "c.parquet", text=["a", "b"], image=[PHOTOS[0], None])
    fails("{}: row 1: image is empty; every row needs an image here", path, need_images=True)
    fails("{}: row 0: text is int; expected text", write_parquet(tmp_path / "d.parquet", text=[1]))
    fails("{}: no prompts", write_parquet(tmp_path / "e.parquet", text=pa.array([], pa.string())))


def test_ids_must_differ_across_shards(tmp_path: Path) -> None:
    for i in (0, 1):
        write_parquet(tmp_path / f"{i}.parquet", id=["same"], text=["a"])
    fails(f"1.parquet: row 0: id 'same' was used before, at {tmp_path / '0.parquet'}: row 0", tmp_path)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = make("parquet", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    fails("{} cannot be read as parquet; truncated or not parquet?", path)


def test_image_folder_mistakes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PHOTOS[0])
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"}]
    metadata = write_jsonl(tmp_path / "metadata.jsonl", rows)
    for need_images in (True, False):
        fails(f"{metadata}:2: file_name names b.png, which does not exist in {tmp_path}", tmp_path, need_images=need_images)
    (tmp_path / "b.png").write_bytes(b"damaged")
    fails(f"{metadata}:2: file_name b.png: not a readable image", tmp_path, need_images=True)
    (tmp_path / "b.png").write_bytes(b"")
    fails(f"{metadata}:2: file_name b.png is empty", tmp_path, need_images=True)
    write_csv(tmp_path / "metadata.csv", rows)
    fails("{} has both metadata.jsonl and metadata.csv", tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "{absolute}", "..\\secret.png"])
def test_metadata_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PHOTOS[0])
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    name = name.replace("{absolute}", str(tmp_path / "secret.png"))
    write_jsonl(folder / "metadata.jsonl", [{"file_name": name, "text": "a"}])
    fails(f"metadata.jsonl:1: file_name {name} leads out of the folder; expected a path inside {folder}", folder)


def test_kohya_mistakes(tmp_path: Path) -> None:
    make_with_images("kohya", tmp_path)
    (tmp_path / "b.txt").write_text(" \n")
    fails(f"{tmp_path / 'b.txt'} is empty; every image needs a caption", tmp_path)
    (tmp_path / "b.txt").unlink()
    fails(f"{tmp_path / 'b.png'}: no caption file b.txt beside it", tmp_path)
    (tmp_path / "a.png").write_bytes(b"damaged")
    fails(f"{tmp_path / 'a.png'}: image: not a readable image", tmp_path, need_images=True)


def test_tar_mistakes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.txt": b"a", "0.png": PHOTOS[0], "1.txt": b"b"})
    assert [p.image for p in read_prompts(path, "train")] == [PHOTOS[0], None]
    fails("{}: 1: image is empty; every row needs an image here", path, need_images=True)
    fails("{}: 1: text is empty", write_tar(tmp_path / "b.tar", {"0.png": PHOTOS[0], "0.txt": b"a", "1.png": PHOTOS[1]}))
    fails("{}: no caption column text or caption or prompt (found: image)", write_tar(tmp_path / "c.tar", {"0.png": PHOTOS[0]}))
    fails("{}: d/0.json: not JSON", write_tar(tmp_path / "d.tar", {"d/0.json": b"{"}))
    fails("{}: 0.txt: not UTF-8 text", write_tar(tmp_path / "e.tar", {"0.txt": b"\xff"}))
    fails("{}: no prompts", write_tar(tmp_path / "f.tar", {}))


@pytest.mark.parametrize("size", [100, 512, 700, 1024, 1536, 2048, 2100, 3072])
def test_truncated_tar(size: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.txt": b"a" * 600, "0.png": PHOTOS[0], "1.txt": b"b"})
    path.write_bytes(path.read_bytes()[:size])  # in a header, in a member, between members
    fails("{} cannot be read as tar", path)


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1024 + bytes(1024))
    fails("{} cannot be read as tar", tmp_path / "a.tar")


def test_the_first_row_may_lack_what_later_ones_have(tmp_path: Path) -> None:
    """In lines and archives each row has columns of its own: a caption of the second, an image of the second."""
    folder = photo_folder(tmp_path / "photos", 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png", "text": "a man"}\n')
    assert [i.text for i in iter_images(folder)] == ["", "a man"]
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        (tmp_path / "1.txt").write_text("a man")
        for n, file in enumerate(("0.png", "1.png", "1.txt")):
            tar.add(tmp_path / "1.txt" if n == 2 else folder / file, file)
    assert [i.text for i in iter_images(tmp_path / "photos.tar")] == ["", "a man"]
    (tmp_path / "p.jsonl").write_text('{"text": "x"}\n{"text": "y", "image": "photos/1.png"}\n')
    assert [p.image and len(p.image) > 0 for p in iter_prompts(tmp_path / "p.jsonl", "train", need_images=False)] == [None, True]
