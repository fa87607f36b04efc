"""Published CLIP scorers on the meta device: names, shapes, nesting and types of their files fit what is built for them."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import plain_clip as plain
from limner.scorers import clip, convert
from limner.scorers.weights import tensors_of

L14 = {
    "width": 1024, "layers": 24, "patch": 14, "grid": 16, "text_width": 768, "text_layers": 12, "context": 77, "vocabulary": 49408,
    "joint": 768,
}  # fmt: skip
H14 = L14 | {"width": 1280, "layers": 32, "text_width": 1024, "text_layers": 24, "joint": 1024}
B32 = L14 | {"width": 768, "layers": 12, "patch": 32, "grid": 7, "text_width": 512, "joint": 512}


def nested(sizes: dict[str, int], wrapped: bool, prefix: str, dtype: torch.dtype) -> dict[str, object]:
    weights = {prefix + k: torch.empty(s, dtype=dtype, device="meta") for k, s in plain.names_and_shapes(**sizes).items()}
    return {"epoch": 1, "state_dict": weights} if wrapped else dict(weights)


def config_of(sizes: dict[str, int], heads: int, text_heads: int, act: str, **text: object) -> CLIPConfig:
    """As the config.json of the published CLIPModel folder says."""
    return CLIPConfig(
        projection_dim=sizes["joint"],
        text_config={
            "hidden_size": sizes["text_width"], "intermediate_size": 4 * sizes["text_width"], "num_hidden_layers": sizes["text_layers"],
            "num_attention_heads": text_heads, "hidden_act": act, "projection_dim": sizes["joint"], **text,
        },
        vision_config={
            "hidden_size": sizes["width"], "intermediate_size": 4 * sizes["width"], "num_hidden_layers": sizes["layers"],
            "num_attention_heads": heads, "patch_size": sizes["patch"], "image_size": 224, "hidden_act": act,
            "projection_dim": sizes["joint"],
        },
    )  # fmt: skip


PUBLISHED = {  # kind: sizes, heads, heads of text, nested in state_dict, prefix, type
    "hps_v1": (L14, 16, 12, True, "", torch.float32),
    "hps_v2": (H14, 16, 16, True, "", torch.float16),
    "hps_v2_1": (H14, 16, 16, True, "module.", torch.float16),
    "aesthetic_v1": (L14, 16, 12, False, "", torch.float16),
    "aesthetic_v2": (L14, 16, 12, False, "", torch.float16),
    "clip_iqa_quality": (L14, 16, 12, False, "", torch.float16),
    "clip_iqa_sharpness": (L14, 16, 12, False, "", torch.float16),
    "clip_score_w": (B32, 12, 8, False, "", torch.float16),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_files_fit(kind: str) -> None:
    """On the meta device: no key missing or unexpected, float32, and the architecture of the published CLIPModel folder."""
    sizes, heads, text_heads, wrapped, prefix, dtype = PUBLISHED[kind]
    found = nested(sizes, wrapped, prefix, dtype)
    if not wrapped:  # as OpenAI's files have
        found |= {k: torch.tensor(1, device="meta") for k in ("input_resolution", "context_length", "vocab_size")}
    metric = clip.METRICS[kind]
    assert metric.activation is not None
    model = convert.openai_to_clip(tensors_of(found, "x"), metric.activation, "x", metric.tower)
    with torch.device("meta"):
        folder = CLIPModel(config_of(sizes, heads, text_heads, metric.activation))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in folder.state_dict().items()}
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}
    inferred = convert.infer_tower(tensors_of(nested(sizes, wrapped, prefix, dtype), "x"), "x")
    assert convert.tower_of(model.config) == convert.tower_of(folder.config) == inferred
    assert model.config.vision_config.hidden_act == ("gelu" if sizes is H14 else "quick_gelu")
    assert model.config.text_config.eos_token_id == 49407


def test_published_pickscore_fits() -> None:
    """transformers' naming, written out here, with the position ids that old folders save and their end token 2."""
    weights = {"logit_scale": (), "visual_projection.weight": (1024, 1280), "text_projection.weight": (1024, 1024)}
    weights |= {
        "text_model.embeddings.token_embedding.weight": (49408, 1024),
        "text_model.embeddings.position_embedding.weight": (77, 1024),
    }
    weights |= {"vision_model.embeddings.class_embedding": (1280,), "vision_model.embeddings.position_embedding.weight": (257, 1280)}
    weights |= {"vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14)}
    weights |= {f"text_model.final_layer_norm.{p}": (1024,) for p in ("weight", "bias")}
    weights |= {f"vision_model.{n}.{p}": (1280,) for n in ("pre_layrnorm", "post_layernorm") for p in ("weight", "bias")}
    for side, layers, w in (("text", 24, 1024), ("vision", 32, 1280)):
        for i in range(layers):
            at = f"{side}_model.encoder.layers.{i}"
            linear = {f"self_attn.{n}_proj": (w, w) for n in "qkv"} | {
                "self_attn.out_proj": (w, w),
                "mlp.fc1": (4 * w, w),
                "mlp.fc2": (w, 4 * w),
            }
            weights |= {f"{at}.{n}.weight": s for n, s in linear.items()} | {f"{at}.{n}.bias": s[:1] for n, s in linear.items()}
            weights |= {f"{at}.layer_norm{n}.{p}": (w,) for n in (1, 2) for p in ("weight", "bias")}
    tensors = {k: torch.empty(s, device="meta") for k, s in weights.items()}
    tensors |= {f"{s}_model.embeddings.position_ids": torch.empty(1, n, device="meta") for s, n in (("text", 77), ("vision", 257))}
    config = config_of(H14, 16, 16, "gelu", eos_token_id=2)
    convert.build_clip(config, tensors, "x")
    assert convert.tower_of(config) == convert.VIT_H_14 == clip.METRICS["pickscore"].tower
    assert clip.METRICS["pickscore"].activation == "gelu"
