"""A step's folder: parquet shards written whole or not at all, skipped when finished, and a manifest that says what made them.

    folder/part-00000.parquet          a shard (written under a temporary name, fsynced, renamed)
    folder/part-00000.parquet.sha256   its checksum; a shard without one does not count
    folder/manifest.json               kind, config, input hashes, versions, shard checksums, counts (no times: equal runs, equal bytes)

Two runs into one folder must have the same config; anything else is an error that lists what differs. (A folder whose first run
failed before its first shard holds nothing yet, and takes any.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic

import pyarrow as pa
import pyarrow.parquet as pq

from limner.records import Row, from_table


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str, writer: str = "") -> None:
    """Write a file so that it is there whole or not at all.

    Args:
        writer: tells this process from others that may write the same file at the same time.

    Raises:
        ValueError: the disk is full; says so and names the file. Nothing half-written is left.
    """
    partial = path.with_name(f".{path.name}{writer and '.' + writer}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise ValueError(
                f"no space left to write {path}; free some and run the same command again, finished shards are kept"
            ) from error
        raise


def _writer() -> str:
    """This process among all that share a disk."""
    return f"{socket.gethostname().replace('.', '_')}-{os.getpid()}"


def _remove_stale(folder: Path) -> None:
    """What processes of this machine that are no more left half-written."""
    host = _writer().rpartition("-")[0]
    for left in folder.glob(".*.partial"):
        where, _, pid = left.name.removesuffix(".partial").rpartition(".")[2].rpartition("-")
        if where == host and pid.isdigit() and not _alive(int(pid)):
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


class Step:
    """A step's output folder, open for writing. Make it with `open_step`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    def shard(self, index: int, name: str = "part") -> Path:
        return self.folder / f"{name}-{index:05d}.parquet"

    def has(self, index: int, name: str = "part") -> bool:
        """Whether the shard was finished (its bytes are checked when it is read)."""
        path = self.shard(index, name)
        return path.is_file() and _checksum_file(path).is_file()

    def write(self, index: int, table: pa.Table, name: str = "part") -> None:
        """Write a shard atomically. Metadata that changes from run to run is kept out, so equal tables give equal bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_statistics=False)
        data = sink.getvalue().to_pybytes()
        path = self.shard(index, name)
        write_atomic(path, data, _writer())
        write_atomic(_checksum_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n", _writer())

    def drop(self, index: int) -> None:
        """Remove the shards from `index` on, of a time when there was more to write."""
        for path in shards(self.folder):
            if path >= self.shard(index):
                path.unlink()
                _checksum_file(path).unlink()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Record the shards' checksums and what was counted; the step is then complete."""
        shards = {p.name: _checksum_file(p).read_text().split()[0] for p in sorted(self.folder.glob("*.parquet"))}
        done = {**self.manifest, "complete": True, "shards": shards, "counts": dict(counts)}
        write_atomic(self.folder / "manifest.json", _json(done), _writer())


def open_step(folder: Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Step:
    """Open a folder for a step's output, new or to be gone on with.

    Args:
        kind: pool, scores, examples ...
        config: JSON values that decide the output.
        inputs: name to hash (`input_hash`) of what is read.

    Raises:
        ValueError: the folder holds the output of another kind, config or input; the message lists the differences.
    """
    wanted = {"kind": kind, "config": json.loads(json.dumps(config)), "inputs": dict(inputs)}
    path = folder / "manifest.json"
    _remove_stale(folder)
    if path.is_file():
        found = read_manifest(folder)
        changed = list(differences({k: found.get(k) for k in wanted}, wanted))
        made = any(folder.glob("*.parquet")) or any(folder.glob("checkpoint-*"))
        if changed and not found.get("complete") and not made:  # failed before it made anything
            write_atomic(path, _json({**wanted, "versions": versions()}), _writer())
            return Step(folder, {**wanted, "versions": versions()})
        if changed:
            raise ValueError(
                f"{folder} holds the output of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nRemove the folder or choose another output_dir."
            )
        return Step(folder, {k: v for k, v in found.items() if k not in ("complete", "shards", "counts")})
    if folder.is_dir() and any(folder.glob("*.parquet")):
        raise ValueError(f"{folder} has shards but no manifest.json; it is not a step's folder, choose another output_dir")
    manifest = {**wanted, "versions": versions()}
    write_atomic(path, _json(manifest), _writer())
    return Step(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step's folder.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    try:
        return dict(json.loads((folder / "manifest.json").read_text()))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no manifest.json; run the step that makes it first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/manifest.json is damaged ({error}); remove the folder and run the step again") from error


def is_complete(folder: Path) -> bool:
    """Whether a finished step lies there, with every shard that it wrote."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_manifest(folder)
    return bool(manifest.get("complete")) and all(_checksum_file(folder / name).is_file() for name in manifest.get("shards", {}))


def input_hash(folder: Path) -> str:
    """The identity of a step's output, for the manifests of steps that read it: kind, config, inputs and shard checksums.

    Raises:
        ValueError: the step is not complete.
    """
    manifest = read_manifest(folder)
    if not is_complete(folder):
        raise ValueError(f"{folder} is not complete; run the step that makes it to its end first")
    core = {k: manifest[k] for k in ("kind", "config", "inputs", "shards")}
    return hashlib.sha256(_json(core).encode()).hexdigest()[:16]


def shards(folder: Path, name: str = "part") -> list[Path]:
    """The finished shards in order."""
    return [p for p in sorted(folder.glob(f"{name}-*.parquet")) if _checksum_file(p).is_file()]


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a shard after checking its bytes.

    Raises:
        ValueError: the file is truncated or changed; the message names it and says what to do.
    """
    checksum = _checksum_file(path)
    if checksum.is_file() and checksum.read_text().split()[0] != sha256(path):
        raise _damaged(path, "its checksum differs")
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error})") from error


def read_column(path: Path, name: str) -> list[Any]:
    """The values of one column of a shard, whose other columns and checksum are not read.

    Raises:
        ValueError: the file is truncated; names it and says what to do.
    """
    try:
        return pq.read_table(path, columns=[name]).column(name).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, str(error)) from error


def read_rows(folder: Path, kind: type[Row], columns: list[str] | None = None) -> Iterator[Row]:
    """All rows of a step's folder, shard by shard."""
    for path in shards(folder):
        yield from from_table(kind, read_table(path, columns), str(path))


def _damaged(path: Path, why: str) -> ValueError:
    main = path.with_name(f"part-{path.stem.rpartition('-')[2]}.parquet")  # its being there says that the shard is finished
    files = "it" if main == path else f"it and {main.name}"
    return ValueError(f"{path} is damaged ({why}); delete {files} with the .sha256 and run the step again")


def _rows_in(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, str(error)) from error


class Rows(Generic[Row]):
    """The rows of a step's folder by number, read a shard at a time when asked for: a folder of photos need not fit into memory."""

    def __init__(self, folder: Path, kind: type[Row], limit: int = 0):
        self.kind: type[Row] = kind
        self.paths = shards(folder)
        self.ends = list(accumulate(map(_rows_in, self.paths)))
        self.length = min(limit or 1 << 62, self.ends[-1] if self.ends else 0)
        self._last: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> list[Row]:
        """Rows start to stop. Neighbouring calls read each shard once."""
        found: list[Row] = []
        for i, (first, end) in enumerate(zip([0, *self.ends], self.ends)):
            if first < stop and start < end:
                if self._last[0] != i:
                    self._last = (i, from_table(self.kind, read_table(self.paths[i]), str(self.paths[i])))
                found += self._last[1][max(start - first, 0) : stop - first]
        return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide results."""
    from importlib.metadata import version

    return {n: version(n) for n in ("limner", "torch", "diffusers", "transformers", "peft", "pyarrow", "numpy")}


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Lines such as "config.seed: was 0, now 1" for everything that differs in two trees of JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: was {old!r}, now {new!r}"
