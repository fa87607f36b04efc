"""The renderer and its truth: what is claimed of a picture can be found in it."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize

pytest.importorskip("anny", reason="the renderer needs the extra `figures`")

from limner.figures import captions, defects, lessons, make, scene
from limner.figures.body import JOINTS, PARTS, build_meshes
from limner.figures.fitting import cosines
from limner.figures.render import camera, cast, turn
from limner.figures.teach import BODY, learn_verdict, reword, to_input, train_reader
from limner.models.stable_diffusion import wrap
from limner.recipe import Sampler
from limner.scorers.joints import measure_names as joint_names
from limner.scorers.joints import peaks
from limner.scorers.reader import FigureReader, Reader, evidence
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def drawn() -> list[make.Drawn]:
    return list(make.draw("reader", 0, 24, defects=True))


@pytest.fixture(scope="module")
def figures() -> list[scene.Figure]:
    rng = np.random.default_rng(7)
    return [scene.sample(rng) for _ in range(300)]


def test_everyone_is_adult_and_every_value_occurs(figures):
    assert min(f.age for f in figures) >= 0.66
    for name, values in scene.ATTRIBUTES.items():
        assert {getattr(f, name) for f in figures} == set(values)


def test_clothes_cover_torso_hips_and_thighs(figures):
    """Skin is seen on hands, neck, face, and at most forearms and calves."""
    for f in figures:
        colours = scene.palette(f)
        skin = scene.SKIN[f.skin]
        assert skin not in (colours["torso"], colours["hips"], colours["thigh"], colours["upperarm"])


def test_the_whole_figure_is_in_the_frame_with_its_feet_low(figures):
    for f, mesh in zip(figures[:32], build_meshes(figures[:32])):
        x0, z0, side = camera(f, mesh)
        v = turn(mesh.vertices, f.yaw)
        assert x0 - side / 2 <= v[:, 0].min() and v[:, 0].max() <= x0 + side / 2
        assert z0 <= v[:, 2].min() and v[:, 2].max() <= z0 + side
        lowest = 1 - (v[:, 2].min() - z0) / side
        assert lowest > f.horizon, "the feet stand on the ground, below the line where it ends"


def test_a_figure_depends_on_its_number_only():
    """Numbers 3 to 6 of a split are the same pictures, whatever else is drawn."""
    some = [make.png(d.sound.image) for d in make.draw("test", 3, 6)]
    more = [make.png(d.sound.image) for d in make.draw("test", 0, 8)]
    assert some == more[3:6]


def test_splits_share_no_attributes(figures):
    """A split owns its part of the attribute space, so its captions occur in no other."""
    seen = {}
    for split in ("train", "validation", "test", "scorer"):
        for d in make.draw(split, 0, 12):
            assert make.split_of(d.figure) == split
            key = tuple(d.figure.attributes().values())
            assert seen.setdefault(key, split) == split


def test_visible_joints_lie_on_the_figure(drawn):
    """At 64 pixels a visible joint has a figure pixel within one pixel."""
    for d in drawn:
        body = d.sound.part >= 0
        for k in np.flatnonzero(d.sound.visible):
            x, y = (d.sound.joints[k] * 64).astype(int)
            near = body[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert near.any(), JOINTS[k]


def test_parts_have_their_colours(drawn):
    """Where the part mask says torso, the picture has the shirt's hue: its strongest channel is the shirt's."""
    for d in drawn:
        shirt = np.array(scene.CLOTH[d.figure.top])
        if np.ptp(shirt) < 60:
            continue  # black and white have no hue
        torso = d.sound.image[d.sound.part == PARTS.index("torso")].astype(float)
        assert torso.mean(0).argmax() == shirt.argmax()


def test_defects_change_the_picture_where_the_mask_says(drawn):
    for d in drawn:
        wrong = d.defective
        assert wrong.kind in defects.DEFECTS
        assert wrong.mask.sum() >= defects.MIN_PIXELS or wrong.kind == "smeared_texture"
        changed = np.abs(wrong.picture.image.astype(int) - d.sound.image).max(-1) > 24
        near = np.zeros_like(changed)
        rows, cols = np.nonzero(wrong.mask)
        for dy in (-2, -1, 0, 1, 2):
            for dx in (-2, -1, 0, 1, 2):
                near[(rows + dy).clip(0, 63), (cols + dx).clip(0, 63)] = True
        assert changed[wrong.mask].any()
        if wrong.kind in ("extra_limb", "missing_limb"):
            assert near[changed].mean() > 0.9, wrong.kind


@pytest.mark.parametrize("kind", defects.DEFECTS)
def test_each_defect_says_what_it_did_to_the_joints(kind):
    """An extra limb adds joints, a missing one takes the limb's end away; the others add none."""
    rng = np.random.default_rng(3)
    for d in make.draw("reader", 30, 33):
        mesh = build_meshes([d.figure])[0]
        sound = cast(d.figure, mesh, 64)
        wrong = defects.make_defective(d.figure, mesh, sound, rng, kind)
        assert wrong.kind == kind
        if kind == "missing_limb":
            end = "head" if wrong.limb == "head" else f"{wrong.limb.split('_')[0]}_{'wrist' if 'arm' in wrong.limb else 'ankle'}"
            assert not wrong.picture.visible[JOINTS.index(end)]
        if kind != "extra_limb":
            assert wrong.extra_joints == []


def test_captions_claim_only_what_is_true(figures):
    """Every claimed value's words are in the caption, and every word with an attribute speaks of a claimed one."""
    for i, f in enumerate(figures[:100]):
        caption = captions.describe(f.attributes(), i)
        words = caption.text.split()
        assert len(words) == len(caption.words)
        assert {a for a in caption.words if a} == set(caption.attributes)
        assert {"sex", "top", "bottom", "pose", "place", "sleeves", "legwear"} <= set(caption.attributes)
        assert all(caption.attributes[n] == getattr(f, n) for n in caption.attributes)
        assert f.sex in words and f.top in words and f.bottom in words


def test_swapped_words_are_where_the_captions_differ(figures):
    """With as many words as the right caption, exactly the listed ones differ."""
    rng = np.random.default_rng(0)
    compared = 0
    for i, f in enumerate(figures[:100]):
        right, wrong = captions.describe(f.attributes(), i).text.split(), captions.swap(f, i, rng)
        words = wrong.text.split()
        assert wrong.wrong_words
        if len(words) == len(right):
            different = {k for k, (a, b) in enumerate(zip(right, words)) if a != b}
            assert different <= set(wrong.wrong_words)
            compared += 1
        assert wrong.region
    assert compared > 30


def test_rows_decode_to_what_was_drawn(drawn):
    row = make.row("reader", drawn[0])
    assert (np.array(Image.open(io.BytesIO(row["image"]))) == drawn[0].sound.image).all()
    assert row["swapped_prompt"] != row["prompt"]


def test_heatmaps_peak_at_the_joints_and_mirror_with_them():
    """A joint at (0.25, 0.5) of a 32-pixel map peaks at column 8, row 16; mirrored, the other side's joint peaks at column 24."""
    left, right = JOINTS.index("left_wrist"), JOINTS.index("right_wrist")
    heat = lessons.heatmaps([(left, 8.5 / 32, 16.5 / 32)])
    assert heat[left].argmax() == 16 * 32 + 8 and heat[left].max() == pytest.approx(1)
    assert heat[right].max() == 0
    mirrored = lessons.heatmaps(lessons.mirror_joints([(left, 8.5 / 32, 16.5 / 32)]))
    assert mirrored[right].argmax() == 16 * 32 + 23


def _row(**changes):
    """A row's joints lie side by side on pixel centres of the heatmap; all seen but the head, which hides; the defect as given."""
    seen = [k for k in range(14) if k != 0]
    row = {
        "joints": [v for k in range(14) for v in ((k + 0.5) / 32, 16.5 / 32)],
        "visible": [k in seen for k in range(14)],
        "defect_limb": "",
    }
    return {**row, "defect_joints": [{"joint": k, "x": (k + 0.5) / 32, "y": 16.5 / 32} for k in seen], **changes}


def test_joints_of_a_wrong_limb_are_gone_hidden_ones_are_not():
    wrist, elbow = JOINTS.index("left_wrist"), JOINTS.index("left_elbow")
    sound, twisted = lessons._joints(_row(defect="twisted_limb", defect_limb="left_arm"))
    assert [k for k, *_ in sound] == list(range(14))
    assert [k for k, *_ in twisted] == [k for k in range(14) if k not in (elbow, wrist)]
    smeared = _row(defect="smeared_texture")
    smeared["defect_joints"] = [j for j in smeared["defect_joints"] if j["joint"] != wrist]
    assert [k for k, *_ in lessons._joints(smeared)[1]] == [k for k in range(14) if k != wrist]


def test_a_second_limb_has_its_joints_twice():
    wrist = JOINTS.index("left_wrist")
    row = _row(defect="extra_limb", defect_limb="left_arm")
    row["defect_joints"].append({"joint": wrist, "x": 24.5 / 32, "y": 4.5 / 32})
    heat = lessons.heatmaps(lessons._joints(row)[1])
    first, second, _ = peaks(torch.from_numpy(heat)[None])
    assert second[0, wrist] > 0.8 and sum(second[0] > 0.1) == 1 and (first > 0.8).all()


def test_a_second_limb_is_seen_where_the_first_is_hidden():
    """In profile one wrist is behind the body; that of the limb that is too much is not, and stands in the row once."""
    wrist = JOINTS.index("left_wrist")
    row = _row(defect="extra_limb", defect_limb="left_arm")
    row["visible"][wrist] = False
    row["defect_joints"] = [j for j in row["defect_joints"] if j["joint"] != wrist] + [{"joint": wrist, "x": 24.5 / 32, "y": 4.5 / 32}]
    places = [(round(x * 32, 3), round(y * 32, 3)) for k, x, y in lessons._joints(row)[1] if k == wrist]
    assert places == [(wrist + 0.5, 16.5), (24.5, 4.5)]


def test_a_shift_moves_by_pixels_and_repeats_the_edge():
    x = np.arange(9).reshape(3, 3)
    assert lessons.shift(x, 1, 0).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert lessons.shift(x, 0, -1).tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def _said(text):
    """What a caption says, read with patterns of this test's own."""
    find = lambda pattern, where=text: tuple(re.findall(pattern, where))  # noqa: E731
    pose = next(i for i, p in enumerate(["stand", "walk", "run|jog", "knee", "wav", "cheer|arms", "kick", "point"]) if find(p))
    place = next(i for i, p in enumerate(["park|grass", "beach|sand", "city|street", "room|indoors", "snow"]) if find(p))
    colours = "red|blue|green|yellow|white|black|purple|pink"
    return {
        "sex": find(r"\b(?:wo)?man"), "hair": find(r"(\w+) hair"), "length": find(r"with (short|long) "),
        "clothes": find(colours, re.sub(r"\w+ hair", "", text)), "sleeves": bool(find("long-sleeved|sweater")),
        "legs": bool(find("shorts")), "pose": pose, "place": place,
    }  # fmt: skip


def test_a_swap_changes_one_named_attribute():
    rng = np.random.default_rng(0)
    attributes = np.array([0, 2, 0, 2, 1, 3, 1, 4, 2])
    for _ in range(40):
        right, *wrong = (_said(t) for t in reword(attributes, rng, 3))
        assert right["sex"] == ("man",) and right["clothes"] == ("green", "yellow") and right["place"] == 2
        changed = [[k for k in right if other[k] != right[k]] for other in wrong]
        assert all(len(c) == 1 for c in changed)
        assert all(sum(x != y for x, y in zip(o["clothes"], right["clothes"])) <= 1 for o in wrong)


def test_each_cycle_of_the_learning_rate_is_half_as_high():
    """Two cycles of 8 and 4 steps, no warm-up: cosines from 1 and from a half, both to zero; then nothing."""
    factor = cosines([8, 4], warmup=1)
    assert [factor(s) for s in (0, 4, 8, 10, 12)] == pytest.approx([1, 0.5, 0.5, 0.25, 0])
    assert factor(7) == pytest.approx((1 - math.cos(math.pi / 8)) / 2)
    assert cosines([8], warmup=4)(1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 8)) / 2)


def test_labelled_samples_teach_the_defect_head(tmp_path):
    """Drawn pictures and their copies are equal here, so only the labelled ones (a dark spot = flawed) can tell."""
    grey = np.full((2, 4, 64, 64, 3), 128, np.uint8)
    drawn = lessons.Lessons(
        ["a man"] * 4, ["a woman"] * 4, np.zeros((4, len(scene.ATTRIBUTES)), int), {"raw": grey}, [([], [])] * 4,
        np.zeros((4, 64, 64), bool), np.zeros((4, 64, 64), np.uint8),
    )  # fmt: skip
    seen = np.full((6, 64, 64, 3), 128, np.uint8)
    seen[:3, 20:44, 20:44] = 10
    model = train_reader(drawn, tmp_path, cycles=[60], batch=8, channels=(4, 8, 8, 8), labelled=(seen, np.array([1, 1, 1, 0, 0, 0])))
    with torch.no_grad():
        said = model(to_input(list(seen)))["defect"]
    assert said[:3].min() > said[3:].max() + 1


def test_a_verdict_is_the_penalised_logistic_regression_of_the_labels():
    """Against scipy's minimiser on the same objective written in numpy; half-sure labels count as such, real pictures as sound."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Reader({"sex": ["man", "woman"]}, JOINTS, BODY, (4, 8, 8, 8), 8).eval()
    reader = FigureReader(model, {k: [-1.0, 1.0] for k in joint_names(JOINTS)})
    samples, sound = rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8), rng.integers(0, 99, (3, 64, 64, 3), dtype=np.uint8)
    wrong = rng.random(12).round(1)
    verdict = learn_verdict(reader, samples, wrong, sound, penalty=0.05)
    x = evidence(reader.read(to_input([*samples, *sound]))).double().numpy()
    z, y = (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-3), np.r_[wrong, 0, 0, 0]

    def objective(w):
        logits = z @ w[:-1] + w[-1]
        return (np.logaddexp(0, logits) - y * logits).mean() + 0.05 * (w[:-1] ** 2).sum()

    best = minimize(objective, np.zeros(z.shape[1] + 1), method="L-BFGS-B", options={"maxfun": 10**6, "ftol": 1e-13}).x
    said = verdict(torch.from_numpy(x).float())[:, 0].numpy()
    assert np.allclose(said, z @ best[:-1] + best[-1], atol=5e-3)
    assert reader.verdict is None, "finish_reader gives it, after it was learned"


def test_a_picture_and_its_copy_take_the_same_path(tmp_path):
    """Copies equal to their originals come out equal; t = 0 is the autoencoder alone; a second call needs no model."""
    rng = np.random.default_rng(3)
    one = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    both = np.stack([one, one])
    pipeline = wrap(tiny_pipeline(), device="cpu")
    sampler = Sampler(num_inference_steps=10, guidance_scale=1.0)

    def path(model):
        found = lessons.Lessons(["a man"] * 3, ["a woman"] * 3, np.zeros((3, 1), int), {"raw": both}, [], *np.zeros((2, 3, 16, 16)))
        lessons.add_paths(found, model, tmp_path / "paths", 0, sampler, batch=1)
        return found.images["recon"]

    made = path(pipeline)
    assert (made[0] == made[1]).all()
    x = torch.from_numpy(one).permute(0, 3, 1, 2).float() / 255
    alone = pipeline.decode_latents(pipeline.encode_images(x)).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    assert (made[0, 0] == alone[0]).all() and (made[0, 1] != alone[1]).any()  # batches of one: t = 0, 100, 200
    assert (path(None) == made).all()
