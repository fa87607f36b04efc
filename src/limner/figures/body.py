"""The body: `anny` (a CC0 parametric human, code Apache-2.0) posed for a batch of figures.

Coordinates are metres, z up, the body faces -y, its left side is +x. Meshes are plain NumPy arrays from here on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import numpy as np
import roma
import torch

from limner.figures.scene import Figure

PARTS = ("hips", "thigh", "calf", "shoe", "torso", "upperarm", "forearm", "hand", "neck", "face", "eye", "hair")
JOINTS = (
    "head", "neck", "left_shoulder", "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist",
    "left_hip", "left_knee", "left_ankle", "right_hip", "right_knee", "right_ankle",
)  # fmt: skip
_JOINT_BONES = (
    "head", "neck01", "upperarm01.L", "lowerarm01.L", "wrist.L", "upperarm01.R", "lowerarm01.R", "wrist.R",
    "upperleg01.L", "lowerleg01.L", "foot.L", "upperleg01.R", "lowerleg01.R", "foot.R",
)  # fmt: skip
_PART_OF_BONE = {
    "pelvis": "hips", "upperleg": "thigh", "lowerleg": "calf", "foot": "shoe", "toe": "shoe", "root": "hips", "spine05": "hips",
    "spine": "torso", "clavicle": "torso", "shoulder": "torso", "upperarm": "upperarm", "lowerarm": "forearm", "wrist": "hand",
    "finger": "hand", "metacarpal": "hand", "neck": "neck", "head": "face", "eye": "eye",
}  # fmt: skip
LIMBS = ("none", "left_arm", "right_arm", "left_leg", "right_leg", "head")
_LIMB_PARTS = {"arm": ("upperarm", "forearm", "hand"), "leg": ("thigh", "calf", "shoe")}


@dataclass
class Mesh:
    """A figure's surface: vertices (V, 3), triangles (F, 3), a part index and a limb index a triangle, joints (14, 3).

    `wrong` marks triangles that an injected defect made. Limbs: see `LIMBS`.
    """

    vertices: np.ndarray
    faces: np.ndarray
    part: np.ndarray
    limb: np.ndarray
    wrong: np.ndarray
    joints: np.ndarray


@dataclass(frozen=True)
class _Template:
    model: object
    faces: np.ndarray
    part: np.ndarray
    limb: np.ndarray
    joint_bones: np.ndarray
    head_bone: int


@cache
def template() -> _Template:
    """Load the body model once and label every triangle with its part and limb."""
    import warp

    warp.config.log_level = logging.ERROR  # before the body model starts it
    import anny

    model = anny.Anny()
    labels = list(model.bone_labels)
    weights = np.zeros((len(model.template_vertices), len(labels)), np.float32)
    np.put_along_axis(weights, model.vertex_bone_indices.numpy(), model.vertex_bone_weights.numpy(), 1)
    bones = [labels[i] for i in weights.argmax(1)]
    part = np.array([PARTS.index(next(v for k, v in _PART_OF_BONE.items() if b.startswith(k))) for b in bones])
    _paint_hair(model.template_vertices.numpy(), part)
    limb = np.zeros(len(part), int)
    for i, (kind, side) in enumerate([("arm", ".L"), ("arm", ".R"), ("leg", ".L"), ("leg", ".R")], 1):
        limb[np.isin(part, [PARTS.index(p) for p in _LIMB_PARTS[kind]]) & np.array([b.endswith(side) for b in bones])] = i
    limb[np.isin(part, [PARTS.index(p) for p in ("face", "eye", "hair")])] = LIMBS.index("head")
    faces = model.get_triangular_faces().numpy().astype(np.int32)
    return _Template(
        model, faces, part[faces[:, 0]], limb[faces[:, 0]], np.array([labels.index(b) for b in _JOINT_BONES]), labels.index("head")
    )


def _paint_hair(vertices: np.ndarray, part: np.ndarray) -> None:
    """Turn the cap of the head into hair: everything high up, and the back down to the nape."""
    head = part == PARTS.index("face")
    low, high = vertices[head].min(0), vertices[head].max(0)
    x = (vertices - low) / (high - low)
    part[head & ((x[:, 2] > 0.76) | ((x[:, 2] > 0.22) & (x[:, 1] > 0.48)))] = PARTS.index("hair")


def _rotation(axis: str, degrees: float) -> torch.Tensor:
    vector = torch.zeros(3)
    vector["xyz".index(axis)] = np.deg2rad(degrees)
    matrix = torch.eye(4)
    matrix[:3, :3] = roma.rotvec_to_rotmat(vector)
    return matrix


def pose(figure: Figure) -> dict[str, torch.Tensor]:
    """Bone rotations (4, 4) of a figure's pose. "a" is the acting side, "b" the other; mirrored figures swap them.

    Angles are degrees about x (forward and back), y (sideways, positive lowers the left arm) and z (twist).
    """
    j = figure.jitter
    hang, elbow = 38 + 5 * j[0], 12 + 6 * abs(j[1])
    bends: list[tuple[str, str, float]] = [
        ("upperarm01.a", "y", hang), ("upperarm01.b", "y", 38 + 5 * j[2]),
        ("lowerarm01.a", "x", -elbow), ("lowerarm01.b", "x", -12 - 6 * abs(j[3])),
        ("upperleg01.a", "y", 2 * j[4]), ("upperleg01.b", "y", 2 * j[5]),
        ("spine03", "x", 2 * j[6]), ("head", "z", 8 * j[7]),
    ]  # fmt: skip
    extra: dict[str, list[tuple[str, str, float]]] = {
        "standing": [],
        "walking": [
            ("upperleg01.a", "x", -26 - 4 * j[8]), ("upperleg01.b", "x", 20 + 4 * j[9]), ("lowerleg01.b", "x", 16 + 4 * j[10]),
            ("upperarm01.a", "x", 22 + 5 * j[8]), ("upperarm01.b", "x", -22 + 5 * j[9]),
        ],
        "running": [
            ("upperleg01.a", "x", -58 - 6 * j[8]), ("lowerleg01.a", "x", 62 + 8 * j[9]), ("upperleg01.b", "x", 26 + 5 * j[10]),
            ("lowerleg01.b", "x", 58 + 8 * j[8]), ("upperarm01.a", "x", 45), ("upperarm01.b", "x", -40 + 5 * j[9]),
            ("lowerarm01.a", "x", -65), ("lowerarm01.b", "x", -75), ("spine03", "x", 10),
        ],
        "kneeling": [
            ("upperleg01.a", "x", -8 + 3 * j[8]), ("upperleg01.b", "x", -8 + 3 * j[9]),
            ("lowerleg01.a", "x", 98), ("lowerleg01.b", "x", 98),
            ("foot.a", "x", 45), ("foot.b", "x", 45),
        ],
        "waving": [("upperarm01.a", "y", -hang - 45 + 6 * j[8]), ("lowerarm01.a", "y", -84 + 8 * j[9])],
        "cheering": [
            ("upperarm01.a", "y", -hang - 88 + 7 * j[8]), ("upperarm01.b", "y", -38 - 5 * j[2] - 88 + 7 * j[9]),
            ("lowerarm01.a", "y", -16), ("lowerarm01.b", "y", -16),
        ],
        "kicking": [
            ("upperleg01.a", "x", -72 + 8 * j[8]), ("lowerleg01.a", "x", 6 + 5 * abs(j[9])),
            ("upperarm01.a", "y", -25), ("upperarm01.b", "y", -25 + 6 * j[10]),
        ],
        "pointing": [("upperarm01.a", "y", -hang - 40 + 5 * j[8]), ("lowerarm01.a", "x", elbow + 14)],
    }  # fmt: skip
    sides = {"a": "R", "b": "L"} if figure.mirrored else {"a": "L", "b": "R"}
    total: dict[tuple[str, str], float] = {}
    for bone, axis, degrees in bends + extra[figure.pose]:
        base, _, side = bone.partition(".")
        name = f"{base}.{sides[side]}" if side else base
        sign = -1.0 if axis == "y" and name.endswith(".R") else 1.0
        total[name, axis] = total.get((name, axis), 0.0) + sign * degrees
    matrices: dict[str, torch.Tensor] = {}
    for (bone, axis), degrees in total.items():
        matrices[bone] = _rotation(axis, degrees) @ matrices.get(bone, torch.eye(4))
    return matrices


def build_meshes(figures: list[Figure], bends: list[dict[str, torch.Tensor]] | None = None) -> list[Mesh]:
    """Meshes of a batch of figures. `bends` adds bone rotations a figure on top of its pose (twisted limbs)."""
    t = template()
    poses = [pose(f) for f in figures]
    for own, more in zip(poses, bends or [{} for _ in figures], strict=True):
        for bone, matrix in more.items():
            own[bone] = matrix @ own.get(bone, torch.eye(4))
    names = sorted({bone for p in poses for bone in p})
    parameters = {n: torch.stack([p.get(n, torch.eye(4)) for p in poses]) for n in names}
    column = lambda values: torch.tensor(values, dtype=torch.float32)  # noqa: E731
    phenotype = {
        "gender": column([float(f.sex == "woman") for f in figures]),
        "age": column([f.age for f in figures]),
        "muscle": column([0.35 if f.sex == "woman" else 0.75 for f in figures]),
        "weight": column([{"slim": 0.05, "average": 0.5, "heavy": 1.0}[f.build] for f in figures]),
        "height": column([f.height for f in figures]),
        "proportions": column([0.7] * len(figures)),
    }
    with torch.no_grad():
        out = t.model(pose_parameters=parameters, phenotype_kwargs=phenotype)  # type: ignore[operator]
    vertices, bones = out["vertices"].float().numpy(), out["bone_poses"].float().numpy()
    meshes = []
    for figure, v, b in zip(figures, vertices, bones, strict=True):
        joints = b[t.joint_bones, :3, 3].copy()
        mesh = Mesh(v, t.faces, t.part, t.limb, np.zeros(len(t.faces), bool), joints)
        meshes.append(_add_long_hair(mesh, b[t.head_bone]) if figure.hair_length == "long" else mesh)
    return meshes


def _add_long_hair(mesh: Mesh, head: np.ndarray) -> Mesh:
    """An ellipsoid of hair behind head and neck, down to the shoulders."""
    u, w = np.meshgrid(np.linspace(0, 2 * np.pi, 24, endpoint=False), np.linspace(0, np.pi, 14))
    ball = np.stack([np.cos(u) * np.sin(w), np.sin(u) * np.sin(w), np.cos(w)], -1).reshape(-1, 3)
    centre = mesh.joints[JOINTS.index("head")] + np.array([0, 0.055, -0.015])
    points = (ball * [0.125, 0.085, 0.235] + centre).astype(np.float32)
    row, col = np.meshgrid(np.arange(13), np.arange(24), indexing="ij")
    a, b = row * 24 + col, row * 24 + (col + 1) % 24
    quads = np.concatenate([np.stack([a, b, a + 24], -1).reshape(-1, 3), np.stack([b, b + 24, a + 24], -1).reshape(-1, 3)])
    n = len(quads)
    return Mesh(
        np.concatenate([mesh.vertices, points]),
        np.concatenate([mesh.faces, (quads + len(mesh.vertices)).astype(np.int32)]),
        np.concatenate([mesh.part, np.full(n, PARTS.index("hair"))]),
        np.concatenate([mesh.limb, np.full(n, LIMBS.index("head"))]),
        np.concatenate([mesh.wrong, np.zeros(n, bool)]),
        mesh.joints,
    )
