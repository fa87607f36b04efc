"""Builders for tests of the whole chain: a folder of photos, a tiny CLIP scorer, a recipe of three stages."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from tiny import save_tiny, tiny_tokenizer

CAPTIONS = ["a man in red", "a woman in blue", "a man running", "a woman waving", "two people", "a man in green"]


def photo_folder(folder: Path, count: int = 6, size: int = 20) -> Path:
    """An image folder with metadata.jsonl: noise pictures of unequal sizes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = rng.integers(0, 256, (size + i, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)] + (f" {i}" if i >= len(CAPTIONS) else "")}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def clip_scorer(folder: Path, seed: int = 0) -> Path:
    """A random CLIPModel of a few thousand parameters with its tokenizer, in the layout of a published PickScore."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, **changes: object) -> Path:
    """A complete small HG-DPO recipe on a photo folder and a tiny pipeline, all below `folder`."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
        photo_folder(folder / "photos")
        clip_scorer(folder / "picker", 0)
        clip_scorer(folder / "judge", 1)
    learn = {"max_train_steps": 2, "train_batch_size": 2, "rank": 2, "learning_rate": 1e-3, "checkpointing_steps": 1}
    by = {"by": "picker"}
    recipe = {
        "name": "chain", "output_dir": str(folder / "out"),
        "model": {"path": str(folder / "model")},
        "data": {**{s: str(folder / "photos") for s in ("train", "validation", "test")}, "resolution": 16},
        "sampler": {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4},
        "pool": {"images_per_prompt": 3, "prompts_per_shard": 2},
        "scorers": {"picker": {"kind": "clip", "path": str(folder / "picker")}, "judge": {"kind": "clip", "path": str(folder / "judge")}},
        "stages": {
            "easy": {
                "winner": {"from": "pool", "pick": "best", **by}, "loser": {"from": "pool", "pick": "worst", **by},
                "learn": {**learn, "statistics_weight": 1e4},
            },
            "normal": {
                "start": "easy", "winner": {"from": "reconstruction", "t": [400, 700], **by},
                "loser": {"from": "pool", "pick": "best", **by}, "keep": "all", "learn": {**learn, "reference": "start"},
            },
            "hard": {
                "start": "normal", "winner": {"from": "reconstruction", "t": [100]}, "loser": {"from": "normal", "role": "winner"},
                "learn": learn,
            },
        },
        "generate": {"lora_scale": 0.5, "stage_blocks": {"hard": ["up"]}},
        "evaluate": {"preference": "picker", "judge": "judge", "diversity_prompts": 0},
    }  # fmt: skip
    for key, value in changes.items():
        merged = {**recipe[key], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
        recipe[key] = {k: v for k, v in merged.items() if v is not None} if isinstance(merged, dict) else merged
    if "hard" not in recipe["stages"]:  # type: ignore[operator]
        recipe["generate"].pop("stage_blocks", None)  # type: ignore[attr-defined]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run_main(*commands: Sequence[str]) -> None:
    """Command lines in turn, as a process runs them: ends with the first exit code that is not 0, or 0."""
    from limner.cli import main

    sys.exit(next((code for words in commands if (code := main(words))), 0))
