"""Where a step's shards run: in this process, one after the other, finished ones skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa
from tqdm import tqdm

from limner.loop import stop_signals
from limner.store import Step

Task = TypeVar("Task")
Progress = Callable[[int], None]


def run_shards(
    step: Step,
    tasks: Sequence[Task],
    work: Callable[[int, Task, Progress], dict[str, pa.Table]],
    *,
    units: Callable[[Task], int] = lambda task: 1,
    name: str,
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Run `work(index, task, progress)` for every shard that is not finished, and write the tables it returns.

    Args:
        work: returns tables by shard name ("part" is the main one); batches never cross shards. `progress(n)` counts units done.
        units: how many units (images, say) a task has, for the progress bar and its ETA.
        part: (i, n): this process takes every n-th shard from the i-th (`--shard i/n`).

    Returns:
        True if every shard of the step, other processes' included, is finished.

    Raises:
        SystemExit: ctrl-C or SIGTERM; the shard in work is lost, finished ones are kept.
    """
    mine = [i for i in range(len(tasks)) if i % part[1] == part[0]]
    todo = [i for i in mine if not step.has(i)]
    total = sum(units(tasks[i]) for i in mine)
    done = total - sum(units(tasks[i]) for i in todo)
    with (
        stop_signals() as received,
        tqdm(total=total, initial=done, desc=name, unit="", disable=None, mininterval=1, dynamic_ncols=True) as bar,
    ):

        def progress(n: int) -> None:
            bar.update(n)
            if received:
                raise SystemExit(130)

        began = time.monotonic()
        for i in todo:
            progress(0)  # a signal may have come while the last shard was written
            tables = work(i, tasks[i], progress)
            for table_name in sorted(tables, key=lambda n: n == "part"):  # the main table last: it marks the shard as finished
                step.write(i, tables[table_name], table_name)
        if todo:
            bar.set_postfix_str(f"{time.monotonic() - began:.0f}s")
        progress(0)
    return all(step.has(i) for i in range(len(tasks)))


def spans(count: int, size: int) -> list[range]:
    """0 .. count in ranges of at most `size`."""
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def parse_part(text: str) -> tuple[int, int]:
    """`--shard i/n` to (i, n).

    Raises:
        ValueError: not of that form, or not 0 <= i < n.
    """
    try:
        i, n = (int(x) for x in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard {text!r}: expected i/n, such as 0/4") from None
    if not 0 <= i < n:
        raise ValueError(f"--shard {text}: i must lie in 0..{n - 1}")
    return i, n
