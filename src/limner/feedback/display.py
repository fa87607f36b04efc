"""Images as raters see them: checked, upright, at most 4096 pixels a side, in files named by their hash.

What browsers show alike stays as it is, byte for byte: raters judge artifacts, and coding an image again would make some.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags
from PIL import Image as PillowImage

from limner.images import decode
from limner.store import write_atomic

LARGEST = 4096  # pixels of a side
PLAIN = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Shown:
    """An image's file, by hash; its media type and pixels."""

    digest: str
    media: str
    width: int
    height: int


def store_image(folder: Path, data: bytes, where: str) -> Shown:
    """Put an image into the folder, unless it is there.

    Raises:
        ValueError: it cannot be decoded (truncated, a decompression bomb ...); names `where`.
    """
    picture = decode(data, where)
    media = _plain_media(data)
    if media is None or max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data, media = buffer.getvalue(), "image/png"
    digest = hashlib.sha256(data).hexdigest()
    path = image_file(folder, digest)
    if not path.is_file():
        write_atomic(path, data)
    return Shown(digest, media, *picture.size)


def image_file(folder: Path, digest: str) -> Path:
    """Where an image of this hash lies."""
    return folder / digest[:2] / digest


def _plain_media(data: bytes) -> str | None:
    """The media type if every browser shows these bytes as `decode` does; else None."""
    with PillowImage.open(io.BytesIO(data)) as image:
        plain = image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1 and not image.has_transparency_data
        upright = PillowImage.Image.getexif(image).get(ExifTags.Base.Orientation, 1) == 1
        profile = "icc_profile" in image.info
        return PLAIN.get(image.format or "") if plain and upright and not profile else None
