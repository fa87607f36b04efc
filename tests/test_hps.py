"""HPS on figures: raters whose noise is known, what can be known of them, and the recipe with stand-ins for what it draws with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("anny")

from limner.cli import main
from limner.feedback.simulate import Truth
from limner.figures import assets, hps, seen
from limner.figures.body import JOINTS
from limner.figures.candidates import REAL, UNSEEN, Hps, hidden_quality, observer, painter, read_candidates, world_rows
from limner.figures.choosers import ceilings, choose, fit_linear
from limner.figures.latent import qualities
from limner.figures.make import png
from limner.images import encode_png
from limner.recipe import Sampler
from limner.scorers.agreement import Judged, accuracy_difference
from limner.scorers.choices import Choices
from limner.scorers.joints import measure_names
from limner.scorers.reader import FigureReader, Reader, save_reader
from limner.store import open_step
from test_choice_records import choice
from tiny import save_tiny

ROOT = Path(__file__).parent.parent


def test_choices_follow_luces_axiom():
    """Qualities 0 and -0.4 with noise 0.4: the first is chosen with probability 1 / (1 + e^-1) = 0.731; of three by the softmax."""
    rng = np.random.default_rng(0)
    two = np.mean([choose(np.array([0, -0.4]), noise=0.4, tie=0, rng=rng)[0] for _ in range(4000)])
    assert two == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    three = np.mean([choose(np.array([0, -0.4, -0.8]), noise=0.4, tie=0, rng=rng) for _ in range(4000)], axis=0)
    weights = np.exp([0, -1, -2])
    assert three == pytest.approx(weights / weights.sum(), abs=0.025)
    assert choose(np.array([0.0, -5.0, -0.01]), noise=1e-6, tie=0.1, rng=rng) == [0.5, 0, 0.5], "too near to call"


def test_the_ceilings_are_those_of_the_known_chances():
    """With p = 0.731 for the better one, knowing quality is right 73.1 % of the time, one more rater p² + (1 - p)² = 60.7 %."""
    rng = np.random.default_rng(1)
    hidden = [np.array([0, -0.4]) if i % 2 else np.array([-0.4, 0]) for i in range(1500)]
    rows = [choice(choose(h, noise=0.4, tie=0, rng=rng), id=str(i), prompt_id=str(i)) for i, h in enumerate(hidden)]
    found = ceilings(rows, hidden, 0.4, seed=0, draws=4)
    p = 1 / (1 + math.exp(-1))
    assert found["quality"]["value"] == pytest.approx(p, abs=0.035)
    assert found["single_rater"]["value"] == pytest.approx(p * p + (1 - p) ** 2, abs=0.03)


def test_a_linear_head_finds_the_direction_that_decides():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(2, 3)) for _ in range(600)]
    rows = [choice([1.0, 0.0] if f[0, 1] > f[1, 1] else [0.0, 1.0]) for f in features]
    vector = fit_linear([*rows, choice([0.5, 0.5])], [*features, rng.normal(size=(2, 3))])
    assert abs(vector[1]) > 10 * max(abs(vector[0]), abs(vector[2])) and vector[1] > 0


def test_the_difference_of_two_scorers_by_hand():
    pairs = np.array([1.0, 1, 0, 0.5, 1]), np.array([0, 0, 1, 1, 2]), np.full((5, 2), "")
    ours, theirs = (Judged(pairs[0], np.array(m, float), *pairs[1:]) for m in ([1, 1, -1, 1, -1], [1, -1, 1, 1, -1]))
    found = accuracy_difference(ours, theirs)
    assert found["value"] == pytest.approx(3 / 4 - 1 / 4) and found["low"] <= 0.5 <= found["high"]
    assert accuracy_difference(ours, ours)["high"] == 0
    with pytest.raises(ValueError, match="judged on different pairs"):
        accuracy_difference(ours, ours.take(ours.margin > 0))


def test_hidden_quality_is_what_people_go_by():
    """As for other simulated people, `overall`, if nothing else is said; else the weights by hand."""
    seen = qualities(np.full((4, 4, 3), 90, np.uint8), np.eye(4) > 0, np.zeros((4, 4), bool), 0.25, defect=0.3)
    assert hidden_quality(Hps(), seen) == pytest.approx(seen["overall"])
    looks = Hps(taste={"aesthetics": 0.8, "plausibility": 0.2})
    assert hidden_quality(looks, {"plausibility": 0.5, "alignment": 0.1, "aesthetics": 0.25}) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="taste: beauty unknown; expected some of plausibility, alignment, aesthetics"):
        hidden_quality(Hps(taste={"beauty": 1.0}), seen)


SIZE = 16
COLOURS = ("red", "green", "blue")


def figure(colour: int, seed: int) -> torch.Tensor:
    """A coloured square on grey grain."""
    x = 0.3 + 0.1 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    x[:, 4:12, 4:12] = 0.1
    x[colour, 4:12, 4:12] = 0.9
    return x


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for number, (split, count) in enumerate({"train": 48, "scorer": 40, "judge": 8, "raters": 16}.items()):
        step = open_step(folder / "images" / split, "figures", {}, {})
        rows = []
        for i in range(count):
            image = figure(i % 3, 1000 * number + i)
            flawed = image.clone()
            flawed[:, 6:10, :] = 0.9
            person, mask = np.zeros((2, SIZE, SIZE), np.uint8)
            person[4:12, 4:12] = 5
            mask[6:10, 4:12] = 255
            rows.append({
                "id": f"{split}-{i}", "prompt": f"a {COLOURS[i % 3]} man", "image": encode_png(image),
                "defective_image": encode_png(flawed), "parts": png(person), "defect_mask": png(mask),
            })  # fmt: skip
        step.write(0, pa.Table.from_pylist(rows))
        step.finish({})
    return folder


def stand_in_painter(config: Hps):
    """Late pictures are mostly right, early ones as often as not in another colour and blurred."""

    def paint(rows):
        def drawn(odds: float, salt: int) -> torch.Tensor:
            out = []
            for r in rows:
                rng = np.random.default_rng([salt, *r["id"].encode()])
                colour = COLOURS.index(r["prompt"].split()[1])
                out.append(figure(colour if rng.random() < odds else (colour + 1) % 3, int(rng.integers(1 << 30))))
            return torch.stack(out)

        found = {(REAL, 0): drawn(1, 0), ("defect", 0): drawn(1, 1), (UNSEEN, 0): drawn(0.5, 7)}
        found |= {("late", k): drawn(0.7, 2 + k) for k in (0, 1)} | {("early", k): drawn(0.4, 4 + k) for k in (0, 1)}
        return found | {("reconstruction", k): drawn(0.6, 8 + k) for k in (0, 1)}

    return paint


def stand_in_observer(config: Hps):
    """Tells the square's colour."""

    def look(images):
        shown = images[:, :, 4:12, 4:12].mean((2, 3))
        return {"features": shown.numpy(), "classes": (20 * shown).softmax(1).numpy()}

    return look


def stand_in_beholder(path: Path):
    """Sees whether the square has the caption's colour, and nothing else."""
    assert path.name == "rater_reader", "the recipe's"

    def know(images, texts):
        shown = images[:, :, 4:12, 4:12].mean((2, 3)).argmax(1)
        right = [COLOURS[int(c)] == text.split()[1] for c, text in zip(shown, texts)]
        none = np.zeros((SIZE, SIZE), bool)
        kinds = ("plausibility", "alignment", "aesthetics", "overall")
        return [Truth(artifact=none, misalignment=none, qualities=dict.fromkeys(kinds, 0.9 if r else 0.6)) for r in right]

    return know


def test_the_recipe_with_stand_ins(world, tmp_path, monkeypatch, capsys):
    """Every part of the shipped recipe at a size of seconds: what is drawn, who chose what, who was trained, and what is reported."""
    monkeypatch.setattr(hps, "painter", stand_in_painter)
    monkeypatch.setattr(hps, "observer", stand_in_observer)
    monkeypatch.setattr(seen, "beholder", stand_in_beholder)
    monkeypatch.setattr(seen, "real_sharpness", lambda: 10.0)
    monkeypatch.setattr(assets, "DATA", tmp_path / "data")
    (tmp_path / "data/rater_reader").mkdir(parents=True)
    options = {
        "output_dir": tmp_path, "world": world, "prompts": "{train: 40, validation: 8, test: 16}", "dual.channels": "[8, 16]",
        "dual.size": SIZE, "dual.width": 32, "dual.text_layers": 1, "dual.attention_layers": 0, "tower_steps": 2, "tower_batch": 16,
        "train.max_train_steps": 12,
        "train.learning_rate": 0.005, "train.lr_warmup_steps": 0, "train.train_batch_size": 16, "train.validation_steps": 0, "noise": 0.04,
        "choices_per_prompt": 2,
    }  # fmt: skip
    command = [
        "figures",
        "hps",
        "--config",
        str(ROOT / "recipes/figures/hps.yaml"),
        *(w for k, v in options.items() for w in (f"--{k}", str(v))),
    ]
    assert main(command) == 0
    config = Hps(output_dir=str(tmp_path))
    generators = {split: {c["generator"] for c in read_candidates(config, split)} for split in ("train", "test")}
    assert generators["test"] - generators["train"] == {UNSEEN} and "defect" in generators["train"]
    defects = [c for c in read_candidates(config, "train") if c["generator"] == "defect"]
    assert len(defects) == 40 and all(c["alignment"] == 1 for c in defects), "their truth is known: their own captions, and a half is wrong"
    assert {round(c["plausibility"], 9) for c in defects} == {round(0.7 * math.exp(-3 * 32 / 64), 9)}
    late = [c["overall"] for c in read_candidates(config, "train") if c["generator"] == "late"]
    assert set(late) == {0.6, 0.9} and 0.5 < np.mean(np.array(late) == 0.9) < 0.9, "about 0.7 of them have the right colour"
    choices = Choices(tmp_path / "choices/test")
    assert (
        len(choices) == 32
        and {len(r.files) for r in choices.rows} <= {2, 3, 4}
        and REAL not in {g for r in choices.rows for g in r.generators}
    )
    found = json.loads((tmp_path / "hps.json").read_text())
    value = {name: s["accuracy"]["value"] for name, s in found["scorers"].items()}
    assert set(value) == {"contrastive tower", "aesthetic head", "domain only", "choice_among", "pickscore"}
    assert all(0 <= v <= 1 for v in value.values())
    assert found["ceilings"]["quality"]["value"] > found["ceilings"]["single_rater"]["value"] - 0.1 > 0.5, "few pairs, so roughly"
    assert set(found["gains"]) == {"choice_among", "pickscore"} and "over contrastive tower" in found["gains"]["pickscore"]
    gain = found["gains"]["choice_among"]["over contrastive tower"]["value"]
    assert gain == pytest.approx(value["choice_among"] - value["contrastive tower"])
    assert found["scorers"]["choice_among"]["by_generator"]["generators"][UNSEEN]["seen"] is False
    assert 0 < found["within_generator"]["domain only"]["value"] < 1, "of two pictures of one generator its name says nothing: lots"
    assert found["sets"]["rows"] > 4 and "class_score" in found["sets"]
    assert "one more rater" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}, "finished parts are kept"
    capsys.readouterr()
    assert main([*command, "--tower_steps", "3"]) == 2
    assert "config.tower_steps: was 2, now 3" in capsys.readouterr().err


def test_what_really_draws_on_a_tiny_pipeline(world, tmp_path):
    """Every generator gives one picture a caption; pictures differ by generator and by number, and are the same again."""
    save_tiny(tmp_path / "late", seed=0)
    save_tiny(tmp_path / "early", seed=1)
    config = Hps(
        world=str(world), base=str(tmp_path / "late"), early=str(tmp_path / "early"), few_steps=1,
        sampler=Sampler(num_inference_steps=2, guidance_scale=2.0, batch_size=4),
    )  # fmt: skip
    rows = world_rows(config, "raters", ["id", "prompt", "image", "defective_image"], 3)
    found = painter(config)(rows)
    expected = {(REAL, 0), ("defect", 0), (UNSEEN, 0), *((g, k) for g in ("late", "early", "reconstruction") for k in (0, 1))}
    assert set(found) == expected and all(x.shape == (3, 3, SIZE, SIZE) for x in found.values())
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in found.values())
    names = sorted(found)
    for i, a in enumerate(names):
        assert all(not torch.equal(found[a], found[b]) for b in names[i + 1 :]), f"{a} repeats another"
    again = painter(config)(rows[1:])
    assert all(torch.allclose(again[n], found[n][1:], atol=1e-4) for n in found), "a picture depends on its caption and number alone"


def test_what_really_looks(tmp_path):
    """Classes are the reader's poses, as probabilities."""
    torch.manual_seed(0)
    joints = list(JOINTS)
    model = Reader(
        {"sex": ["man", "woman"], "pose": ["standing", "kicking", "waving"]}, joints, ["background", "body"], (4, 8, 8, 16), 8
    ).eval()
    limits = {k: [-1.0, 1.0] for k in measure_names(JOINTS)}
    save_reader(FigureReader(model, limits), tmp_path)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    own = FigureReader(model, limits).read(images).attributes["pose"]
    found = observer(Hps(reader=str(tmp_path)))(images)
    assert found["classes"].shape == (4, 3) and found["classes"].sum(1) == pytest.approx(1, abs=1e-5)
    assert found["classes"].argmax(1).tolist() == own.tolist()
