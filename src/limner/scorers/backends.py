"""Where a vision-language model answers: an OpenAI-compatible HTTP endpoint, or a transformers folder on this machine.

An answer is its text and the probabilities of its first token. Answers are kept in a journal as they arrive, a line of JSON each, so that
a stop, a crash or an endpoint that goes away loses none of those that were given (and paid for).
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

FIRST_TOKENS = 20  # most likely first tokens that are asked for, the most that OpenAI's interface gives
KEY_VARIABLE = "OPENAI_API_KEY"
WAIT_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses after which the same question may be answered
SEVERAL = 4  # questions of which at least one should have an answer
MISCONFIGURED = (401, 403, 404, 405)  # of no question


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text about images (encoded files, in order).

    Args:
        probabilities: the first token's are wanted.
    """

    text: str
    images: tuple[bytes, ...]
    max_tokens: int = 512
    probabilities: bool = False

    @property
    def key(self) -> str:
        """What it is kept under."""
        digest = hashlib.sha256(json.dumps([self.text, self.max_tokens, self.probabilities]).encode())
        for image in self.images:
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """text; first: probability by first token; problem: why there is no answer, "" where there is one."""

    text: str = ""
    first: dict[str, float] = field(default_factory=dict)
    problem: str = ""


class Backend(Protocol):
    """Answers questions. `model` and `revision` name what answers; `files` are the SHA-256 of weights at hand."""

    model: str
    revision: str
    files: dict[str, str]

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer], None]) -> None:
        """Answer each, in any order: `keep(position, answer)` as soon as it is there."""
        ...


class Journal:
    """Answers that were given, by question. A line that a crash cut off is asked again."""

    def __init__(self, path: Path | None, backend: Backend):
        # weights of the same name may be others
        self.model = f"{backend.model}@{backend.revision}" if backend.revision else backend.model
        self.path, self._lock = path, threading.Lock()
        self.answers: dict[str, Answer] = {}
        if path is None or not path.is_file():
            return
        whole = path.read_bytes()
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                key, by = row.pop("key"), row.pop("model")
                if by == self.model:
                    self.answers[key] = Answer(**row)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        if whole and not whole.endswith(b"\n"):
            with path.open("ab") as f:
                f.write(b"\n")

    def keep(self, question: Question, answer: Answer) -> None:
        with self._lock:
            self.answers[question.key] = answer
            if self.path is not None and (answer.text or answer.first or not answer.problem):  # what was refused may be asked again
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as f:
                    f.write(json.dumps({"key": question.key, "model": self.model, **asdict(answer)}, ensure_ascii=False) + "\n")


def ask_all(backend: Backend, questions: Sequence[Question], journal: Journal) -> list[Answer]:
    """Answers in the order of the questions; each distinct question is asked once, and not at all where the journal has its answer.

    Raises:
        ValueError: of several questions not one was answered, so that something else is wrong than a question.
    """
    new = list({q.key: q for q in questions if q.key not in journal.answers}.values())
    if new:
        backend.ask(new, lambda i, answer: journal.keep(new[i], answer))
    refused = {q.key: a.problem for q in questions if not ((a := journal.answers[q.key]).text or a.first) and a.problem}
    if len(refused) >= SEVERAL and len(refused) == len({q.key for q in questions}):
        raise ValueError(f"{backend.model} answers none of {len(refused)} questions ({next(iter(refused.values()))}); mend that and run "
                         "the same command again")  # fmt: skip
    return [journal.answers[q.key] for q in questions]


class HttpBackend:
    """An endpoint with OpenAI's chat completions (vLLM, SGLang, llama.cpp, ollama, hosted ones).

    Args:
        url: up to and with the version, such as http://localhost:8000/v1.
        model: as the endpoint calls it.
        workers: questions at a time.
        tries: of a question while the endpoint cannot be reached, is busy (429) or fails (5xx).
        backoff: seconds before the second try, then twice as long each time, at most a minute; Retry-After counts where it is longer.
        timeout: seconds an answer may take.
        sleep: how to wait.

    Raises:
        ValueError: on asking: the endpoint stays away, or refuses whatever is asked. A question that it refuses alone has no answer.
    """

    def __init__(
        self, url: str, model: str, *, workers: int = 8, tries: int = 6, backoff: float = 1.0, timeout: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ):  # fmt: skip
        self.url, self.model, self.revision, self.files = url.rstrip("/"), model, "", dict[str, str]()
        self._workers, self._tries, self._backoff, self._timeout, self._sleep = workers, tries, backoff, timeout, sleep

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer], None]) -> None:
        """As `Backend`; answers that came before an error are kept."""
        stop = threading.Event()

        def one(i: int) -> None:
            if not stop.is_set():
                try:
                    keep(i, self._answer(questions[i]))
                except BaseException:
                    stop.set()
                    raise

        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for future in [pool.submit(one, i) for i in range(len(questions))]:
                    future.result()
            finally:
                stop.set()  # a no-op when all are done; else those that wait are not asked

    def _answer(self, question: Question) -> Answer:
        why = ""
        for attempt in range(self._tries):
            if attempt:
                self._sleep(self._pause(attempt, why))
            try:
                return read_answer(self._post(question))
            except urllib.error.HTTPError as error:
                body = _body(error)
                why = f"status {error.code}{': ' + body if body else ''}"
                if error.code in MISCONFIGURED:
                    raise ValueError(f"{self.url} refuses questions to {self.model} ({why}); check the address, the model's name "
                                     f"and the key in {KEY_VARIABLE}") from None  # fmt: skip
                if error.code not in WAIT_AGAIN:
                    return Answer(problem=f"the endpoint refused it ({why})")
                why += f" retry-after {error.headers.get('Retry-After', '')}"
            except (OSError, http.client.HTTPException) as error:  # no connection, none in time, or an answer that breaks off
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                why = str(error)
        raise ValueError(
            f"{self.url} gave no answer in {self._tries} tries ({why}); the answers so far are kept, run the same command again to go on"
        )

    def _pause(self, attempt: int, why: str) -> float:
        asked = why.rpartition("retry-after ")[2] if "retry-after " in why else ""
        own = min(60.0, self._backoff * 2 ** (attempt - 1)) * (1 + 0.25 * random.random())  # so that workers do not come back together
        return max(own, min(float(asked), 300.0)) if asked.isdigit() else own

    def _post(self, question: Question) -> Any:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in question.images]
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "max_tokens": question.max_tokens, "temperature": 0,
        }  # fmt: skip
        if question.probabilities:
            body |= {"logprobs": True, "top_logprobs": FIRST_TOKENS}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            return json.load(response)


def _body(error: urllib.error.HTTPError) -> str:
    """What an endpoint says of its refusal, in one line; "" where it breaks off."""
    try:
        return " ".join(error.read(2000).decode(errors="replace").split())[:200]
    except (OSError, http.client.HTTPException):
        return ""


def data_url(image: bytes) -> str:
    """An encoded image as a data: address."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "gif" if image.startswith(b"GIF") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def read_answer(found: Any) -> Answer:
    """An answer of OpenAI's form.

    Raises:
        ValueError: it has another form.
    """
    try:
        choice: Mapping[str, Any] = found["choices"][0]
        text = choice["message"]["content"] or ""
        tokens = (choice.get("logprobs") or {}).get("content") or []
        first = {t["token"]: math.exp(t["logprob"]) for t in tokens[0]["top_logprobs"]} if tokens else {}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer of another form than OpenAI's chat completions ({type(error).__name__}: {error})") from None
    if choice.get("finish_reason") == "length" and not tokens:
        return Answer(text=text, problem="the answer was cut off at its longest")
    return Answer(text=text, first=first)


class LocalBackend:
    """A vision-language model of transformers, a question at a time, the likeliest token each time; so answers do not depend on each other.

    Args:
        model: any model with a chat template that takes images (LLaVA, Qwen2-VL ...).
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any, name: str, files: Mapping[str, str] | None = None):
        self.model_, self.processor, self.model, self.files = model.eval(), processor, name, dict(files or {})
        self.revision = hashlib.sha256("".join(self.files.values()).encode()).hexdigest()[:16] if self.files else ""

    def to_device(self, device: str) -> None:
        """Move the weights."""
        self.model_.to(device)

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer], None]) -> None:
        """As `Backend`."""
        for i, question in enumerate(questions):
            keep(i, self._answer(question))

    def _answer(self, question: Question) -> Answer:
        import torch

        from limner.images import decode

        pictures = [decode(i) for i in question.images]
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question.text}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[text], images=pictures, return_tensors="pt").to(self.model_.device)
        with torch.inference_mode():
            out = self.model_.generate(
                **inputs, max_new_tokens=1 if question.probabilities else question.max_tokens, do_sample=False,
                output_logits=question.probabilities, return_dict_in_generate=True,
            )  # fmt: skip
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        words = self.processor.tokenizer
        first: dict[str, float] = {}
        if question.probabilities:
            best = out.logits[0][0].float().softmax(-1).topk(min(FIRST_TOKENS, out.logits[0].shape[-1]))
            for value, token in zip(best.values.tolist(), best.indices.tolist()):
                first[words.decode([token])] = first.get(words.decode([token]), 0.0) + value
        ends = self.model_.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        cut = not question.probabilities and len(new) == question.max_tokens and int(new[-1]) not in ends
        return Answer(text=words.decode(new, skip_special_tokens=True).strip(), first=first,
                      problem="the answer was cut off at its longest" if cut else "")  # fmt: skip


def load_backend(where: str, address: str, model: str = "") -> Backend:
    """An endpoint for an address (http://, https://), or a local folder.

    Raises:
        ValueError: no model named for an endpoint; a folder that holds none. Nothing is fetched from a hub.
    """
    if address.startswith(("http://", "https://")):
        if not model:
            raise ValueError(f"{where}.model: not set; which model does {address} answer with?")
        return HttpBackend(address, model)
    folder = Path(address)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise ValueError(f"{where}.path: {address} is neither an address (http://...) nor a folder with config.json and .safetensors")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from limner.store import sha256

    found = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return LocalBackend(found, processor, model or folder.name, {w.name: sha256(w) for w in weights})
