"""Many at once, on both databases, and a server that is killed: counts worked out by hand, and what is left on disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from sqlalchemy import create_engine, select

import postgres
import study as s
from limner.feedback import accounts, answers, assign, client, server
from limner.feedback.database import Answer, Slot, reading, writing
from limner.feedback.study import load_study

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    if postgres.programs() is None:
        pytest.skip(postgres.WHY_NOT)
    with postgres.running() as url:
        yield url


def own_database(cluster: str, name: str) -> str:
    engine = create_engine(cluster, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return cluster.replace("/postgres?", f"/{name}?")


@pytest.fixture(params=["sqlite", "postgres"])
def site(tmp_path: Path, request: pytest.FixtureRequest):
    s.image_folder(tmp_path / "images", {f"i{n:02d}": "a red cat" for n in range(12)})
    url = own_database(request.getfixturevalue("cluster"), f"d{time.monotonic_ns()}") if request.param == "postgres" else ""
    study = s.study_of(tmp_path, {"overlap": 2, "database": url, "server": {"requests_per_second": 1000, "attempts_per_minute": 1000}})
    database = server.prepare(study)
    yield study, database
    database.engine.dispose()


def run(threads: list[threading.Thread]) -> None:
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)


def test_raters_in_a_race(site) -> None:
    """Eight threads, two of each rater (two tabs), until nothing is left: 12 items by 2 raters of 4, none twice, none over."""
    study, database = site
    raters = [accounts.add_rater(database, f"r{n}") for n in range(4)]
    failures = []

    def work(rater: int, tab: int) -> None:
        try:
            for n in range(200):
                with writing(database) as session:
                    slot = assign.take(session, study, rater, time.time())
                if slot is None:
                    with reading(database) as session:
                        if not session.execute(select(Slot.id).where(~Slot.done)).first():
                            return
                    time.sleep(0.01)
                    continue
                with contextlib.suppress(assign.Conflict):  # the other tab was faster
                    assign.submit(database, study, rater, slot.item_id, f"{rater:04d}-{tab}-{n:04d}", 0, s.rich([[0.5, 0.5]]))
        except Exception as error:
            failures.append(error)

    run([threading.Thread(target=work, args=(r, tab)) for r in raters for tab in (0, 1)])
    assert failures == []
    with reading(database) as session:
        stored = [(a.item_id, a.rater_id) for a in session.execute(select(Answer)).scalars()]
    assert len(stored) == len(set(stored)) == 24
    assert set(Counter(item for item, _ in stored).values()) == {2}


def test_the_same_submission_from_many_threads(site) -> None:
    study, database = site
    rater = accounts.add_rater(database, "r0-again")
    with writing(database) as session:
        slot = assign.take(session, study, rater, time.time())
    assert slot is not None
    found = []

    def work() -> None:
        found.append(assign.submit(database, study, rater, slot.item_id, "sent-six-times", 0, s.rich()))

    run([threading.Thread(target=work) for _ in range(6)])
    assert [f.revision for f in found] == [1] * 6 and sum(not f.again for f in found) == 1
    with reading(database) as session:
        assert len(list(session.execute(select(Answer).where(Answer.rater_id == rater)))) == 1


def test_a_study_on_postgres_by_http(cluster: str, tmp_path: Path) -> None:
    s.image_folder(tmp_path / "images", {"a": "x", "b": "y"})
    study = s.study_of(tmp_path, {"overlap": 1, "database": own_database(cluster, "other")})
    database = server.prepare(study)
    a = s.sign_in(s.client(study, database), study, database, "a")
    for n in range(2):
        a.post("/api/draft", json={"item": a.get("/api/task").json()["item"]["id"], "version": 0, "payload": {"\u0000": "😀"}})
        assert s.answer(a, s.rich([[0.5, 0.5]]), f"postgres-{n}").status_code == 200
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    assert "2 of 2 answers" in boss.get("/admin").text and boss.get("/admin/gallery").text.count("<circle") == 2
    assert len(answers.feedback(answers.given(study, database))) == 6
    database.engine.dispose()


def test_a_killed_server_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    s.image_folder(tmp_path / "images", {f"i{n}": "a red cat" for n in range(4)})
    study = s.study_of(tmp_path, {"overlap": 1, "server": {"port": 0}})
    database = server.prepare(study)
    link = server.invitation(study, database, "a", "rater", "")
    database.engine.dispose()
    command = [sys.executable, "-m", "limner.cli", "annotate", "serve", str(tmp_path / "study.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        visitor = client.join(address, link)
        item = client.get(visitor, "/api/task")["item"]["id"]
        client.post(visitor, "/api/draft", {"item": item, "version": 0, "payload": {"ratings": {"overall": 4}}})
        sent = {"id": "acknowledged", "item": item, "base": 0, "payload": s.rich([[0.25, 0.75]]), "seconds": 3}
        after = client.post(visitor, "/api/submit", sent)["next"]["item"]["id"]
        client.post(visitor, "/api/draft", {"item": after, "version": 0, "payload": {"ratings": {"overall": 2}}})
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    database = server.prepare(study)
    (row,) = answers.history(database)
    assert row["id"] == "acknowledged" and row["answer"] == sent["payload"]
    with server.serving(study, database) as again:  # the cookie, the place and the draft are still good
        visitor.address, visitor.connection = again, None
        assert client.post(visitor, "/api/submit", sent)["again"]
        task = client.get(visitor, "/api/task")
    assert task["item"]["id"] == after and task["draft"] == {"ratings": {"overall": 2}}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/annotate").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_load(path: Path) -> None:
    study = load_study(path)
    assert study.task == path.stem and path.read_text().startswith(f"# limner annotate serve recipes/annotate/{path.name}")
    assert json.dumps(vars(replace(study, images=None, gold=None, server=None)))  # plain values
