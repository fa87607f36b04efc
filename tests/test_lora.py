"""LoRA: switching is exact, gradients stay inside, files load in plain diffusers with identical output."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from limner.models.card import add_evaluation, write_card
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
    load_lora,
    merge_adapter,
    remove_adapters,
    save_lora,
    set_adapter_scale,
)
from tiny import tiny_pipeline

UNet = torch.nn.Module


@pytest.fixture
def unet() -> UNet:
    return tiny_pipeline().unet


def run(unet: UNet) -> Tensor:
    g = torch.Generator().manual_seed(5)
    noisy, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 16, 16, generator=g)
    return unet(noisy, torch.tensor([10, 900]), text, return_dict=False)[0]


def stir(unet: UNet, name: str) -> None:
    """B away from zero, as after training."""
    g = torch.Generator().manual_seed(1)
    load_adapter_state(unet, name, {k: torch.randn(v.shape, generator=g) / 2 for k, v in adapter_state(unet, name).items()})


@torch.no_grad()
def test_new_lora_changes_nothing_and_off_is_the_base_bit_for_bit(unet: UNet) -> None:
    before = run(unet)
    add_lora(unet, "learner", rank=4)
    assert torch.equal(run(unet), before)
    stir(unet, "learner")
    assert (run(unet) - before).abs().max() > 1e-3
    with adapter_off(unet):
        assert torch.equal(run(unet), before)
    assert (run(unet) - before).abs().max() > 1e-3


# 2 attention blocks down and up (1 + 2 layers), 1 in the middle; 8 linears each.
# All: these, with proj_in, proj_out and two of the feed-forward each; 8 resnets (2 down, 2 in the middle, 4 up) of conv1, conv2 and
# time_emb_proj, of which 5 change the width and have a shortcut; one convolution to go down and one to go up.
@pytest.mark.parametrize(("layers", "number"), [("attention", 4 * 8), ("all", 4 * 12 + 8 * 3 + 5 + 2)])
def test_gradients_reach_the_adapter_only(unet: UNet, layers: Any, number: int) -> None:
    forget_inputs(unet)  # as in training
    parameters = add_lora(unet, "learner", rank=4, layers=layers)
    stir(unet, "learner")
    run(unet).square().mean().backward()
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
        start = run(unet)
    optimizer = torch.optim.SGD(parameters, 1e-2)
    with torch.no_grad(), adapter_as(unet, "start"):
        assert torch.equal(run(unet), start)
    run(unet).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(run(unet), start)
        with adapter_as(unet, "start"):
            assert torch.equal(run(unet), start)


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_scale_is_that_of_b_and_acts_in_the_blocks_only(unet: UNet, layers: Any) -> None:
    add_lora(unet, "learner", rank=4, alpha=2, layers=layers)
    stir(unet, "learner")
    full, state = run(unet), adapter_state(unet, "learner")
    for blocks in (("all",), ("up",)):
        set_adapter_scale(unet, "learner", 0.5, blocks)
        scaled = run(unet)
        set_adapter_scale(unet, "learner", 1.0)
        by_hand = {k: v * (0.5 if blocks == ("all",) or k.startswith("up_") else 0.0) if "lora_B" in k else v for k, v in state.items()}
        load_adapter_state(unet, "learner", by_hand)
        assert torch.allclose(run(unet), scaled, atol=1e-6)
        load_adapter_state(unet, "learner", state)
        assert torch.equal(run(unet), full)


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_merge_keeps_the_output_and_a_new_adapter_goes_on_top(unet: UNet, layers: Any) -> None:
    names = list(unet.state_dict())
    add_lora(unet, "easy", rank=2, layers=layers)
    stir(unet, "easy")
    tuned = run(unet)
    merge_adapter(unet, "easy")
    merged = run(unet)
    assert torch.allclose(merged, tuned, atol=1e-5)
    assert list(unet.state_dict()) == names
    add_lora(unet, "normal", rank=2)
    assert torch.equal(run(unet), merged)
    stir(unet, "normal")
    with adapter_off(unet):
        assert torch.equal(run(unet), merged)


@torch.no_grad()
def test_merge_of_one_of_two(unet: UNet) -> None:
    add_lora(unet, "easy", rank=2)
    stir(unet, "easy")
    copy_adapter(unet, "easy", "start")
    tuned = run(unet)
    merge_adapter(unet, "easy")
    assert torch.allclose(run(unet), tuned, atol=1e-5)  # the copy was inactive and stays so
    assert not any(p.requires_grad for p in unet.parameters())
    assert len(adapter_parameters(unet, "start")) == 64


@pytest.mark.parametrize("layers", ["attention", "all"])
@torch.no_grad()
def test_fused_draws_the_same_and_the_base_comes_back_bit_for_bit(unet: UNet, layers: Any) -> None:
    before, weights = run(unet), {k: v.clone() for k, v in unet.state_dict().items()}
    add_lora(unet, "easy", rank=2, alpha=1, layers=layers)
    stir(unet, "easy")
    set_adapter_scale(unet, "easy", 0.5, ["up"])
    tuned = run(unet)
    fuse_adapter(unet, "easy")
    load_adapter_state(unet, "easy", {k: torch.full_like(v, 9.0) for k, v in adapter_state(unet, "easy").items()})  # not asked any more
    assert torch.allclose(run(unet), tuned, atol=1e-5)
    assert not torch.allclose(tuned, before, atol=1e-3)
    remove_adapters(unet)
    assert torch.equal(run(unet), before)
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())


@torch.no_grad()
def test_one_adapter_is_fused_at_a_time_and_others_go_on(unet: UNet) -> None:
    add_lora(unet, "a", rank=2)
    stir(unet, "a")
    add_lora(unet, "b", rank=2)
    stir(unet, "b")
    alone = run(unet)
    for layer in (m for m in unet.modules() if isinstance(m, LoraLayer)):
        layer.set_adapter(["a", "b"])
    both = run(unet)
    fuse_adapter(unet, "a")
    assert torch.allclose(run(unet), both, atol=1e-3)
    assert not torch.allclose(run(unet), alone, atol=1e-1)
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
    assert (run(untouched.unet) - run(pipe.unet)).abs().max() < 1e-6
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
    assert torch.equal(run(other), run(unet))
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


def test_model_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    metrics = {
        "base": {"judge": {"value": 0.5}},
        "easy": {"judge": {"value": 0.61234, "low": 0.58, "high": 0.64, "n": 200}, "defect_rate": 0.1},
    }
    command = "limner run recipes/figures/demo.yaml --stages.easy.learn.beta 500"
    recipe = "name: demo\nstages:\n  easy: {loss: dpo}"
    path = write_card(
        tmp_path / "out", base_model="acme/sd", command=command, recipe_yaml=recipe, stage="easy", samples=tmp_path / "grid.png",
        license="apache-2.0",
    )  # fmt: skip
    add_evaluation(path, {"base": {"judge": {"value": 0.1}}}, stage="easy", scale=0.5, blocks=["up"])
    assert ".set_scale" in path.read_text()
    add_evaluation(path, metrics, stage="easy")  # takes the place of the first
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": "acme/sd", "library_name": "diffusers", "license": "apache-2.0", "tags": ["text-to-image", "lora", "dpo", "hg-dpo"],
    }  # fmt: skip
    assert command in card.text
    assert recipe in card.text
    table = "| metric | base | easy |\n| --- | --- | --- |\n| judge | 0.5 | 0.6123 [0.58, 0.64] |\n| defect_rate | – | 0.1 |\n"
    assert table in card.text
    assert card.text.count("## Evaluation") == card.text.count("## Training") == 1
    assert "set_adapters" not in card.text and "set_scale" not in card.text  # at full strength nothing need be set
    assert 'adapter_name="easy")\nimage = pipe(' in card.text
    assert "![samples](samples.png)" in card.text
    assert (tmp_path / "out/samples.png").is_file()
    assert "diffusers 0." in card.text
    local = write_card(tmp_path / "local", base_model=str(tmp_path / "grid"), command="c", recipe_yaml="a: 1", stage="easy").read_text()
    assert str(tmp_path) not in local
    assert "Evaluation" not in local
    assert "samples" not in local


@pytest.mark.parametrize("layers", ["attention", "all"])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(("scale", "blocks"), [(0.5, ["all"]), (0.5, ["up", "mid"]), (0.7, ["up"])])
@torch.no_grad()
def test_the_card_says_how_to_use_the_adapter_as_it_was_evaluated(
    tmp_path: Path, scale: float, blocks: list[str], evaluated: bool, layers: Any
) -> None:
    """Its lines, run on another copy of the model, give what the adapter gave at that strength, be it set when the card was or later."""
    pipe = tiny_pipeline()  # one block down and one up have no attentions
    untouched = copy.deepcopy(pipe)
    add_lora(pipe.unet, "learner", rank=4, alpha=2, layers=layers)
    stir(pipe.unet, "learner")
    save_lora(tmp_path, pipe.unet, "learner", metadata={})
    set_adapter_scale(pipe.unet, "learner", scale, blocks)
    first: dict[str, Any] = {} if evaluated else {"scale": scale, "blocks": blocks}
    card = write_card(tmp_path, base_model="acme/sd", command="c", recipe_yaml="a: 1", stage="hard", **first)
    if evaluated:
        add_evaluation(card, {}, stage="hard", scale=scale, blocks=blocks)
    code = card.read_text().partition("pipe.load_lora_weights")
    lines = (code[1] + code[2].partition("image = ")[0]).replace("path/to/this/folder", str(tmp_path))
    exec(lines, {"pipe": untouched})
    assert (run(untouched.unet) - run(pipe.unet)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"base_model": "a/models/person.safetensors"}, 'from_single_file("person.safetensors")'),
        ({"base_model": "a/models/person"}, 'from_pretrained("person")'),
        ({"base_model": "a/models/person.safetensors", "tuned": True}, 'from_pretrained("train/base/model")'),
    ],
)
def test_the_card_loads_the_model_that_the_adapter_belongs_to(tmp_path: Path, about: dict[str, Any], said: str) -> None:
    card = write_card(tmp_path, command="c", recipe_yaml="a: 1", stage="easy", **about).read_text()
    assert said in card
    assert ("stage `base` of the same run made of `person.safetensors`" in card) == bool(about.get("tuned"))
