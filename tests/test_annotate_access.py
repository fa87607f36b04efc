"""Who may do what on the annotation server: links, cookies, passwords, other sites, rates, other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from sqlalchemy import select

import study as s
from limner.feedback import accounts, progress, server
from limner.feedback.database import Rater, reading, writing
from limner.feedback.guard import Bucket, allow
from limner.feedback.study import load_study

TEXTS = {f"i{n}": f"a red cat number {n}" for n in range(4)}


@pytest.fixture
def site(tmp_path: Path):
    return s.site(tmp_path, TEXTS, {"overlap": 2, "raters": ["anna"], "server": {"requests_per_second": 1000}})


def test_access(site) -> None:
    study, database = site
    nobody = s.client(study, database)
    assert nobody.get("/").headers["location"] == "/login" and nobody.get("/api/task").status_code == 401
    a = s.sign_in(s.client(study, database), study, database, "a")
    token = a.get("/api/task").json()["item"]["images"][0]["token"]
    picture = a.get(f"/images/{token}")
    assert picture.headers["content-type"] == "image/png" and nobody.get(f"/images/{token}").status_code in (303, 401)
    for path in ("/admin", "/admin/gallery", "/admin/items/1", "/admin/export/feedback.csv"):
        assert a.get(path).status_code == 403
    page = a.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in page.headers["content-security-policy"] and page.headers["x-content-type-options"] == "nosniff"
    assert s.token_in(page.text) == a.headers["x-csrf-token"]


def test_cookies(site) -> None:
    study, database = site
    browser = s.client(study, database)
    link = server.invitation(study, database, "anna", "rater", "")
    assert browser.get(link).status_code == browser.get(link).status_code == 200  # looking does not use it up
    cookie = browser.post(link).headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert s.client(study, database).post(link).status_code == 410
    value = browser.cookies["limner"]
    body, signature = value.split(".")
    changed = ("A" if signature[0] != "A" else "B") + signature[1:]  # not the last letter: two of its bits are padding
    for forged in (f"{body}.{changed}", body, "x.y", "ü"):
        assert accounts.person(database, forged, accounts.study_key(database)) is None
    with writing(database) as session:
        session.execute(accounts.update(accounts.Login).values(expires=1.0))
    expired = browser.post("/api/draft", json={"item": 1, "version": 0, "payload": {}})
    assert expired.status_code == 401 and "Sign in again" in expired.json()["error"]


def test_passwords(site) -> None:
    study, database = site
    browser = s.client(study, database)
    link = server.invitation(study, database, "anna", "rater", "")
    assert browser.post(link, data={"password": "short"}).status_code == 400
    assert browser.post(link, data={"password": "long enough it is"}).status_code == 303
    other = s.client(study, database)
    assert other.post("/login", data={"name": "anna", "password": "long enough it isn't"}).status_code == 401
    assert other.post("/login", data={"name": "nobody", "password": "long enough it is"}).status_code == 401
    assert other.post("/login", data={"name": "anna", "password": "long enough it is"}).status_code == 303
    with reading(database) as session:
        (hashed,) = session.execute(select(accounts.Rater.password).where(accounts.Rater.name == "anna")).one()
    assert hashed.startswith("$argon2id$")
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    (who,) = [r["id"] for r in progress.rater_rows(database, []) if r["name"] == "anna"]
    boss.post("/admin/block", data={"rater": who, "csrf": boss.headers["x-csrf-token"]})
    assert other.get("/api/task").status_code == 401
    assert other.post("/login", data={"name": "anna", "password": "long enough it is"}).status_code == 401


def test_posts_of_other_sites_are_refused(site) -> None:
    study, database = site
    a = s.sign_in(s.client(study, database), study, database, "a")
    item = a.get("/api/task").json()["item"]["id"]
    body = {"id": "cross-site-1", "item": item, "base": 0, "payload": s.rich()}
    for headers in (
        {"origin": "https://elsewhere.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
        {"x-csrf-token": ""}, {"x-csrf-token": "x" * 32}, {"x-csrf-token": "é"},
    ):  # fmt: skip
        assert a.post("/api/submit", json=body, headers={k: v.encode() for k, v in headers.items()}).status_code == 403, headers
    assert a.post("/logout", data={"csrf": "no"}).status_code == 403
    assert s.stored(database) == []
    assert a.post("/api/submit", json=body, headers={"origin": s.ORIGIN}).status_code == 200


def test_rate_limits(site, tmp_path: Path) -> None:
    bucket = Bucket(rate=1, burst=3)
    assert [allow(bucket, "a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert allow(bucket, "b", 0.0) and not allow(bucket, "a", 0.5) and allow(bucket, "a", 1.5)
    study, database = site
    browser = s.client(study, database)
    tried = [browser.get("/join/no").status_code for _ in range(study.server.attempts_per_minute + 2)]
    assert tried[0] == 410 and tried[-1] == 429


def test_only_this_machine_unless_told(site) -> None:
    study = site[0]
    folder = Path(study.output_dir).parent
    open_to_all = load_study(folder / "study.yaml", ["--server.host", "0.0.0.0"])
    with pytest.raises(ValueError, match=r"server.host: 0.0.0.0 is reached from other machines"):
        server.serve(open_to_all)
    public = load_study(folder / "study.yaml", ["--server.host", "0.0.0.0", "--server.public", "true"])
    with pytest.raises(ValueError, match="no admin has a password"):
        server.serve(public)


def test_a_second_link_leaves_an_admin_an_admin(tmp_path: Path) -> None:
    """And links begin where the study says that its page is."""
    s.image_folder(tmp_path / "images", TEXTS)
    study = s.study_of(tmp_path, {"server": {"address": "https://rate.example.org/"}})
    database = server.prepare(study)
    boss = s.sign_in(s.client(study, database), study, database, "boss", "admin")
    server.invitation(study, database, "boss", "", "")
    assert boss.get("/admin").status_code == 200
    made = boss.post("/admin/invite", data={"csrf": s.token_in(boss.get("/admin").text), "name": "anna", "role": ""})
    assert "https://rate.example.org/join/" in made.text
    with writing(database) as session:
        assert {r.name: r.role for r in session.execute(select(Rater)).scalars()} == {"boss": "admin", "anna": "rater"}
