"""HPS v3 (arXiv 2508.03789): Qwen2-VL-7B reads image, instruction and prompt; a network on its token <|Reward|> gives mean and deviation.

Needed: HPSv3.safetensors; the folder of Qwen2-VL-7B-Instruct (config.json and tokenizer, not its weights) as `tower`; and the instruction
that the network was trained with, in `instruction.txt` beside the weights: what stands before the prompt, {prompt}, what stands behind it
up to the reward token. Instead of it the file data_collator_qwen.py of the package hpsv3 may lie there; it is read, not run.

The published code calls the language model without positions, which in the transformers that it pins (4.45) means 0, 1, 2 ... for image
tokens as well, not Qwen2-VL's rows and columns. So it is here.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from limner.images import check_images, to_uint8
from limner.scorers.protocol import checked_prompts
from limner.scorers.weights import compare, read_weights
from limner.store import sha256

REWARD, PIXELS, SIDE = "<|Reward|>", 256 * 28 * 28, 28
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
HEAD = ((1024, 0), (16, 3), (2, 5))  # widths of the last network's layers, and their places among activations and dropout
NAMES = {"visual.": "visual.", "model.": "language_model."}  # published: transformers 5


class Hpsv3Scorer:
    """HPS v3 behind the scorer protocol: the mean; unbounded, about -1 to 12. An image at a time, so nothing depends on batch mates.

    Attributes:
        files: SHA-256 of every file, by name.
        The others: as `Scorer`.
    """

    higher_is_better, comparable_across_prompts, needs_prompt, metric = True, False, True, "hps_v3"
    range = (-math.inf, math.inf)

    def __init__(self, name: str, model: Any, head: nn.Module, tokenizer: Any, instruction: str, revision: str = ""):
        from transformers import Qwen2VLImageProcessorPil

        self.name, self.revision, self.files = name, revision, dict[str, str]()
        self.model, self.head, self.tokenizer = model.eval().requires_grad_(False), head.eval().requires_grad_(False), tokenizer
        self.instruction = instruction
        vision = model.config.vision_config
        self._merge = vision.spatial_merge_size
        self._processor = Qwen2VLImageProcessorPil(
            do_resize=False, patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size, merge_size=self._merge
        )

    def to_device(self, device: str) -> None:
        """Move the weights."""
        self.model.to(device)
        self.head.to(device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`."""
        check_images(images)
        return torch.tensor(self.score_pictures([Image.fromarray(i) for i in to_uint8(images)], prompts))

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """As `PictureScorer`."""
        checked = checked_prompts(self.name, self.metric, prompts, len(pictures))
        return [self.judge(picture, prompt)[0] for picture, prompt in zip(pictures, checked)]

    @torch.inference_mode()
    def judge(self, picture: Image.Image, prompt: str) -> tuple[float, float]:
        """Mean and logarithm of the deviation of one RGB picture's score."""
        where = self.head[0].weight.device  # type: ignore[index]
        resized = picture.resize(fit(*picture.size), Image.Resampling.BICUBIC)
        inputs = self._processor(images=[resized], return_tensors="pt")
        tokens = int(inputs["image_grid_thw"].prod()) // self._merge**2
        text = f"{BEFORE}{'<|image_pad|>' * tokens}<|vision_end|>{self.instruction.replace('{prompt}', prompt)}{REWARD}"
        ids = self.tokenizer(text, return_tensors="pt").input_ids.to(where)
        places = torch.arange(ids.shape[1], device=where).expand(3, 1, -1)
        pixels, grid = inputs["pixel_values"].to(where, self.model.dtype), inputs["image_grid_thw"].to(where)
        out = self.model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, position_ids=places, use_cache=False)
        mean, deviation = self.head(out.last_hidden_state[0, -1].float()).tolist()  # nothing behind the reward token reaches it
        return mean, deviation


def fit(width: int, height: int) -> tuple[int, int]:
    """The size with sides of a multiple of 28 and about 200,704 pixels that Qwen2-VL resizes an image to."""
    w, h = (max(SIDE, round(side / SIDE) * SIDE) for side in (width, height))
    scale = math.sqrt(width * height / PIXELS)
    if w * h > PIXELS:
        return max(SIDE, math.floor(width / scale / SIDE) * SIDE), max(SIDE, math.floor(height / scale / SIDE) * SIDE)
    if w * h < PIXELS:
        return math.ceil(width / scale / SIDE) * SIDE, math.ceil(height / scale / SIDE) * SIDE
    return w, h


def build(config: Any, weights: Mapping[str, Tensor], where: str) -> tuple[Any, nn.Module]:
    """Backbone and head that hold these very tensors.

    Args:
        config: a Qwen2VLConfig; its vocabulary becomes that of the weights, which have the reward token more.
        weights: under the published names.

    Raises:
        ValueError: lists the first keys that are missing, unexpected or of another shape.
    """
    from transformers import Qwen2VLModel

    weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}  # published, not used
    rows = weights.get("model.embed_tokens.weight")
    if rows is not None:
        config.text_config.vocab_size = len(rows)
    width = config.text_config.hidden_size
    with torch.device("meta"):
        model = Qwen2VLModel(config)
        head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
    ours = {new: old for old, new in NAMES.items()}
    shapes = {f"rm_head.{k}": tuple(v.shape) for k, v in head.state_dict().items()}
    for key, value in model.state_dict().items():
        first = next(n for n in ours if key.startswith(n))
        shapes[ours[first] + key.removeprefix(first)] = tuple(value.shape)
    compare(weights, shapes, where)
    backbone = {NAMES[o] + k.removeprefix(o): v for k, v in weights.items() for o in NAMES if k.startswith(o)}
    model.load_state_dict(backbone, assign=True)
    head.load_state_dict({k.removeprefix("rm_head."): v.float() for k, v in weights.items() if k.startswith("rm_head.")}, assign=True)
    device = next(iter(weights.values())).device
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # of rotary positions: not saved
            fresh: Any = type(module)(module.config).inv_freq.to(device)
            module.inv_freq, module.original_inv_freq = (nn.Buffer(fresh.clone(), persistent=False) for _ in range(2))
    return model.eval(), head.eval()


def load_scorer(path: Path, name: str, *, tower: Path | None, tokenizer: Path | None = None) -> Hpsv3Scorer:
    """Read a scorer from local files.

    Args:
        path: HPSv3.safetensors.
        name: as in the recipe, for results and errors.
        tower: folder of Qwen2-VL-7B-Instruct.
        tokenizer: its folder; None = the tower's.

    Raises:
        ValueError: files that are missing, corrupt or of another model.
    """
    from transformers import AutoTokenizer, Qwen2VLConfig

    where = f"scorers.{name}"
    if tower is None or not (tower / "config.json").is_file():
        raise ValueError(f"{where}.tower: {tower or 'not set'}; expected the folder of Qwen2-VL-7B-Instruct (config.json and tokenizer)")
    instruction = read_instruction(path.parent, f"{where}.path")
    weights = read_weights(path, f"{where}.path", as_stored=True)
    model, head = build(Qwen2VLConfig.from_pretrained(tower, local_files_only=True), weights, f"{where}.path: {path} does not fit hps_v3")
    words = AutoTokenizer.from_pretrained(tokenizer or tower, local_files_only=True, trust_remote_code=False)
    words.add_tokens([REWARD], special_tokens=True)
    rows = len(weights["model.embed_tokens.weight"])
    if len(words) > rows:
        raise ValueError(f"{where}.tokenizer: {len(words)} tokens with {REWARD}, the weights have {rows}; is it Qwen2-VL's?")
    digest = sha256(path)
    wording = hashlib.sha256(instruction.encode()).hexdigest()[:8]
    scorer = Hpsv3Scorer(name, model, head, words, instruction, f"hps_v3@{digest[:16]}:{wording}")
    scorer.files = {path.name: digest, "instruction": hashlib.sha256(instruction.encode()).hexdigest()}
    return scorer


def read_instruction(folder: Path, where: str) -> str:
    """What is said to the model around {prompt}, up to the reward token.

    Raises:
        ValueError: there is no file of it, or it has no place for the prompt.
    """
    text, package = folder / "instruction.txt", folder / "data_collator_qwen.py"
    if text.is_file():
        found = text.read_text()
    elif package.is_file():
        assigned = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(package.read_text()).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
        }
        try:
            found = (
                assigned["INSTRUCTION"].replace("{text_prompt}", "{prompt}") + assigned["prompt_with_special_token"].partition(REWARD)[0]
            )
        except KeyError as error:
            raise ValueError(f"{where}: {package} has no {error}; expected the file of the package hpsv3 1.0") from None
    else:
        raise ValueError(
            f"{where}: {folder} has neither instruction.txt nor data_collator_qwen.py; HPS v3 needs the words it was trained with: copy "
            "the latter from the package hpsv3 (hpsv3/dataset/), or write the former with {prompt} in it"
        )
    if "{prompt}" not in found:
        raise ValueError(f"{where}: the instruction in {folder} has no place for the prompt; expected {{prompt}} in it")
    return found.partition(REWARD)[0]
