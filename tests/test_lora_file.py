"""LoRA files: plain diffusers loads both with identical output, Limner reads its own again, and others are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from limner.models.lora import add_lora, set_adapter_scale
from limner.models.lora_file import load_lora, save_lora
from tiny import predict, stir, tiny_pipeline

UNet = torch.nn.Module


@pytest.fixture
def unet() -> UNet:
    return tiny_pipeline().unet


@pytest.mark.parametrize("layers", ["attention", "all"])
@pytest.mark.parametrize("blocks", [("all",), ("up",)])
@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
@torch.no_grad()
def test_plain_diffusers_loads_both_files_with_identical_output(tmp_path: Path, file: str, blocks: tuple[str], layers: Any) -> None:
    pipe = tiny_pipeline()
    untouched = copy.deepcopy(pipe)
    add_lora(pipe.unet, "learner", rank=4, alpha=2, layers=layers, blocks=blocks)
    stir(pipe.unet, "learner")
    set_adapter_scale(pipe.unet, "learner", 0.5)  # of generation; what is saved is the trained strength
    save_lora(tmp_path, pipe.unet, "learner", metadata={"stage": "easy"})
    set_adapter_scale(pipe.unet, "learner", 1.0)
    named = {} if file.startswith("pytorch") else {"weight_name": file}
    untouched.load_lora_weights(tmp_path, **named)
    assert (predict(untouched.unet) - predict(pipe.unet)).abs().max() < 1e-6
    with safe_open(tmp_path / file, "pt") as f:
        assert f.metadata()["stage"] == "easy"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kohya.safetensors", "pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_own_round_trip(tmp_path: Path, unet: UNet, layers: Any) -> None:
    add_lora(unet, "learner", rank=4, alpha=2, layers=layers)
    stir(unet, "learner")
    save_lora(tmp_path, unet, "learner", metadata={})
    other = tiny_pipeline().unet
    parameters = load_lora(other, tmp_path, "mine")
    assert torch.equal(predict(other), predict(unet))
    assert not any(p.requires_grad for p in parameters)
    first = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    save_lora(tmp_path, other, "mine", metadata={})
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == first


def test_kohya_names(tmp_path: Path, unet: UNet) -> None:
    add_lora(unet, "learner", rank=4, alpha=2)
    save_lora(tmp_path, unet, "learner", metadata={})
    with safe_open(tmp_path / "kohya.safetensors", "pt") as f:
        at = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"
        assert {f"{at}to_q.lora_down.weight", f"{at}to_out_0.lora_up.weight", f"{at}to_q.alpha"} <= set(f.keys())
        assert f.get_tensor(f"{at}to_q.alpha") == 2


def test_lora_of_another_model_is_refused(tmp_path: Path, unet: UNet) -> None:
    wide = tiny_pipeline(widths=(16, 32)).unet
    add_lora(wide, "learner", rank=4)
    save_lora(tmp_path, wide, "learner", metadata={})
    with pytest.raises(ValueError, match=r"another model: unet\.\S+lora_A.weight has shape \(4, 16\), this model needs \(4, 8\)"):
        load_lora(unet, tmp_path, "x")
    assert not hasattr(unet, "peft_config")  # nothing was changed
    deep = tiny_pipeline(widths=(8, 8, 16)).unet
    add_lora(deep, "learner", rank=4)
    save_lora(tmp_path, deep, "learner", metadata={})
    with pytest.raises(ValueError, match=r"another model: .* this model has no layer down_blocks\.1"):
        load_lora(unet, tmp_path, "x")
    save_file({"unet.conv_norm_out.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "norm.safetensors")  # no layer that can have one
    with pytest.raises(ValueError, match=r"another model: .* this model has no layer conv_norm_out"):
        load_lora(unet, tmp_path / "norm.safetensors", "x")


def test_unreadable_lora_files(tmp_path: Path, unet: UNet) -> None:
    with pytest.raises(ValueError, match="no pytorch_lora_weights"):
        load_lora(unet, tmp_path, "x")
    add_lora(unet, "learner", rank=4)
    save_lora(tmp_path, unet, "learner", metadata={})
    with pytest.raises(ValueError, match="not a LoRA weight of a UNet in diffusers' naming"):
        load_lora(unet, tmp_path / "kohya.safetensors", "x")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_lora(unet, tmp_path, "x")
