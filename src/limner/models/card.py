"""The README.md beside trained weights: what they are, what made them, how to use them, how they did."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from limner.store import versions, write_atomic

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

pipe = StableDiffusionPipeline.from_pretrained("{{ base_name }}")
pipe.load_lora_weights("path/to/this/folder")
image = pipe("a photo of a person").images[0]
```

`kohya.safetensors` holds the same weights under the names that ComfyUI and other programs read.
{% if rows %}
## Evaluation

| metric |{% for m in models %} {{ m }} |{% endfor %}
|---|{% for m in models %}---|{% endfor %}
{% for name, cells in rows -%}
| {{ name }} |{% for c in cells %} {{ c }} |{% endfor %}
{% endfor %}
In brackets: the confidence interval.
{% endif %}
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


def write_card(
    folder: Path,
    *,
    base_model: str,
    command: str,
    recipe_yaml: str,
    stage: str,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    samples: Path | None = None,
    license: str = "",
    tags: Sequence[str] = ("text-to-image", "lora", "dpo", "hg-dpo"),
) -> Path:
    """Write `folder/README.md`, a model card with the metadata that the hub indexes.

    Args:
        base_model: as in `model.path`. A hub id also goes into the metadata; of a local path only the last part is shown.
        command: what was run, exactly.
        recipe_yaml: the resolved recipe.
        metrics: the `models` part of metrics.json: {model: {metric: {"value", "low", "high", "n"}}}, or plain numbers.
        samples: an image; copied into the folder if it lies elsewhere.
        license: the hub's identifier, e.g. creativeml-openrail-m; "" = not said.

    Returns:
        The card's path.
    """
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None and not Path(base_model).exists()
    data = ModelCardData(base_model=base_model if is_id else None, library_name="diffusers", license=license or None, tags=list(tags))
    names = list(metrics or {})
    every = list(dict.fromkeys(metric for of_model in (metrics or {}).values() for metric in of_model))
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        base_name=base_model if is_id else Path(base_model).name,
        stage=stage,
        samples=_beside(folder, samples) if samples else "",
        models=names,
        rows=[(metric, [_cell((metrics or {})[m].get(metric)) for m in names]) for metric in every],
        command=command.strip(),
        recipe_yaml=recipe_yaml.strip(),
        versions=versions(),
    )
    path = folder / "README.md"
    write_atomic(path, str(card).rstrip() + "\n")
    return path


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
