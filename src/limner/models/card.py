"""The README.md beside trained weights: what they are, what made them, how to use them, how they did."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from limner.store import versions, write_atomic

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".bin")
TEMPLATE = """---
{{ card_data }}
---

# {{ base_name }}: stage {{ stage }}

A LoRA for the UNet of `{{ base_name }}`, trained with [Limner](https://github.com/limner-org/limner).
{% if samples %}
![samples]({{ samples }})
{% endif %}
## Use

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.{{ loads }}("{{ path }}")
pipe.load_lora_weights("path/to/this/folder", adapter_name="{{ stage }}")
{{ strength }}image = pipe("a photo of a person").images[0]
```
{% if tuned %}
The base model is the one that stage `base` of the same run made of `{{ tuned }}`: `train/base/model` below the run's folder.
{% endif %}
`kohya.safetensors` holds the same weights under the names that ComfyUI and other programs read.

## Training

```sh
{{ command }}
```

The recipe:

```yaml
{{ recipe_yaml }}
```

Versions: {% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.
"""


EVALUATION, TRAINING = "\n## Evaluation\n\n", "\n## Training\n"  # headings between which the table stands
LOADED, DRAWN = 'pipe.load_lora_weights("path/to/this/folder", adapter_name="{stage}")\n', "image = pipe("  # between them the strength


def write_card(
    folder: Path,
    *,
    base_model: str,
    tuned: bool = False,
    scale: float = 1.0,
    blocks: Sequence[str] = ("all",),
    command: str,
    recipe_yaml: str,
    stage: str,
    samples: Path | None = None,
    license: str = "",
    tags: Sequence[str] = ("text-to-image", "lora", "dpo", "hg-dpo"),
) -> Path:
    """Write `folder/README.md`, a model card with the metadata that the hub indexes.

    Args:
        base_model: as in `model.path`. A hub id also goes into the metadata; of a local path only the last part is shown.
        tuned: the LoRA belongs to what the stage `base` made of that model.
        scale: the strength it is used with.
        blocks: where it is used, as in `generate.blocks`.
        command: what was run, exactly.
        recipe_yaml: the resolved recipe.
        samples: an image; copied into the folder if it lies elsewhere.
        license: the hub's identifier, e.g. creativeml-openrail-m; "" = not said.

    Returns:
        The card's path.
    """
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None and not Path(base_model).exists()
    data = ModelCardData(base_model=base_model if is_id else None, library_name="diffusers", license=license or None, tags=list(tags))
    shown = base_model if is_id else Path(base_model).name
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        base_name=shown,
        path="train/base/model" if tuned else shown,
        loads="from_pretrained" if tuned or not shown.endswith(SINGLE_FILES) else "from_single_file",
        tuned=shown if tuned else "",
        strength=_strength(stage, scale, blocks),
        stage=stage,
        samples=_beside(folder, samples) if samples else "",
        command=command.strip(),
        recipe_yaml=recipe_yaml.strip(),
        versions=versions(),
    )
    path = folder / "README.md"
    write_atomic(path, str(card).rstrip() + "\n")
    return path


def add_evaluation(
    card: Path, metrics: Mapping[str, Mapping[str, Any]], *, stage: str, scale: float = 1.0, blocks: Sequence[str] = ("all",)
) -> None:
    """Put how models did, and at which strength, into a card that `write_card` wrote, in place of what was there.

    Args:
        card: the README.md.
        metrics: the `models` part of metrics.json, or some of it: {model: {metric: {"value", "low", "high", "n"}}}, or plain numbers.
        scale, blocks: as in `write_card`: they are chosen after training, and may have changed since.
    """
    every = dict.fromkeys(metric for of_model in metrics.values() for metric in of_model)
    lines = [
        ["metric", *metrics],
        ["---"] * (len(metrics) + 1),
        *[[m, *[_cell(found.get(m)) for found in metrics.values()]] for m in every],
    ]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    before, _, training = card.read_text().rpartition(TRAINING)
    before = before.partition(EVALUATION)[0]
    use, loaded, rest = before.partition(LOADED.format(stage=stage))
    _, drawn, after = rest.partition(DRAWN)
    if drawn:  # else someone wrote it anew
        before = use + loaded + _strength(stage, scale, blocks) + drawn + after
    write_atomic(card, f"{before}{EVALUATION}{table}\n\nIn brackets: the confidence interval.\n{TRAINING}{training}")


def _strength(stage: str, scale: float, blocks: Sequence[str]) -> str:
    """Lines that set the strength; "" where nothing need be set.

    diffusers' `set_adapters` knows parts of a UNet too, but leaves layers of blocks without attentions at full strength.
    """
    if "all" in blocks:
        return "" if scale == 1 else f'pipe.set_adapters("{stage}", {scale:g})  # as it was evaluated\n'
    acting = tuple(f"{part}_block" for part in ("down", "mid", "up") if part in blocks)
    return (
        f"for name, layer in pipe.unet.named_modules():  # as it was evaluated: in the {' and '.join(blocks)} blocks only\n"
        '    if hasattr(layer, "set_scale"):\n'
        f'        layer.set_scale("{stage}", {scale:g} if name.startswith({acting!r}) else 0.0)\n'
    )


def _cell(value: Any) -> str:
    """A number, with its interval if it has one."""
    if value is None:
        return "–"
    if not isinstance(value, Mapping):
        return f"{value:.4g}"
    low, high = value.get("low"), value.get("high")
    interval = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
    return f"{value['value']:.4g}{interval}"


def _beside(folder: Path, image: Path) -> str:
    """The image's name in the folder."""
    if image.resolve().parent != folder.resolve():
        write_atomic(folder / f"samples{image.suffix}", image.read_bytes())
        return f"samples{image.suffix}"
    return image.name
