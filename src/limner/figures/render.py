"""From mesh to picture: cast rays once (`cast`), then paint as often as wanted (`paint`).

Casting yields layers (part, limb and light of every sub-pixel); painting gives them colours and a background. So one body
can be shown in many clothes and places for nearly nothing. Supersampling 3×3; orthographic camera; the ground line lies
above the feet and a soft shadow ties them to it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from limner.figures.body import PARTS, Mesh
from limner.figures.scene import Figure, palette

SUPERSAMPLING = 3


@dataclass
class Layers:
    """What the camera saw. Q = size × SUPERSAMPLING sub-pixels a side.

    part (Q, Q) int8: index into `PARTS`, -1 = background; limb (Q, Q) int8; wrong (Q, Q) bool; normal (Q, Q, 3) float16 in
    camera axes; joints (14, 2): x, y in 0..1 of the frame; visible (14,) bool; feet (x, y, half width): where the shadow lies.
    """

    part: np.ndarray
    limb: np.ndarray
    wrong: np.ndarray
    normal: np.ndarray
    joints: np.ndarray
    visible: np.ndarray
    feet: tuple[float, float, float]

    @property
    def size(self) -> int:
        return self.part.shape[0] // SUPERSAMPLING


@dataclass
class Picture:
    """image (size, size, 3) uint8; part (size, size) int8, the commonest part of a pixel; joints and visible as in `Layers`."""

    image: np.ndarray
    part: np.ndarray
    joints: np.ndarray
    visible: np.ndarray


@cache
def _kernel() -> Any:
    import warp as wp

    wp.config.log_level = logging.ERROR

    @wp.kernel
    def cast_rays(
        mesh: wp.uint64,
        origin: wp.array(dtype=wp.vec3),  # type: ignore[valid-type]
        face: wp.array(dtype=wp.int32),  # type: ignore[valid-type]
        depth: wp.array(dtype=wp.float32),  # type: ignore[valid-type]
        normal: wp.array(dtype=wp.vec3),  # type: ignore[valid-type]
    ) -> None:
        i = wp.tid()
        query = wp.mesh_query_ray(mesh, origin[i], wp.vec3(0.0, 1.0, 0.0), 100.0)
        face[i] = -1
        if query.result:
            face[i] = query.face
            depth[i] = query.t
            normal[i] = query.normal

    return cast_rays


def turn(points: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate points (N, 3) about the vertical axis."""
    a = np.deg2rad(degrees)
    return (points @ np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])).astype(np.float32)


def camera(figure: Figure, mesh: Mesh) -> tuple[float, float, float]:
    """Where to look so that the whole figure is in the frame: centre x, bottom z and side length of the view, in metres."""
    v = turn(mesh.vertices, figure.yaw)
    low, high = v.min(0), v.max(0)
    head, ankle = mesh.joints[0, 2], mesh.joints[:, 2].min()
    side = max(1.72 / figure.fill if head > ankle else 0, (high[2] - low[2]) / 0.93, (high[0] - low[0]) / 0.93)
    free = max(side * 0.96 - (high[0] - low[0]), 0) / 2
    return float((low[0] + high[0]) / 2 + figure.shift * free * 0.7), float(low[2] - 0.035 * side), float(side)


def cast(figure: Figure, mesh: Mesh, size: int = 64, view: tuple[float, float, float] | None = None) -> Layers:
    """See the mesh from the figure's camera (or from `view`, so that a defective copy keeps the sound one's frame)."""
    import warp as wp

    x0, z0, side = view or camera(figure, mesh)
    q = size * SUPERSAMPLING
    v, joints = turn(mesh.vertices, figure.yaw), turn(mesh.joints, figure.yaw)
    to_frame = lambda p: np.stack([(p[:, 0] - x0) / side + 0.5, 1 - (p[:, 2] - z0) / side], -1)  # noqa: E731
    box = to_frame(v)
    rows = slice(*np.clip([int(box[:, 1].min() * q) - 1, int(box[:, 1].max() * q) + 2], 0, q))
    cols = slice(*np.clip([int(box[:, 0].min() * q) - 1, int(box[:, 0].max() * q) + 2], 0, q))
    centre = (np.arange(q) + 0.5) / q
    zs, xs = np.meshgrid(z0 + (1 - centre[rows]) * side, x0 + (centre[cols] - 0.5) * side, indexing="ij")
    origin = np.stack([xs, np.full_like(xs, -10), zs], -1).reshape(-1, 3).astype(np.float32)
    n = len(origin)
    face, depth, normal = wp.zeros(n, dtype=wp.int32), wp.zeros(n, dtype=wp.float32), wp.zeros(n, dtype=wp.vec3)
    body = wp.Mesh(points=wp.array(v, dtype=wp.vec3), indices=wp.array(mesh.faces.ravel(), dtype=wp.int32))
    wp.launch(_kernel(), n, [body.id, wp.array(origin, dtype=wp.vec3), face, depth, normal])
    hit = face.numpy().reshape(xs.shape)
    seen = hit >= 0

    def layer(values: np.ndarray, empty: Any, dtype: Any) -> np.ndarray:
        out = np.full((q, q), empty, dtype)
        out[rows, cols] = np.where(seen, values[hit], empty)
        return out

    normals = np.zeros((q, q, 3), np.float16)
    normals[rows, cols] = normal.numpy().reshape(*xs.shape, 3)
    surface = np.full((q, q), np.inf, np.float32)
    surface[rows, cols] = np.where(seen, depth.numpy().reshape(xs.shape) - 10, np.inf)
    spots = to_frame(joints)
    pixel = np.clip((spots * q).astype(int), 0, q - 1)
    inside = (spots >= 0).all(1) & (spots < 1).all(1)
    near = joints[:, 1] - surface[pixel[:, 1], pixel[:, 0]]  # how far the joint lies behind what is seen there
    visible = inside & (near < 0.14) & np.isfinite(near)
    low = box[v[:, 2] < v[:, 2].min() + 0.12]
    feet = (float(low[:, 0].mean()), float(box[:, 1].max()), float(np.ptp(low[:, 0]) / 2 + 0.05))
    return Layers(
        layer(mesh.part, -1, np.int8),
        layer(mesh.limb, 0, np.int8),
        layer(mesh.wrong, False, bool),
        normals,
        spots.astype(np.float32),
        visible,
        feet,
    )


def _grid(q: int) -> tuple[np.ndarray, np.ndarray]:
    centre = (np.arange(q) + 0.5) / q
    y, x = np.meshgrid(centre, centre, indexing="ij")
    return x, y


def backdrop(figure: Figure, q: int) -> np.ndarray:
    """The place behind the figure: (q, q, 3) float, 0-255. A ground, a far side, and one or two things that name it."""
    x, y = _grid(q)
    rng = np.random.default_rng(figure.scenery)
    far, ground = {
        "park": ((150, 195, 235), (92, 150, 78)), "beach": ((150, 210, 240), (228, 208, 152)), "city": ((190, 195, 205), (108, 108, 114)),
        "room": ((206, 188, 160), (140, 96, 62)), "snow": ((176, 190, 208), (236, 240, 246)),
    }[figure.place]  # fmt: skip
    h = figure.horizon
    image = np.where((y < h)[..., None], np.array(far) * (1.06 - 0.18 * y[..., None]), np.array(ground) * (0.82 + 0.25 * y[..., None]))
    tone = float(rng.uniform(0.92, 1.06))

    def put(where: np.ndarray, colour: tuple[float, ...]) -> None:
        image[where] = np.array(colour) * tone

    if figure.place == "park":
        for _ in range(int(rng.integers(1, 4))):  # trees
            cx, r = rng.uniform(0, 1), rng.uniform(0.09, 0.16)
            put((abs(x - cx) < r * 0.16) & (y > h - 2.2 * r) & (y < h), (96, 70, 46))
            put(((x - cx) ** 2 + ((y - h + 2.4 * r) * 0.85) ** 2) < r**2, (58, 116, 56))
    elif figure.place == "beach":
        put((y < h) & (y > h - rng.uniform(0.08, 0.16)), (46, 120, 180))
        cx = rng.uniform(0.1, 0.9)
        put((x - cx) ** 2 + (y - 0.12) ** 2 < 0.055**2, (250, 236, 150))
    elif figure.place == "city":
        left = 0.0
        while left < 1:  # a row of houses
            width, top = rng.uniform(0.14, 0.3), h - rng.uniform(0.15, 0.42)
            house = (x >= left) & (x < left + width) & (y > top) & (y < h)
            put(house, tuple(np.array((128, 118, 116)) * rng.uniform(0.75, 1.15)))
            put(house & ((x - left) % 0.11 > 0.06) & ((y - top) % 0.12 > 0.07), (176, 170, 150))
            left += width
    elif figure.place == "room":
        cx = rng.uniform(0.0, 0.75)
        put((x > cx) & (x < cx + 0.24) & (y > 0.1) & (y < 0.34), (240, 240, 232))
        put((x > cx + 0.02) & (x < cx + 0.22) & (y > 0.12) & (y < 0.32), (150, 190, 220))
        put((y > h - 0.02) & (y < h), (120, 84, 58))
    else:
        for _ in range(int(rng.integers(2, 5))):  # firs under snow
            cx, tall = rng.uniform(0, 1), rng.uniform(0.16, 0.3)
            put((abs(x - cx) < (y - h + tall) * 0.34) & (y > h - tall) & (y < h), (62, 92, 84))
            put((abs(x - cx) < (y - h + tall) * 0.34) & (y > h - tall) & (y < h - tall * 0.72), (240, 244, 250))
    return image


def paint(figure: Figure, layers: Layers) -> Picture:
    """Give the layers the figure's colours, light, place and shadow, and average the sub-pixels."""
    q, s = layers.part.shape[0], SUPERSAMPLING
    x, y = _grid(q)
    image = backdrop(figure, q)
    fx, fy, width = layers.feet
    distance = ((x - fx) / width) ** 2 + ((y - fy + 0.012) / 0.028) ** 2
    image *= (1 - 0.45 * np.exp(-distance))[..., None]  # shadow on the ground
    light = np.array([figure.light, -0.75, 0.55])
    shade = 0.5 + 0.58 * np.clip(layers.normal.astype(np.float32) @ (light / np.linalg.norm(light)), 0, 1)
    colours = np.array([palette(figure)[p] for p in PARTS], np.float32)
    body = layers.part >= 0
    image = np.where(body[..., None], colours[layers.part] * shade[..., None], image).clip(0, 255)
    small = image.reshape(layers.size, s, layers.size, s, 3).mean((1, 3))
    return Picture((small + 0.5).astype(np.uint8), shrink_parts(layers.part), layers.joints, layers.visible)


def shrink_parts(part: np.ndarray) -> np.ndarray:
    """(Q, Q) sub-pixel labels to (size, size): the commonest label of each pixel."""
    s = SUPERSAMPLING
    size = part.shape[0] // s
    blocks = part.reshape(size, s, size, s).transpose(0, 2, 1, 3).reshape(size, size, s * s)
    counts = np.stack([(blocks == k).sum(-1) for k in range(-1, len(PARTS))], -1)
    return (counts.argmax(-1) - 1).astype(np.int8)


def shrink_mask(mask: np.ndarray) -> np.ndarray:
    """(Q, Q) bool to (size, size) bool: at least half of a pixel."""
    s = SUPERSAMPLING
    size = mask.shape[0] // s
    return mask.reshape(size, s, size, s).mean((1, 3)) >= 0.5
