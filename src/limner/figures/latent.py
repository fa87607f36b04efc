"""How good a picture of a figure is: four latent qualities, the one formula that every simulated person starts from (docs/figures.md).

Raters of rendered figures, raters of generated ones and people who choose for HPS differ in how they come to know what is wrong, and in
their noise; what they would say without noise is this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DEFECT, CONTRAST = 0.7, 130  # plausibility of the smallest defect; distance of mean colours (0..255) beyond which more is no better


def qualities(
    picture: NDArray[np.uint8], person: NDArray[np.bool_], artifact: NDArray[np.bool_], wrong: float, *, defect: float | None = None,
    blur: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """The qualities plausibility, alignment, aesthetics and overall of a picture, 0 to 1.

    Args:
        picture: (H, W, 3).
        person: (H, W), where the person is.
        artifact: (H, W), what is wrong with the picture.
        wrong: share of the attributes that its caption claims and that are not so, 0 to 1.
        defect: how sure it is that something is wrong, 0 to 1; None = known: certain if `artifact` is not empty.
        blur: share of a real picture's sharpness that it lacks, 0 to 1.

    Raises:
        ValueError: wrong, defect or blur is outside 0 to 1 (or nan).
    """
    sure = float(artifact.any()) if defect is None else float(defect)
    for name, value in (("wrong", wrong), ("defect", sure), ("blur", blur)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; expected 0 to 1")
    size = float(artifact.sum() / max(person.sum(), 1))
    plausibility = 1 - sure * (1 - DEFECT * float(np.exp(-3 * size)))
    alignment = (1 - wrong) ** 3
    columns = np.nonzero(person)[1]
    middle = float(columns.mean() + 0.5) / person.shape[1] if len(columns) else 0.5
    centred = max(0.0, 1 - abs(middle - 0.5) / 0.2)
    colours = picture.astype(np.float64)
    apart = float(np.linalg.norm(colours[person].mean(0) - colours[~person].mean(0))) if person.any() and not person.all() else 0.0
    aesthetics = (0.2 + 0.4 * centred + 0.4 * min(apart / CONTRAST, 1)) * (1 - 0.4 * sure) * (1 - blur)
    overall = 0.4 * plausibility + 0.35 * alignment + 0.25 * aesthetics
    return {"plausibility": plausibility, "alignment": alignment, "aesthetics": aesthetics, "overall": overall}
