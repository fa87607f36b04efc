"""Images at the edges, against Pillow and hand calculation."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from PIL import Image

from limner import images as I


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(width: int, height: int) -> Image.Image:
    """Soft blobs, so that resampling filters agree but for rounding."""
    return Image.fromarray(noise(7, 9, 3)).resize((width, height), Image.Resampling.BICUBIC)


# The contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_check_passes_the_contract(dtype: torch.dtype) -> None:
    I.check_images(torch.tensor([0.0, 0.5, 1.0], dtype=dtype).view(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 2, 2), 1.0).index_fill(3, torch.tensor([0]), -0.98), "images lie in [-0.98, 1]; expected [0, 1]"),
        (torch.full((1, 3, 2, 2), 255.0), "images lie in [255, 255]; expected [0, 1]"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "images are uint8; expected floating point in [0, 1]"),
        (torch.zeros(3, 2, 2), "images have shape (3, 2, 2); expected (B, 3, H, W)"),
        (torch.zeros(1, 2, 2, 3), "images have shape (1, 2, 2, 3); expected (B, 3, H, W)"),
        (torch.zeros(0, 3, 2, 2), "images have shape (0, 3, 2, 2)"),
        (torch.full((1, 3, 2, 2), torch.nan), "not finite"),
        (torch.full((1, 3, 2, 2), torch.inf), "not finite"),
    ],
)
def test_check_names_what_is_wrong(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        I.check_images(images)


def test_one_nan_among_many_is_found() -> None:
    images = torch.rand(2, 3, 8, 8)
    images[1, 2, 7, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        I.check_images(images)


# Decoding


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(form: str) -> None:
    pixels = noise(5, 4, 3)
    image = I.decode(encoded(Image.fromarray(pixels), form, lossless=True))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_transparency_goes_over_white() -> None:
    # over white: colour * a + 255 * (1 - a); with a = 51/255 = 0.2: 200 * .2 + 255 * .8 = 244, 0 -> 204, 100 -> 224
    rgba = Image.new("RGBA", (3, 1), (200, 0, 100, 51))
    rgba.putpixel((0, 0), (200, 0, 100, 0))
    rgba.putpixel((1, 0), (200, 0, 100, 255))
    image = I.decode(encoded(rgba))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (200, 0, 100), (244, 204, 224)]
    grey = I.decode(encoded(Image.new("LA", (1, 1), (100, 51))))
    assert grey.getpixel((0, 0)) == (224, 224, 224)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palette_with_and_without_a_transparent_colour(form: str) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    plain = I.decode(encoded(palette, form))
    assert [plain.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (200, 100, 50)]
    holed = I.decode(encoded(palette, form, transparency=0))
    assert [holed.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_one_transparent_colour_without_a_palette(mode: str) -> None:
    black: Any = (0, 0, 0) if mode == "RGB" else 0
    image = I.decode(encoded(Image.new(mode, (1, 1), black), transparency=black))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_bilevel_become_rgb() -> None:
    assert I.decode(encoded(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert I.decode(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 77 * 257, 0xFFFF, 0x80FF]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        image = I.decode(encoded(Image.fromarray(values), form))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 77, 255, 0x80]


def test_cmyk_is_converted() -> None:
    # ink (c, m, y, k) = (0, 255, 255, 0) is red, full black is black
    for ink, colour in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))):
        image = I.decode(encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100))
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 3
        assert I.decode(encoded(Image.new("CMYK", (8, 8), ink), "TIFF")).getpixel((4, 4)) == colour


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int) -> None:
    # EXIF: where row 0 and column 0 of what is stored lie in the upright image
    upright = noise(3, 2, 3)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.asarray(I.decode(data)), upright)
    assert I.image_size(data) == (2, 3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert I.decode(data).getpixel((1, 1)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(smooth(64, 64), "JPEG")[:-300],
        encoded(smooth(64, 64))[:-300],
        encoded(smooth(64, 64), "WEBP")[:-300],
        encoded(smooth(64, 64), "GIF")[:-300],
        png_header(8, 8),
        png_header(60_000, 60_000),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "cut webp", "cut gif", "header only", "bomb"],
)
def test_unreadable_names_the_image(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"photos/7\.jpg: not a readable image \(.+\)"):
        I.decode(data, "photos/7.jpg")


def test_a_bomb_is_seen_in_the_header() -> None:
    with pytest.raises(ValueError, match=r"row 3: not a readable image \(.*3600000000 pixels"):
        I.image_size(png_header(60_000, 60_000), "row 3")
    assert I.image_size(png_header(600, 400)) == (600, 400)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1: .*floating-point"):
        I.decode(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "row 1")


@given(st.binary(max_size=60))
@settings(max_examples=50, deadline=None)
def test_damaged_bytes_never_raise_anything_else(tail: bytes) -> None:
    whole = encoded(Image.fromarray(noise(8, 8, 3)))
    for data in (tail, whole[:40] + tail, whole[: len(whole) // 2] + tail):
        try:
            assert I.decode(data, "x").mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("x: not a readable image")  # noqa: PT017 (either outcome is right)


# Tensors


def test_to_tensor_lays_out_channels_first() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 51))
    image.putpixel((1, 0), (0, 102, 255))
    assert torch.equal(I.to_tensor(image), torch.tensor([[[1.0, 0.0]], [[0.0, 0.4]], [[0.2, 1.0]]]))
    assert I.to_tensor([image, image]).shape == (2, 3, 1, 2)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([], "no images"),
        ([Image.new("L", (2, 2))], "image 0 has mode L; expected RGB"),
        ([Image.new("RGB", (2, 3)), Image.new("RGB", (4, 5))], "image 1 is 4x5, image 0 2x3"),
    ],
)
def test_to_tensor_refuses(sequence: list[Image.Image], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        I.to_tensor(sequence)


def test_decode_batch_names_the_position() -> None:
    with pytest.raises(ValueError, match="image 1: not a readable"):
        I.decode_batch([encoded(smooth(8, 8)), b"?"])


def test_to_uint8_rounds() -> None:
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 99.4 / 255, 99.6 / 255, 1.0])
    got = I.to_uint8(values.view(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert got.shape == (1, 1, 6, 3)
    assert got[0, 0, :, 0].tolist() == [0, 0, 1, 99, 100, 255]
    with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
        I.to_uint8(values.view(1, 1, 1, 6).expand(1, 3, 1, 6) * 2)


@given(st_np.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.just(3))))
@settings(max_examples=40, deadline=None)
def test_eight_bits_survive_encoding(pixels: np.ndarray) -> None:
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    files = I.encode_batch(tensor)
    assert [np.array_equal(np.asarray(Image.open(io.BytesIO(f))), p) for f, p in zip(files, pixels, strict=True)] == [True] * len(pixels)
    assert torch.equal(I.decode_batch(files), tensor)
    assert I.encode_png(tensor[0]) == files[0]


def test_all_eight_bit_values_survive() -> None:
    values = (torch.arange(256) / 255).view(1, 16, 16).expand(3, 16, 16)
    assert torch.equal(I.decode_batch([I.encode_png(values)])[0], values)


def test_encoding_takes_gradients_and_half_precision() -> None:
    image = torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert I.decode(I.encode_png(image)).getpixel((0, 0)) == (128, 128, 128)
