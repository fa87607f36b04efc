"""Shards in this process: finished ones skipped, parts of the work, signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow as pa
import pytest

from limner.engine import parse_part, run_shards
from limner.store import Step, open_step, shards


def step_in(folder: Path) -> Step:
    return open_step(folder, "pool", {}, {})


def work_on(calls: list[int]):
    def work(index, task, progress):
        calls.append(index)
        progress(1)
        return {"part": pa.table({"v": [task]}), "latents": pa.table({"v": [-task]})}

    return work


def test_finished_shards_are_skipped(tmp_path: Path) -> None:
    calls: list[int] = []
    step = step_in(tmp_path)
    step.write(1, pa.table({"v": [20]}))
    assert run_shards(step, [10, 20, 30], work_on(calls), name="t")
    assert calls == [0, 2]
    assert run_shards(step, [10, 20, 30], work_on(calls), name="t")
    assert calls == [0, 2]


def test_parts_share_the_work_out(tmp_path: Path) -> None:
    """Seven shards over three processes: every one once, and only the last to end finds the step finished."""
    tasks, step, calls = list(range(7)), step_in(tmp_path), [list[int](), list[int](), list[int]()]
    done = [run_shards(step, tasks, work_on(c), name="t", part=(i, 3)) for i, c in enumerate(calls)]
    assert calls == [[0, 3, 6], [1, 4], [2, 5]]
    assert done == [False, False, True]
    assert len(shards(tmp_path)) == 7


def test_the_main_table_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard counts as finished by its main table, so the others must be there before."""
    order: list[str] = []
    write = Step.write
    monkeypatch.setattr(Step, "write", lambda self, i, table, name="part": (order.append(name), write(self, i, table, name))[1])
    run_shards(step_in(tmp_path), [1], work_on([]), name="t")
    assert order == ["latents", "part"]


def test_a_failing_shard_keeps_the_ones_before(tmp_path: Path) -> None:
    def work(index, task, progress):
        if index == 1:
            raise ValueError("bad image")
        return {"part": pa.table({"v": [task]})}

    with pytest.raises(ValueError, match="bad image"):
        run_shards(step_in(tmp_path), [1, 2, 3], work, name="t")
    assert [p.name for p in shards(tmp_path)] == ["part-00000.parquet"]
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize("when", ["in the work", "in the last write"])
def test_a_signal_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """In the work the shard is lost; a signal during a write is not forgotten, and that shard is kept."""
    calls: list[int] = []
    step, write = step_in(tmp_path), Step.write

    def work(index, task, progress):
        calls.append(index)
        if when == "in the work":
            os.kill(os.getpid(), signal.SIGTERM)
        progress(1)
        return {"part": pa.table({"v": [task]})}

    def signalled(self, *args):
        write(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    if when == "in the last write":
        monkeypatch.setattr(Step, "write", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_shards(step, [1], work, name="t")
    assert caught.value.code == 130
    assert calls == [0]
    assert step.has(0) == (when == "in the last write")
    assert signal.getsignal(signal.SIGTERM) is before


def test_shard_option() -> None:
    assert parse_part("0/1") == (0, 1)
    assert parse_part("3/4") == (3, 4)


@pytest.mark.parametrize("text", ["", "1", "a/b", "1/2/3", "2/2", "-1/2", "0/0"])
def test_a_wrong_shard_option_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="--shard"):
        parse_part(text)
