"""`limner score --serve`: the same scores as without it, batches across requests, a bounded queue, bad input."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from chain import clip_scorer
from limner.images import decode, to_tensor
from limner.scorers import clip
from limner.scorers.serve import make_app


class Brightness:
    """Mean of the pixels; waits for `go`, and remembers the sizes of its batches."""

    name, range, higher_is_better, comparable_across_prompts, needs_prompt, revision = "light", (0.0, 255.0), True, True, False, "1"

    def __init__(self) -> None:
        self.go, self.began, self.batches = threading.Event(), threading.Event(), list[int]()
        self.go.set()

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | str]:
        self.batches.append(len(pictures))
        self.began.set()
        assert self.go.wait(30)
        values = [float(np.asarray(p).mean()) for p in pictures]
        if 13.0 in values:
            raise RuntimeError("no luck")
        return ["too dark" if v < 1 else v for v in values]


def png(value: int = 100, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def body(*values: int, prompt: str = "a man") -> dict[str, Any]:
    return {"images": [{"image": base64.b64encode(png(v)).decode(), "prompt": prompt} for v in values]}


@pytest.fixture
def light() -> Brightness:
    return Brightness()


@pytest.fixture
def client(light: Brightness) -> Iterator[TestClient]:
    with TestClient(make_app([light], batch_size=8, limit=4, max_bytes=20_000)) as made:  # type: ignore[list-item]
        yield made


def test_scores_are_those_of_the_scorer(tmp_path: Path) -> None:
    """JSON, and the same as a form: pictures of two sizes, two scorers, of which one has no answer without a prompt."""
    weights = clip_scorer(tmp_path / "clip")
    mine, light = clip.load_scorer(weights, "mine"), Brightness()
    pictures, prompts = [png(200), png(30, (30, 9)), png(0)], ["a man in red", "a woman", ""]
    expected = [mine(to_tensor([decode(p)]), [t]).item() for p, t in zip(pictures[:2], prompts)]
    with TestClient(make_app([mine, light])) as client:  # type: ignore[list-item]
        rows = [{"image": base64.b64encode(p).decode(), "prompt": t} for p, t in zip(pictures, prompts)]
        found = client.post("/score", json={"images": rows}).json()
        files = [("image", (f"{i}.png", p, "image/png")) for i, p in enumerate(pictures)]
        assert client.post("/score", files=files, data={"prompt": prompts}).json() == found
        one = client.post("/score", files=files[:2], data={"prompt": "a man in red"}).json()
        told = client.get("/health").json()
    assert [s["mine"] for s in found["scores"]] == [pytest.approx(expected[0], rel=1e-5), pytest.approx(expected[1], rel=1e-5), None]
    assert [s["light"] for s in found["scores"]] == [200, 30, None]
    assert found["reasons"] == [{}, {}, {"mine": "there is no prompt", "light": "too dark"}]
    assert one["scores"][0] == found["scores"][0] and one["scores"][1]["mine"] != found["scores"][1]["mine"]
    assert told["status"] == "ok" and told["scorers"]["mine"]["files"] == mine.files and told["scorers"]["mine"]["higher_is_better"]


def test_requests_that_wait_are_scored_together(client: TestClient, light: Brightness) -> None:
    """While one image is scored three others come, each in a request of its own: they make the second batch."""
    light.go.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/score", json=body(50))
        assert light.began.wait(30)
        others = [pool.submit(client.post, "/score", json=body(60 + i)) for i in range(3)]
        while client.app.state.batcher._waiting.qsize() < 3:  # type: ignore[attr-defined]
            threading.Event().wait(0.001)
        refused = client.post("/score", json={"images": [{"image": base64.b64encode(b"nothing decoded is wanted").decode()}]})
        light.go.set()
        assert first.result().json()["scores"] == [{"light": 50.0}]
        assert [o.result().json()["scores"] for o in others] == [[{"light": 60.0 + i}] for i in range(3)]
    assert light.batches == [1, 3]
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "1" and "4 of 4 images wait already" in refused.json()["detail"]
    text = client.get("/metrics").text
    assert 'limner_requests_total{status="200"} 4\n' in text and 'limner_requests_total{status="503"} 1\n' in text
    assert "limner_images_total 4\nlimner_batches_total 2\n" in text and "limner_queue_images 0\n" in text
    assert client.post("/score", json=body(70)).status_code == 200, "there is room again"


def test_a_scorer_that_fails_does_not_end_the_service(client: TestClient) -> None:
    found = client.post("/score", json=body(13)).json()
    assert (found["scores"], found["reasons"]) == ([{"light": None}], [{"light": "RuntimeError: no luck"}])
    assert client.post("/score", json=body(14)).json()["scores"] == [{"light": 14.0}]
    assert "limner_failures_total 1\n" in client.get("/metrics").text


def test_an_image_that_cannot_be_read_takes_nothing_from_the_others(client: TestClient) -> None:
    images = [{"image": base64.b64encode(data).decode()} for data in (b"GIF89a", png(40), b"hello")]
    found = client.post("/score", json={"images": images}).json()
    assert found["scores"] == [{"light": None}, {"light": 40.0}, {"light": None}]
    assert [r.get("light", "").partition(":")[0] for r in found["reasons"]] == ["image 0", "", "image 2"]
    assert found["scorers"]["light"]["revision"] == Brightness.revision


def test_bad_requests(client: TestClient, light: Brightness) -> None:
    def says(status: int, text: str, **request: Any) -> None:
        answer = client.post("/score", **request)
        assert answer.status_code == status and text in answer.json()["detail"]

    says(400, "the body is not JSON", content=b"{", headers={"Content-Type": "application/json"})
    says(400, 'expected {"images": [{"image": base64, "prompt": text}, ...]}', json=[1])
    says(400, "no images; send at least one", json={"images": []})
    says(400, 'images[0]: expected {"image": base64', json={"images": [{"prompt": "a"}]})
    says(400, "images[0].image: not base64", json={"images": [{"image": "a man"}]})
    says(400, "image 0: not a readable image", json={"images": [{"image": base64.b64encode(b"GIF89a").decode()}]})
    says(
        400, "content type application/x-pickle; expected application/json", content=b"x", headers={"Content-Type": "application/x-pickle"}
    )
    says(413, "5 images; the service takes at most 4", json=body(1, 2, 3, 4, 5))
    says(413, "larger than 20000 bytes", content=b"x" * 20_001, headers={"Content-Type": "application/json"})
    says(400, "a form needs a Content-Length", content=iter([b"x"]), headers={"Content-Type": "multipart/form-data; boundary=x"})
    files = [("image", ("a.png", png(), "image/png"))] * 3
    says(400, "3 files `image` but 2 fields `prompt`", files=files, data={"prompt": ["a", "b"]})
    says(400, "no images", data={"prompt": "a"}, files=[("other", ("a.png", png(), "image/png"))])
    assert not light.batches and client.app.state.batcher.size == 0  # type: ignore[attr-defined]
