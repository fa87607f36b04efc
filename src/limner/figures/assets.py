"""Where the shipped parts of the embedded world lie."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")


def find(name: str, data: Path | None = None) -> Path:
    """`figures` names in recipes to files: base, preference, judge, reader, rater_reader, train, validation, test.

    Args:
        data: where the parts lie, if not in the package.

    Raises:
        ValueError: it is not there; says how to make it.
    """
    path = (data or DATA) / (f"{name}.parquet" if name in SPLITS else name)
    if not path.exists():
        raise ValueError(
            f"the embedded {name!r} is not in this checkout ({path.name}); make it with `limner figures make` (hours on a CPU)"
        )
    return path
