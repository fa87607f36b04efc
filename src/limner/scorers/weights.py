"""Files of published weights: read as tensors only, their names and shapes compared with what is expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SHOWN = 4  # mismatched keys of a sort that a message lists


def from_hub(address: str, where: str) -> Path:
    """What `hub:owner/name`, `hub:owner/name@revision` or `hub:owner/name/file` names, fetched from the model hub: only if so asked.

    Raises:
        ValueError: not of that form; not there; no network.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.+))?", address)
    if not found:
        raise ValueError(f"{where}: {address}; expected hub:owner/name, with @revision or /file behind it")
    repository, revision, file = found.groups()
    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # the client's own kinds, and those of its HTTP library
        raise ValueError(f"{where}: {address} cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from error


def read_weights(path: Path, where: str, *, as_stored: bool = False) -> dict[str, Tensor]:
    """A checkpoint's tensors, in float32 on the CPU, out of its nesting (`state_dict`) and without `module.` before the names.

    Args:
        path: .safetensors, or a file of torch.save, which is read as weights only.
        where: what errors begin with, such as scorers.mine.path.
        as_stored: of its own type instead of float32: for weights that would not fit.

    Raises:
        ValueError: there is no such file; it is corrupt; it holds objects that would run code; it holds no tensors.
    """
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {path}")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler raises a dozen types
        raise ValueError(f"{where}: {path} {_unreadable(error)}") from error
    return tensors_of(found, f"{where}: {path}", as_stored=as_stored)


def _unreadable(error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        return (
            "is a TorchScript program, and only tensors are read. "
            "Where you trust the file, write torch.jit.load(file, 'cpu').state_dict() with torch.save; or give a CLIPModel folder"
        )
    if code := re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", text) if "Weights only" in text else None:
        return (
            f"holds a pickled object ({code[1]}), and reading it would run code; only tensors are read. "
            "Where you trust the file, load it there and write its state_dict() with torch.save"
        )
    text = text or "it ends early"
    return f"cannot be read as weights; is it corrupt, or a download cut off? ({type(error).__name__}: {text.splitlines()[0][:200]})"


def tensors_of(found: Any, where: str, *, as_stored: bool = False) -> dict[str, Tensor]:
    """The tensors of what a file held: see `read_weights`.

    Raises:
        ValueError: there are none.
    """
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    pairs = found.items() if isinstance(found, Mapping) else ()
    tensors = {str(k).removeprefix("module."): v for k, v in pairs if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{where} holds no tensors by name; expected a state_dict")
    return {k: v if as_stored or not v.is_floating_point() else v.float() for k, v in tensors.items()}


def compare(weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check names and shapes.

    Raises:
        ValueError: lists the first keys that are missing, unexpected or of another shape, with shapes.
    """
    wrong = [
        f"{key} is {shape_text(weights[key])} instead of {shape_text(shape)}" if key in weights else f"{key} {shape_text(shape)} is missing"
        for key, shape in expected.items()
        if key not in weights or tuple(weights[key].shape) != shape
    ]
    extra = [f"{key} {shape_text(value)} is unexpected" for key, value in weights.items() if key not in expected]
    if wrong or extra:
        shown = [*wrong[:SHOWN], *extra[:SHOWN]]
        more = len(wrong) + len(extra) - len(shown)
        raise ValueError(f"{where}: {'; '.join(shown)}{f'; and {more} more' if more else ''}")


def shape_text(value: Tensor | tuple[int, ...]) -> str:
    return "x".join(map(str, value.shape if isinstance(value, Tensor) else value)) or "scalar"
