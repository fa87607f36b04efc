"""LoRA on a diffusers UNet, through peft: add, switch, scale, copy, fold into the weights, merge.

One network serves as policy and reference: `adapter_off` gives the base model, `adapter_as` another adapter such as the frozen
copy of the stage before. peft's own switches also set `requires_grad` and re-enable it on adapters that were frozen (peft issue 3447);
the ones here leave it alone. Switch before a forward pass, not between it and its backward: with gradient checkpointing the
backward pass runs the forward again, with whatever is switched on then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from limner.recipe import BLOCKS

Flags = list[tuple[nn.Parameter, bool]]


def add_lora(
    unet: UNet2DConditionModel,
    name: str,
    *,
    rank: int,
    alpha: int = 0,
    layers: Literal["attention", "all"] = "attention",
    blocks: Sequence[str] = ("all",),
    seed: int = 0,
) -> list[nn.Parameter]:
    """Put a LoRA on layers of the network and make it the active adapter.

    A is normal with deviation 1 / rank, as diffusers' training scripts have it, drawn from a generator of its own; B is zero, so
    the output is unchanged. Everything else in the network is frozen.

    Args:
        alpha: the update is alpha / rank * B A; 0 = rank.
        layers: attention: every linear layer of the self- and cross-attentions (to_q, to_k, to_v, to_out.0), as HG-DPO has it.
            all: every linear layer and convolution of the blocks.
        blocks: all, down, mid, up.

    Returns:
        Its parameters, float32 whatever the network computes in: A (rank, in) and B (out, rank) a linear layer,
        A (rank, in, height, width) and B (out, rank, 1, 1) a convolution.

    Raises:
        ValueError: an unknown block, a rank below 1, a name in use, no such layers in these blocks. All functions here: no such adapter.
    """
    _check_blocks(blocks)
    if rank < 1:
        raise ValueError(f"rank: {rank}; expected at least 1")
    found = _attention_linears(unet) if layers == "attention" else _block_layers(unet)
    targets = [n for n in found if _in_blocks(n, blocks)]
    if not targets:
        raise ValueError(f"blocks: the UNet has no {'attention' if layers == 'attention' else 'layers'} in {', '.join(blocks)}")
    inject(unet, name, targets, rank, alpha or rank)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in _named(unet, name).items():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / rank if ".lora_A." in key else torch.zeros(weight.shape))
    unet.requires_grad_(False)
    parameters = adapter_parameters(unet, name)
    for p in parameters:
        p.requires_grad_(True)
    return parameters


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> list[nn.Parameter]:
    """A and B of each layer, in the network's order."""
    return list(_named(unet, name).values())


def adapter_state(unet: UNet2DConditionModel, name: str) -> dict[str, Tensor]:
    """A copy of an adapter's weights, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, shaped as `add_lora` says."""
    return {key: weight.detach().clone() for key, weight in _named(unet, name).items()}


def load_adapter_state(unet: UNet2DConditionModel, name: str, state: Mapping[str, Tensor]) -> None:
    """Put weights from `adapter_state` into an adapter that is there already.

    Raises:
        ValueError: the state has other layers or shapes; names the first that differs.
    """
    own = _named(unet, name)
    for key in sorted(own.keys() | state.keys()):
        wanted, found = (tuple(d[key].shape) if key in d else None for d in (own, state))
        if wanted != found:
            raise ValueError(
                f"adapter {name!r} does not fit the saved state: {key} is {wanted or 'absent'} here and {found or 'absent'} there"
            )
    for key, weight in own.items():
        weight.data.copy_(state[key])


@contextmanager
def adapter_off(unet: UNet2DConditionModel) -> Iterator[None]:
    """The base network inside the block, bit for bit. Does nothing where there is no adapter."""
    with _kept(unet) as (layers, flags):
        for layer in layers:
            layer.enable_adapters(False)
        _restore_flags(flags)
        yield


@contextmanager
def adapter_as(unet: UNet2DConditionModel, name: str) -> Iterator[None]:
    """Only the adapter `name` acts inside the block."""
    layers_of(unet, name)
    with _kept(unet) as (layers, flags):
        for layer in layers:
            layer.set_adapter([name])
            layer.enable_adapters(True)
        _restore_flags(flags)
        yield


def set_adapter_scale(unet: UNet2DConditionModel, name: str, scale: float, blocks: Sequence[str] = ("all",)) -> None:
    """Let an adapter act with `scale` times its trained strength in the given blocks, and not at all elsewhere.

    HG-DPO generates with scale 0.5, and for the hard stage in the up blocks only. It stays until set again; weights are not changed.
    """
    _check_blocks(blocks)
    for n, layer in layers_of(unet, name).items():
        layer.set_scale(name, scale if _in_blocks(n, blocks) else 0.0)


def copy_adapter(unet: UNet2DConditionModel, source: str, target: str) -> None:
    """Make a frozen, inactive copy of an adapter, e.g. as the reference while `source` is trained on."""
    layers = layers_of(unet, source)
    first = next(iter(layers.values()))
    with _kept(unet):
        inject(unet, target, list(layers), first.r[source], first.lora_alpha[source])
    load_adapter_state(unet, target, adapter_state(unet, source))
    for layer in layers.values():
        layer.scaling[target] = layer.scaling[source]
    for p in adapter_parameters(unet, target):
        p.requires_grad_(False)


def fuse_adapter(unet: UNet2DConditionModel, name: str) -> None:
    """Draw faster: base weights take up the adapter at the scale that it has now, until `remove_adapters` puts them back bit for bit.

    Only where the network computes in float32: half precision would round small updates away, and goes on with the adapter beside it.
    Until then `adapter_off` is the base with the adapter. The weights proper wait in main memory.

    Raises:
        ValueError: an adapter is fused already.
    """
    layers = layers_of(unet, name).values()
    if any(hasattr(m, "unfused") for m in unet.modules()):
        raise ValueError(f"adapter {name!r}: one is fused already; remove_adapters first")
    for layer in layers:
        weight = layer.get_base_layer().weight
        if weight.dtype == torch.float32:
            if layer.scaling[name]:
                layer.unfused, weight.data = weight.data.cpu(), _with_update(layer, name)
            _deactivate(layer, name)


def _with_update(layer: LoraLayer, name: str) -> Tensor:
    """A layer's base weights and the adapter's update at the scale that it has now, in float32."""
    return layer.get_base_layer().weight.data.float() + layer.get_delta_weight(name).float()


def _deactivate(layer: LoraLayer, name: str) -> None:
    layer.set_adapter([a for a in layer.active_adapters if a != name])


def remove_adapters(unet: UNet2DConditionModel) -> None:
    """Take every adapter off for good; the network is what it was before any."""
    for layer in (m for m in unet.modules() if isinstance(m, LoraLayer) and hasattr(m, "unfused")):
        weight = layer.get_base_layer().weight
        weight.data = layer.unfused.to(weight.device)
    if getattr(unet, "peft_config", None):
        unet.unload_lora()
    unet.requires_grad_(False)


def merge_adapter(unet: UNet2DConditionModel, name: str) -> None:
    """Add an adapter, at the scale that it has now, to the base weights and remove it. `adapter_off` then means the merged network.

    The sum is made in float32 and rounded to the base weights' type.
    """
    flags = [(p, p.requires_grad) for p in unet.parameters()]
    for layer in layers_of(unet, name).values():
        weight = layer.get_base_layer().weight
        weight.data.copy_(_with_update(layer, name))
        _deactivate(layer, name)  # deleting an active adapter would make peft activate another one
    if len(unet.peft_config) > 1:
        unet.delete_adapters(name)
    else:
        unet.unload_lora()
    _restore_flags(flags)


def inject(unet: UNet2DConditionModel, name: str, targets: list[str], rank: int, alpha: int) -> None:
    """Add an adapter and make it active; its weights are to be set by the caller."""
    if name in getattr(unet, "peft_config", {}):
        raise ValueError(f"adapter {name!r} is there already")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws initial weights, which are replaced
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), name)
    for p in adapter_parameters(unet, name):
        p.data = p.data.float()  # peft takes the base weights' type


def _attention_linears(unet: UNet2DConditionModel) -> list[str]:
    attentions = [n for n, m in unet.named_modules() if isinstance(m, Attention)]
    return [n for n in _block_layers(unet) if any(n.startswith(f"{at}.") for at in attentions)]


def _block_layers(unet: UNet2DConditionModel) -> list[str]:
    """Linear layers and convolutions of the down, mid and up blocks, in the network's order."""
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | LoraLayer) and "_block" in n.split(".")[0]]
    return [n for n in names if ".lora_" not in n and not n.endswith(".base_layer")]  # inner parts of earlier adapters


def layers_of(unet: UNet2DConditionModel, name: str) -> dict[str, LoraLayer]:
    """The layers that an adapter acts on, by their names, in the network's order."""
    found = {n: m for n, m in unet.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    if not found:
        raise ValueError(f"no adapter {name!r}; there are: {', '.join(getattr(unet, 'peft_config', {})) or 'none'}")
    return found


def _named(unet: UNet2DConditionModel, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names of its state."""
    layers = layers_of(unet, name).items()
    return {f"{n}.lora_{side}.weight": part[name].weight for n, m in layers for side, part in (("A", m.lora_A), ("B", m.lora_B))}


def _check_blocks(blocks: Sequence[str]) -> None:
    if not blocks or (unknown := [b for b in blocks if b not in BLOCKS]):
        raise ValueError(f"blocks: {', '.join(map(repr, unknown)) if blocks else 'empty'}; expected some of {', '.join(BLOCKS)}")


def _in_blocks(layer: str, blocks: Sequence[str]) -> bool:
    """down_blocks.0... is in down, mid_block... in mid."""
    return "all" in blocks or layer.split("_block")[0] in blocks


@contextmanager
def _kept(unet: UNet2DConditionModel) -> Iterator[tuple[list[LoraLayer], Flags]]:
    """Which adapters act, and what requires gradients, is afterwards as it was before."""
    before = [(m, list(m.active_adapters), m.disable_adapters) for m in unet.modules() if isinstance(m, LoraLayer)]
    flags = [(p, p.requires_grad) for layer, _, _ in before for p in layer.parameters()]
    try:
        yield [layer for layer, _, _ in before], flags
    finally:
        for layer, active, off in before:
            layer.set_adapter(active)
            layer.enable_adapters(not off)
        _restore_flags(flags)


def _restore_flags(flags: Flags) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
