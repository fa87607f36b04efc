"""A step's folder: whole or absent, checked when read, and of one configuration only."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from limner.records import Image, Prompt, to_table
from limner.store import Rows, differences, input_hash, is_complete, open_step, read_manifest, read_rows, read_table, shards, write_atomic


def table(*ids: str) -> pa.Table:
    return to_table(Image, [Image(id=i, prompt_id="p", text="a man", image=b"x") for i in ids])


def finished(folder: Path, *ids: str) -> Path:
    step = open_step(folder, "pool", {"seed": 0}, {})
    step.write(0, table(*ids))
    step.finish({"images": len(ids)})
    return folder


def everything(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep/a.txt", "one")
    write_atomic(tmp_path / "deep/a.txt", "two é")
    assert (tmp_path / "deep/a.txt").read_bytes() == "two é".encode()
    assert everything(tmp_path) == ["a.txt", "deep"]


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are in the file when fsync finds that there is no room for them, as on a delayed allocation."""
    target = tmp_path / "a.parquet"
    write_atomic(target, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"no space left to write .*a\.parquet"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert everything(tmp_path) == ["a.parquet"]


def test_other_errors_leave_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(tmp_path / "a", b"x")
    assert everything(tmp_path) == []


def test_several_processes_may_write_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that writes while another has opened its file and not yet renamed it."""
    step, rename = open_step(tmp_path / "s", "pool", {}, {}), Path.rename
    others = iter([True])

    def slow(self: Path, target: Path) -> Path:
        if next(others, False):
            monkeypatch.setattr(os, "getpid", lambda: 1)
            step.write(0, table("a"))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    step.write(0, table("a"))
    assert read_table(step.shard(0)) == table("a") and not list(step.folder.glob("*.partial"))


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname().replace(".", "_")
    gone, living, elsewhere = (
        tmp_path / f".part-00000.parquet.{who}.partial" for who in (f"{host}-{dead.pid}", f"{host}-{os.getpid()}", f"other-{dead.pid}")
    )
    for path in (gone, living, elsewhere):
        path.write_bytes(b"half")
    open_step(tmp_path, "pool", {}, {})
    assert sorted(tmp_path.glob(".*.partial")) == sorted([living, elsewhere])


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:], lambda b: b""])
def test_a_truncated_or_changed_shard_is_named(tmp_path: Path, damage) -> None:
    path = shards(finished(tmp_path / "pool", "a", "b"))[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"part-00000\.parquet is damaged"):
        read_table(path)
    with pytest.raises(ValueError, match="damaged"):
        list(read_rows(tmp_path / "pool", Image))


def test_a_shard_without_checksum_does_not_count(tmp_path: Path) -> None:
    """A kill between the shard and its checksum: the shard is made again."""
    step = open_step(tmp_path, "pool", {}, {})
    step.write(0, table("a"))
    step.write(1, table("b"))
    (tmp_path / "part-00001.parquet.sha256").unlink()
    assert (step.has(0), step.has(1)) == (True, False)
    assert [p.name for p in shards(tmp_path)] == ["part-00000.parquet"]


def test_the_checksum_is_sha256(tmp_path: Path) -> None:
    path = shards(finished(tmp_path, "a"))[0]
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "part-00000.parquet.sha256").read_text() == f"{wanted}  part-00000.parquet\n"
    assert read_manifest(tmp_path)["shards"] == {"part-00000.parquet": wanted}


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    a, b = finished(tmp_path / "a", "x", "y"), finished(tmp_path / "b", "x", "y")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_another_configuration_is_refused_with_dotted_differences(tmp_path: Path) -> None:
    open_step(tmp_path, "pool", {"sampler": {"steps": 25, "scale": 5.0}, "seed": 0}, {"prompts": "ab"}).write(0, table("a"))
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="another configuration") as caught:
        open_step(tmp_path, "pool", {"sampler": {"steps": 20, "scale": 5.0}, "seed": 0}, {"prompts": "cd"})
    message = str(caught.value)
    assert "config.sampler.steps: was 25, now 20" in message
    assert "inputs.prompts: was 'ab', now 'cd'" in message
    assert "scale" not in message
    assert "seed" not in message
    assert (tmp_path / "manifest.json").read_bytes() == before
    with pytest.raises(ValueError, match="kind: was 'pool', now 'scores'"):
        open_step(tmp_path, "scores", {"sampler": {"steps": 25, "scale": 5.0}, "seed": 0}, {"prompts": "ab"})


def test_the_same_configuration_goes_on(tmp_path: Path) -> None:
    """Tuples and lists are the same JSON."""
    open_step(tmp_path, "pool", {"t": (1, 2)}, {}).write(0, table("a"))
    assert open_step(tmp_path, "pool", {"t": [1, 2]}, {}).has(0)
    assert not is_complete(tmp_path)


def test_a_folder_without_a_shard_takes_another_configuration(tmp_path: Path) -> None:
    """The first try failed, say on a bad image; the row was taken out of the input and the command run again."""
    open_step(tmp_path, "pool", {"rows": 3}, {})
    step = open_step(tmp_path, "pool", {"rows": 2}, {})
    step.write(0, table("a"))
    step.finish({})
    assert read_manifest(tmp_path)["config"] == {"rows": 2}


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        open_step(tmp_path, "pool", {}, {})
    with pytest.raises(ValueError, match="run the step that makes it first"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_input_hash_follows_what_the_shards_hold(tmp_path: Path) -> None:
    same, also, other = (finished(tmp_path / n, *ids) for n, ids in (("a", "x"), ("b", "x"), ("c", "y")))
    assert input_hash(same) == input_hash(also) != input_hash(other)
    open_step(tmp_path / "d", "pool", {"seed": 0}, {})
    with pytest.raises(ValueError, match="is not complete"):
        input_hash(tmp_path / "d")


def test_differences_of_missing_and_nested_values() -> None:
    assert list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "d": [3]}, "c": None})) == [
        "a.d: was None, now [3]",
        "c: was 2, now None",
    ]


def test_rows_are_read_by_number_across_shards(tmp_path: Path) -> None:
    """Shards of 3, 1 and 2 rows: any span is the same span of all rows, a limit ends them, and neighbours read a shard once."""
    step = open_step(tmp_path, "prompts", {}, {})
    prompts = [Prompt(id=str(i), text=f"a man {i}") for i in range(6)]
    for index, part in enumerate((prompts[:3], prompts[3:4], prompts[4:])):
        step.write(index, to_table(Prompt, part))
    rows = Rows(tmp_path, Prompt)
    assert len(rows) == 6
    assert all(rows.read(a, b) == prompts[a:b] for a in range(7) for b in range(a, 7))
    assert len(Rows(tmp_path, Prompt, limit=4)) == 4
