"""Images at the edges: decode, resize, crop, encode; the image contract and its checker.

Inside Limner an image tensor is float in [0, 1], NCHW, RGB. Sizes are (width, height), as in Pillow, in every function here.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8  # that decode and resize at most
GAP = 2  # pixels between the tiles of a grid
LABEL = 13  # pixels of a label's line


def check_images(images: Tensor) -> None:
    """Check the image contract: floating point, (B, 3, H, W), not empty, finite, in [0, 1].

    Raises:
        ValueError: names the shape, type or range that was found.
    """
    if not images.is_floating_point():
        raise ValueError(f"images are {str(images.dtype).removeprefix('torch.')}; expected floating point in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W), RGB, not empty")
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("images hold values that are not finite (NaN or infinity); expected [0, 1]")
    if low < 0 or high > 1:
        raise ValueError(f"images lie in [{low:.6g}, {high:.6g}]; expected [0, 1]")


def decode(data: bytes, where: str = "image") -> Image.Image:
    """Encoded bytes to an RGB image, upright as its EXIF orientation says.

    Transparency is composited over white; of an animation it is the first frame; of 16 bits a channel the upper 8 are kept.
    Colour profiles are ignored.

    Args:
        data: a file's bytes, in any format that Pillow reads.
        where: what errors call the image (its file, row or id).

    Raises:
        ValueError: not an image, truncated, too many pixels (a decompression bomb), or floating-point pixels; names `where`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged bytes Pillow's readers raise a dozen types
        raise _unreadable(where, error) from error


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Work on every item, results in order: Pillow decodes and resizes without the interpreter's lock, so that all cores help."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1, THREADS)) as pool:
        return list(pool.map(work, items))


def image_size(data: bytes, where: str = "image") -> tuple[int, int]:
    """Width and height of what `decode` would give, from the file's header alone.

    Raises:
        ValueError: not an image, or too many pixels; names `where`. Damage behind the header goes unseen.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            exif = Image.Image.getexif(image)  # the base class's: that of PNG decodes the pixels
            turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)  # by 90 degrees
            return (image.height, image.width) if turned else (image.width, image.height)
    except Exception as error:  # as above
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> ValueError:
    why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"{where}: not a readable image ({why})")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255; of 16-bit RGB it keeps the upper byte, so do the same
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32 bits a channel; expected 8 or 16")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels; expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image | Sequence[Image.Image]) -> Tensor:
    """One RGB image to (3, H, W), or several of one size to (B, 3, H, W); float32 in [0, 1].

    Raises:
        ValueError: no image, one that is not RGB, or sizes that differ.
    """
    images = [image] if isinstance(image, Image.Image) else list(image)
    if not images:
        raise ValueError("no images to make a tensor of")
    for i, each in enumerate(images):
        if each.mode != "RGB":
            raise ValueError(f"image {i} has mode {each.mode}; expected RGB")
        if each.size != images[0].size:
            raise ValueError(f"image {i} is {_by(each.size)}, image 0 {_by(images[0].size)}; the images of a batch need one size")
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in images]))
    batch = pixels.permute(0, 3, 1, 2).contiguous().float() / 255
    return batch[0] if isinstance(image, Image.Image) else batch


def decode_batch(data: Sequence[bytes]) -> Tensor:
    """Encoded images of one size to (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: as `decode` and `to_tensor`, naming the position in the batch.
    """
    return to_tensor([decode(each, f"image {i}") for i, each in enumerate(data)])


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, rounded to the nearest.

    Raises:
        ValueError: as `check_images`.
    """
    check_images(images)
    pixels = (images.detach().float() * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode_png(image: Tensor) -> bytes:
    """One image (3, H, W) in [0, 1] to PNG; equal pixels give equal bytes. Values that came from 8 bits come back exactly.

    Raises:
        ValueError: as `check_images`.
    """
    return encode_batch(image[None])[0]


def encode_batch(images: Tensor) -> list[bytes]:
    """Images (B, 3, H, W) in [0, 1] to B PNG files.

    Raises:
        ValueError: as `check_images`.
    """
    return [_png(Image.fromarray(pixels)) for pixels in to_uint8(images)]


def _png(image: Image.Image) -> bytes:
    # Run-length coding of PNG's filtered rows: half the time of Pillow's default and no larger on photos, where nothing repeats;
    # up to half as large again on flat drawings.
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def fit_to(
    image: Image.Image,
    width: int,
    height: int,
    crop: Literal["center", "random", "none"] = "center",
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """Resize (antialiased, Lanczos) so that the image covers width x height, and crop what is over.

    Args:
        image: any size.
        width: pixels of the result.
        height: pixels of the result.
        crop: which part is kept: the middle, one drawn from `rng` (always two draws), or none: the image must have that size already.
        rng: for `random` only.

    Raises:
        ValueError: another size with `none`; `random` without rng; an unknown crop.
    """
    if crop == "none":
        if image.size != (width, height):
            raise ValueError(f"data.crop: none, but an image is {_by(image.size)} instead of {width}x{height}; set center or random")
        return image
    if crop == "center":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if crop != "random":
        raise ValueError(f"data.crop: {crop!r}; expected center, random or none")
    if rng is None:
        raise ValueError("crop random needs a generator")
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=(rng.random(), rng.random()))


def bucket_sizes(resolution: int, aspect_buckets: Sequence[float], multiple: int = 8) -> list[tuple[int, int]]:
    """The sizes (width, height) that images are sorted into: about resolution² pixels each, sides rounded to the nearest multiple.

    Args:
        resolution: pixels; side of the square bucket.
        aspect_buckets: widths over heights; empty = one square. Those that round to one size make one bucket.
        multiple: of pixels, that the model needs sides to be.

    Raises:
        ValueError: a resolution that is not a positive multiple, an aspect that is not positive and finite.
    """
    if resolution < multiple or resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(f"data.resolution: {resolution} is not a multiple of {multiple}; the nearest is {near}")
    for aspect in aspect_buckets:
        if not 0 < aspect < math.inf:
            raise ValueError(f"data.aspect_buckets: {aspect} is not a width over a height; expected e.g. 0.69")
    sides = [(resolution * math.sqrt(a), resolution / math.sqrt(a)) for a in aspect_buckets or [1.0]]
    sizes = [(max(multiple, round(w / multiple) * multiple), max(multiple, round(h / multiple) * multiple)) for w, h in sides]
    return list(dict.fromkeys(sizes))


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (width, height) whose aspect is nearest to that of `size`, in logarithms; of equally near ones the first.

    Raises:
        ValueError: no buckets.
    """
    if not buckets:
        raise ValueError("no buckets to choose from")
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect))


def resize_tensor(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W) in [0, 1] to a (width, height), or a square; antialiased bicubic, Pillow's to a rounding; differentiable.

    The result lies in [0, 1]; the gradient is that of the resize without the clamp, so saturated pixels (a white wall) keep theirs.
    """
    width, height = (size, size) if isinstance(size, int) else size
    resized = torch.nn.functional.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized + (resized.clamp(0, 1) - resized).detach()


def grid(images: Tensor, columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1] as one sheet, row by row on white, tiles 2 px apart.

    Args:
        images: the tiles.
        columns: tiles a row.
        labels: one a tile, written below it in a line of 13 px, cut at the tile's width.

    Raises:
        ValueError: as `check_images`; columns below 1; another number of labels than of images.
    """
    tiles = to_uint8(images)
    if columns < 1:
        raise ValueError(f"columns: {columns}; expected at least 1")
    if labels is not None and len(labels) != len(tiles):
        raise ValueError(f"{len(labels)} labels for {len(tiles)} images; expected one each")
    columns = min(columns, len(tiles))
    tile_width, tile_height = tiles.shape[2], tiles.shape[1]
    cell_width, cell_height = tile_width + GAP, tile_height + GAP + (LABEL if labels else 0)
    sheet = Image.new("RGB", (columns * cell_width - GAP, math.ceil(len(tiles) / columns) * cell_height - GAP), "white")
    for i, tile in enumerate(tiles):
        x, y = i % columns * cell_width, i // columns * cell_height
        sheet.paste(Image.fromarray(tile), (x, y))
        if labels:
            sheet.paste(_line(labels[i], tile_width), (x, y + tile_height))
    return sheet


def _line(text: str, width: int) -> Image.Image:
    line = Image.new("RGB", (width, LABEL), "white")
    ImageDraw.Draw(line).text((1, 1), " ".join(text.split()), fill="black", font=ImageFont.load_default(10))
    return line


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
