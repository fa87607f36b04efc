"""What simulated people know of generated figures: a reader's eyes, here of a stand-in whose answers are written down."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from limner import records
from limner.cli import main
from limner.figures import assets, seen
from limner.figures.assets import find
from limner.figures.captions import REGION, describe, parse, swap
from limner.figures.scene import ATTRIBUTES, sample
from limner.images import decode_batch, encode_png
from limner.inputs import read_prompts
from limner.scorers.joints import BONES, measure_names
from limner.scorers.reader import FigureReader, load_reader
from limner.store import open_step, read_rows

JOINTS = sorted({name for bone in BONES for name in bone})
BODY = ["background", *sorted({p for region in REGION.values() for p in region} - {"place"})]
SAID = "a woman with long brown hair wearing a red t-shirt and blue trousers kicking in a park"
RED = SAID.split().index("red")
TRUE = {
    "sex": "woman", "hair": "brown", "hair_length": "long", "top": "red", "sleeves": "short", "bottom": "blue", "legwear": "trousers",
    "pose": "kicking", "place": "park",
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """What the stand-in sees: attributes, logit of a defect, rows and columns of the defect map that are lit, a second left wrist."""

    attributes: dict[str, str] = field(default_factory=lambda: TRUE)
    defect: float = -20.0
    lit: tuple[slice, slice] = (slice(0), slice(0))
    twice: bool = False


class Eyes(nn.Module):
    """Answers with what is written down under the number in a picture's first pixel. The torso is columns 24 to 40, hair a stripe of it."""

    def __init__(self, cases: list[Shown]) -> None:
        super().__init__()
        self.cases, self.attributes, self.joints, self.parts = cases, {k: list(v) for k, v in ATTRIBUTES.items()}, JOINTS, BODY

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = [self.cases[int(n)] for n in (images[:, 2, 0, 0] * 255).round()]
        count = len(found)
        out = {name: torch.zeros(count, len(values)) for name, values in self.attributes.items()}
        out |= {"joints": torch.full((count, len(JOINTS), 32, 32), -6.0), "defect_map": torch.full((count, 32, 32), -6.0)}
        out |= {"parts": torch.zeros(count, len(BODY), 64, 64), "summary": torch.zeros(count, 1), "soundness": torch.zeros(count, 1)}
        out["defect"] = torch.tensor([c.defect for c in found])
        out["parts"][:, BODY.index("torso"), 8:60, 24:40] = 5.0
        out["parts"][:, BODY.index("hair"), 8:12, 24:40] = 9.0
        for i, case in enumerate(found):
            for name, value in case.attributes.items():
                out[name][i, self.attributes[name].index(value)] = 1.0
            for j in range(len(JOINTS)):
                out["joints"][i, j, 2 * j + 2, 16] = 3.0
            if case.twice:
                out["joints"][i, JOINTS.index("left_wrist"), 4, 28] = 3.0
            out["defect_map"][i][case.lit] = 6.0
        return out


def eyes(*cases: Shown, **sure: float) -> FigureReader:
    """The stand-in. Joints are normal up to a second peak of 0.5."""
    limits = {n: [-0.5, 0.5] if n.startswith("second ") else [-1e3, 1e3] for n in measure_names(JOINTS)}
    return FigureReader(Eyes(list(cases)), limits, sure=sure)  # type: ignore[arg-type]


def pictures(count: int) -> Tensor:
    """A white person in the middle of black, where the stand-in sees them."""
    images = torch.zeros(count, 3, 64, 64)
    images[:, :, 8:60, 24:40] = 1.0
    images[:, 2, 0, 0] = torch.arange(count) / 255
    return images


def test_every_caption_is_read_back() -> None:
    """The inverse of `describe` and of `swap`, on 400 figures."""
    rng = np.random.default_rng(0)
    for seed in range(400):
        figure = sample(rng)
        caption = describe(figure.attributes(), seed)
        assert parse(caption.text.split()) == caption
        swapped = swap(figure, seed, rng)
        found = parse(swapped.text.split())
        untrue = [n for n, value in found.attributes.items() if figure.attributes()[n] != value]
        assert sorted(untrue) == sorted(swapped.attributes)
        assert tuple(i for i, n in enumerate(found.words) if n in untrue) == swapped.wrong_words
    assert parse("A Man in a red car, standing".replace(",", "").split()).attributes == {"sex": "man", "pose": "standing"}


def test_qualities_of_what_is_seen_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound picture; one with a defect of 8x8 of the person's 832 pixels and sex and place untrue; one with a second wrist."""
    monkeypatch.setattr(seen, "real_sharpness", lambda: 1e-6)
    wrong = {**TRUE, "sex": "man", "place": "snow"}
    cases = Shown(), Shown(wrong, 20.0, (slice(10, 14), slice(14, 18))), Shown(defect=math.log(0.25), twice=True)
    sound, flawed, doubled = seen.see(eyes(*cases), pictures(3), [SAID] * 3)
    assert sound.qualities == pytest.approx({"plausibility": 1, "alignment": 1, "aesthetics": 1, "overall": 1}, abs=1e-6)
    assert not sound.artifact.any() and not sound.misalignment.any() and sound.words == ()
    expected = np.zeros((64, 64), bool)
    expected[20:28, 28:36] = True  # the map's rows 10 to 14 and columns 14 to 18, twice as large
    assert np.array_equal(flawed.artifact, expected)
    assert flawed.words == (1, 14, 15, 16), "woman; in a park"
    assert flawed.qualities["plausibility"] == pytest.approx(0.7 * math.exp(-3 * 64 / 832), abs=1e-6)
    assert flawed.qualities["alignment"] == pytest.approx((7 / 9) ** 3)
    assert flawed.qualities["aesthetics"] == pytest.approx(0.6, abs=1e-6)
    torso = np.zeros((64, 64), bool)
    torso[12:60, 24:40] = True
    outside = np.ones((64, 64), bool)
    outside[8:60, 24:40] = False
    assert np.array_equal(flawed.misalignment, torso | outside), "sex shows in the torso, the place in all that is not the person"
    peak = 1 / (1 + math.exp(-3))
    chance = 1 - (1 - 0.2) * 0.5 / peak  # a defect of 0.2; the second peak is peak/0.5 times its limit
    assert chance > 0.5 and not doubled.artifact.any(), "nothing of the map is lit"
    assert doubled.qualities["plausibility"] == pytest.approx(1 - chance * (1 - 0.7), abs=1e-6)


def test_a_place_of_the_map_shows_only_where_a_defect_is_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "real_sharpness", lambda: 1e-6)
    unlikely = Shown(defect=-0.1, lit=(slice(10, 14), slice(14, 18)))
    found = seen.see(eyes(unlikely, replace(unlikely, defect=0.1)), pictures(2), [SAID] * 2)
    assert [t.artifact.sum() for t in found] == [0, 64]


def test_only_what_is_read_surely_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "real_sharpness", lambda: 1e-6)
    wrong = Shown({**TRUE, "sex": "man", "top": "green"})
    (found,) = seen.see(eyes(wrong, sex=0.8, hair=0.9), pictures(1), [SAID])
    assert found.words == (RED,) and found.qualities["alignment"] == pytest.approx((6 / 7) ** 3)


def test_blur_is_sharpness_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the contrast is half the standard deviation of the Laplacian."""
    sharp = torch.zeros(1, 3, 64, 64)
    sharp[..., ::2] = 200 / 255
    monkeypatch.setattr(seen, "real_sharpness", lambda: 400.0)  # -4 g + 2 g of vertical stripes: ±2 x 200
    assert seen.blurs(torch.cat([sharp, sharp / 2, sharp * 1.2])) == pytest.approx([0, 0.5, 0], abs=1e-6)


def test_what_cannot_be_seen_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "real_sharpness", lambda: 1.0)
    with pytest.raises(ValueError, match="caption 'two dogs' claims nothing that the reader can see"):
        seen.see(eyes(Shown()), pictures(1), ["two dogs"])
    blind = eyes(Shown())
    del blind.model.parts
    with pytest.raises(ValueError, match="the reader does not see calf, face, forearm"):
        seen.see(blind, pictures(1), [SAID])
    with pytest.raises(ValueError, match=r"eyes has no config.json; expected a reader"):
        seen.beholder(tmp_path / "eyes")
    monkeypatch.setattr(seen, "load_reader", lambda path: eyes(Shown()))
    large = records.Image(id="large", prompt_id="p", text=SAID, image=encode_png(torch.zeros(3, 32, 80)))
    with pytest.raises(ValueError, match="image large is 80x32; the reader of figures sees 64x64"):
        list(seen.see_images([large], tmp_path))


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """A pool of 12 generated pictures in tmp_path/pool: every second one flawed, every third one in other clothes than its caption says."""
    cases = [
        Shown(
            {**TRUE, **({"top": "green"} if n % 3 == 0 else {})}, 20.0 if n % 2 else -20.0,
            (slice(8, 16), slice(12, 20)) if n % 2 else (slice(0), slice(0)),
        )
        for n in range(12)
    ]  # fmt: skip
    step = open_step(tmp_path / "pool", "pool", {}, {})
    images = pictures(12)
    rows = [records.Image(id=f"i{n:02d}", prompt_id=f"p{n // 2}", text=SAID, image=encode_png(x), k=n % 2) for n, x in enumerate(images)]
    step.write(0, records.to_table(records.Image, rows))
    step.finish({"rows": 12})
    monkeypatch.setattr(seen, "real_sharpness", lambda: 1e-6)
    monkeypatch.setattr(seen, "load_reader", lambda path: eyes(*cases) if path == tmp_path / "eyes" else None)
    return cases


def test_raters_of_generated_images_say_what_their_reader_sees(tmp_path: Path, generated: list[Shown]) -> None:
    """Through HTTP: artifact points lie on what is lit, in flawed pictures; the wrong word is marked; better pictures rate higher."""
    pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")
    study = {"output_dir": str(tmp_path / "run"), "images": {"from": str(tmp_path / "pool")}, "overlap": 3, "seed": 2}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    assert main(["annotate", "simulate", str(tmp_path / "study.yaml"), "--count", "3", "--reader", str(tmp_path / "eyes")]) == 0
    assert main(["annotate", "consolidate", str(tmp_path / "study.yaml")]) == 0
    rows = list(read_rows(tmp_path / "run/feedback", records.Feedback))
    assert len(rows) == 12 * 3 * 3, "points, words and ratings of three raters"
    places = [(int(r.image_id[1:]), json.loads(r.payload)["artifact"]) for r in rows if r.kind == "points"]
    flawed = [p for n, points in places if n % 2 for p in points]
    near = [0.3 < x < 0.7 and 0.2 < y < 0.6 for x, y in flawed]  # what is lit is 0.375 to 0.625 by 0.25 to 0.5
    assert len(flawed) >= 18 and np.mean(near) > 0.8 and len(flawed) > 5 * sum(len(points) for n, points in places if n % 2 == 0)
    marked = [(int(r.image_id[1:]) % 3 == 0, RED in json.loads(r.payload)["misaligned"]) for r in rows if r.kind == "words"]
    assert np.mean([hit for wrong, hit in marked if wrong]) > 0.6 > 0.2 > np.mean([hit for wrong, hit in marked if not wrong])
    scores = {s.image_id: s.score or 0 for s in read_rows(tmp_path / "run/preferences/scores", records.Score)}
    best, worst = (np.mean([scores[f"i{n:02d}"] for n in numbers]) for numbers in ((2, 4, 8, 10), (3, 9)))
    assert best > worst + 0.1


def test_known_truths_are_kept_and_the_others_looked_at(tmp_path: Path, generated: list[Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")
    from limner.feedback.simulate import Truth
    from limner.feedback.study import Pictures, Study
    from limner.figures.truths import dump_truth, read_truths
    from limner.steps.annotate import _known

    kept = Truth(artifact=np.eye(64, dtype=bool), misalignment=np.zeros((64, 64), bool), words=(3,), qualities={"overall": 0.25})
    truths = [dump_truth(kept), None, json.dumps({"attributes": {}}), "not JSON"]
    rows = [{"id": f"i{n:02d}", "text": SAID, "image": encode_png(x), "truth": t} for n, (x, t) in enumerate(zip(pictures(4), truths))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    assert list(read_truths(tmp_path / "images.parquet")) == ["i00"]
    asked = list[str]()
    real = seen.see_images
    monkeypatch.setattr(seen, "see_images", lambda images, path: real([asked.append(i.id) or i for i in images], path))
    study = Study(output_dir=str(tmp_path / "run"), images=Pictures(source=str(tmp_path / "images.parquet")))
    found = _known(study, {f"i{n:02d}" for n in range(4)}, str(tmp_path / "eyes"))
    assert set(found) == {f"i{n:02d}" for n in range(4)} and asked == ["i01", "i02", "i03"]
    assert np.array_equal(found["i00"].artifact, kept.artifact) and found["i00"].words == (3,)
    assert found["i01"].artifact.sum() == 256 and found["i03"].words == (RED,)


def test_simulate_says_whose_eyes_are_missing(tmp_path: Path, generated: list[Shown], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")
    study = {"output_dir": str(tmp_path / "run"), "images": {"from": str(tmp_path / "pool")}, "overlap": 1}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command = ["annotate", "simulate", str(tmp_path / "study.yaml")]
    assert main(command) == 2
    assert "no truth is known of 12 of 12 images, such as i00; for generated figures say" in capsys.readouterr().err
    monkeypatch.setattr(assets, "DATA", tmp_path / "nothing")
    assert main([*command, "--reader", "figures/rater_reader"]) == 2
    assert "the embedded 'rater_reader' is not in this checkout (rater_reader); make it with" in capsys.readouterr().err


def test_how_likely_a_caption_is_read_by_hand() -> None:
    """The stand-in gives what it sees a logit of 1 among zeros."""
    sizes = {n: len(v) for n, v in ATTRIBUTES.items()}
    scorer = seen.AttributeScorer("attributes", eyes(Shown(), Shown({**TRUE, "sex": "man"}), Shown()))
    right, wrong, silent = scorer(pictures(3), [SAID, SAID, "a drawing"]).tolist()
    counted = list(parse(SAID.split()).attributes)
    expected = [1 - math.log(math.e + sizes[n] - 1) for n in counted]
    assert right == pytest.approx(np.mean(expected), abs=1e-6)
    assert wrong == pytest.approx(np.mean(expected) - 1 / len(counted), abs=1e-6)
    assert silent == 0


def test_soundness_orders_what_readers_find_wrong() -> None:
    """The shipped raters' reader: real figures above the same with a patch of noise; the number is the log-odds of the defect's."""
    reader = load_reader(find("rater_reader"))
    real = decode_batch([p.image or b"" for p in read_prompts(find("test"), "test")[:16]])
    spoilt = real.clone()
    spoilt[:, :, 24:40, 24:40] = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scorer = seen.SoundnessScorer("soundness", reader)
    found = scorer(torch.cat([real, spoilt]), [""] * 32)
    assert (found[:16] > found[16:]).float().mean() > 0.9
    defect = reader.read(real).defect.astype(float)
    inside = (defect > 1e-4) & (defect < 1 - 1e-4)
    assert found[:16].numpy()[inside] == pytest.approx(np.log((1 - defect) / defect)[inside], rel=1e-3, abs=1e-3)
    assert found.abs().max() <= 10


def test_the_shipped_readers_eyes() -> None:
    """Real figures with their own captions, then with their neighbours': nearly nothing is untrue, then much is."""
    prompts = read_prompts(find("test"), "test")[:48]
    images = decode_batch([p.image or b"" for p in prompts])
    look = seen.beholder(find("rater_reader"))
    own = look(images, [p.text for p in prompts])
    other = look(images, [p.text for p in prompts[1:] + prompts[:1]])
    aligned, strange = (np.mean([t.qualities["alignment"] for t in truths]) for truths in (own, other))
    assert aligned > 0.9 and strange < 0.4
    assert np.mean([t.qualities["plausibility"] for t in own]) > 0.7
