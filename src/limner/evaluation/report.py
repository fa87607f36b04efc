"""report.html: one file with numbers, curves and pictures, no script and no link; the terminal's table; picture sheets for READMEs."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from limner.evaluation.compare import DIRECTION
from limner.images import decode
from limner.store import write_atomic

FIGURES_NOTE = "The embedded world is a test bench; nothing here is claimed for photographs."
PERCENT = ("attribute_accuracy", "joint_plausibility", "defect_rate")
# Fields of a training log, by panel.
PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",), "winner and loser error difference": ("winner_error_difference", "loser_error_difference"), "margin": ("margin",),
    "accuracy": ("accuracy",), "gradient norm": ("grad_norm",), "statistics": ("statistics",),
}  # fmt: skip
MAX_SIDE = 512  # pixels; larger pictures are shown smaller, or a report of SDXL images would weigh hundreds of megabytes


def write_report(
    path: Path,
    *,
    metrics: Mapping[str, Any],
    images: Mapping[str, Sequence[bytes]],
    prompts: Sequence[str],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    judge_scores: Mapping[str, Sequence[float]],
    command: str,
    recipe_yaml: str,
    note: str = "",
    title: str = "Limner report",
    grid_rows: int = 8,
    num_examples: int = 8,
) -> None:
    """Write the report, whole or not at all.

    Args:
        metrics: what `compare` returned.
        images: model (real, base, stages) to encoded images, one a prompt, in the order of `prompts` and with the same seeds for all.
        curves: stage to the rows of its training log (`read_curves`).
        judge_scores: model to the judge's score of each image; the final model's gains and losses against base choose what is shown.
        note: shown at the top, e.g. FIGURES_NOTE when the world is the embedded one.
        grid_rows: prompts shown side by side.
        num_examples: images shown of those that improved most, and as many of those that worsened most.

    Raises:
        ValueError: a model's images or scores are not as many as the prompts.
    """
    for what, of in (("images", images), ("judge scores", judge_scores)):
        for model, items in of.items():
            if len(items) != len(prompts):
                raise ValueError(f"report: {len(items)} {what} of {model} for {len(prompts)} prompts")
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    ).get_template("report.html.j2")
    order = [m for m in metrics["models"] if m in images] + [m for m in images if m not in metrics["models"]]
    final = metrics["final"]
    best, worst = _extremes(judge_scores, final, num_examples)
    html = template.render(
        title=title,
        note=note,
        command=command,
        recipe=recipe_yaml,
        versions=metrics.get("versions", {}),
        seed=metrics.get("seed"),
        final=final,
        table=_table(metrics),
        columns=[(m, _label(m), m in metrics["circular"]) for m in _measured(metrics)],
        wins=_bars(metrics),
        curves={stage: svgs for stage, rows in curves.items() if (svgs := _panels(rows, stage))},
        models=order,
        grid=[(prompts[i], [(m, _data_uri(images[m][i])) for m in order]) for i in range(min(grid_rows, len(prompts)))],
        extremes={
            "Improved most": [_example(i, images, prompts, judge_scores, final) for i in best if _shown(images, final)],
            "Worsened most": [_example(i, images, prompts, judge_scores, final) for i in worst if _shown(images, final)],
        },
    )
    write_atomic(path, html)


def read_curves(paths: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Stage to the rows of its JSON-lines training log. A last line cut short by a kill is left out.

    Raises:
        ValueError: another line is not JSON; names the file and the line.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for stage, path in paths.items():
        lines = path.read_text().splitlines()
        curves[stage] = []
        for number, line in enumerate(lines, 1):
            try:
                curves[stage].append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
    return curves


def print_table(metrics: Mapping[str, Any]) -> None:
    """Metrics by model to the terminal, better than base (beyond the paired 95 % interval) in green, worse in red."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"final model: {metrics['final']}", caption="green, red: better, worse than base beyond the 95 % interval")
    table.add_column("metric")
    for model in metrics["models"]:
        table.add_column(model, justify="right")
    colour = {1: "bold green", 0: "default", -1: "red"}
    for metric in _measured(metrics):
        cells = [
            f"[{colour[_verdict(metrics, model, metric)]}]{_format(metrics, metric, found[metric]['value'])}[/]" if metric in found else ""
            for model, found in metrics["models"].items()
        ]
        table.add_row(_label(metric) + (" (circular)" if metric in metrics["circular"] else ""), *cells)
    for metric in [m for m in DIRECTION if any(m in w for w in metrics["wins"].values())]:
        row = [metrics["wins"].get(model, {}).get(metric) for model in metrics["models"]]
        table.add_row(f"wins: {metric.replace('_', ' ')}", *[f"{w['value']:.0%}" if w else "" for w in row])
    Console().print(table)


def sheet(images: Mapping[str, Sequence[bytes]], prompts: Sequence[str], path: Path, tile: int = 128) -> None:
    """Write a PNG for a README: a column a model, a row a prompt, with labels.

    Args:
        images: model to encoded images, one a prompt.
        tile: pixels of a picture's longer side.

    Raises:
        ValueError: a model's images are not as many as the prompts.
    """
    for model, items in images.items():
        if len(items) != len(prompts):
            raise ValueError(f"sheet: {len(items)} images of {model} for {len(prompts)} prompts")
    gap, head, left = 6, 24, 176
    page = PIL.Image.new("RGB", (left + len(images) * (tile + gap) + gap, head + len(prompts) * (tile + gap)), "white")
    draw, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(13)
    for row, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, 24)[: max(1, tile // 17)]
        draw.multiline_text((gap, head + row * (tile + gap)), "\n".join(lines), fill="#333333", font=font, spacing=3)
    for column, (model, items) in enumerate(images.items()):
        x = left + gap + column * (tile + gap)
        draw.text((x + tile / 2, head / 2), model, fill="black", font=font, anchor="mm")
        for row, data in enumerate(items):
            picture = decode(data, f"{model}, image {row}")
            scale = tile / max(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), PIL.Image.Resampling.LANCZOS)
            page.paste(picture, (x + (tile - picture.width) // 2, head + row * (tile + gap)))
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics that some model has, known ones first."""
    found = dict.fromkeys(m for values in metrics["models"].values() for m in values)
    return [m for m in DIRECTION if m in found] + [m for m in found if m not in DIRECTION]


def _label(metric: str) -> str:
    return metric.replace("_", " ").replace("frechet", "Fréchet") + {1: " ↑", -1: " ↓"}.get(DIRECTION.get(metric, 0), "")


def _decimals(metrics: Mapping[str, Any], metric: str) -> int:
    """As many for all models as show two digits of the narrowest interval, paired ones too: a sure gain must not show as equal numbers."""
    found = [v[metric] for part in ("models", "differences") for v in metrics.get(part, {}).values() if metric in v]
    halves = [_scale(metric) * (n["high"] - n["low"]) / 2 for n in found]
    return min(4, max(0, 1 - math.floor(math.log10(min(h for h in halves if h > 1e-9))))) if max(halves) > 1e-9 else 2


def _scale(metric: str) -> float:
    return 100.0 if metric in PERCENT else 1.0


def _format(metrics: Mapping[str, Any], metric: str, value: float) -> str:
    return f"{value * _scale(metric):.{_decimals(metrics, metric)}f}".replace("-", "−") + (" %" if metric in PERCENT else "")


def _verdict(metrics: Mapping[str, Any], model: str, metric: str) -> int:
    """1 better than base, -1 worse, 0 not told apart: by the paired interval where there is one."""
    direction = DIRECTION.get(metric, 0)
    if model in ("real", "base") or not direction or metric == "hue_shift":
        return 0
    values = metrics["models"][model]
    if metric.startswith("frechet") and "frechet_ratio" in values:
        against, reference = values["frechet_ratio"], 1.0
    elif metric in metrics.get("differences", {}).get(model, {}):
        against, reference = metrics["differences"][model][metric], 0.0
    else:
        return 0
    return direction * (int(against["low"] > reference) - int(against["high"] < reference))


def _table(metrics: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Rows of cells: texts of the value and its ends, and the verdict; None where a model was not measured."""
    table = []
    for model, values in metrics["models"].items():
        cells: list[dict[str, Any] | None] = []
        for m in _measured(metrics):
            ends = {k: _format(metrics, m, values[m][k]) for k in ("value", "low", "high")} if m in values else None
            cells.append({**ends, "verdict": _verdict(metrics, model, m)} if ends else None)
        table.append((model, cells))
    return table


def _bars(metrics: Mapping[str, Any]) -> list[tuple[str, bool, list[dict[str, Any]]]]:
    """Wins by metric, whether it is circular, and each model's share and interval in percent."""
    bars = []
    for metric in DIRECTION:
        found = {model: w[metric] for model, w in metrics["wins"].items() if metric in w}
        if found:
            rows = [{"model": m, "p": w["p"], **{k: 100 * w[k] for k in ("value", "low", "high")}} for m, w in found.items()]
            bars.append((metric.replace("_", " "), metric in metrics["circular"], rows))
    return bars


def _extremes(judge_scores: Mapping[str, Sequence[float]], final: str, count: int) -> tuple[list[int], list[int]]:
    """Indices of the largest gains and of the largest losses of final against base, largest first; without those that have no answer."""
    if final == "base" or final not in judge_scores or "base" not in judge_scores:
        return [], []
    gains = [(a - b, i) for i, (a, b) in enumerate(zip(judge_scores[final], judge_scores["base"], strict=True)) if math.isfinite(a - b)]
    best = [i for gain, i in sorted(gains, reverse=True) if gain > 0][:count]
    worst = [i for gain, i in sorted(gains) if gain < 0][:count]
    return best, worst


def _shown(images: Mapping[str, Sequence[bytes]], final: str) -> bool:
    return final in images and "base" in images


def _example(
    i: int, images: Mapping[str, Sequence[bytes]], prompts: Sequence[str], judge_scores: Mapping[str, Sequence[float]], final: str
) -> dict[str, Any]:
    return {"prompt": prompts[i], "pictures": [(m, _data_uri(images[m][i]), f"{judge_scores[m][i]:.3f}") for m in ("base", final)]}


def _data_uri(data: bytes) -> str:
    with PIL.Image.open(io.BytesIO(data)) as picture:
        kind, size = (picture.format or "PNG").lower(), picture.size
    if max(size) > MAX_SIDE:
        small, buffer, kind = decode(data), io.BytesIO(), "jpeg"
        small.thumbnail((MAX_SIDE, MAX_SIDE), PIL.Image.Resampling.LANCZOS)
        small.save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _panels(rows: Sequence[Mapping[str, Any]], stage: str) -> list[Markup]:
    """An inline SVG for each panel of which the log has a field."""
    found = [(title, [f for f in names if any(f in row for row in rows)]) for title, names in PANELS.items()]
    return [_panel(rows, title, names, stage) for title, names in found if names]


def _panel(rows: Sequence[Mapping[str, Any]], title: str, names: Sequence[str], stage: str) -> Markup:
    """Raw values pale, their running mean strong. Text and axes take the page's colour, so they can be read in dark mode."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = "#010203"  # stands for currentColor, which matplotlib does not know
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": f"{stage} {title}", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}
    ):  # fmt: skip
        figure = Figure(figsize=(3.6, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for name, colour in zip(names, ("#2f7ed8", "#e0803a")):
            points = [(row.get("step", i + 1), row[name]) for i, row in enumerate(rows) if name in row and math.isfinite(row[name])]
            points = points[:: max(1, len(points) // 400)]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _running_mean(values, max(1, len(values) // 20)), color=colour, linewidth=1.6, label=name.split("_")[0])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Markup(svg.replace(ink, "currentColor"))  # made here from numbers and fixed names: nothing to escape


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
