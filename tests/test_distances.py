from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from scipy import linalg

from limner.evaluation.distances import (
    diversity,
    frechet,
    hue_shift,
    hue_vectors,
    mean_hue,
    principal_components,
    sharpness,
    signed_turn,
)


def test_frechet_is_the_formula_with_sqrtm() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 0.3
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    oracle = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet(a, b) == pytest.approx(oracle)
    assert frechet(b, a) == pytest.approx(oracle)


def test_frechet_of_diagonal_gaussians_has_a_closed_form() -> None:
    corners = np.array([[x, y] for x in (-1, 1) for y in (-1, 1)], dtype=float)  # covariance 4/3 I
    a, b = corners * [1, 2], corners * [3, 5] + [1, -2]
    assert frechet(a, b) == pytest.approx(1 + 4 + 4 / 3 * ((3 - 1) ** 2 + (5 - 2) ** 2))


def test_frechet_with_more_dimensions_than_images() -> None:
    a = np.random.default_rng(0).normal(size=(5, 20))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 1) == pytest.approx(20)


def test_frechet_refuses() -> None:
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 2\)"):
        frechet(x, x[:3])
    with pytest.raises(ValueError, match="features_b: image 2 has a value that is not finite"):
        frechet(x, np.where(np.arange(4)[:, None] == 2, np.nan, x))
    with pytest.raises(ValueError, match="at least 2"):
        frechet(x[:1], x[:1])


def test_principal_components_find_the_axes() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(500, 3)) * [1, 10, 0.1] + 7
    project = principal_components(reference, 2)
    assert np.abs(project.components) == pytest.approx(np.array([[0, 1, 0], [1, 0, 0]]), abs=0.05)
    assert project.components @ project.components.T == pytest.approx(np.eye(2), abs=1e-12)
    assert project(reference).mean(0) == pytest.approx(np.zeros(2), abs=1e-9)
    assert project(reference).std(0) == pytest.approx([10, 1], rel=0.1)
    with pytest.raises(ValueError, match="fitted on 3"):
        project(reference[:, :2])


def test_principal_components_refuse() -> None:
    with pytest.raises(ValueError, match="k = 65"):
        principal_components(np.zeros((100, 80)), 65)
    with pytest.raises(ValueError, match="10 images of 20 dimensions are too few for 10"):
        principal_components(np.zeros((10, 20)), 10)


def test_diversity_by_hand() -> None:
    square = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]  # four sides of 1, two diagonals of √2
    assert diversity(np.array([square, np.zeros((4, 2))])) == pytest.approx([(4 + 2 * 2**0.5) / 6, 0])
    with pytest.raises(ValueError, match="seeds >= 2"):
        diversity(np.zeros((3, 1, 2)))


def colour(degrees: float, saturation: float = 0.8, value: float = 0.9) -> torch.Tensor:
    return torch.tensor(colorsys.hsv_to_rgb(degrees / 360 % 1, saturation, value)).view(3, 1, 1)


def test_hue_is_that_of_colorsys() -> None:
    pixels = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    hues = np.array([2 * np.pi * colorsys.rgb_to_hsv(*p)[0] for p in pixels[0].reshape(3, -1).T.tolist()])
    assert hue_vectors(pixels) == pytest.approx(np.array([[np.cos(hues).mean(), np.sin(hues).mean()]]), abs=1e-6)
    assert hue_vectors(torch.full((1, 3, 2, 2), 0.5)) == pytest.approx(np.array([[1.0, 0.0]]))  # grey counts as 0°


def test_hue_shift_of_a_rotated_hue() -> None:
    def images(turn: float) -> torch.Tensor:
        return torch.stack(
            [torch.cat([colour(h + turn).expand(3, 4, 2), colour(h + 40 + turn).expand(3, 4, 2)], 2) for h in (330.0, 350.0)]
        )

    assert mean_hue(hue_vectors(images(0))) == pytest.approx(0, abs=1e-4) or mean_hue(hue_vectors(images(0))) == pytest.approx(
        360, abs=1e-4
    )
    for turn, shift in [(0, 0), (25, 25), (-25, 25), (170, 170), (200, 160)]:
        assert hue_shift(images(turn), images(0)) == pytest.approx(shift, abs=1e-4)


def test_hue_is_not_weighted_by_saturation() -> None:
    image = torch.cat([colour(100, 0.05), colour(140, 1.0)], 2)[None]
    assert mean_hue(hue_vectors(image)) == pytest.approx(120, abs=1e-4)


def test_signed_turn() -> None:
    assert [signed_turn(10, 350), signed_turn(350, 10), signed_turn(180, 0)] == [20, -20, -180]


def test_sharpness_of_known_images() -> None:
    flat = torch.full((3, 4, 4), 0.5)
    ramp = torch.arange(5.0).div(255).expand(3, 3, 5)  # mirrored borders: Laplacian +2 at the left end, -2 at the right, 0 between
    dot = torch.zeros(3, 5, 5)
    dot[:, 2, 2] = 1.0  # -4 · 255 at the dot, 255 at its four neighbours
    assert sharpness(torch.stack([flat])) == pytest.approx([0])
    assert sharpness(torch.stack([ramp])) == pytest.approx([np.sqrt(2 * 4 / 5)])
    assert sharpness(torch.stack([dot])) == pytest.approx([255 * np.sqrt((16 + 4) / 25)])
    green = torch.zeros(3, 5, 5)
    green[1, 2, 2] = 1.0  # grey 0.587 · 255 = 149.7, a whole level: 150
    assert sharpness(green[None]) == pytest.approx([150 * np.sqrt(20 / 25)])


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match="expected"):
        sharpness(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="255"):
        hue_vectors(torch.full((1, 3, 4, 4), 255.0))
