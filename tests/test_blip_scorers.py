"""ImageReward and CycleReward: published names and shapes, equal to plain torch on the raw checkpoint, bad input by message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plain_blip as plain
from limner.images import to_tensor
from limner.recipe import ScorerSpec
from limner.scorers import blip
from limner.scorers.steps import answers
from limner.scorers.weights import tensors_of
from limner.steps.run import load_scorer
from plain_clip import preprocess

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    "man",
    "red",
]
LARGE = {"width": 1024, "layers": 24, "patch": 16, "grid": 14, "text_width": 768, "text_layers": 12, "hidden": 3072, "vocabulary": 30524}
SMALL = {"width": 32, "layers": 2, "patch": 8, "grid": 2, "text_width": 24, "text_layers": 2, "hidden": 40, "vocabulary": len(WORDS)}
SIZES = blip.Sizes(
    width=32, layers=2, heads=4, patch=8, image_size=16, text_width=24, text_layers=2, text_heads=3, text_hidden=40, vocabulary=len(WORDS)
)
KINDS = ["image_reward", "cycle_reward"]
PROMPTS = ["a man in red", "", "red", "a man in red"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for kind in KINDS:
        torch.save(plain.random_weights(plain.names_and_shapes(**SMALL, gelu=kind == "cycle_reward")), folder / f"{kind}.pt")
    return folder


def load(files: Path, kind: str) -> blip.BlipScorer:
    return blip.load_scorer(files / f"{kind}.pt", "mine", kind, sizes=SIZES)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((16, 16), (33, 20), (21, 50), (90, 61))]


def by_hand(files: Path, kind: str, picture: Image.Image, prompt: str) -> float:
    """Tokens by hand as well: words of the list whole, others letter by letter."""
    ids = [2]
    for word in prompt.split():
        pieces = [word] if word in WORDS else [word[0], *("##" + c for c in word[1:])]
        ids += [WORDS.index(p) for p in pieces]
    ids = [*ids[: blip.REWARDS[kind].tokens - 1], 3]
    w = torch.load(files / f"{kind}.pt", weights_only=True)
    return plain.score(w, preprocess(picture, 16, down=False), ids, 4, 3, kind == "cycle_reward")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_plain_torch_on_the_raw_file(files: Path, kind: str) -> None:
    """Pictures of four sizes and texts of unequal lengths in one batch, an empty text among them."""
    scorer = load(files, kind)
    expected = [by_hand(files, kind, p, t) for p, t in zip(pictures(), PROMPTS)]
    assert len({round(e, 3) for e in expected}) == len(expected)
    assert scorer.score_pictures(pictures(), PROMPTS) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for picture, prompt, value in zip(pictures(), PROMPTS, expected):
        score = scorer(to_tensor([picture]), [prompt])
        assert score.dtype == torch.float32 and score.tolist() == pytest.approx([value], rel=1e-4, abs=1e-5)
        assert scorer.range[0] <= value <= scorer.range[1]


@pytest.mark.parametrize("kind", KINDS)
def test_published_files_fit(kind: str) -> None:
    """BLIP-large with BERT-base, flat names, with the position ids that the file has; about 446 M parameters."""
    published = plain.names_and_shapes(**LARGE, gelu=kind == "cycle_reward")
    weights = tensors_of({k: torch.empty(s, device="meta", dtype=torch.float32) for k, s in published.items()}, "x")
    model = blip.build(kind, weights, "x")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {k: s for k, s in published.items() if "position_ids" not in k}
    assert 4.4e8 < sum(v.numel() for v in model.state_dict().values()) < 4.9e8
    assert {v.device.type for v in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_neither_on_batch_mates_nor_on_padding(files: Path, kind: str) -> None:
    scorer = load(files, kind)
    together = answers(scorer, pictures(), PROMPTS)
    for order in ([3, 2, 1, 0], [2], [0, 1]):
        alone = answers(scorer, [pictures()[i] for i in order], [PROMPTS[i] for i in order])
        assert alone == pytest.approx([together[i] for i in order], rel=1e-5, abs=1e-5)  # scores go through 0


def test_the_range_is_reached(files: Path) -> None:
    """With the last norm's output at the best corner of its sphere the linear head gives the upper bound."""
    scorer = load(files, "image_reward")
    w = torch.load(files / "image_reward.pt", weights_only=True)
    vector = torch.eye(24)
    bias = torch.zeros(24)
    for n in (0, 2, 4, 6, 7):
        vector, bias = w[f"mlp.layers.{n}.weight"] @ vector, plain.linear(bias, w, f"mlp.layers.{n}")
    at = "blip.text_encoder.encoder.layer.1.output.LayerNorm"
    direction = vector[0] * w[at + ".weight"]
    token = direction / direction.norm() * 24**0.5 * w[at + ".weight"] + w[at + ".bias"]
    best = (float(vector[0] @ token + bias) - 0.16717362830052426) / 1.0333394966054072
    assert scorer.range[1] == pytest.approx(best, rel=1e-4) and load(files, "cycle_reward").range == (-float("inf"), float("inf"))


def test_gradients_reach_the_image(files: Path) -> None:
    images = (torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1).requires_grad_(True)
    scorer = load(files, "image_reward")
    score = scorer(images, PROMPTS[:2], differentiable=True)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    step = 0.003 / gradient.norm()
    ahead = scorer(images.detach() + step * gradient, PROMPTS[:2], differentiable=True)
    assert (ahead - score).sum().item() == pytest.approx((step * gradient.square().sum()).item(), rel=0.1)
    assert not scorer(images, PROMPTS[:2]).requires_grad


def test_long_prompts_are_cut_and_counted(files: Path) -> None:
    scorer, long = load(files, "image_reward"), "man " * 40
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 35 tokens that the scorer reads"):
        found = scorer.score_pictures(pictures()[:2], [long, "red"])
    assert found[0] == pytest.approx(by_hand(files, "image_reward", pictures()[0], long), rel=1e-4)


def test_bad_files(files: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"image_reward\.pt does not fit cycle_reward: mlp\.layers\.8\.weight 1x16 is missing; .*mlp\.layers\.7"
    ):
        blip.load_scorer(files / "image_reward.pt", "mine", "cycle_reward", sizes=SIZES)
    spec = ScorerSpec(kind="image_reward", path=str(files / "image_reward.pt"), tokenizer=str(files))
    with pytest.raises(ValueError, match=r"does not fit image_reward: blip\.visual_encoder\.cls_token is 1x1x32 instead of 1x1x1024; "):
        load_scorer("mine", spec)
    with pytest.raises(ValueError, match=r"scorers\.mine\.tokenizer: .* has no tokenizer; give a folder with vocab\.txt"):
        blip.load_scorer(files / "image_reward.pt", "mine", "image_reward", tokenizer=tmp_path)
    small = blip.Sizes(vocabulary=10)
    with pytest.raises(ValueError, match=r"scorers\.mine\.tokenizer: .* has \d+ tokens, the weights 10; expected bert-base-uncased's"):
        blip.load_scorer(files / "image_reward.pt", "mine", "image_reward", sizes=small)
    with pytest.raises(ValueError, match=r"image_reward needs a prompt for every image \(image 0 has none\)"):
        load(files, "image_reward")(torch.rand(1, 3, 16, 16), [None])  # type: ignore[list-item]
