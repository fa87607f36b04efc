"""Scores of a CLIP tower: published names and shapes, equal to plain torch on the raw checkpoint, bad input by message."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plain_clip as plain
from limner.images import to_tensor
from limner.recipe import ScorerSpec
from limner.scorers import clip, convert, tower
from limner.steps.run import load_scorer
from tiny import LENGTH, tiny_tokenizer

WORDS = len(tiny_tokenizer())
SMALL = {"layers": 2, "patch": 4, "grid": 4, "text_width": 128, "text_layers": 2, "context": LENGTH, "vocabulary": WORDS}
# reduced: two heads of 64 channels, or of 80 as in the image tower of ViT-H; the joint width is ViT-L's, which the aesthetic heads need
SMALL_L, SMALL_H = SMALL | {"width": 128, "joint": 768}, SMALL | {"width": 160, "joint": 64}
PROMPTS = ["a man in red", "", "a woman in blue", "a man in red"]
SIZES = [(16, 16), (33, 20), (21, 50), (90, 61)]

# kind: sizes, activation, and the score of the two unit vectors as the publication has it
COSINES = {
    "clip_cosine": (SMALL_L, "quick_gelu", lambda c: c),
    "clip_score": (SMALL_L, "gelu", lambda c: 100 * max(c, 0)),
    "clip_score_w": (SMALL_L, "quick_gelu", lambda c: 2.5 * max(c, 0)),
    "hps_v1": (SMALL_L, "quick_gelu", lambda c: 100 * c),
    "hps_v2": (SMALL_H, "gelu", lambda c: 100 * c),
    "hps_v2_1": (SMALL_H, "gelu", lambda c: 100 * c),
    "pickscore": (SMALL_H, "gelu", lambda c: float(np.exp(2.0)) * c),
}
PAIRS = {"clip_iqa_quality": ("Good photo.", "Bad photo."), "clip_iqa_sharpness": ("Sharp photo.", "Blurry photo.")}
HEADS = ["aesthetic_v1", "aesthetic_v2"]
DOWN = ("clip_score", "pickscore", *PAIRS)  # odd rests are cut as transformers does


def shape_of(sizes: dict[str, int]) -> convert.Tower:
    return convert.Tower(
        width=sizes["width"], layers=sizes["layers"], heads=2, hidden=4 * sizes["width"], patch=4, image_size=16, text_width=128,
        text_layers=2, text_heads=2, text_hidden=512, context=LENGTH, vocabulary=WORDS, joint=sizes["joint"],
    )  # fmt: skip


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def head_weights(kind: str, seed: int = 5) -> dict[str, torch.Tensor]:
    widths = [768, 1] if kind == "aesthetic_v1" else [768, 1024, 128, 64, 16, 1]
    names = [""] if kind == "aesthetic_v1" else [f"layers.{i}." for i in (0, 2, 4, 6, 7)]
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, inner, outer in zip(names, widths, widths[1:]):
        out[f"{name}weight"] = torch.randn(outer, inner, generator=g) / inner**0.5
        out[f"{name}bias"] = torch.randn(outer, generator=g)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reduced checkpoints in their published nesting, the tokenizer beside them, heads."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_tokenizer().save_pretrained(folder)
    for name, sizes in (("l", SMALL_L), ("h", SMALL_H)):
        torch.save({"state_dict": plain.random_weights(plain.names_and_shapes(**sizes))}, folder / f"{name}.pt")
    for kind in HEADS:
        torch.save(head_weights(kind), folder / f"{kind}.pth")
    return folder


def load(files: Path, kind: str) -> clip.ClipScorer:
    if kind in HEADS:
        return clip.load_scorer(files / f"{kind}.pth", "mine", kind, tower=files / "l.pt", shape=shape_of(SMALL_L))
    sizes, activation, _ = COSINES.get(kind, (SMALL_L, "quick_gelu", None))
    path = files / ("h.pt" if sizes is SMALL_H else "l.pt")
    return clip.load_scorer(path, "mine", kind, shape=shape_of(sizes), activation=activation)  # type: ignore[arg-type]


def by_hand(files: Path, kind: str, picture: Image.Image, prompt: str) -> float:
    """The score in plain torch on the raw file."""
    sizes, act, score = COSINES.get(kind, (SMALL_L, "quick_gelu", None))
    w = torch.load(files / ("h.pt" if sizes is SMALL_H else "l.pt"), weights_only=True)["state_dict"]
    image = plain.image_vector(w, plain.preprocess(picture, 16, kind in DOWN), 2, act)

    def text(words: str) -> torch.Tensor:
        return plain.text_vector(w, tiny_tokenizer()(words, truncation=True, max_length=LENGTH).input_ids, 2, act)

    if kind in PAIRS:
        good, bad = (float(np.exp(100 * float(image @ text(t)))) for t in PAIRS[kind])
        return good / (good + bad)
    if kind in HEADS:
        x, head = image, head_weights(kind)
        for name in [k.removesuffix("weight") for k in head if k.endswith("weight")]:
            x = head[f"{name}weight"] @ x + head[f"{name}bias"]
        return float(x)
    assert score is not None
    return score(float(image @ text("A photo depicts " + prompt if kind == "clip_score_w" else prompt)))


@pytest.mark.parametrize("kind", [*COSINES, *PAIRS, *HEADS])
@pytest.mark.filterwarnings("ignore:.*are longer than the")
def test_scores_equal_plain_torch_on_the_raw_file(files: Path, kind: str) -> None:
    """Images of four sizes, an empty prompt, one repeated; within 1e-4 of the score."""
    scorer = load(files, kind)
    for picture, prompt in zip(pictures(), PROMPTS):
        score = scorer(to_tensor([picture]), [prompt])
        assert score.shape == (1,) and score.dtype == torch.float32
        assert score.item() == pytest.approx(by_hand(files, kind, picture, prompt), rel=1e-4, abs=1e-5)
        assert scorer.range[0] <= score.item() <= scorer.range[1]


@pytest.mark.parametrize("kind", ["clip_score", "clip_score_w", "clip_cosine"])
@pytest.mark.filterwarnings("ignore:.*are longer than the")
def test_negative_cosines(files: Path, tmp_path: Path, kind: str) -> None:
    """With the texts' projection negated the cosine of the first pair is below 0: CLIP score 0, the raw cosine itself."""
    weights = torch.load(files / "l.pt", weights_only=True)["state_dict"]
    torch.save(weights | {"text_projection": -weights["text_projection"]}, tmp_path / "negated.pt")
    scorer = clip.load_scorer(
        tmp_path / "negated.pt",
        "mine",
        kind,
        tokenizer=files,
        shape=shape_of(SMALL_L),
        activation=None if kind.endswith("_w") else "quick_gelu",
    )
    cosine = by_hand(files, "clip_cosine", pictures()[0], PROMPTS[0])
    assert cosine > 0.01
    assert scorer(to_tensor(pictures()[:1]), PROMPTS[:1]).item() == pytest.approx(-cosine if kind == "clip_cosine" else 0.0, rel=1e-4)


def test_plain_texts_differ(files: Path) -> None:
    """So that equal scores mean something."""
    scores = [by_hand(files, "clip_cosine", p, t) for p in pictures()[:2] for t in PROMPTS[:3]]
    assert len({round(s, 3) for s in scores}) == len(scores)


@pytest.mark.parametrize("kind", ["hps_v2", "clip_iqa_quality", "aesthetic_v2"])
def test_a_score_depends_neither_on_batch_mates_nor_on_what_was_scored_before(files: Path, kind: str) -> None:
    images = torch.rand(4, 3, 20, 31, generator=torch.Generator().manual_seed(1))
    together = load(files, kind)(images, PROMPTS)
    for order in ([3, 2, 1, 0], [2], [0, 1]):
        alone = load(files, kind)(images[order], [PROMPTS[i] for i in order])
        assert torch.allclose(alone, together[order], rtol=1e-5, atol=1e-7)


def test_a_prompt_is_encoded_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, seen = load(files, "hps_v1"), []
    encode = scorer.model.get_text_features
    monkeypatch.setattr(scorer.model, "get_text_features", lambda input_ids: (seen.append(len(input_ids)), encode(input_ids=input_ids))[1])
    images = torch.rand(4, 3, 16, 16)
    first = scorer(images, PROMPTS)
    assert torch.equal(scorer(images, PROMPTS), first) and len(seen) == len(set(PROMPTS))


@pytest.mark.filterwarnings("ignore:.*are longer than the")
def test_scorers_of_one_file_share_its_tower(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture goes once through the weights, where the crops are the same, whoever else asks for it; scores are those of one alone."""
    kinds = ["hps_v1", "clip_iqa_quality", "hps_v2", "aesthetic_v2", "clip_score_w"]
    alone, together = ([load(files, k) for k in kinds] for _ in range(2))
    clip.share_towers(together)
    assert len({id(s.model) for s in together}) == 2  # OpenAI's, and LAION's
    sizes, through, counts = [(24, 24), (33, 24), (24, 40)], list[int](), list[int]()  # 16 x 16, and crops of 6 and 10 over: all even
    shown = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)) for i, (w, h) in enumerate(sizes)]
    features = tower.image_features
    monkeypatch.setattr(tower, "image_features", lambda model, pixels: (through.append(len(pixels)), features(model, pixels))[1])
    for pictures_, texts in (([shown[0], shown[2]], ["a man", "red"]), (shown, ["a man", "and", "red"]), ([shown[1]] * 2, ["red", "and"])):
        found = [s.score_pictures(pictures_, texts) for s in together]
        counts.append(sum(through))
        for scorer, values in zip(alone, found):
            before = len(through)
            assert scorer.score_pictures(pictures_, texts) == pytest.approx(values, rel=1e-5)
            del through[before:]
    assert counts == [2 + 2, 4 + 1 + 3, 8 + 2]  # hps_v2 has nobody to share with
    shown.clear()
    del pictures_
    again = [Image.new("RGB", (24, 24), (200, 30, 30))]  # may lie where another lay
    assert together[0].score_pictures(again, ["red"]) == pytest.approx(alone[0].score_pictures(again, ["red"]), rel=1e-5)


@pytest.mark.parametrize("kind", ["hps_v2", "clip_iqa_quality", "aesthetic_v1"])
def test_gradients_reach_the_image(files: Path, kind: str) -> None:
    """And they are right: a small step along them raises the score by their square norm times the step, to 10 %."""
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1
    images.requires_grad_(True)
    scorer = load(files, kind)
    score = scorer(images, PROMPTS[:2], differentiable=True)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    step = 0.01 / gradient.norm()
    ahead = scorer(images.detach() + step * gradient, PROMPTS[:2], differentiable=True)
    assert (ahead - score).sum().item() == pytest.approx((step * gradient.square().sum()).item(), rel=0.1)
    assert not scorer(images, PROMPTS[:2]).requires_grad


def test_the_differentiable_resize_is_near_the_exact_one() -> None:
    """A smooth picture: within 2/255 of Pillow's at every pixel, in units of the deviation."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 97), indexing="ij")
    image = torch.stack([x, y, (x + y) / 2])[None]
    exact, smooth = (tower.preprocess(image, 16, "openai", d) for d in (False, True))
    assert (exact - smooth).abs().max() < 2 / 255 / min(tower.STD)


def folder_of(files: Path, folder: Path, end: int | None = None) -> Path:
    """The reduced ViT-H file as a folder of transformers, in PickScore's layout."""
    w = torch.load(files / "h.pt", weights_only=True)["state_dict"]
    convert.openai_to_clip(w, "gelu", "x", shape_of(SMALL_H)).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["eos_token_id"] = end or WORDS - 1
    (folder / "config.json").write_text(json.dumps(values))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("end", [None, 2])
def test_a_folder_scores_as_the_single_file(files: Path, tmp_path: Path, end: int | None) -> None:
    """Also with the end token 2 of old configs, which means the largest id."""
    folder = folder_of(files, tmp_path / "model", end)
    images, expected = to_tensor(pictures()[3:]), by_hand(files, "pickscore", pictures()[3], PROMPTS[0])
    for kind in ("pickscore", "clip"):
        scorer = clip.load_scorer(folder, "mine", kind, shape=shape_of(SMALL_H))
        assert scorer(images, PROMPTS[:1]).item() == pytest.approx(expected, rel=1e-4)
        assert set(scorer.files) == {"model.safetensors"} and len(scorer.files["model.safetensors"]) == 64


def test_what_scorers_declare(files: Path) -> None:
    for kind in [*COSINES, *PAIRS, *HEADS]:
        scorer = load(files, kind)
        assert scorer.name == "mine" and scorer.higher_is_better and scorer.range[0] < scorer.range[1]
        assert scorer.needs_prompt == (kind in COSINES)
        assert scorer.comparable_across_prompts == (kind not in ("hps_v1", "hps_v2", "hps_v2_1", "pickscore"))
        named = kind if kind in HEADS or not scorer.comparable_across_prompts else f"{kind}_vit_128_4_16"
        assert scorer.metric == named and scorer.revision.startswith(f"{named}@") and len(scorer.files) == (2 if kind in HEADS else 1)
    names = [t.backbone for t in (convert.VIT_L_14, convert.VIT_H_14, convert.Tower(image_size=336))]
    assert names == ["vit_l_14", "vit_h_14", "vit_l_14_336"]


@pytest.mark.parametrize("kind", [*PAIRS, *HEADS])
def test_no_prompt_where_none_is_needed(files: Path, kind: str) -> None:
    images, scorer = to_tensor(pictures()[1:2]), load(files, kind)
    assert torch.equal(scorer(images), scorer(images, ["a man"])) and torch.equal(scorer(images), scorer(images, [None]))


def test_a_missing_prompt_is_an_error(files: Path) -> None:
    scorer, images = load(files, "hps_v2"), torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="scorer mine: hps_v2 needs a prompt for every image; give one"):
        scorer(images)
    with pytest.raises(ValueError, match=r"needs a prompt for every image \(image 1 has none\)"):
        scorer(images, ["a man", None])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        scorer(images, ["a man"])


def test_long_prompts_are_cut_and_counted_once(files: Path) -> None:
    scorer, images = load(files, "hps_v1"), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    long = ["a man in red and " * 5, "a man", "a woman in blue and " * 5]
    with pytest.warns(UserWarning, match=f"2 of 3 prompts are longer than the {LENGTH} tokens that the scorer reads"):
        scores = scorer(images, long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scorer(images, long), scores)
        same = load(files, "hps_v1")(images[1:2], long[1:2])
    assert torch.allclose(scores[1:2], same, rtol=1e-5)


def test_settings_reach_the_loader(files: Path) -> None:
    """Through a recipe's spec: a file of unpinned size, tokenizer elsewhere; a head with its tower."""
    alone = files / "alone"
    alone.mkdir()
    shutil.copy(files / "l.pt", alone / "l.pt")
    spec = ScorerSpec(kind="clip_cosine", path=str(alone / "l.pt"), tokenizer=str(files), activation="quick_gelu")
    scorer = load_scorer("mine", spec)
    image = to_tensor(pictures()[2:3])
    assert scorer(image, ["a man"]).item() == pytest.approx(by_hand(files, "clip_cosine", pictures()[2], "a man"), rel=1e-4)
    with pytest.raises(
        ValueError, match=r"scorers\.mine\.tokenizer: .*alone has no tokenizer; give a folder with tokenizer\.json, or with vocab"
    ):
        load_scorer("mine", ScorerSpec(kind="clip_cosine", path=spec.path, activation="quick_gelu"))
    with pytest.raises(ValueError, match=r"scorers\.mine\.activation: not set, and .*l\.pt does not tell it: quick_gelu if"):
        load_scorer("mine", ScorerSpec(kind="clip_cosine", path=spec.path))
    with pytest.raises(ValueError, match=r"scorers\.mine\.activation: gelu, but hps_v1 was trained with quick_gelu"):
        load_scorer("mine", ScorerSpec(kind="hps_v1", path=spec.path, activation="gelu"))
    with pytest.raises(ValueError, match=r"scorers\.mine\.tower: not set; aesthetic_v1 is a head over OpenAI's CLIP ViT-L/14"):
        load_scorer("mine", ScorerSpec(kind="aesthetic_v1", path=str(files / "aesthetic_v1.pth")))


def test_the_wrong_checkpoint_lists_the_first_keys(files: Path, tmp_path: Path) -> None:
    def refused(path: Path, kind: str, match: str, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            clip.load_scorer(path, "mine", kind, **options)  # type: ignore[arg-type]

    refused(files / "h.pt", "hps_v1", r"scorers\.mine\.path: .*h\.pt does not fit hps_v1: text_projection is 128x64 instead of 128x768; .*"
            r"visual\.proj is 160x64 instead of 128x768; .* and \d+ more", shape=shape_of(SMALL_L))  # fmt: skip
    refused(files / "l.pt", "hps_v2", r"does not fit hps_v2: text_projection is 128x768 instead of 1024x1024;")
    refused(files / "aesthetic_v2.pth", "hps_v2", r"logit_scale scalar is missing; .*layers\.0\.weight 1024x768 is unexpected")
    refused(
        files / "aesthetic_v2.pth",
        "clip_score",
        r"visual\.conv1\.weight, .* missing; it holds layers\.0\.weight 1024x768",
        activation="gelu",
    )
    under = {"tower": files / "l.pt", "shape": shape_of(SMALL_L)}
    refused(files / "aesthetic_v1.pth", "aesthetic_v2", r"layers\.0\.weight 1024x768 is missing; .*; weight 1x768 is unexpected", **under)
    folder = folder_of(files, tmp_path / "model")
    refused(folder, "pickscore", r"model does not fit pickscore: logit|model does not fit pickscore: .* is .* instead of ")
    refused(folder, "hps_v1", r"has the activation gelu; hps_v1 expects quick_gelu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript")
def test_unreadable_files(files: Path, tmp_path: Path) -> None:
    whole = (files / "l.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.pt").write_bytes(b"<html>not found</html>" * 9)
    (tmp_path / "junk.safetensors").write_bytes(b"<html>not found</html>" * 9)
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "junk.pt", "junk.safetensors", "empty.pt"):
        with pytest.raises(
            ValueError, match=rf"scorers\.mine\.path: .*{name} cannot be read as weights; is it corrupt, or a download cut off"
        ):
            clip.load_scorer(tmp_path / name, "mine", "hps_v1")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"holds a pickled object \(torch\.nn\.modules\.linear\.Linear\).*write its state_dict\(\)"):
        clip.load_scorer(tmp_path / "module.pt", "mine", "hps_v1")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"is a TorchScript program, and only tensors are read\. .*state_dict\(\) with torch\.save"):
        clip.load_scorer(tmp_path / "program.pt", "mine", "hps_v1")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors by name; expected a state_dict"):
        clip.load_scorer(tmp_path / "list.pt", "mine", "hps_v1")
    with pytest.raises(ValueError, match=r"there is no file .*none\.pt"):
        clip.load_scorer(tmp_path / "none.pt", "mine", "hps_v1")
    with pytest.raises(ValueError, match=r"scorers\.mine\.kind: 'hps'; expected one of clip, clip_cosine, "):
        clip.load_scorer(files / "l.pt", "mine", "hps")


def test_a_tokenizer_of_another_model(files: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"scorers\.mine\.tokenizer: the tokenizer has {WORDS + 1} tokens .* the weights have {WORDS}"):
        clip.load_scorer(files / "l.pt", "mine", "hps_v1", tokenizer=tmp_path, shape=shape_of(SMALL_L))
