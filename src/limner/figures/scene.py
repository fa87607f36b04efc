"""What a figure is: a frozen description, its palette, and how one is drawn by lot.

Every visible property of a picture follows from a `Figure`; `sample` draws one from a seeded generator. Adults only
(the body model's age runs from 0 = infant to 1 = old; nothing under 0.67 is ever drawn) and always clothed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]

CLOTH: dict[str, Colour] = {
    "red": (200, 38, 42), "blue": (42, 72, 195), "green": (38, 140, 70), "yellow": (232, 200, 50),
    "white": (238, 238, 238), "black": (34, 34, 40), "purple": (128, 58, 165), "pink": (240, 140, 180),
}  # fmt: skip
HAIR: dict[str, Colour] = {
    "black": (26, 22, 24), "brown": (98, 62, 34), "blond": (228, 192, 100), "red": (186, 74, 30), "grey": (172, 172, 176),
}  # fmt: skip
SKIN: tuple[Colour, ...] = ((242, 205, 178), (224, 172, 140), (190, 135, 100), (140, 95, 65), (95, 62, 45))
SHOES: tuple[Colour, ...] = ((58, 44, 40), (225, 225, 228), (120, 72, 44))
PLACES = ("park", "beach", "city", "room", "snow")
POSES = ("standing", "walking", "running", "kneeling", "waving", "cheering", "kicking", "pointing")

# The values an attribute can take. Captions, the reader's heads and the metrics all read this table.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sex": ("man", "woman"),
    "hair": tuple(HAIR),
    "hair_length": ("short", "long"),
    "top": tuple(CLOTH),
    "sleeves": ("short", "long"),
    "bottom": tuple(CLOTH),
    "legwear": ("shorts", "trousers"),
    "pose": POSES,
    "place": PLACES,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One person in one place. `jitter` holds the small random bends of this pose (standard normal draws)."""

    sex: str
    build: str  # slim, average or heavy; not captioned, a few pixels cannot tell it
    hair: str
    hair_length: str
    top: str
    sleeves: str
    bottom: str
    legwear: str
    pose: str
    place: str
    age: float  # 0.67 (young adult) .. 0.97 (old)
    height: float  # 0.2 .. 0.85 of the body model's range
    skin: int
    shoes: int
    mirrored: bool  # which arm waves, which leg kicks
    yaw: float  # degrees, 0 = facing the camera
    fill: float  # share of the frame that the standing figure is high
    shift: float  # -1 .. 1 of the free space left and right
    horizon: float  # height of the ground line, share of the frame from the top
    light: float  # -1 (from the left) .. 1
    scenery: int  # seed of the things in the background
    jitter: tuple[float, ...]

    def attributes(self) -> dict[str, str]:
        """The values of `ATTRIBUTES` for this figure."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


# Profiles show a stride or a kick, a frontal view shows raised arms: degrees of yaw away from the camera.
_YAW = {"walking": (35, 70), "running": (40, 75), "kneeling": (35, 75), "kicking": (30, 70)}


def sample(rng: np.random.Generator) -> Figure:
    """Draw a figure. Attributes are independent except hair length, which leans strongly with sex: at 64 pixels little else shows it."""

    def pick(values: tuple[str, ...] | list[str]) -> str:
        return str(values[rng.integers(len(values))])

    sex, pose, skin = pick(["man", "woman"]), pick(POSES), int(rng.integers(len(SKIN)))
    hair = pick([h for h in HAIR if np.abs(np.subtract(HAIR[h], SKIN[skin])).sum() > 60])  # else the head looks bald
    low, high = _YAW.get(pose, (0, 35))
    return Figure(
        sex=sex,
        build=pick(["slim", "average", "heavy"]),
        hair=hair,
        hair_length="long" if rng.random() < (0.9 if sex == "woman" else 0.1) else "short",
        top=pick(list(CLOTH)),
        sleeves=pick(["short", "long"]),
        bottom=pick(list(CLOTH)),
        legwear=pick(["shorts", "trousers", "trousers"]),
        pose=pose,
        place=pick(PLACES),
        age=float(rng.uniform(0.67, 0.97)),
        height=float(rng.uniform(0.25, 0.8)),
        skin=skin,
        shoes=int(rng.integers(len(SHOES))),
        mirrored=bool(rng.random() < 0.5),
        yaw=float(rng.uniform(low, high) * rng.choice([-1, 1])),
        fill=float(rng.uniform(0.74, 0.92)),
        shift=float(rng.uniform(-1, 1)),
        horizon=float(rng.uniform(0.5, 0.72)),
        light=float(rng.uniform(-0.7, 0.7)),
        scenery=int(rng.integers(2**31)),
        jitter=tuple(float(x) for x in rng.normal(0, 1, 12).clip(-2, 2)),
    )


def palette(figure: Figure) -> dict[str, Colour]:
    """The colour of each body part (the parts of `body.PARTS`)."""
    top, bottom, skin = CLOTH[figure.top], CLOTH[figure.bottom], SKIN[figure.skin]
    return {
        "hips": bottom, "thigh": bottom, "calf": bottom if figure.legwear == "trousers" else skin, "shoe": SHOES[figure.shoes],
        "torso": top, "upperarm": top, "forearm": top if figure.sleeves == "long" else skin,
        "hand": skin, "neck": skin, "face": skin, "eye": (60, 45, 40), "hair": HAIR[figure.hair],
    }  # fmt: skip
