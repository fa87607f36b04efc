"""Raters and admins: invitations that work once, passwords (argon2), and signed-in browsers.

Secrets are kept as hashes only. A cookie holds a secret signed with the study's key, so guesses never reach the database.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from functools import cache
from typing import cast

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from itsdangerous import BadSignature, Signer
from sqlalchemy import bindparam, delete, select, update
from sqlmodel import Session, col

from limner.feedback.database import Database, Invitation, Login, Meta, Rater, reading, writing

ROLES = ("rater", "admin")
SHORTEST = 10  # characters of a password


@dataclass(frozen=True)
class Person:
    """Who a request comes from. csrf: what the page must send back with every change."""

    id: int
    name: str
    role: str
    csrf: str
    settings: str


_PERSON = (  # made once: every request asks it
    select(col(Rater.id), col(Rater.name), col(Rater.role), col(Login.csrf), col(Rater.settings))
    .join(Login, col(Login.rater_id) == col(Rater.id))
    .where(col(Login.secret) == bindparam("secret"), col(Login.expires) > bindparam("now"), ~col(Rater.blocked))
)


@cache
def hasher() -> PasswordHasher:
    """argon2id with the library's parameters."""
    return PasswordHasher()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()  # of 32 random bytes: nothing to guess, so no slow hash is needed


def study_key(database: Database) -> str:
    """The key that cookies are signed with, made on first use."""
    with writing(database) as session:
        found = session.get(Meta, "key")
        if found is None:
            found = Meta(key="key", value=secrets.token_hex(32))
            session.add(found)
        return found.value


def add_rater(database: Database, name: str, role: str = "") -> int:
    """A person's id; made if there is none of the name, and given the role ("" = the one they have, a new one's is rater).

    Raises:
        ValueError: an empty or long name, or an unknown role.
    """
    if not name.strip() or len(name) > 80 or any(ord(c) < 32 for c in name):
        raise ValueError(f"name {name[:90]!r}: expected 1 to 80 characters")
    if role and role not in ROLES:
        raise ValueError(f"role {role!r}; expected {' or '.join(ROLES)}")
    with writing(database) as session:
        rater = session.execute(select(Rater).where(col(Rater.name) == name)).scalar_one_or_none() or Rater(name=name)
        rater.role = role or rater.role or "rater"
        session.add(rater)
        session.flush()
        return cast(int, rater.id)


def set_password(database: Database, rater_id: int, password: str) -> None:
    """Set a password; browsers that are signed in stay so.

    Raises:
        ValueError: it is too short or too long.
    """
    if not SHORTEST <= len(password) <= 200:
        raise ValueError(f"A password has {SHORTEST} to 200 characters.")
    hashed = hasher().hash(password)
    with writing(database) as session:
        session.execute(update(Rater).where(col(Rater.id) == rater_id).values(password=hashed))


def has_admin(database: Database) -> bool:
    """Whether an admin with a password is there."""
    with reading(database) as session:
        query = select(col(Rater.id)).where(col(Rater.role) == "admin", col(Rater.password) != "", ~col(Rater.blocked))
        return session.execute(query.limit(1)).first() is not None


def invite(database: Database, rater_id: int, hours: float) -> str:
    """The secret of a link that signs this person in once. Links made before and not used are void."""
    secret = secrets.token_urlsafe(24)
    with writing(database) as session:
        session.execute(delete(Invitation).where(col(Invitation.rater_id) == rater_id, col(Invitation.used).is_(None)))
        session.add(Invitation(secret=_hash(secret), rater_id=rater_id, expires=time.time() + hours * 3600))
    return secret


def invited(database: Database, secret: str) -> str | None:
    """The name that an invitation is for; None if it was used, is too old or never was."""
    with reading(database) as session:
        found = session.get(Invitation, _hash(secret))
        if found is None or found.used is not None or found.expires < time.time():
            return None
        rater = session.get(Rater, found.rater_id)
        return rater.name if rater is not None and not rater.blocked else None


def accept(database: Database, secret: str, hours: float) -> str | None:
    """Use an invitation up; returns the secret of a signed-in browser, or None if it cannot be used."""
    now = time.time()
    with writing(database) as session:
        unused = update(Invitation).where(
            col(Invitation.secret) == _hash(secret), col(Invitation.used).is_(None), col(Invitation.expires) > now
        )
        if session.execute(unused.values(used=now)).rowcount != 1:  # type: ignore[attr-defined]
            return None
        found = cast(Invitation, session.get(Invitation, _hash(secret)))
        return _sign_in(session, found.rater_id, hours)


def sign_in(database: Database, name: str, password: str, hours: float) -> str | None:
    """The secret of a signed-in browser; None if name and password do not fit. Takes as long for a name that does not exist."""
    with reading(database) as session:
        rater = session.execute(select(Rater).where(col(Rater.name) == name)).scalar_one_or_none()
    try:
        hasher().verify(rater.password if rater and rater.password else _decoy(), password)
    except (VerificationError, InvalidHashError):
        return None
    if rater is None or not rater.password or rater.blocked:
        return None
    with writing(database) as session:
        return _sign_in(session, cast(int, rater.id), hours)


@cache
def _decoy() -> str:
    return hasher().hash(secrets.token_hex(16))


def _sign_in(session: Session, rater_id: int, hours: float) -> str:
    now, secret = time.time(), secrets.token_urlsafe(32)
    session.execute(delete(Login).where(col(Login.expires) < now))
    session.add(Login(secret=_hash(secret), rater_id=rater_id, csrf=secrets.token_urlsafe(24), expires=now + hours * 3600))
    return secret


def sign_out(database: Database, secret: str) -> None:
    """End a signed-in browser's session."""
    with writing(database) as session:
        session.execute(delete(Login).where(col(Login.secret) == _hash(secret)))


def person(database: Database, cookie: str, key: str) -> Person | None:
    """Who a cookie belongs to; None if it is forged, expired, signed out, or its owner blocked."""
    secret = read_cookie(cookie, key)
    if secret is None:
        return None
    with reading(database) as session:
        row = session.execute(_PERSON, {"secret": _hash(secret), "now": time.time()}).first()
    return Person(*row) if row else None


def write_cookie(secret: str, key: str) -> str:
    """The cookie of a signed-in browser."""
    return Signer(key, salt="limner.login").sign(secret).decode()


def read_cookie(cookie: str, key: str) -> str | None:
    """The secret in a cookie; None if it was not signed with this key."""
    try:
        return Signer(key, salt="limner.login").unsign(cookie).decode()
    except (BadSignature, UnicodeDecodeError):
        return None


def save_settings(database: Database, rater_id: int, settings: str) -> None:
    """Keep a person's hot keys and the like (JSON)."""
    with writing(database) as session:
        session.execute(update(Rater).where(col(Rater.id) == rater_id).values(settings=settings))


def block(database: Database, rater_id: int, blocked: bool) -> None:
    """Shut a person out, or let them in again. What they answered stays."""
    with writing(database) as session:
        session.execute(update(Rater).where(col(Rater.id) == rater_id).values(blocked=blocked))
        if blocked:
            session.execute(delete(Login).where(col(Login.rater_id) == rater_id))
