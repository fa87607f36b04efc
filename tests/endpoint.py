"""An OpenAI-compatible endpoint in this process, and what it is sent."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Reply = Callable[[dict[str, Any]], tuple[int, Any]]  # a request's body to status and body


class Server:
    """An OpenAI-compatible endpoint that answers as `reply` says; `seen` are the requests. Bytes are sent as they are: no good HTTP."""

    def __init__(self) -> None:
        self.reply: Reply = lambda body: (200, said("Final Score: 3"))
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(body)
                outer.headers.append(dict(self.headers))
                status, answer = outer.reply(body) if self.path == "/v1/chat/completions" else (404, "no such path")
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    return
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "7")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def said(text: str, finish: str = "stop", first: dict[str, float] | None = None) -> dict[str, Any]:
    logprobs = (
        {"content": [{"token": "x", "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in first.items()]}]} if first else None
    )
    return {"choices": [{"message": {"content": text}, "finish_reason": finish, "logprobs": logprobs}]}


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def images_of(body: dict[str, Any]) -> list[Image.Image]:
    urls = [c["image_url"]["url"] for c in body["messages"][0]["content"] if c["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))) for u in urls]


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (value, value, value))
