"""The model card: what it says of model, recipe and evaluation, and that its lines do what was evaluated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from limner.models.card import add_evaluation, write_card
from limner.models.lora import add_lora, set_adapter_scale
from limner.models.lora_file import save_lora
from tiny import predict, stir, tiny_pipeline


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
    assert (predict(untouched.unet) - predict(pipe.unet)).abs().max() < 1e-6


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
