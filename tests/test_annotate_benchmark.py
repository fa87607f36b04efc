"""The benchmark of many raters and a killed server, small: that it runs to its end, and that it would see what was lost or doubled."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

import study as s
from limner.feedback import server

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("annotate_benchmark", ROOT / "benchmarks/annotate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_loses_nothing(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three raters, six items, two answers each: twelve; the server is killed once in between."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    arguments = {"raters": 3, "items": 6, "overlap": 2, "kills": 1, "thinking": 0.05, "limit": 60}
    monkeypatch.setattr(sys, "argv", ["annotate.py", *(word for name, n in arguments.items() for word in (f"--{name}", str(n)))])
    benchmark.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {k: found[k] for k in ("name", "stored", "acknowledged", "lost", "doubled", "uneven", "kills")} == {
        "name": "annotate", "stored": 12, "acknowledged": 12, "lost": 0, "doubled": 0, "uneven": 0, "kills": 1,
    }  # fmt: skip
    assert found["ratio"] == pytest.approx(found["p95_ms"] / 150, abs=1e-3) and found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]


def test_it_sees_what_is_lost_changed_and_doubled(benchmark: ModuleType, tmp_path: Path) -> None:
    """Of four items by two raters only one has an answer, by one rater, twice; one that was acknowledged is not there, one is another."""
    s.image_folder(tmp_path / "images", {f"i{n}": "a red cat" for n in range(4)})
    study = s.study_of(tmp_path, {"overlap": 2})
    database = server.prepare(study)
    rater = s.sign_in(s.client(study, database), study, database, "a")
    item = rater.get("/api/task").json()["item"]["id"]
    for base, id in enumerate(("the-first", "the-second")):
        assert s.answer(rater, s.rich(rating=2 + base), id, item, base=base).status_code == 200
    said = {"the-first": benchmark.digest(s.rich(rating=2)), "the-second": benchmark.digest(s.rich(rating=5)), "never-there": "x"}
    assert benchmark.check(study, said, total=8) == {"acknowledged": 3, "stored": 2, "lost": 2, "doubled": 1, "uneven": 3}
