"""Small scorers and the reader: losses by hand, saved and loaded alike, independent of batch mates."""

from __future__ import annotations

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch

from chain import clip_scorer
from limner.records import Image
from limner.scorers import clip, dual, joints, losses, reader
from limner.scorers.protocol import describe
from limner.scorers.steps import score_images
from tiny import tiny_tokenizer


def test_pickscore_loss_by_hand():
    """Scores 2 and 0, first preferred: -log(e^2 / (e^2 + 1)) = log(1 + e^-2) = 0.12693. A tie at equal scores costs nothing."""
    one = losses.pickscore(torch.tensor([2.0]), torch.tensor([0.0]))
    assert one.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    tie = losses.pickscore(torch.tensor([1.0]), torch.tensor([1.0]), 0.5)
    assert tie.item() == pytest.approx(0, abs=1e-6)


def test_contrastive_loss_by_hand():
    """Two orthogonal matching pairs at scale 1: each row's softmax is e/(e+1), so the loss is log(1 + e^-1)."""
    eye = torch.eye(2)
    assert losses.contrastive(eye, eye, torch.tensor(1.0)).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    harder = losses.contrastive(eye, eye, torch.tensor(1.0), eye)
    assert harder > losses.contrastive(eye, eye, torch.tensor(1.0))


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = dual.DualConfig(channels=(8, 16, 16), attention_layers=1, width=16, text_layers=1, size=32)
    model = dual.DualEncoder(config, dual.vocabulary_of(tokenizer))
    model.train()
    model.encode_images(torch.rand(8, 3, 32, 32))  # so that batch norm has statistics of its own
    dual.save_scorer(model.eval(), tokenizer, folder / "dual")
    return {
        "dual": dual.load_scorer(folder / "dual", "dual"),
        "clip": clip.load_scorer(clip_scorer(folder / "clip"), "clip"),
        "model": model,
    }


PROMPTS = ["a man in red", "a woman in blue", "a man in red"]


@pytest.mark.parametrize("kind", ["dual", "clip"])
def test_scores_do_not_depend_on_batch_mates(scorers, kind):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    together = scorers[kind](images, PROMPTS)
    alone = torch.cat([scorers[kind](images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert together[0] != together[2], "another image, another score"
    low, high = scorers[kind].range
    assert low <= together.min() and together.max() <= high


def test_a_saved_scorer_scores_as_before(scorers):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model, loaded = scorers["model"], scorers["dual"]
    with torch.no_grad():
        text = model.encode_tokens(dual.tokenize(loaded.tokenizer, PROMPTS[:2]))
        expected = (model.encode_images(images) * text).sum(1) * model.log_scale.exp()
    assert torch.allclose(loaded(images, PROMPTS[:2]), expected, atol=1e-5)
    assert len(loaded.revision) == 16


def test_images_outside_the_contract_are_refused(scorers):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        scorers["dual"](torch.rand(1, 3, 32, 32) * 255, ["a man"])


def test_the_wrong_kind_of_scorer_says_so(tmp_path):
    folder = clip_scorer(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"scorers\.mine\.path: .* another kind of model; set scorers\.mine\.kind"):
        dual.load_scorer(folder, "mine")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        clip.load_scorer(tmp_path, "mine")


def test_a_score_that_is_no_number_is_missing_with_a_reason(scorers):
    class Broken:
        name, revision = "broken", ""

        def __call__(self, images, prompts):
            return torch.tensor([math.nan] * len(prompts))

    from limner.images import encode_png

    image = Image(id="a/0", prompt_id="a", text="a man", image=encode_png(torch.rand(3, 32, 32)))
    found = score_images([image], [Broken(), scorers["dual"]])  # type: ignore[list-item]
    assert found[0].score is None and "nan" in (found[0].reason or "")
    assert found[1].score is not None


JOINTS = [
    "head", "neck", "left_shoulder", "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist",
    "left_hip", "left_knee", "left_ankle", "right_hip", "right_knee", "right_ankle",
]  # fmt: skip


PARTS = ["background", "torso", "forearm"]


def test_parts_are_averaged_each_on_its_own_pixels():
    """Two pixels of part 1 with values 1 and 3, two of part 0 with 5 and 7: sums 4 and 12 over one pixel more than the part has."""
    parts = torch.full((1, 2, 2, 2), -50.0)
    parts[0, 1, 0], parts[0, 0, 1] = 50.0, 50.0
    found = reader.by_part(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]), parts)
    assert found[0].tolist() == pytest.approx([12 / 3, 4 / 3, np.log(3) / 4, np.log(3) / 4, 4 - 4 / 3], abs=1e-4)


def test_peaks_finds_both_maxima():
    """A map with 0.9 at (x 3, y 5) and 0.6 at (x 20, y 10) of 32×32: heights 0.9 and 0.6, first at (3.5, 5.5)/32."""
    heat = torch.zeros(1, 1, 32, 32)
    heat[0, 0, 5, 3], heat[0, 0, 10, 20], heat[0, 0, 5, 2], heat[0, 0, 5, 4] = 0.9, 0.6, 0.7, 0.7
    first, second, where = joints.peaks(heat)
    assert first.item() == pytest.approx(0.9) and second.item() == pytest.approx(0.6)
    assert where[0, 0].tolist() == pytest.approx([3.5 / 32, 5.5 / 32])


def test_peaks_lie_between_pixels():
    """Gaussians around any place: found to a twentieth of a pixel, in the corner to half a pixel."""
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    for at in ((10.2, 17.9), (5.5, 6.0), (30.7, 4.4), (0.6, 31.3)):
        heat = torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 2)[None, None]
        _, _, where = joints.peaks(heat)
        inside = all(1 < v < 31 for v in at)
        assert (where[0, 0] * 32).tolist() == pytest.approx(at, abs=0.05 if inside else 0.5)


def test_a_limb_twice_as_long_is_implausible():
    """Limits of 200 alike skeletons with small noise: their mean passes, one with a forearm of double length does not."""
    rng = np.random.default_rng(0)
    spots = rng.uniform(0.2, 0.8, (1, 14, 2)) + rng.normal(0, 0.004, (200, 14, 2))
    first, second = np.full((200, 14), 0.9), np.full((200, 14), 0.05)
    limits = joints.measure_limits(JOINTS, first, second, spots)

    middle = spots.mean(0, keepdims=True)
    long = middle.copy()
    elbow, wrist = JOINTS.index("left_elbow"), JOINTS.index("left_wrist")
    long[0, wrist] = long[0, elbow] + 2 * (long[0, wrist] - long[0, elbow])
    assert joints.doubt(joints.joint_measures(JOINTS, first[:1], second[:1], middle), limits)[0] <= 1
    assert joints.doubt(joints.joint_measures(JOINTS, first[:1], second[:1], long), limits)[0] > 1
    doubled = second[:1].copy()
    doubled[0, wrist] = 0.8
    assert joints.doubt(joints.joint_measures(JOINTS, first[:1], doubled, middle), limits)[0] > 1
    lost = first[:1].copy()
    lost[0, wrist] = 0.1
    assert joints.doubt(joints.joint_measures(JOINTS, lost, second[:1], middle), limits)[0] > 1


def test_a_mirroring_reader_reads_a_picture_and_its_mirror_image_alike():
    """Left and right joints change places, nothing else does; a reader that does not mirror tells the two apart."""
    torch.manual_seed(0)
    model = reader.Reader({"sex": ["man", "woman"]}, JOINTS, PARTS, (4, 8, 8, 16), 8).eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    once, both = reader.FigureReader(model, {}), reader.FigureReader(model, {}, mirror=True)
    there, back = both.look(images), both.look(images.flip(3), batch_size=2)
    assert all(torch.allclose(there[k], back[k], atol=1e-5) for k in there if k != "joints")
    for name, other in (("left_wrist", "right_wrist"), ("right_hip", "left_hip"), ("neck", "neck"), ("head", "head")):
        a, b = there["joints"][:, JOINTS.index(name)], back["joints"][:, JOINTS.index(other)]
        assert torch.allclose(a, b.flip(2), atol=1e-5)
    plain, turned = once.look(images), once.look(images.flip(3))
    assert not torch.allclose(plain["sex"], turned["sex"], atol=1e-4)
    assert torch.allclose(there["sex"], (plain["sex"] + turned["sex"]) / 2, atol=1e-5)


def test_a_saved_reader_reads_as_before(tmp_path):
    torch.manual_seed(0)
    model = reader.Reader({"sex": ["man", "woman"], "top": ["red", "blue", "green"]}, JOINTS, PARTS, (4, 8, 8, 16), 8).eval()
    limits = {k: [-1.0, 1.0] for k in joints.measure_names(JOINTS)}
    first = reader.FigureReader(model, limits, sure={"sex": 0.95, "top": 0.94}, mirror=True)
    reader.save_reader(first, tmp_path)
    second = reader.load_reader(tmp_path)
    assert second.mirror and second.verdict is None
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    a, b = first.read(images), second.read(images, batch_size=1)
    assert np.allclose(a.features, b.features, atol=1e-4)
    assert np.allclose(a.defect, b.defect, atol=1e-5)
    claimed = [{"sex": model.attributes["sex"][i], "place": "park"} for i in a.attributes["sex"]]
    assert first.attribute_accuracy(a, claimed).tolist() == [1, 1, 1]
    wrong = [{**c, "top": "none"} for c in claimed]  # read too unsurely to be counted
    assert second.attribute_accuracy(b, wrong).tolist() == [1, 1, 1]
    assert np.isnan(second.attribute_accuracy(b, [{"top": "red"}] * 3)).all()


def test_a_verdict_goes_by_all_that_is_read_and_is_saved_with_the_reader(tmp_path):
    """Its word replaces the defect head's: the logistic function of weights times features, the head's log-odds and log(1 + doubt)."""
    torch.manual_seed(0)
    model = reader.Reader({"sex": ["man", "woman"]}, JOINTS, PARTS, (4, 8, 8, 16), 8).eval()
    limits = {k: [-1.0, 1.0] for k in joints.measure_names(JOINTS)}
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    plain = reader.FigureReader(model, limits).read(images)
    verdict = torch.nn.Linear(plain.features.shape[1] + 2, 1).requires_grad_(False)
    first = reader.FigureReader(model, limits, verdict=verdict)
    x = np.c_[plain.features, np.log(plain.defect / (1 - plain.defect)), np.log1p(plain.doubt)]
    expected = 1 / (1 + np.exp(-(x @ verdict.weight[0].numpy() + verdict.bias.numpy())))
    assert np.allclose(first.read(images).defect, expected, atol=1e-5) and not np.allclose(expected, plain.defect, atol=1e-2)
    reader.save_reader(first, tmp_path, half=True)
    second = reader.load_reader(tmp_path)
    assert torch.equal(second.verdict.weight, verdict.weight), "not halved"
    assert np.allclose(second.read(images).defect, expected, atol=1e-2) and np.array_equal(first.read(images).features, plain.features)


def test_a_dual_scorer_resizes_as_pillow_does(scorers):
    """Pictures of unequal sizes in one batch, and tensors of another size: as Pillow's bicubic resize of each."""
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((50, 40), (32, 32), (20, 70))]
    small = [torch.from_numpy(np.array(p.resize((32, 32), PIL.Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255 for p in pictures]
    expected = scorers["dual"](torch.stack(small), PROMPTS)
    assert scorers["dual"].score_pictures(pictures, PROMPTS) == pytest.approx(expected.tolist(), rel=1e-5)
    first = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1)[None] / 255
    assert scorers["dual"](first, PROMPTS[:1]).item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_a_dual_scorer_says_what_it_is(scorers, tmp_path):
    found = describe(scorers["dual"])
    assert list(found["files"]) == ["model.safetensors"]
    assert found["files"]["model.safetensors"].startswith(found["revision"]) and len(found["files"]["model.safetensors"]) == 64
    assert found["metric"] == "dual" and not found["comparable_across_prompts"]
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are longer than the \d+ tokens that the scorer reads"):
        scorers["dual"](torch.rand(2, 3, 32, 32), ["a man " * 60, "red"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 40),
            r"scorers\.mine\.path: .*model\.safetensors cannot be read as weights",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"scorers\.mine\.path: there is no file .*model\.safetensors"),
        (lambda f: edit(f, width=8), r"scorers\.mine\.path: .*model\.safetensors: .* instead of "),
        (lambda f: edit(f, colour="red"), r"config\.json is not what `limner scorer train` writes \(.*colour"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not what `limner scorer train` writes"),
    ],
)
def test_a_damaged_dual_scorer_is_named(scorers, tmp_path, spoil, said):
    dual.save_scorer(scorers["model"], scorers["dual"].tokenizer, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said):
        dual.load_scorer(tmp_path, "mine")


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
