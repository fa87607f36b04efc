"""Images to sizes, against Pillow and hand calculation: fitting, buckets, tensor resize, grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from limner import images as I
from test_images import noise, smooth


def test_fit_covers_and_crops_the_middle() -> None:
    # left, middle and right third in red, lime, blue: of 12x4 a centred 4x4 is the lime third alone
    image = Image.new("RGB", (12, 4), "lime")
    image.paste("red", (0, 0, 4, 4))
    image.paste("blue", (8, 0, 12, 4))
    assert I.fit_to(image, 4, 4).getcolors() == [(16, (0, 255, 0))]
    assert I.fit_to(image, 24, 8).size == (24, 8)
    assert I.fit_to(image.transpose(Image.Transpose.ROTATE_90), 4, 4).getcolors() == [(16, (0, 255, 0))]


def test_fit_without_a_crop_is_pillows_resize() -> None:
    image = smooth(40, 30)
    expected = image.resize((20, 15), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(I.fit_to(image, 20, 15)), np.asarray(expected))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_fit_gives_the_size_and_keeps_one_that_fits(width: int, height: int, to_width: int, to_height: int, seed: int) -> None:
    image = Image.fromarray(noise(height, width, 3, seed=seed))
    for crop in ("center", "random"):
        assert I.fit_to(image, to_width, to_height, crop, np.random.default_rng(seed)).size == (to_width, to_height)
        same = I.fit_to(image, width, height, crop, np.random.default_rng(seed))
        assert np.array_equal(np.asarray(same), np.asarray(image))


def test_random_crops_follow_their_generator() -> None:
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (10, 1, 3)))  # the value is the column
    lefts = [np.asarray(I.fit_to(image, 10, 10, "random", np.random.default_rng(s)))[5, 5, 0] for s in range(60)]
    again = [np.asarray(I.fit_to(image, 10, 10, "random", np.random.default_rng(s)))[5, 5, 0] for s in range(60)]
    assert lefts == again
    assert min(lefts) < 40
    assert max(lefts) > 160
    rng = np.random.default_rng(5)
    I.fit_to(image, 10, 10, "random", rng)
    expected = np.random.default_rng(5)
    expected.random(2)
    assert rng.random() == expected.random()


def test_fit_refuses() -> None:
    image = smooth(20, 10)
    assert I.fit_to(image, 20, 10, "none") is image
    with pytest.raises(ValueError, match=r"data\.crop: none, but an image is 20x10 instead of 10x10"):
        I.fit_to(image, 10, 10, "none")
    with pytest.raises(ValueError, match="random needs a generator"):
        I.fit_to(image, 10, 10, "random")
    with pytest.raises(ValueError, match=r"data\.crop: 'middle'; expected center, random or none"):
        I.fit_to(image, 10, 10, "middle")  # type: ignore[arg-type]


def test_buckets_by_hand() -> None:
    assert I.bucket_sizes(64, []) == [(64, 64)]
    # 512 * sqrt(2/3) = 418.05 -> 416, 512 / sqrt(2/3) = 627.07 -> 624
    assert I.bucket_sizes(512, [2 / 3, 1.0, 1.5]) == [(416, 624), (512, 512), (624, 416)]
    assert I.bucket_sizes(512, [1.0, 1.01]) == [(512, 512)]
    assert I.bucket_sizes(64, [0.01], multiple=16) == [(16, 640)]


@given(st.integers(32, 160), st.lists(st.floats(0.4, 2.5), max_size=6))
def test_buckets_keep_area_and_aspect(eighths: int, aspects: list[float]) -> None:
    resolution = eighths * 8
    for width, height in I.bucket_sizes(resolution, aspects):
        assert width % 8 == height % 8 == 0
        assert abs(width * height / resolution**2 - 1) < 0.06
        assert min(abs(np.log(width / height / a)) for a in aspects or [1.0]) < 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, []), r"data\.resolution: 100 is not a multiple of 8; the nearest is 96"),
        ((0, []), r"data\.resolution: 0 is not a multiple of 8; the nearest is 8"),
        ((64, [1.0, 0.0]), r"data\.aspect_buckets: 0\.0 is not a width over a height"),
        ((64, [float("nan")]), r"data\.aspect_buckets: nan"),
        ((64, [float("inf")]), r"data\.aspect_buckets: inf"),
    ],
)
def test_buckets_refuse(arguments: tuple[int, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        I.bucket_sizes(*arguments)


def test_the_nearest_bucket_is_by_ratio() -> None:
    buckets = [(416, 624), (512, 512), (624, 416)]
    assert I.choose_bucket((3000, 2000), buckets) == (624, 416)
    assert I.choose_bucket((2000, 3000), buckets) == (416, 624)
    assert I.choose_bucket((1100, 1000), buckets) == (512, 512)
    # 1.45 lies between 1 and 2: nearer to 2 in logarithms (0.372 vs 0.322), nearer to 1 in plain numbers
    assert I.choose_bucket((145, 100), [(1, 1), (2, 1)]) == (2, 1)
    with pytest.raises(ValueError, match="no buckets"):
        I.choose_bucket((1, 1), [])


# Resizing tensors


@pytest.mark.parametrize("size", [(16, 12), (50, 70), (64, 48), 24])
def test_resize_is_pillows_bicubic(size: int | tuple[int, int]) -> None:
    image = smooth(64, 48)
    got = I.resize_tensor(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255, size)
    expected = np.asarray(image.resize((size, size) if isinstance(size, int) else size, Image.Resampling.BICUBIC))
    assert got.shape[2:] == expected.shape[:2]
    assert np.abs(got[0].permute(1, 2, 0).numpy() * 255 - expected).max() < 1.51  # Pillow rounds after each of two passes


def test_resize_stays_in_range_and_keeps_gradients_where_saturated() -> None:
    image = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float().requires_grad_()
    small = I.resize_tensor(image, 48)
    I.check_images(small)
    small.sum().backward()
    unclamped = torch.nn.functional.interpolate(torch.ones_like(image, requires_grad=True), (48, 48), mode="bicubic", antialias=True)
    assert image.grad is not None
    assert image.grad.sum() == pytest.approx(unclamped.sum().item(), rel=1e-4)  # weights of each output pixel add up to 1
    assert (image.grad != 0).all()


# Sample sheets


def test_grid_places_tiles_with_gaps() -> None:
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 6)  # a red, a lime and a blue tile of 6x4
    sheet = I.grid(colours, 2)
    assert sheet.size == (6 + 2 + 6, 4 + 2 + 4)
    assert [sheet.getpixel(p) for p in ((0, 0), (5, 3), (8, 0), (13, 3), (0, 6), (5, 9))] == [
        (255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255), (0, 0, 255),
    ]  # fmt: skip
    assert {sheet.getpixel(p) for p in ((6, 0), (7, 3), (0, 4), (0, 5), (8, 6), (13, 9))} == {(255, 255, 255)}
    assert I.grid(colours, 9).size == (3 * 6 + 2 * 2, 4)


def test_grid_writes_labels_inside_their_cells() -> None:
    black = torch.zeros(2, 3, 10, 30)
    sheet = np.asarray(I.grid(black, 2, ["a label far longer\nthan the tile", ""]))
    assert sheet.shape == (10 + 13, 30 + 2 + 30, 3)
    assert sheet[10:, :30].min() < 100  # ink
    assert (sheet[10:, 30:] == 255).all()  # none over the edge
    assert (sheet[:10, :30] == 0).all()


def test_grid_refuses() -> None:
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        I.grid(torch.zeros(2, 3, 4, 4), 2, ["a"])
    with pytest.raises(ValueError, match="columns: 0"):
        I.grid(torch.zeros(2, 3, 4, 4), 0)
