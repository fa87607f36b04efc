"""The files of a LoRA: in diffusers' naming, which Limner reads again, and in kohya's for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from limner.models.lora import adapter_parameters, adapter_state, inject, layers_of, load_adapter_state
from limner.store import write_atomic

WEIGHTS, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


def save_lora(folder: Path, unet: UNet2DConditionModel, name: str, *, metadata: Mapping[str, str]) -> None:
    """Write the adapter for others, at its trained strength, in the two namings in use; each file is there whole or not at all.

    `pytorch_lora_weights.safetensors` is what `pipe.load_lora_weights(folder)` reads; alpha lies in its header, which diffusers
    reads since 0.35 (older ones take alpha = rank). `kohya.safetensors` is for ComfyUI and other programs, and for
    `pipe.load_lora_weights(folder, weight_name="kohya.safetensors")`.

    Args:
        metadata: goes into the headers of both.
    """
    layers = layers_of(unet, name)
    first = next(iter(layers.values()))
    rank, alpha = first.r[name], first.lora_alpha[name]
    state = {k: v.float().cpu().contiguous() for k, v in adapter_state(unet, name).items()}
    config = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": sorted(layers)}
    header = {**metadata, "format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True)}
    write_atomic(folder / WEIGHTS, _file_bytes({f"unet.{k}": v for k, v in state.items()}, header))
    kohya: dict[str, Tensor] = {}
    for n in layers:
        key = f"lora_unet_{n.replace('.', '_')}"
        kohya[f"{key}.lora_down.weight"] = state[f"{n}.lora_A.weight"]
        kohya[f"{key}.lora_up.weight"] = state[f"{n}.lora_B.weight"]
        kohya[f"{key}.alpha"] = torch.tensor(float(alpha))
    header = {**metadata, "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(alpha))}
    write_atomic(folder / KOHYA, _file_bytes(kohya, header))


def _file_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file with sorted metadata: the library writes it in a random order, and equal weights should give equal bytes."""
    data = save(dict(tensors), dict(header))
    size = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + size])
    text = json.dumps({**fields, "__metadata__": dict(sorted(header.items()))}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_lora(unet: UNet2DConditionModel, path: Path, name: str) -> list[nn.Parameter]:
    """Read `pytorch_lora_weights.safetensors` (the file, or its folder) into a new adapter, active and frozen.

    To train it on, set `requires_grad_(True)` on what is returned.

    Raises:
        ValueError: no such file, damaged, not a UNet LoRA, or made for another model (with the first key that differs).
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no {WEIGHTS} there")
    try:
        with safe_open(file, framework="pt") as f:
            header, tensors = f.metadata() or {}, {k: f.get_tensor(k) for k in sorted(f.keys())}
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error})") from error
    rank = _check_fits(unet, tensors, file)
    config = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    alpha = config.get("unet.lora_alpha", rank)
    inject(unet, name, sorted({k.removeprefix("unet.").split(".lora_")[0] for k in tensors}), rank, alpha)
    load_adapter_state(unet, name, {k.removeprefix("unet."): v for k, v in tensors.items()})
    parameters = adapter_parameters(unet, name)
    for p in parameters:
        p.requires_grad_(False)
    return parameters


def _check_fits(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], file: Path) -> int:
    """The rank of a LoRA file, if it fits the network."""
    modules, rank = dict(unet.named_modules()), 0
    for key, tensor in tensors.items():
        layer, _, side = key.removeprefix("unet.").partition(".lora_")
        if not key.startswith("unet.") or side not in ("A.weight", "B.weight"):
            raise ValueError(f"{file}: {key} is not a LoRA weight of a UNet in diffusers' naming (unet.<layer>.lora_A.weight)")
        found, down = tuple(tensor.shape), side == "A.weight"
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None or weight.ndim < 2:
            raise ValueError(f"{file}: the LoRA is for another model: {key} has shape {found}, this model has no layer {layer}")
        rank = rank or tensor.shape[0 if down else 1]
        kernel = tuple(weight.shape[2:])  # of a convolution
        wanted = (rank, weight.shape[1], *kernel) if down else (weight.shape[0], rank, *(1 for _ in kernel))
        if found != wanted:
            raise ValueError(f"{file}: the LoRA is for another model: {key} has shape {found}, this model needs {wanted}")
    if not rank:
        raise ValueError(f"{file}: holds no weights")
    return rank
