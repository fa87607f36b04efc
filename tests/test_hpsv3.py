"""HPS v3: published names and shapes, equal to plain torch on the raw checkpoint, bad input by message."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

import plain_qwen as plain
from limner.images import to_tensor
from limner.recipe import ScorerSpec
from limner.scorers import hpsv3
from limner.scorers.weights import tensors_of
from limner.steps.run import load_scorer

MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = ["<unk>", *MARKS, "system", "user", "You", "are", "helpful", "a", "man", "in", "red", "rate", ":", "."]
SMALL = {"depth": 2, "embed": 16, "layers": 2, "width": 32, "heads": 4, "kv": 2, "inner": 48, "vocabulary": len(WORDS) + 1}
INSTRUCTION = "\nrate the image of: {prompt}\nrate it: "


def config_of(depth: int, embed: int, layers: int, width: int, heads: int, kv: int, inner: int, vocabulary: int) -> dict[str, object]:
    """config.json as Qwen2-VL's folders have it."""
    sections = {128: [16, 24, 24], 8: [2, 1, 1]}[width // heads]
    return {
        "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "vocab_size": vocabulary - 1, "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": False,
        "image_token_id": WORDS.index("<|image_pad|>"), "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": {
            "depth": depth, "embed_dim": embed, "mlp_ratio": 4, "num_heads": 2 if embed == 16 else 16, "in_chans": 3, "hidden_size": width,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    folder = tmp_path_factory.mktemp("weights")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", additional_special_tokens=MARKS).save_pretrained(folder / "qwen")
    (folder / "qwen/config.json").write_text(json.dumps(config_of(**SMALL)))
    save_file(plain.random_weights(plain.names_and_shapes(**SMALL)), folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(INSTRUCTION)
    return folder


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((64, 64), (50, 90))]


def test_scores_equal_plain_torch_on_the_raw_file(files: Path) -> None:
    """A square picture is made 448 x 448; one of 50 x 90 pixels 336 x 616: both sides up to whole 28s."""
    scorer = load_scorer("mine", ScorerSpec(kind="hps_v3", path=str(files / "HPSv3.safetensors"), tower=str(files / "qwen")))
    assert isinstance(scorer, hpsv3.Hpsv3Scorer)
    from safetensors.torch import load_file

    weights, expected = load_file(files / "HPSv3.safetensors"), []
    for picture, size, prompt in zip(pictures(), ((448, 448), (336, 616)), ("a man in red", "two dogs")):
        pads = "<|image_pad|>" * (size[0] * size[1] // 28**2)
        text = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
        text += INSTRUCTION.replace("{prompt}", prompt)
        pieces = re.findall(r"<\|\w+\|>|\w+|(?:(?!<\|)[^\w\s])+", text)
        ids = [WORDS.index(p) if p in WORDS else 0 for p in pieces] + [len(WORDS)]
        expected.append(plain.score(weights, picture, size, ids, WORDS.index("<|image_pad|>"), 4, 2, 2))
        assert scorer.judge(picture, prompt) == pytest.approx(expected[-1], rel=1e-4, abs=1e-5)
    assert abs(expected[0][0] - expected[1][0]) > 1e-2
    assert scorer.score_pictures(pictures(), ["a man in red", "two dogs"]) == pytest.approx([e[0] for e in expected], rel=1e-4, abs=1e-5)
    assert scorer(to_tensor(pictures()[:1]), ["a man in red"]).item() == pytest.approx(expected[0][0], rel=1e-4, abs=1e-5)
    assert scorer.metric == "hps_v3" and not scorer.comparable_across_prompts and scorer.revision.startswith("hps_v3@")


def test_published_files_fit() -> None:
    """On the meta device, in bfloat16 with the head in float32: 8.3 billion parameters, of which the unused lm_head's half is left out."""
    published = plain.names_and_shapes(**plain.PUBLISHED)
    stored = {k: torch.empty(s, device="meta", dtype=torch.float32 if "rm_head" in k else torch.bfloat16) for k, s in published.items()}
    model, head = hpsv3.build(Qwen2VLConfig(**config_of(**plain.PUBLISHED)), tensors_of(stored, "x", as_stored=True), "x")  # type: ignore[arg-type]
    held = sum(v.numel() for m in (model, head) for v in m.state_dict().values())
    assert held == sum(v.numel() for k, v in stored.items() if k != "lm_head.weight") and 7.5e9 < held < 8e9
    assert {v.dtype for v in model.state_dict().values()} == {torch.bfloat16} and model.config.text_config.vocab_size == 151658


@pytest.mark.parametrize(
    ("size", "expected"), [((448, 448), (448, 448)), ((1024, 1024), (448, 448)), ((1000, 700), (532, 364)), ((10, 10), (448, 448))]
)
def test_sizes_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """1000 x 700: divided by sqrt(1000 · 700 / 200704) = 1.8676 they are 535.5 and 374.8, down to whole 28s 532 and 364."""
    assert hpsv3.fit(*size) == expected


def test_bad_files(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scorers\.mine\.tower: not set; expected the folder of Qwen2-VL-7B-Instruct"):
        hpsv3.load_scorer(files / "HPSv3.safetensors", "mine", tower=None)
    with pytest.raises(ValueError, match=r"has neither instruction\.txt nor data_collator_qwen\.py; HPS v3 needs the words"):
        hpsv3.load_scorer(tmp_path / "HPSv3.safetensors", "mine", tower=files / "qwen")
    lines = ["import nothing", r'INSTRUCTION = "\nrate {text_prompt}"', r'prompt_with_special_token = "\nso: <|Reward|>\nEND"']
    (tmp_path / "data_collator_qwen.py").write_text("\n".join(lines))
    assert hpsv3.read_instruction(tmp_path, "x") == "\nrate {prompt}\nso: "
    (tmp_path / "instruction.txt").write_text("rate it")
    with pytest.raises(ValueError, match=r"has no place for the prompt; expected \{prompt\} in it"):
        hpsv3.read_instruction(tmp_path, "x")
    weights = plain.random_weights(plain.names_and_shapes(**SMALL))
    (tmp_path / "instruction.txt").write_text(INSTRUCTION)
    save_file({k: v for k, v in weights.items() if k != "rm_head.5.bias"}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"HPSv3\.safetensors does not fit hps_v3: rm_head\.5\.bias 2 is missing"):
        hpsv3.load_scorer(tmp_path / "HPSv3.safetensors", "mine", tower=files / "qwen")
