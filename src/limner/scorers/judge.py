"""A vision-language model as a scorer: what it is asked, and how strictly its answer is read.

An answer that does not say the one thing it was asked for is a missing score with its reason, never a number. Templates are in the manner
of UnifiedReward (arXiv 2503.05236: points of 1 to 5 behind "Final Score:", pairs) and VQAScore (arXiv 2404.01291: probability of "Yes");
the words are ours, so numbers are not those of the papers.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from limner.images import check_images, encode_batch
from limner.scorers.backends import Answer, Backend, Journal, LocalBackend, Question, ask_all
from limner.scorers.protocol import checked_prompts

Read = Callable[[Answer], float | str]  # an answer to its number, or why there is none
SHOWN = 80  # characters of an answer that a reason quotes


@dataclass(frozen=True, kw_only=True)
class Template:
    """What is asked of an image (or of two), and how the answer is read.

    Args:
        text: with {prompt}.
        range: smallest and largest number.
        comparable: numbers of different prompts may be compared.
    """

    text: str
    read: Read
    range: tuple[float, float]
    comparable: bool = True
    probabilities: bool = False
    max_tokens: int = 512

    def question(self, prompt: str, *images: bytes) -> Question:
        return Question(
            text=self.text.replace("{prompt}", prompt), images=images, max_tokens=self.max_tokens, probabilities=self.probabilities
        )


def _final(label: str, value: str, text: str) -> list[str]:
    """The values of the lines, or last sentences of lines, that say `label: value` and nothing else, whatever their emphasis.

    Empty if the label also comes with a value in another way: `4 to 5`, `4/10`, `not better: tie`.
    """
    said = re.findall(rf"(?:^|[.!?]\s+)[*_#\s]*{label}[*_\s]*:[*_\s]*{value}[*_.\s]*$", text, re.IGNORECASE | re.MULTILINE)
    near = re.findall(rf"{label}[*_\s]*:[*_\s]*{value}", text, re.IGNORECASE)
    return said if len(said) == len(near) else []


def read_points(answer: Answer) -> float | str:
    """`Final Score: x` with x in 1..5, once; or an answer that is such a number alone."""
    if answer.problem:
        return answer.problem
    found = _final("final score", r"(-?\d+(?:\.\d+)?)(?:\s*/\s*5)?", answer.text)
    if not found and (alone := re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)(?:\s*/\s*5)?\.?\s*", answer.text)):
        found = [alone[1]]
    if len(set(map(float, found))) != 1:
        return _unread(answer, "expected one line `Final Score: x`" if not found else "it gives several scores")
    value = float(found[0])
    return value if 1 <= value <= 5 else _unread(answer, "its score is not in 1..5")


def read_choice(answer: Answer) -> float | str:
    """`Better: 1`, `Better: 2` or `Better: tie`, once, to 1, 0 or 1/2."""
    if answer.problem:
        return answer.problem
    found = {w.lower() for w in _final("better", r"(?:image\s*)?(1|2|tie)", answer.text)}
    if len(found) != 1:
        return _unread(answer, "expected one line `Better: 1`, `2` or `tie`" if not found else "it chooses both")
    return {"1": 1.0, "2": 0.0, "tie": 0.5}[found.pop()]


def read_yes(answer: Answer) -> float | str:
    """Probability that the first word is yes, whatever its case; the rest need not be no."""
    if answer.problem:
        return answer.problem
    if not answer.first:
        return "the endpoint gives no probabilities (logprobs); ask another, or use the template pointwise"
    words = {"yes": 0.0, "no": 0.0}
    for token, probability in answer.first.items():
        if (word := token.strip().lower()) in words:
            words[word] += probability
    if not any(words.values()):
        return _unread(answer, "neither yes nor no is among its likely first words")
    return min(1.0, words["yes"])


def _unread(answer: Answer, why: str) -> str:
    text = " ".join(answer.text.split())
    return f"unparsable answer, {why}: {text[:SHOWN]!r}{' ...' if len(text) > SHOWN else ''}"


TEMPLATES = {
    "pointwise": Template(
        text=(
            "An image was made for this caption:\n{prompt}\n\nJudge it by three things: whether it shows what the caption says, whether "
            "what it shows is sound (bodies, hands, faces, objects without faults), and whether it looks good. Say in a sentence or two "
            "what you see. Then end with one line of this form, x from 1 (very poor) to 5 (excellent), halves allowed:\nFinal Score: x"
        ),
        read=read_points, range=(1.0, 5.0),
    ),
    "yes": Template(
        text='Does this figure show "{prompt}"? Please answer yes or no.', read=read_yes, range=(0.0, 1.0),
        probabilities=True, max_tokens=1,
    ),
}  # fmt: skip
PAIRWISE = Template(
    text=(
        "Two images, image 1 and image 2, were made for this caption:\n{prompt}\n\nWhich is better: truer to the caption, with fewer "
        "faults in bodies, hands, faces and objects, better looking? Give your reasons in a sentence or two. Then end with one line of "
        "this form, x being 1, 2 or tie:\nBetter: x"
    ),
    read=read_choice, range=(0.0, 1.0),
)  # fmt: skip


class JudgeScorer:
    """A backend and a template behind the scorer protocol.

    Attributes:
        The others: as `Scorer`. revision: of the weights where they are at hand, else the model's name; with a hash of the template.
    """

    higher_is_better, needs_prompt = True, True

    def __init__(self, name: str, backend: Backend, template: str = "pointwise", journal: Path | None = None):
        if template not in TEMPLATES:
            raise ValueError(f"scorers.{name}.template: {template!r}; expected one of {', '.join(TEMPLATES)}")
        self.name, self.backend, self.template = name, backend, TEMPLATES[template]
        self.range, self.comparable_across_prompts = self.template.range, self.template.comparable
        self.metric, self.files = f"judge_{template}", backend.files
        wording = hashlib.sha256((self.template.text + PAIRWISE.text).encode()).hexdigest()[:8]
        self.revision = f"{self.metric}@{backend.revision or backend.model}:{wording}"
        self.journal = Journal(journal, backend)

    def keep_answers(self, path: Path | None) -> None:
        """Keep answers in a file from now on, and take those that it has; None = forget what was answered, keep no file."""
        self.journal = Journal(path, self.backend)

    def to_device(self, device: str) -> None:
        """Move a local model."""
        if isinstance(self.backend, LocalBackend):
            self.backend.to_device(device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`; NaN where there is no score."""
        check_images(images)
        found = self._scores(encode_batch(images), checked_prompts(self.name, self.metric, prompts, len(images)))
        return torch.tensor([float("nan") if isinstance(v, str) else v for v in found])

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | str]:
        """As `PictureScorer`."""
        return self._scores([png(p) for p in pictures], prompts)

    def _scores(self, images: Sequence[bytes], prompts: Sequence[str]) -> list[float | str]:
        questions = [self.template.question(p, i) for i, p in zip(images, prompts)]
        return [self.template.read(a) for a in ask_all(self.backend, questions, self.journal)]

    def compare(self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | str]:
        """How often the first picture of each pair is chosen: 1, 1/2 or 0, asked in both orders, since models favour a place.

        A model that chooses by place gets 1/2. A reason where either answer cannot be read.
        """
        found = both_orders(self.backend, self.journal, [png(p) for p in first], [png(p) for p in second], prompts)
        return [a if isinstance(a, str) else b if isinstance(b, str) else (a + b) / 2 for a, b in found]


def both_orders(
    backend: Backend, journal: Journal, first: Sequence[bytes], second: Sequence[bytes], prompts: Sequence[str]
) -> list[tuple[float | str, float | str]]:
    """How far the first image of each pair is preferred, 1, 1/2 or 0, when it is shown as image 1, and when as image 2.

    Where an answer cannot be read: why not.
    """
    questions = [PAIRWISE.question(p, x, y) for p, x, y in zip(prompts, first, second, strict=True)]
    questions += [PAIRWISE.question(p, y, x) for p, x, y in zip(prompts, first, second)]
    read = [PAIRWISE.read(answer) for answer in ask_all(backend, questions, journal)]
    return [(one, other if isinstance(other, str) else 1 - other) for one, other in zip(read[: len(prompts)], read[len(prompts) :])]


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
