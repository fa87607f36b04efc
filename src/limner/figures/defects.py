"""What can be wrong with a body, made on purpose and with its exact extent.

Four defects change the mesh (extra, missing, twisted, stretched limb), one the finished picture (smeared texture). A defect
too small to be seen (fewer than `MIN_PIXELS` pixels of its mask) is drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from limner.figures.body import JOINTS, LIMBS, PARTS, Mesh, _rotation, build_meshes
from limner.figures.render import Layers, Picture, camera, cast, paint, shrink_mask, turn
from limner.figures.scene import Figure

DEFECTS = ("extra_limb", "missing_limb", "twisted_limb", "stretched_limb", "smeared_texture")
MIN_PIXELS = 24
_ROOT = {"left_arm": "left_shoulder", "right_arm": "right_shoulder", "left_leg": "left_hip", "right_leg": "right_hip"}
_END = {"left_arm": "left_wrist", "right_arm": "right_wrist", "left_leg": "left_ankle", "right_leg": "right_ankle"}
_FAR_PARTS = {"arm": ("forearm", "hand"), "leg": ("calf", "shoe")}


@dataclass
class Defective:
    """A picture with a defect, its kind, the limb (or "") and the wrong pixels (size, size) bool.

    The picture's joints are where they now are, and visible only where they still are; `extra_joints` holds (joint, x, y) of
    a second limb's.
    """

    picture: Picture
    kind: str
    limb: str
    mask: np.ndarray
    extra_joints: list[tuple[int, float, float]]


def _parts(names: tuple[str, ...]) -> list[int]:
    return [PARTS.index(n) for n in names]


def _extra(mesh: Mesh, limb: str, rng: np.random.Generator) -> tuple[Mesh, np.ndarray]:
    """A second limb out of the same shoulder or hip, turned away from the first; and where its two outer joints are."""
    own = mesh.limb == LIMBS.index(limb)
    used = np.unique(mesh.faces[own])
    pivot = mesh.joints[JOINTS.index(_ROOT[limb])]
    low, high = (45, 120) if "arm" in limb else (30, 65)
    a = np.deg2rad(rng.uniform(low, high)) * (-1 if limb.startswith("left") else 1)
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    copy = ((mesh.vertices[used] - pivot) @ turn.T + pivot).astype(np.float32)
    place = np.full(len(mesh.vertices), -1)
    place[used] = len(mesh.vertices) + np.arange(len(used))
    faces, n = place[mesh.faces[own]].astype(np.int32), int(own.sum())
    first = JOINTS.index(_ROOT[limb])
    joints = (mesh.joints[first + 1 : first + 3] - pivot) @ turn.T + pivot
    return Mesh(
        np.concatenate([mesh.vertices, copy]), np.concatenate([mesh.faces, faces]), np.concatenate([mesh.part, mesh.part[own]]),
        np.concatenate([mesh.limb, mesh.limb[own]]), np.concatenate([mesh.wrong, np.ones(n, bool)]), mesh.joints,
    ), joints  # fmt: skip


def _missing(mesh: Mesh, limb: str, whole: bool) -> tuple[Mesh, np.ndarray]:
    """The mesh without a limb, or without its outer half; and which (part, limb) triangles went."""
    gone = mesh.limb == LIMBS.index(limb)
    if limb != "head" and not whole:
        gone &= np.isin(mesh.part, _parts(_FAR_PARTS[limb.split("_")[1]]))
    keep = ~gone
    return replace(mesh, faces=mesh.faces[keep], part=mesh.part[keep], limb=mesh.limb[keep], wrong=mesh.wrong[keep]), gone


def _twist(limb: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Bone rotations that bend an elbow or a knee the wrong way."""
    side = "L" if limb.startswith("left") else "R"
    if "arm" in limb:
        return {f"lowerarm01.{side}": _rotation("x", float(rng.uniform(95, 140)))}
    return {f"lowerleg01.{side}": _rotation("x", -float(rng.uniform(65, 105)))}


def _stretch(mesh: Mesh, limb: str, rng: np.random.Generator) -> Mesh:
    """A limb drawn out to 1.5-1.9 of its length (arms) or shrunk to about half (both), along the line from root to end."""
    root, end = mesh.joints[JOINTS.index(_ROOT[limb])], mesh.joints[JOINTS.index(_END[limb])]
    direction = (end - root) / np.linalg.norm(end - root)
    factor = rng.uniform(1.5, 1.9) if "arm" in limb and rng.random() < 0.6 else rng.uniform(0.42, 0.62)
    moved = np.unique(mesh.faces[mesh.limb == LIMBS.index(limb)])
    vertices = mesh.vertices.copy()
    along = ((vertices[moved] - root) @ direction).clip(0)
    vertices[moved] += ((factor - 1) * along[:, None] * direction).astype(np.float32)
    joints, first = mesh.joints.copy(), JOINTS.index(_ROOT[limb])
    reach = ((joints[first + 1 : first + 3] - root) @ direction).clip(0)
    joints[first + 1 : first + 3] += (factor - 1) * reach[:, None] * direction
    return replace(mesh, vertices=vertices, joints=joints)


def smear(image: np.ndarray, centre: tuple[float, float], radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Swirl and blur a disc (centre and radius in pixels) of an image (H, W, 3) uint8; returns it and the disc's mask."""
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    dx, dy = x - centre[0], y - centre[1]
    distance = np.hypot(dx, dy) / radius
    weight = np.clip(1.6 * (1 - distance), 0, 1)
    angle = rng.choice([-1, 1]) * rng.uniform(1.2, 2.4) * weight
    sx, sy = centre[0] + dx * np.cos(angle) - dy * np.sin(angle), centre[1] + dx * np.sin(angle) + dy * np.cos(angle)
    sigma = rng.uniform(0.8, 1.8)
    out = [gaussian_filter(map_coordinates(image[..., c].astype(np.float32), [sy, sx], order=1, mode="nearest"), sigma) for c in range(3)]
    mixed = image * (1 - weight[..., None]) + np.stack(out, -1) * weight[..., None]
    return (mixed + 0.5).clip(0, 255).astype(np.uint8), distance < 0.85


def inject(
    figure: Figure, mesh: Mesh, sound: Layers, kind: str, rng: np.random.Generator
) -> tuple[Layers, str, np.ndarray, list[tuple[int, float, float]]] | None:
    """A defective copy of what `sound` shows, in the same frame: layers, limb, mask (size, size), extra joints. None if it cannot be seen.

    `kind` is one of the four that change the mesh. The mask of a missing limb is where the sound figure showed it; that of
    a twisted or stretched one, where it is now and should not be, or is not and should be.
    """
    view, size = camera(figure, mesh), sound.size
    limbs = [n for n in LIMBS[1:] if n != "head"] + (["head"] if kind == "missing_limb" else [])
    limb = str(rng.choice(limbs))
    extra: list[tuple[int, float, float]] = []
    index = LIMBS.index(limb)
    if kind == "extra_limb":
        larger, joints = _extra(mesh, limb, rng)
        bad = cast(figure, larger, size, view)
        mask = bad.wrong
        extra = _seen(joints, figure, view, mask, JOINTS.index(_ROOT[limb]) + 1)
    elif kind == "missing_limb":
        whole = bool(rng.random() < 0.3)
        smaller, gone = _missing(mesh, limb, whole)
        bad = cast(figure, smaller, size, view)
        parts = np.unique(mesh.part[gone])
        mask = (sound.limb == index) & np.isin(sound.part, parts) & ~((bad.limb == index) & np.isin(bad.part, parts))
        end = JOINTS.index(_END[limb]) if limb != "head" else JOINTS.index("head")
        bad.visible[end - 1 if whole and limb != "head" else end : end + 1] = False
    elif kind in ("twisted_limb", "stretched_limb"):
        changed = build_meshes([figure], [_twist(limb, rng)])[0] if kind == "twisted_limb" else _stretch(mesh, limb, rng)
        bad = cast(figure, changed, size, view)
        mask = (bad.limb == index) ^ (sound.limb == index)
    else:
        raise ValueError(f"unknown mesh defect {kind!r}; expected one of {DEFECTS[:4]}")
    bad.feet = sound.feet
    small = shrink_mask(mask)
    return (bad, limb, small, extra) if small.sum() >= MIN_PIXELS else None


def _seen(
    joints: np.ndarray, figure: Figure, view: tuple[float, float, float], mask: np.ndarray, first: int
) -> list[tuple[int, float, float]]:
    """(joint, x, y) of the joints that lie on visible pixels of the mask."""
    x0, z0, side = view
    p = turn(joints, figure.yaw)
    found = []
    for k, (x, y) in enumerate(np.stack([(p[:, 0] - x0) / side + 0.5, 1 - (p[:, 2] - z0) / side], -1)):
        row, col, r = int(y * len(mask)), int(x * len(mask)), 2
        if mask[max(row - r, 0) : row + r + 1, max(col - r, 0) : col + r + 1].any():
            found.append((first + k, float(x), float(y)))
    return found


def make_defective(figure: Figure, mesh: Mesh, sound: Layers, rng: np.random.Generator, kind: str | None = None) -> Defective:
    """A picture of the figure with one defect that can be seen; `kind` at random if not given."""
    for _ in range(20):
        chosen = kind or str(rng.choice(DEFECTS))
        if chosen != "smeared_texture":
            found = inject(figure, mesh, sound, chosen, rng)
            if found:
                return Defective(paint(figure, found[0]), chosen, found[1], found[2], found[3])
            continue
        picture = paint(figure, sound)
        spots = picture.joints[picture.visible] * sound.size
        centre = spots[rng.integers(len(spots))]
        radius = float(rng.uniform(0.09, 0.17) * sound.size)
        image, mask = smear(picture.image, (float(centre[0]), float(centre[1])), radius, rng)
        if np.abs(image.astype(int) - picture.image).max(-1)[mask].mean() > 18:
            hidden = np.hypot(*(picture.joints * sound.size - centre).T) < 0.7 * radius
            picture = replace(picture, image=image, visible=picture.visible & ~hidden)
            return Defective(picture, chosen, "", mask & (picture.part >= 0), [])
    raise RuntimeError(f"no visible defect of kind {kind!r} after 20 tries")
