"""The tables of a study, in SQLite (WAL) or PostgreSQL, and transactions on them.

What was answered is never changed: an edit is another row with the next revision. Every commit is on disk when it returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from sqlalchemy import Engine, Index, UniqueConstraint, event
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Field, Session, SQLModel, create_engine


class Meta(SQLModel, table=True):
    """What the study is (JSON), by name."""

    key: str = Field(primary_key=True)
    value: str


class Rater(SQLModel, table=True):
    """Who answers (role rater), or may see and settle everything (admin). settings: JSON of hot keys and the tour."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)
    role: str = "rater"
    password: str = ""
    settings: str = "{}"
    blocked: bool = False
    created: float = Field(default_factory=time.time)


class Invitation(SQLModel, table=True):
    """A link that lets someone in once, by the hash of its secret."""

    secret: str = Field(primary_key=True)
    rater_id: int = Field(foreign_key="rater.id")
    expires: float
    used: float | None = None


class Login(SQLModel, table=True):
    """A signed-in browser, by the hash of its secret."""

    secret: str = Field(primary_key=True)
    rater_id: int = Field(foreign_key="rater.id")
    csrf: str
    expires: float


class Picture(SQLModel, table=True):
    """An image as it is shown; its bytes lie in the file named by their hash. Browsers know it by `token` only."""

    token: str = Field(primary_key=True)
    image_id: str = Field(index=True, unique=True)
    digest: str
    media: str
    width: int
    height: int


class Item(SQLModel, table=True):
    """What is answered at once. pictures: JSON list of tokens; gold: JSON of the known answer."""

    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(unique=True)
    position: int = Field(index=True)
    text: str
    pictures: str
    gold: str | None = None
    message: str = ""


class Slot(SQLModel, table=True):
    """One of an item's `overlap` places: free, kept for a rater until it expires, or done. Gold has one for each rater."""

    __table_args__ = (
        UniqueConstraint("item_id", "number"),
        UniqueConstraint("item_id", "rater_id"),
        Index("queue", "done", "position", "number"),
    )
    id: int | None = Field(default=None, primary_key=True)
    item_id: int = Field(foreign_key="item.id")
    number: int
    position: int
    rater_id: int | None = Field(default=None, foreign_key="rater.id", index=True)
    expires: float = 0.0
    done: bool = False


class Draft(SQLModel, table=True):
    """What a rater has so far."""

    item_id: int = Field(foreign_key="item.id", primary_key=True)
    rater_id: int = Field(foreign_key="rater.id", primary_key=True, index=True)
    version: int = 0
    payload: str
    saved: float = Field(default_factory=time.time)


class Answer(SQLModel, table=True):
    """What a rater handed in, as it came. id: made by the page, so that sending twice saves once; skipped: the reason; final: settled."""

    __table_args__ = (UniqueConstraint("item_id", "rater_id", "revision"), Index("mine", "rater_id", "item_id"))
    id: str = Field(primary_key=True)
    item_id: int = Field(foreign_key="item.id", index=True)
    rater_id: int = Field(foreign_key="rater.id")
    revision: int
    payload: str
    skipped: str = ""
    seconds: float = 0.0
    correct: float | None = None
    final: bool = False
    created: float = Field(default_factory=time.time)


@dataclass(frozen=True)
class Database:
    """An engine, and the lock that lets SQLite's writers wait in turn instead of trying again and again."""

    engine: Engine
    lock: threading.Lock
    sqlite: bool


def database_file(folder: Path) -> Path:
    """Where SQLite keeps a study."""
    return folder / "study.db"


def open_database(url: str, folder: Path) -> Database:
    """Open the database of a study, and make its tables where they are not.

    Args:
        url: "" = SQLite in `folder`; or such as postgresql+psycopg://user@host/name.

    Raises:
        ValueError: it cannot be reached or opened; says which (without a password).
    """
    sqlite = not url or url.startswith("sqlite")
    if not url:
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{database_file(folder)}"
    pool: dict[str, Any] = {} if sqlite else {"pool_size": 16, "max_overflow": 16, "pool_pre_ping": True}
    try:
        engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False} if sqlite else {}, **pool)
        if sqlite:
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        with engine.execution_options(writes=True).begin() as connection:
            SQLModel.metadata.create_all(connection)
    except (OperationalError, ImportError, ValueError) as error:
        raise ValueError(f"database {url.rsplit('@', 1)[-1]}: cannot be opened ({str(error).splitlines()[0]})") from error
    return Database(engine, threading.Lock(), sqlite)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin as `_begin_sqlite` says
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def writing(database: Database) -> Iterator[Session]:
    """A transaction that is durable once the block is left, and undone if it raises."""
    if not database.sqlite:
        with Session(database.engine, expire_on_commit=False) as session, session.begin():
            yield session
        return
    with database.lock, Session(database.engine.execution_options(writes=True), expire_on_commit=False) as session:
        try:
            with session.begin():
                yield session
        except (ValueError, IntegrityError, HTTPException):
            raise
        except BaseException:  # rows that were never fetched would keep this connection at an old view of the database
            session.invalidate()
            raise


@contextmanager
def reading(database: Database) -> Iterator[Session]:
    """A view of the database at one moment."""
    with Session(database.engine, expire_on_commit=False) as session:
        yield session
