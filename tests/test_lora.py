"""LoRA: switching is exact, gradients stay inside, scales and merges are what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from limner.models.frozen import forget_inputs
from limner.models.lora import (
    adapter_as,
    adapter_off,
    adapter_parameters,
    adapter_state,
    add_lora,
    copy_adapter,
    fuse_adapter,
    load_adapter_state,
    merge_adapter,
    remove_adapters,
    set_adapter_scale,
)
from tiny import predict, stir, tiny_pipeline

UNet = torch.nn.Module


@pytest.fixture
def unet() -> UNet:
    return tiny_pipeline().unet


@torch.no_grad()
def test_new_lora_changes_nothing_and_off_is_the_base_bit_for_bit(unet: UNet) -> None:
    before = predict(unet)
    add_lora(unet, "learner", rank=4)
    assert torch.equal(predict(unet), before)
    stir(unet, "learner")
    assert (predict(unet) - before).abs().max() > 1e-3
    with adapter_off(unet):
        assert torch.equal(predict(unet), before)
    assert (predict(unet) - before).abs().max() > 1e-3


# 2 attention blocks down and up (1 + 2 layers), 1 in the middle; 8 linears each.
# All: these, with proj_in, proj_out and two of the feed-forward each; 8 resnets (2 down, 2 in the middle, 4 up) of conv1, conv2 and
# time_emb_proj, of which 5 change the width and have a shortcut; one convolution to go down and one to go up.
@pytest.mark.parametrize(("layers", "number"), [("attention", 4 * 8), ("all", 4 * 12 + 8 * 3 + 5 + 2)])
def test_gradients_reach_the_adapter_only(unet: UNet, layers: Any, number: int) -> None:
    forget_inputs(unet)  # as in training
    parameters = add_lora(unet, "learner", rank=4, layers=layers)
    stir(unet, "learner")
    predict(unet).square().mean().backward()
    assert {id(p) for p in unet.parameters() if p.grad is not None} == {id(p) for p in parameters}
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    assert len(parameters) == number * 2


def test_init_follows_the_seed_and_not_the_process() -> None:
    states = []
    for seed, noise in ((3, 0), (3, 17), (4, 0)):
        unet = tiny_pipeline().unet
        torch.manual_seed(noise)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(noise))
        add_lora(unet, "x", rank=4, seed=seed)
        assert torch.rand(1) == expected  # and the process' state is left alone
        states.append(adapter_state(unet, "x"))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])
    assert all((v == 0).all() for k, v in states[0].items() if "lora_B" in k)


def test_adapter_stays_float32_in_a_half_network(unet: UNet) -> None:
    parameters = add_lora(unet.to(torch.bfloat16), "learner", rank=2)
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize(("blocks", "prefixes"), [(["up"], {"up_blocks"}), (["down", "mid"], {"down_blocks", "mid_block"})])
def test_blocks_restrict(unet: UNet, blocks: list[str], prefixes: set[str]) -> None:
    add_lora(unet, "learner", rank=2, blocks=blocks)
    assert {k.split(".")[0] for k in adapter_state(unet, "learner")} == prefixes


@pytest.mark.parametrize(("arguments", "message"), [({"blocks": ["top"]}, "'top'"), ({"blocks": []}, "empty"), ({"rank": 0}, "rank: 0")])
def test_wrong_arguments(unet: UNet, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(unet, "learner", **{"rank": 2, **arguments})


def test_name_in_use_and_unknown_name(unet: UNet) -> None:
    add_lora(unet, "learner", rank=2)
    with pytest.raises(ValueError, match="there already"):
        add_lora(unet, "learner", rank=2)
    with pytest.raises(ValueError, match="no adapter 'start'; there are: learner"), adapter_as(unet, "start"):
        pass


def switches(unet: UNet) -> list:
    layers = [(m.active_adapters, m.disable_adapters) for m in unet.modules() if hasattr(m, "active_adapters") and hasattr(m, "lora_A")]
    return [layers, {n: p.requires_grad for n, p in unet.named_parameters()}]


def test_switches_are_as_before_after_use_and_after_an_exception(unet: UNet) -> None:
    add_lora(unet, "learner", rank=2)
    copy_adapter(unet, "learner", "start")
    before = switches(unet)
    assert {n for n, flag in before[1].items() if flag} == {n for n, _ in unet.named_parameters() if ".learner." in n}
    for use in (lambda: adapter_off(unet), lambda: adapter_as(unet, "start")):
        with use():
            assert switches(unet)[1] == before[1]  # peft alone would let gradients into the frozen copy
        assert switches(unet) == before
        with pytest.raises(KeyboardInterrupt), use():
            raise KeyboardInterrupt
        assert switches(unet) == before
    with adapter_as(unet, "start"), adapter_off(unet):
        pass
    assert switches(unet) == before


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_frozen_copy_is_a_reference_that_does_not_move(unet: UNet, layers: Any) -> None:
    parameters = add_lora(unet, "learner", rank=2, alpha=1, layers=layers)
    stir(unet, "learner")
    copy_adapter(unet, "learner", "start")
    with torch.no_grad():
        start = predict(unet)
    optimizer = torch.optim.SGD(parameters, 1e-2)
    with torch.no_grad(), adapter_as(unet, "start"):
        assert torch.equal(predict(unet), start)
    predict(unet).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(predict(unet), start)
        with adapter_as(unet, "start"):
            assert torch.equal(predict(unet), start)


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_scale_is_that_of_b_and_acts_in_the_blocks_only(unet: UNet, layers: Any) -> None:
    add_lora(unet, "learner", rank=4, alpha=2, layers=layers)
    stir(unet, "learner")
    full, state = predict(unet), adapter_state(unet, "learner")
    for blocks in (("all",), ("up",)):
        set_adapter_scale(unet, "learner", 0.5, blocks)
        scaled = predict(unet)
        set_adapter_scale(unet, "learner", 1.0)
        by_hand = {k: v * (0.5 if blocks == ("all",) or k.startswith("up_") else 0.0) if "lora_B" in k else v for k, v in state.items()}
        load_adapter_state(unet, "learner", by_hand)
        assert torch.allclose(predict(unet), scaled, atol=1e-6)
        load_adapter_state(unet, "learner", state)
        assert torch.equal(predict(unet), full)


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_merge_keeps_the_output_and_a_new_adapter_goes_on_top(unet: UNet, layers: Any) -> None:
    names = list(unet.state_dict())
    add_lora(unet, "easy", rank=2, layers=layers)
    stir(unet, "easy")
    tuned = predict(unet)
    merge_adapter(unet, "easy")
    merged = predict(unet)
    assert torch.allclose(merged, tuned, atol=1e-5)
    assert list(unet.state_dict()) == names
    add_lora(unet, "normal", rank=2)
    assert torch.equal(predict(unet), merged)
    stir(unet, "normal")
    with adapter_off(unet):
        assert torch.equal(predict(unet), merged)


@torch.no_grad()
def test_merge_of_one_of_two(unet: UNet) -> None:
    add_lora(unet, "easy", rank=2)
    stir(unet, "easy")
    copy_adapter(unet, "easy", "start")
    tuned = predict(unet)
    merge_adapter(unet, "easy")
    assert torch.allclose(predict(unet), tuned, atol=1e-5)  # the copy was inactive and stays so
    assert not any(p.requires_grad for p in unet.parameters())
    assert len(adapter_parameters(unet, "start")) == 64


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_fused_draws_the_same_and_the_base_comes_back_bit_for_bit(unet: UNet, layers: Any) -> None:
    before, weights = predict(unet), {k: v.clone() for k, v in unet.state_dict().items()}
    add_lora(unet, "easy", rank=2, alpha=1, layers=layers)
    stir(unet, "easy")
    set_adapter_scale(unet, "easy", 0.5, ["up"])
    tuned = predict(unet)
    fuse_adapter(unet, "easy")
    load_adapter_state(unet, "easy", {k: torch.full_like(v, 9.0) for k, v in adapter_state(unet, "easy").items()})  # not asked any more
    assert torch.allclose(predict(unet), tuned, atol=1e-5)
    assert not torch.allclose(tuned, before, atol=1e-3)
    remove_adapters(unet)
    assert torch.equal(predict(unet), before)
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())


@torch.no_grad()
def test_one_adapter_is_fused_at_a_time_and_others_go_on(unet: UNet) -> None:
    add_lora(unet, "a", rank=2)
    stir(unet, "a")
    add_lora(unet, "b", rank=2)
    stir(unet, "b")
    alone = predict(unet)
    for layer in (m for m in unet.modules() if isinstance(m, LoraLayer)):
        layer.set_adapter(["a", "b"])
    both = predict(unet)
    fuse_adapter(unet, "a")
    assert torch.allclose(predict(unet), both, atol=1e-3)
    assert not torch.allclose(predict(unet), alone, atol=1e-1)
    with pytest.raises(ValueError, match="'b': one is fused already"):
        fuse_adapter(unet, "b")


@torch.no_grad()
def test_half_networks_are_not_fused() -> None:
    """An update below bf16's resolution of the weights would be lost."""
    unet = tiny_pipeline().unet.to(torch.bfloat16)
    weights = {k: v.clone() for k, v in unet.state_dict().items()}
    add_lora(unet, "easy", rank=2)
    stir(unet, "easy")
    fuse_adapter(unet, "easy")
    names = {k: k.replace(".base_layer", "") for k in unet.state_dict() if ".lora_" not in k}
    assert all(torch.equal(unet.state_dict()[k], weights[n]) for k, n in names.items())
    assert {tuple(m.active_adapters) for m in unet.modules() if isinstance(m, LoraLayer)} == {("easy",)}


def test_state_of_another_adapter_is_refused(unet: UNet) -> None:
    add_lora(unet, "a", rank=2)
    add_lora(unet, "b", rank=4)
    with pytest.raises(ValueError, match=r"lora_A.weight is \(4, 8\) here and \(2, 8\) there"):
        load_adapter_state(unet, "b", adapter_state(unet, "a"))
