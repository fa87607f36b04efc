"""Measures of image sets without a scorer: Fréchet distance, diversity, hue shift, sharpness.

Features are arrays (n, D) of whatever network the user trusts; nothing here is called FID, which needs one particular Inception network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor

from limner.images import check_images
from limner.statistics import circular_mean

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal components of a reference set: features (n, D) in, coordinates (n, k) out.

    mean: (D,); components: (k, D), orthonormal rows, largest variance first.
    """

    mean: Array
    components: Array

    def __call__(self, features: NDArray) -> Array:
        x = _features(features, "features")
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features have {x.shape[1]} dimensions, the projection was fitted on {len(self.mean)}")
        return (x - self.mean) @ self.components.T


def principal_components(real_features: NDArray, k: int = 64) -> Projection:
    """Fit a projection to k dimensions on features (n, D) of a reference set of real images.

    With a few hundred images a covariance of hundreds of dimensions cannot be estimated, and the Fréchet distance would mostly measure n.
    The reference must be other images than those compared (training images, say): fitted on one of the compared sets, it would favour it.

    Raises:
        ValueError: k outside 1..64, fewer than k + 1 images or k dimensions, or features that are not finite.
    """
    x = _features(real_features, "real_features")
    if not 1 <= k <= 64:
        raise ValueError(f"k = {k}; expected 1 to 64 components")
    if len(x) < k + 1 or x.shape[1] < k:
        raise ValueError(f"real_features: {len(x)} images of {x.shape[1]} dimensions are too few for {k} components")
    mean = x.mean(0)
    components = np.linalg.svd(x - mean, full_matrices=False)[2][:k]
    # The sign of a component is arbitrary and differs between LAPACK builds; fixing it makes coordinates reproducible.
    signs = np.sign(components[np.arange(k), np.abs(components).argmax(1)])
    return Projection(mean, components * signs[:, None])


def frechet(features_a: NDArray, features_b: NDArray) -> float:
    """Fréchet distance (squared 2-Wasserstein) of Gaussians fitted to two feature sets (n, D): |m_a - m_b|² + tr(A + B - 2(AB)^½).

    tr (AB)^½ is the sum of the square roots of the eigenvalues of A^½ B A^½, which is symmetric: no complex square roots. Covariances
    divide by n - 1, as in pytorch-fid. HG-DPO gives FID of 5000 images; this is the same formula on the features handed in.

    Raises:
        ValueError: the sets differ in size (the bias depends on n, so unequal sets do not compare) or dimension, n < 2, or not finite.
    """
    a, b = _features(features_a, "features_a"), _features(features_b, "features_b")
    if a.shape != b.shape:
        raise ValueError(
            f"features of shapes {a.shape} and {b.shape}; the Fréchet distance needs as many images, of as many dimensions, on both sides"
        )
    if len(a) < 2:
        raise ValueError("the Fréchet distance needs at least 2 images a side")
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = _covariance(a), _covariance(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(0.0, float(distance))  # equal sets: zero but for rounding


def class_score(probabilities: NDArray) -> float:
    """exp of the mean KL divergence of an image's class probabilities from those of the set: the formula of the Inception Score (arXiv
    1606.03498), on whatever classifier made them; only Inception's 1,000 classes make it that score.

    Args:
        probabilities: (n, C), rows sum to 1.

    Returns:
        1 (all alike) to C.

    Raises:
        ValueError: rows that are no probabilities.
    """
    p = _features(probabilities, "probabilities")
    if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("probabilities: rows must be 0 or more and sum to 1")
    return float(np.exp((xlogy(p, p) - xlogy(p, p.mean(0))).sum(1).mean()))


def _covariance(x: Array) -> Array:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def diversity(features_by_prompt: NDArray) -> Array:
    """How far apart a prompt's images lie: mean Euclidean distance over the pairs of its seeds.

    HG-DPO reports a loss of diversity in the hard stage but no measure; this one is ours.

    Args:
        features_by_prompt: (P, S, D) with S seeds a prompt (four, as a rule).

    Returns:
        (P,), one number a prompt; their mean is the model's diversity.

    Raises:
        ValueError: another shape or fewer than two seeds.
    """
    x = np.asarray(features_by_prompt, dtype=np.float64)
    if x.ndim != 3 or x.shape[1] < 2:
        raise ValueError(f"diversity: expected features (prompts, seeds >= 2, D), found {x.shape}")
    first, second = np.triu_indices(x.shape[1], 1)
    return np.linalg.norm(x[:, first] - x[:, second], axis=-1).mean(1)


def hue_vectors(images: Tensor) -> Array:
    """Mean hue vector of each image: (B, 3, H, W) in [0, 1] to (B, 2), cosine and sine of hue averaged over all its pixels, unweighted.

    Hue is that of HSV. A grey pixel has none; as in every HSV conversion it counts as 0° (red).
    """
    x = _pixels(images)
    red, green, blue = x[:, 0], x[:, 1], x[:, 2]
    top = x.max(1)
    chroma = top - x.min(1)
    safe = np.where(chroma > 0, chroma, 1.0)
    sextant = np.where(
        top == red, (green - blue) / safe % 6, np.where(top == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )  # 0..6: red, yellow, green, cyan, blue, magenta
    hue = np.where(chroma > 0, sextant, 0.0) * (np.pi / 3)
    return np.stack([np.cos(hue).mean((1, 2)), np.sin(hue).mean((1, 2))], axis=1)


def mean_hue(vectors: NDArray) -> float:
    """Circular mean in degrees [0, 360) over all pixels of images of one size, from their `hue_vectors` (n, 2); nan if they cancel."""
    lengths = np.hypot(vectors[:, 0], vectors[:, 1])
    if not lengths.any():
        return float("nan")
    return circular_mean(np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0])), lengths)


def hue_shift(images: Tensor, base_images: Tensor) -> float:
    """Colour shift in degrees, 0..180: |circular mean hue of a model's images - that of base's| (HG-DPO Tables 3 and 7, "Hue").

    The circular mean of hue over all pixels after RGB to HSV, unweighted, as HG-DPO defines it. It does not state the unit; the size
    of its figures fits degrees.

    Args:
        images, base_images: (B, 3, H, W) in [0, 1].
    """
    return abs(signed_turn(mean_hue(hue_vectors(images)), mean_hue(hue_vectors(base_images))))


def signed_turn(angle: float, start: float) -> float:
    """The shorter way from `start` to `angle`, in degrees, -180 (included) to 180."""
    return (angle - start + 180.0) % 360.0 - 180.0


def sharpness(images: Tensor) -> Array:
    """Standard deviation of the Laplacian of each image, on grey 0..255: what ATHEC calls sharpness and HG-DPO reports as ATHEC.

    As `cv2.Laplacian(grey, CV_64F).std()`: grey = 0.299 R + 0.587 G + 0.114 B rounded to whole levels, kernel 0 1 0 / 1 -4 1 / 0 1 0,
    borders mirrored. It depends on the resolution, and noise raises it: a collapsed model scores highest in HG-DPO Table 2.

    Args:
        images: (B, 3, H, W) in [0, 1], at least 2 pixels a side.

    Returns:
        (B,), 0 or more, in grey levels.
    """
    grey = np.rint(np.tensordot(_pixels(images), [0.299, 0.587, 0.114], axes=(1, 0)) * 255)
    p = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    laplacian = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:] - 4 * grey
    return laplacian.std((1, 2))


def _pixels(images: Tensor) -> Array:
    check_images(images)
    return images.detach().cpu().double().numpy()


def _features(features: NDArray, name: str) -> Array:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name}: expected (n, D), found shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: image {int(np.argmin(np.isfinite(x).all(1)))} has a value that is not finite")
    return x
