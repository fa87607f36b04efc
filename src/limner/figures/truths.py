"""What is known to be true of pictures to rate, as it is kept: JSON in a column `truth` of the pictures' table, or of one beside them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from limner.feedback.simulate import Truth


def read_truths(images: Path) -> dict[str, Truth]:
    """The truths that are known, by image id: of the table `images`, or of the table truth.parquet beside the folder `images`.

    Images of which none is known are left out; of others than figures to rate that is all.
    """
    path = images.parent / "truth.parquet" if images.is_dir() else images
    if path.suffix != ".parquet" or not path.is_file():
        return {}
    columns = pq.read_schema(path).names
    name = next((n for n in ("image_id", "id") if n in columns), "")
    if not name or "truth" not in columns:
        return {}
    rows = pq.read_table(path, columns=[name, "truth"]).to_pylist()
    return {str(row[name]): load_truth(row["truth"]) for row in rows if "artifact" in _values(row["truth"])}


def load_truth(text: str) -> Truth:
    """The truth that `dump_truth` wrote.

    Raises:
        ValueError: another truth: of a figure that was not made to be rated.
    """
    values = _values(text)
    if "artifact" not in values:
        raise ValueError(f"truth has {', '.join(values) or 'nothing'}; expected figures to rate (images.from: figures)")
    masks = {name: decode_array(base64.b64decode(values[name])) > 0 for name in ("artifact", "misalignment")}
    return Truth(**masks, words=tuple(values["words"]), qualities=values["qualities"])


def dump_truth(truth: Truth) -> str:
    """A truth as JSON; masks are PNG in base64."""
    masks = {}
    for name in ("artifact", "misalignment"):
        buffer = io.BytesIO()
        Image.fromarray(getattr(truth, name).astype(np.uint8) * 255).save(buffer, "PNG", optimize=True)
        masks[name] = base64.b64encode(buffer.getvalue()).decode()
    return json.dumps({**masks, "words": list(truth.words), "qualities": dict(truth.qualities)})


def decode_array(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an encoded image, (H, W) or (H, W, 3)."""
    return np.array(Image.open(io.BytesIO(data)))


def _values(text: Any) -> dict[str, Any]:
    """The object in a column `truth`; {} if there is none, or it is not ours."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}
