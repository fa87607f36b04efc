"""Many raters at once, and a server that is killed: nothing lost, nothing doubled, and how long a submit takes.

    python benchmarks/annotate.py                                                  # 100 raters, 2,000 items, ten kills, SQLite
    python benchmarks/annotate.py --database postgres
    python benchmarks/annotate.py --raters 20 --items 200 --kills 2 --thinking 0.5   # a short one

The server is `limner annotate serve` in a process of its own; raters are threads of this one, on this machine only. The last line is
JSON: `lost` (acknowledged and not there, or not as it was sent), `doubled` (an item answered twice by one rater), `uneven` (items with
more or fewer answers than overlap), `p95_ms` of a submit that a live server answered, `ratio` of that to the 150 ms that are allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # a PostgreSQL of our own

import postgres
from limner.feedback import answers, client, server
from limner.feedback.database import open_database
from limner.feedback.study import load_study

ALLOWED_MS = 150.0


def make_images(path: Path, count: int) -> None:
    rows = []
    for n in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (n % 256, n // 256 % 256, 90)).save(buffer, "PNG")
        rows.append({"id": f"i{n:05d}", "text": f"a person number {n} in a park", "image": buffer.getvalue()})
    pq.write_table(pa.Table.from_pylist(rows), path)


def random_answer(rng: random.Random) -> dict[str, Any]:
    points = [[round(rng.random(), 4), round(rng.random(), 4)] for _ in range(rng.randrange(1, 4))]
    ratings = {q: rng.randrange(1, 6) for q in ("plausibility", "alignment", "aesthetics", "overall")}
    events = [[n * 137, f"artifact {x},{y}"] for n, (x, y) in enumerate(points)]
    return {
        "points": {"artifact": points, "misalignment": []}, "words": {"misaligned": [rng.randrange(6)]}, "ratings": ratings,
        "nothing": {"image": False, "prompt": False}, "events": events,
    }  # fmt: skip


def digest(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def rate(visitor: client.Visitor, number: int, thinking: float, acknowledged: dict[str, str], stop: threading.Event) -> None:
    """One rater answers until nothing is left; what was acknowledged is noted after it was."""
    rng = random.Random(number)
    time.sleep(thinking * rng.random())
    found = client.get(visitor, "/api/task")
    while not stop.is_set():
        if found["item"] is None:
            if found["finished"]:
                return
            time.sleep(1)
            found = client.get(visitor, "/api/task")
            continue
        time.sleep(thinking * rng.uniform(0.5, 1.5))
        payload, id = random_answer(rng), f"{number:04d}-{found['item']['id']:06d}-{rng.getrandbits(32):08x}"
        body = {"id": id, "item": found["item"]["id"], "base": found["revision"], "payload": payload, "seconds": thinking}
        try:
            found = client.post(visitor, "/api/submit", body)["next"]
        except ValueError as error:
            if "409" not in str(error):
                raise
            found = client.get(visitor, "/api/task")
            continue
        acknowledged[id] = digest(payload)


class Server:
    """`limner annotate serve` on a fixed port, started again after it was killed."""

    def __init__(self, study: Path, port: int):
        self.command = [sys.executable, "-m", "limner.cli", "annotate", "serve", str(study), "--server.port", str(port)]
        self.port = port
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}")
            time.sleep(0.1)
        raise RuntimeError("the server does not listen after two minutes")

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def measure(args: argparse.Namespace, folder: Path, url: str) -> dict[str, Any]:
    make_images(folder / "images.parquet", args.items)
    path = folder / "study.yaml"
    study_values = {
        "output_dir": str(folder / "run"), "database": url, "overlap": args.overlap, "images": {"from": str(folder / "images.parquet")},
        "server": {"attempts_per_minute": 1000},
    }  # fmt: skip
    path.write_text(json.dumps(study_values))
    study = load_study(path)
    database = server.prepare(study)
    links = [server.invitation(study, database, f"rater-{n:03d}", "rater", "") for n in range(args.raters)]
    port = free_port()
    running = Server(path, port)
    running.start()
    acknowledged: dict[str, str] = {}
    stop, failures = threading.Event(), list[BaseException]()
    address = f"http://127.0.0.1:{port}"
    visitors = []
    for link in links:  # signing in is not measured, and limited to so many a minute from one address
        visitors.append(client.join(address, link))
        visitors[-1].times.clear()

    def work(n: int) -> None:
        try:
            rate(visitors[n], n, args.thinking, acknowledged, stop)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(args.raters)]
    began, total, kills = time.monotonic(), args.items * args.overlap, 0
    for thread in threads:
        thread.start()
    try:
        while any(t.is_alive() for t in threads) and time.monotonic() - began < args.limit and not failures:
            time.sleep(0.05)
            if kills < args.kills and len(acknowledged) >= total * (kills + 1) / (args.kills + 1):
                running.kill()
                kills += 1
                running.start()
                print(f"killed {kills}; {len(acknowledged)} of {total}", file=sys.stderr)
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
        running.kill()
    took = time.monotonic() - began
    if failures:
        raise RuntimeError(f"{len(failures)} raters failed: {failures[0]}") from failures[0]
    return {**check(study, acknowledged, total), **speed(visitors), "kills": kills, "seconds": round(took, 1)}


def check(study: Any, acknowledged: dict[str, str], total: int) -> dict[str, Any]:
    """What is in the database against what was acknowledged."""
    database = open_database(study.database, Path(study.output_dir))
    rows = list(answers.history(database))
    there = {row["id"]: digest(row["answer"]) for row in rows}
    lost = sum(there.get(id) != sent for id, sent in acknowledged.items())
    of_rater = Counter((row["item"], row["rater"]) for row in rows)
    of_item = Counter(row["item"] for row in rows)
    uneven = sum(n != study.overlap for n in of_item.values()) + (total // study.overlap - len(of_item))
    doubled = sum(n > 1 for n in of_rater.values())
    return {"acknowledged": len(acknowledged), "stored": len(rows), "lost": lost, "doubled": doubled, "uneven": uneven}


def speed(visitors: list[client.Visitor]) -> dict[str, float]:
    times = np.array([t for v in visitors for path, t in v.times if path == "/api/submit"]) * 1000
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {"p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "p99_ms": round(p99, 1), "ratio": round(p95 / ALLOWED_MS, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", type=int, default=100)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--overlap", type=int, default=3)
    parser.add_argument("--thinking", type=float, default=2.0, help="seconds between submits, on average")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds after which it stops, done or not")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limner-annotate-")))
        url = stack.enter_context(postgres.running()) if args.database == "postgres" else ""
        figures = measure(args, folder, url)
    settings = {k: getattr(args, k) for k in ("raters", "items", "overlap", "thinking", "database")}
    print(json.dumps({"name": "annotate", **figures, **settings, "python": re.split(r"\s", sys.version)[0]}))


if __name__ == "__main__":
    main()
