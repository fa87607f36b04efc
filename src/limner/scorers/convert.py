"""CLIP checkpoints to transformers' `CLIPModel`: sizes told from the tensors, OpenAI's names translated.

OpenAI's CLIP and open_clip share one naming (`visual.transformer.resblocks.0.attn.in_proj_weight` ...), which HPS v1, v2 and v2.1 are
published in. transformers splits in_proj into q, k and v, and transposes both projections. No name and no shape is left to chance: what is
missing, unexpected or of another shape is an error that lists it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from limner.scorers.weights import compare, shape_text

Activation = Literal["quick_gelu", "gelu"]

# Heads cannot be told from shapes. All towers have 64 channels a head but open_clip's large image towers (ViT-H, g and bigG).
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
LETTERS = {768: "b", 1024: "l", 1280: "h", 1408: "g", 1664: "bigg"}

SAME = {  # OpenAI's name: transformers'; both may be beginnings
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # so spelled there
    "visual.ln_post.": "vision_model.post_layernorm.",
}
BLOCK = {
    "attn.out_proj.": "self_attn.out_proj.", "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}  # fmt: skip
TRANSPOSED = ("text_projection", "visual.proj")
RESBLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes of both towers of a CLIP model, by default those of OpenAI's ViT-L/14.

    Args:
        width, layers, heads, hidden: of the image tower; `hidden` is the width within its MLPs.
        patch, image_size: pixels.
        text_width, text_layers, text_heads, text_hidden: of the text tower.
        context: tokens a text.
        vocabulary: tokens there are; the last one ends a text.
        joint: of the space that both project to.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    hidden: int = 4096
    patch: int = 14
    image_size: int = 224
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    context: int = 77
    vocabulary: int = 49408
    joint: int = 768

    @property
    def backbone(self) -> str:
        """Its usual name, such as vit_l_14 or vit_l_14_336."""
        name = f"vit_{LETTERS.get(self.width, self.width)}_{self.patch}"
        return name if self.image_size == 224 else f"{name}_{self.image_size}"

    def config(self, activation: Activation) -> CLIPConfig:
        """For transformers. Texts are pooled at the first end token, the last of the vocabulary (OpenAI: the largest id of the text)."""
        text = {
            "hidden_size": self.text_width, "num_hidden_layers": self.text_layers, "num_attention_heads": self.text_heads,
            "intermediate_size": self.text_hidden, "max_position_embeddings": self.context, "vocab_size": self.vocabulary,
            "bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1, "pad_token_id": self.vocabulary - 1,
            "projection_dim": self.joint, "hidden_act": activation,
        }  # fmt: skip
        vision = {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "intermediate_size": self.hidden, "patch_size": self.patch, "image_size": self.image_size,
            "projection_dim": self.joint, "hidden_act": activation,
        }  # fmt: skip
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=self.joint)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of its checkpoint under OpenAI's name."""
        out: dict[str, tuple[int, ...]] = {
            "logit_scale": (),
            "text_projection": (self.text_width, self.joint),
            "positional_embedding": (self.context, self.text_width),
            "token_embedding.weight": (self.vocabulary, self.text_width),
            "visual.proj": (self.width, self.joint),
            "visual.class_embedding": (self.width,),
            "visual.positional_embedding": ((self.image_size // self.patch) ** 2 + 1, self.width),
            "visual.conv1.weight": (self.width, 3, self.patch, self.patch),
        }
        norms = [("ln_final", self.text_width), ("visual.ln_pre", self.width), ("visual.ln_post", self.width)]
        towers = (("", self.text_layers, self.text_width, self.text_hidden), ("visual.", self.layers, self.width, self.hidden))
        for side, layers, w, hidden in towers:
            for i in range(layers):
                at = f"{side}transformer.resblocks.{i}"
                out |= {f"{at}.attn.in_proj_weight": (3 * w, w), f"{at}.attn.in_proj_bias": (3 * w,)}
                out |= {f"{at}.attn.out_proj.weight": (w, w), f"{at}.attn.out_proj.bias": (w,)}
                out |= {f"{at}.mlp.c_fc.weight": (hidden, w), f"{at}.mlp.c_fc.bias": (hidden,)}
                out |= {f"{at}.mlp.c_proj.weight": (w, hidden), f"{at}.mlp.c_proj.bias": (w,)}
                norms += [(f"{at}.ln_1", w), (f"{at}.ln_2", w)]
        return out | {f"{norm}.{part}": (w,) for norm, w in norms for part in ("weight", "bias")}

    def transformers_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same under transformers' names."""
        with torch.device("meta"):
            return shapes_of(CLIPModel(self.config("gelu")))


def shapes_of(model: CLIPModel) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model saves."""
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


VIT_L_14 = Tower()
VIT_H_14 = Tower(width=1280, layers=32, hidden=5120, text_width=1024, text_layers=24, text_heads=16, text_hidden=4096, joint=1024)


def infer_tower(weights: Mapping[str, Tensor], where: str) -> Tower:
    """The sizes that a checkpoint of OpenAI's naming has.

    Raises:
        ValueError: the tensors that tell them are not there; lists them, and what there is.
    """
    needed = {
        "visual.conv1.weight": 4, "visual.positional_embedding": 2, "visual.proj": 2, "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "token_embedding.weight": 2, "positional_embedding": 2, "transformer.resblocks.0.mlp.c_fc.weight": 2,
    }  # fmt: skip
    missing = [k for k, dims in needed.items() if k not in weights or weights[k].ndim != dims]
    if missing:
        found = ", ".join(f"{k} {shape_text(v)}" for k, v in list(weights.items())[:4])
        raise ValueError(f"{where}: {', '.join(missing[:4])} missing; it holds {found} ... Is it a CLIP model in OpenAI's naming?")
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    vocabulary, text_width = weights["token_embedding.weight"].shape
    depth = {"": 0, "visual.": 0}
    for key in weights:
        if block := RESBLOCK.fullmatch(key):
            depth[block[1] or ""] = max(depth[block[1] or ""], int(block[2]) + 1)
    return Tower(
        width=width, layers=depth["visual."], heads=max(1, width // HEAD_WIDTHS.get(width, 64)),
        hidden=len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]), patch=patch,
        image_size=round((len(weights["visual.positional_embedding"]) - 1) ** 0.5) * patch,
        text_width=text_width, text_layers=depth[""], text_heads=max(1, text_width // 64),
        text_hidden=len(weights["transformer.resblocks.0.mlp.c_fc.weight"]), context=len(weights["positional_embedding"]),
        vocabulary=vocabulary, joint=weights["visual.proj"].shape[1],
    )  # fmt: skip


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under OpenAI's names as `CLIPModel` wants them.

    Raises:
        ValueError: a name that CLIP does not have.
    """
    out: dict[str, Tensor] = {}
    for key, value in weights.items():
        block = RESBLOCK.fullmatch(key)
        at = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}." if block else ""
        rest = block[3] if block else key
        if block and rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            out |= {f"{at}self_attn.{n}_proj.{kind}": v.contiguous() for n, v in zip("qkv", value.chunk(3))}
            continue
        names = {o: t for o, t in (BLOCK if block else SAME).items() if rest == o or (o.endswith(".") and rest.startswith(o))}
        if not names:
            raise ValueError(f"{key} is no tensor of a CLIP model in OpenAI's naming")
        ((old, new),) = names.items()
        out[at + new + rest.removeprefix(old)] = value.T.contiguous() if key in TRANSPOSED else value
    return out


def build_clip(config: CLIPConfig, weights: Mapping[str, Tensor], where: str) -> CLIPModel:
    """A `CLIPModel` that holds these very tensors (nothing is drawn or copied), in evaluation mode.

    Raises:
        ValueError: names or shapes do not fit the config.
    """
    with torch.device("meta"):
        model = CLIPModel(config)
    weights = {k: v for k, v in weights.items() if not k.endswith(".position_ids")}  # a buffer that older versions saved
    compare(weights, shapes_of(model), where)
    model.load_state_dict(weights, assign=True)
    device = next(iter(weights.values())).device
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = nn.Buffer(torch.arange(count, device=device)[None], persistent=False)
    return model.eval().requires_grad_(False)


def openai_to_clip(weights: Mapping[str, Tensor], activation: Activation, where: str, expected: Tower | None = None) -> CLIPModel:
    """A `CLIPModel` of tensors under OpenAI's names.

    Args:
        weights: of `read_weights`.
        activation: of the MLPs, which the file does not tell: quick_gelu where it descends from OpenAI's weights, gelu from LAION's.
        where: what errors begin with.
        expected: the sizes that the scorer was published with; None takes them from the tensors.

    Raises:
        ValueError: lists the first keys that are missing, unexpected or of another shape.
    """
    # OpenAI's own files hold three sizes beside the weights
    weights = {k: v for k, v in weights.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    tower = expected or infer_tower(weights, where)
    compare(weights, tower.shapes(), where)
    return build_clip(tower.config(activation), to_transformers(weights), where)


def tower_of(config: Any) -> Tower:
    """The sizes that a CLIPConfig tells."""
    text, vision = config.text_config, config.vision_config
    return Tower(
        width=vision.hidden_size, layers=vision.num_hidden_layers, heads=vision.num_attention_heads, hidden=vision.intermediate_size,
        patch=int(vision.patch_size), image_size=int(vision.image_size), text_width=text.hidden_size,
        text_layers=text.num_hidden_layers, text_heads=text.num_attention_heads, text_hidden=text.intermediate_size,
        context=text.max_position_embeddings, vocabulary=text.vocab_size, joint=config.projection_dim,
    )  # fmt: skip
