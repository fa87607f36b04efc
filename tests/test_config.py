"""Recipes: what loads, what is refused and in which words."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from limner import recipe as recipes
from limner.cli import main, split_overrides
from limner.config import dump
from limner.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
RUNS = [p for p in RECIPES if not re.search(r"limner (figures|scorer|annotate)", p.read_text().splitlines()[0])]
CLASSES = [c for c in vars(recipes).values() if isinstance(c, type) and is_dataclass(c)]

SMALL = {
    "output_dir": "out",
    "scorers": {"picker": {"path": "p"}},
    "stages": {
        "easy": {"winner": {"from": "pool", "by": "picker"}, "loser": {"from": "pool", "pick": "worst", "by": "picker"}},
        "hard": {"start": "easy", "winner": {"from": "reconstruction", "t": [100]}, "loser": {"from": "easy", "role": "winner"}},
    },
}


def written(folder: Path, **changes: object) -> Path:
    """SMALL with top-level keys replaced."""
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_loads_and_survives_its_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_begins_with_its_command(path: Path) -> None:
    assert re.match(rf"# limner \w+ .*{path.name}", path.read_text().splitlines()[0])


def test_print_config_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    assert main(["run", str(path), "--print_config", "--stages.easy.learn.beta", "7"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(path, ["--stages.easy.learn.beta", "7"])
    assert "from: reconstruction" in (tmp_path / "again.yaml").read_text()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_field_is_documented(kind: type) -> None:
    documented = re.findall(r"^ +(\w+): ", (kind.__doc__ or "").partition("Args:")[2], re.MULTILINE)
    assert [f.name for f in fields(kind) if f.name not in documented] == []


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    easy = load_recipe(written(tmp_path)).stages["easy"]
    assert (easy.learn.beta, easy.learn.rank, easy.winner.pick, easy.keep) == (2500.0, 8, "best", "all")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--stages.easy.learn.beta", "5"], 5.0),
        (["--stages.easy.learn.beta=5"], 5.0),
        (["--stages.easy.learn", "{beta: 5}"], 5.0),
    ],
)
def test_overrides(tmp_path: Path, words: list[str], value: float) -> None:
    assert load_recipe(written(tmp_path), words).stages["easy"].learn.beta == value


def test_from_is_renamed_in_names_only(tmp_path: Path) -> None:
    """An option's value may hold ".from" too."""
    recipe = load_recipe(written(tmp_path), ["--stages.hard.winner.from", "real", "--output_dir", "a.from/b", "--name=x.from"])
    assert (recipe.stages["hard"].winner.source, recipe.output_dir, recipe.name) == ("real", "a.from/b", "x.from")
    for words in (["--stages.hard.winner={from: real}"], ["--stages.hard.winner", "{from: real}"]):
        assert load_recipe(written(tmp_path), words).stages["hard"].winner.source == "real"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": {"easy": {"learn": {"bta": 5}}}}, "r.yaml: unknown key stages.easy.learn.bta; did you mean stages.easy.learn.beta?"),
        ({"poool": {}}, "r.yaml: unknown key poool; did you mean pool?"),
        ({"stages": {"easy": {"winner": {"form": "pool"}}}}, "unknown key stages.easy.winner.form; did you mean stages.easy.winner.from?"),
        ({"scorers": {"a": {"xyz": 1}}}, "unknown key scorers.a.xyz; known: kind, path"),
    ],
)
def test_an_unknown_key_has_its_path_and_a_near_match(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(written(tmp_path, **change))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--stages.easy.learn.bta", "5"], "unknown key stages.easy.learn.bta; did you mean stages.easy.learn.beta?"),
        (["--stages.easy.learn.bta=5"], "unknown key stages.easy.learn.bta; did you mean stages.easy.learn.beta?"),
        (["--stages.easy.learn", "{bta: 5}"], "unknown key stages.easy.learn.bta; did you mean stages.easy.learn.beta?"),
        (["--sed", "5"], "unknown key sed; did you mean seed?"),
        (["--stages.eazy.learn.beta", "5"], "no stage eazy in --stages.eazy.learn.beta; did you mean stages.easy?"),
    ],
)
def test_an_unknown_option_says_the_same(tmp_path: Path, option: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(written(tmp_path), option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--seed", "soon"], "seed"),
        (["--stages.easy.learn.loss", "ppo"], "expected one of 'dpo', 'sft'; got ppo"),
        (["--stages.easy.learn.max_train_steps", "1.5"], "max_train_steps"),
        (["--pool.images_per_prompt", "1"], "pool.images_per_prompt: 1; a pair needs at least 2"),
        (["--stages.hard.winner.t", "[0]"], "stages.hard.winner.t: 0 lies outside the schedule 1..1000"),
        (["--stages.hard.winner.t", "[1001]"], "stages.hard.winner.t: 1001 lies outside the schedule 1..1000"),
        (["--stages.hard.winner.t", "[]"], "stages.hard.winner.t: empty"),
        (["--stages.hard.winner.t", "[100, 200]"], "stages.hard.winner.by: not set"),
        (["--stages.easy.winner.by", "pickscore"], "stages.easy.winner.by: no scorer 'pickscore' under scorers (picker)"),
        (["--stages.easy.loser", "null"], "stages.easy.loser: not set"),
        (["--stages.hard.start", "normal"], "stages.hard.start: 'normal' is not an earlier stage (easy)"),
        (["--stages.easy.start", "hard"], "stages.easy.start: 'hard' is not an earlier stage (there is none)"),
        (["--data.train", ""], "data.train: not set"),
        (["--data.test", ""], "data.test: not set"),
        (["--generate.stage_blocks", "{hard: []}"], "generate.stage_blocks.hard: empty; expected some of all, down, mid, up"),
        (["--stages.hard.loser.role", ""], "stages.hard.loser.role: winner or loser"),
        (["--stages.hard.loser.from", "easier"], "stages.hard.loser.from: 'easier'"),
        (["--stages.easy.learn.reference", "start"], "stages.easy.learn.reference: start needs stages.easy.start"),
        (["--stages.hard.keep", "winner_not_worse"], "stages.hard.keep: winner_not_worse needs a scorer"),
        (["--stages.hard.learn.rank", "4"], "stages.hard.learn.rank: 4, but stage easy has 8"),
        (["--stages.hard.learn.layers", "all"], "stages.hard.learn.layers: all, but stage easy has attention"),
        (["--stages.easy.learn.max_timestep", "0"], "lie outside the schedule"),
        (["--stages.hard.wins_on", "[picker]", "--stages.hard.winner.from", "real"], "stages.hard.winner: scorers score pools and recon"),
        (
            ["--stages.easy.learn.blocks", "[upper]", "--stages.hard.learn.blocks", "[upper]"],
            "stages.easy.learn.blocks: 'upper'; expected some of all, down, mid, up",
        ),
        (["--generate.stage_blocks", "{hard: [upper]}"], "generate.stage_blocks.hard: 'upper'; expected some of"),
        (
            ["--generate.stage_blocks", "{heard: [up]}"],
            "generate.stage_blocks: 'heard' is no stage with an adapter of its own; there are easy",
        ),
        (["--generate.stage_lora_scale", "{base: 0.5}"], "generate.stage_lora_scale: 'base' is no stage"),
        (["--evaluate.stages", "[easy, base]"], "evaluate.stages: 'base' is no stage"),
        (["--scorers.picker.kind", "sum"], "scorers.picker.of: goes with kind sum"),
        (
            ["--scorers.picker", "{kind: sum, of: {picke: 1}}"],
            "scorers.picker.of: 'picke' is no scorer that can be added",
        ),
        (["--evaluate.judge", "reward"], "evaluate.judge: no scorer 'reward' under scorers (picker)"),
        (["--output_dir", ""], "output_dir: not set"),
    ],
)
def test_values_that_make_no_sense_are_named(tmp_path: Path, option: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(written(tmp_path), option)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
    for text, words in (("a: [", "is not YAML"), ("just words", "holds a str"), ("- a\n- b", "holds a list")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_recipe(tmp_path / "bad.yaml")


def test_the_command_line_tells_values_from_the_recipe() -> None:
    """An option of the recipe may stand anywhere; its value is never taken for the recipe's path."""
    own, overrides = split_overrides(
        ["train", "--seed", "5", "--config", "r.yaml", "--stage=easy", "--pool.images_per_prompt=3", "--dry_run"]
    )
    assert own == ["train", "--config", "r.yaml", "--stage=easy", "--dry_run"]
    assert overrides == ["--seed", "5", "--pool.images_per_prompt=3"]
    assert split_overrides(["run", "r.yaml", "--seed", "-1"]) == (["run", "r.yaml"], ["--seed", "-1"])


def test_recipes_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Recipe().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["pool", "real"])
def test_a_stage_may_not_be_called_as_a_source_is(tmp_path: Path, name: str) -> None:
    stages = {name: SMALL["stages"]["easy"]}  # type: ignore[index]
    with pytest.raises(ValueError, match=f"stages.{name}: the name '{name}' is that of a source"):
        load_recipe(written(tmp_path, stages=stages))


def test_a_stage_may_not_be_called_as_a_reconstruction_is(tmp_path: Path) -> None:
    """A pool that a stage t400 drew would have the ids of what was reconstructed from timestep 400."""
    with pytest.raises(ValueError, match=r"stages.t400: the name 't400' is that of a reconstruction from a timestep"):
        load_recipe(written(tmp_path, stages={"t400": SMALL["stages"]["easy"]}))


def test_what_the_stage_base_cannot_be(tmp_path: Path) -> None:
    """All stages begin from what it makes: another cannot start from it a second time, nor can it learn from pools, which it draws."""
    tuned, easy = {"winner": {"from": "real"}, "learn": {"loss": "sft"}}, SMALL["stages"]["easy"]
    with pytest.raises(ValueError, match=r"stages.easy.start: all stages start from what stage base makes; leave start out"):
        load_recipe(written(tmp_path, stages={"base": tuned, "easy": {**easy, "start": "base"}}))
    pool = {"winner": {"from": "pool", "pick": "best", "by": "picker"}, "learn": {"loss": "sft"}}
    with pytest.raises(ValueError, match=r"stages.base.winner.from: pool; stage base learns from real or feedback"):
        load_recipe(written(tmp_path, stages={"base": pool}))
    rebuilt = {"winner": {"from": "reconstruction", "t": [400]}, "learn": {"loss": "sft"}}
    with pytest.raises(ValueError, match=r"stages.base.winner.from: reconstruction; stage base learns from real or feedback"):
        load_recipe(written(tmp_path, stages={"base": rebuilt}))
    with pytest.raises(ValueError, match=r"stages.base.start: stage base makes the model that all others start from"):
        load_recipe(written(tmp_path, stages={"easy": easy, "base": {**tuned, "start": "easy"}}))
    loser = {**easy, "loser": {"from": "base", "role": "loser"}}
    with pytest.raises(ValueError, match=r"stages.easy.loser.role: stage 'base' has no loser"):
        load_recipe(written(tmp_path, stages={"base": tuned, "easy": loser}))


@pytest.mark.parametrize("command", [["figures", "make"], ["figures", "hps"], ["run"], ["scorer", "train"], ["annotate", "serve"]])
def test_files_that_are_no_recipes(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that reads YAML says in one line what is wrong with the file."""
    assert main([*command, "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    assert main([*command, "--config", str(path)]) == 2
    assert "holds a list; expected keys and values" in capsys.readouterr().err
    path.write_text("a: [1")
    assert main([*command, "--config", str(path)]) == 2
    assert "is not YAML" in capsys.readouterr().err
