"""Words for figures: varied captions whose every word is known to speak of one attribute, and captions with wrong words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from limner.figures.scene import ATTRIBUTES, Figure

# Which body parts a wrong word speaks of (names of `body.PARTS`; "place" = everything that is not the figure).
REGION: dict[str, tuple[str, ...]] = {
    "sex": ("torso", "hips", "face"), "hair": ("hair",), "hair_length": ("hair",),
    "top": ("torso", "upperarm"), "sleeves": ("forearm",), "bottom": ("hips", "thigh"), "legwear": ("calf",),
    "pose": ("upperarm", "forearm", "hand", "thigh", "calf", "shoe"), "place": ("place",),
}  # fmt: skip

_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "hair": {"grey": ("grey", "silver")},
    "pose": {
        "standing": ("standing", "standing still"), "walking": ("walking", "taking a walk"), "running": ("running", "jogging"),
        "kneeling": ("kneeling", "on both knees"), "waving": ("waving", "waving hello"), "cheering": ("cheering", "with both arms raised"),
        "kicking": ("kicking", "kicking with one leg"), "pointing": ("pointing", "pointing to the side"),
    },
    "place": {
        "park": ("in a park", "on the grass"), "beach": ("at the beach", "on the sand"), "city": ("in the city", "on a street"),
        "room": ("in a room", "indoors"), "snow": ("in the snow", "on a snowy day"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """text; attributes: what the text claims; words: for each whitespace-separated word the attribute it speaks of, or ""."""

    text: str
    attributes: dict[str, str]
    words: tuple[str, ...]


@dataclass(frozen=True)
class SwappedCaption:
    """A caption with wrong words: their positions, and the body parts (or "place") that contradict them."""

    text: str
    wrong_words: tuple[int, ...]
    attributes: tuple[str, ...]
    region: tuple[str, ...]


def describe(attributes: dict[str, str], seed: int) -> Caption:
    """Write a caption. `seed` fixes template, synonyms and what is left unsaid, so that other attributes change their own words only.

    Always named: sex, top, sleeves, bottom, legwear, pose, place. Hair is named more often than not.
    """
    rng = np.random.default_rng(seed)
    choice = {name: int(rng.integers(2)) for name in ATTRIBUTES}
    with_hair, with_length, template = rng.random() < 0.75, rng.random() < 0.6, int(rng.integers(4))

    def say(name: str) -> list[tuple[str, str]]:
        value = attributes[name]
        options = _PHRASES.get(name, {}).get(value, (value,))
        return [(word, name) for word in options[choice[name] % len(options)].split()]

    plain = lambda text: [(word, "") for word in text.split()]  # noqa: E731
    person = plain("a") + say("sex")
    hair = plain("with") + (say("hair_length") if with_length else []) + say("hair") + plain("hair") if with_hair else []
    if attributes["sleeves"] == "long":
        top = [("long-sleeved", "sleeves"), *say("top"), ("shirt", "")] if choice["sleeves"] else [*say("top"), ("sweater", "sleeves")]
    else:
        top = [("short-sleeved", "sleeves"), *say("top"), ("shirt", "")] if choice["sleeves"] else [*say("top"), ("t-shirt", "sleeves")]
    legwear = ("pants" if choice["legwear"] else "trousers") if attributes["legwear"] == "trousers" else "shorts"
    bottom = [*say("bottom"), (legwear, "legwear")]
    pose, place = say("pose"), say("place")
    both = plain("a") + top + plain("and") + bottom
    words = [
        person + hair + plain("wearing") + both + pose + place,
        person + hair + pose + place + plain("in") + both,
        person + pose + place + plain("wearing") + both + hair,
        plain("photo of") + person + hair + plain("in") + both + pose + place,
    ][template]
    claimed = {a for _, a in words if a}  # saying nothing claims nothing
    return Caption(" ".join(w for w, _ in words), {n: attributes[n] for n in ATTRIBUTES if n in claimed}, tuple(a for _, a in words))


_SAID: dict[tuple[str, ...], tuple[str, str]] = {  # what stands for one value wherever it stands
    **{
        tuple(phrase.split()): (name, value)
        for name in ("sex", "pose", "place")
        for value in ATTRIBUTES[name]
        for phrase in _PHRASES.get(name, {}).get(value, (value,))
    },
    ("long-sleeved",): ("sleeves", "long"), ("sweater",): ("sleeves", "long"),
    ("short-sleeved",): ("sleeves", "short"), ("t-shirt",): ("sleeves", "short"),
    ("trousers",): ("legwear", "trousers"), ("pants",): ("legwear", "trousers"), ("shorts",): ("legwear", "shorts"),
}  # fmt: skip
_COLOURED = {  # what has the colour before it
    "hair": "hair", "shirt": "top", "sweater": "top", "t-shirt": "top", "trousers": "bottom", "pants": "bottom", "shorts": "bottom",
}  # fmt: skip


def parse(words: Sequence[str]) -> Caption:
    """What a caption in the words of `describe` claims; other words claim nothing. Its inverse, also of captions with wrong words."""
    said = [w.lower() for w in words]
    claims, about = dict[str, str](), [""] * len(said)

    def claim(name: str, value: str, *at: int) -> None:
        claims[name] = value
        for i in at:
            about[i] = name

    for phrase in sorted(_SAID, key=len):  # longer ones last: they are the surer ones
        for i in range(len(said) - len(phrase) + 1):
            if tuple(said[i : i + len(phrase)]) == phrase:
                claim(*_SAID[phrase], *range(i, i + len(phrase)))
    for i, noun in enumerate(said):
        name = _COLOURED.get(noun, "")
        colour = {"silver": "grey"}.get(said[i - 1], said[i - 1]) if i else ""
        if name and colour in ATTRIBUTES[name]:
            claim(name, colour, i - 1)
        before = i - 2 if colour in ATTRIBUTES["hair"] else i - 1
        if noun == "hair" and before >= 0 and said[before] in ATTRIBUTES["hair_length"]:
            claim("hair_length", said[before], before)
    return Caption(" ".join(words), {n: claims[n] for n in ATTRIBUTES if n in claims}, tuple(about))


def contradicting(parts: NDArray[np.integer], names: Sequence[str], attributes: Iterable[str]) -> NDArray[np.bool_]:
    """Where wrong attributes show: their body parts, or all that is not the person.

    Args:
        parts: (H, W) numbers of body parts, 0 = not the person.
        names: of the parts, in the order of their numbers.
        attributes: that a caption claims and that are not so.
    """
    region = {part for name in attributes for part in REGION[name]}
    body = np.isin(parts, [names.index(n) for n in region if n != "place"])
    return body | (parts == 0) if "place" in region else body


def swap(figure: Figure, seed: int, rng: np.random.Generator, count: int | None = None) -> SwappedCaption:
    """The caption of `describe` with one to three attributes (or `count`) replaced by wrong values."""
    right = describe(figure.attributes(), seed)
    names = list(right.attributes)
    chosen = sorted(str(n) for n in rng.choice(names, size=count or int(rng.integers(1, 4)), replace=False))
    attributes = figure.attributes()
    for name in chosen:
        others = [v for v in ATTRIBUTES[name] if v != attributes[name]]
        attributes[name] = others[rng.integers(len(others))]
    wrong = describe(attributes, seed)
    positions = tuple(i for i, a in enumerate(wrong.words) if a in chosen)
    return SwappedCaption(wrong.text, positions, tuple(chosen), tuple(sorted({p for n in chosen for p in REGION[n]})))
