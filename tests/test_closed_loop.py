"""The loop on figures, once around, by the commands that users run: the embedded base draws, simulated raters choose through HTTP, what
they said is consolidated, a scorer learns from it, that scorer and the raters choose examples, and the base learns from those."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("sqlmodel", reason="needs the extra `annotate`")

from limner import records
from limner.cli import main
from limner.figures import seen
from limner.figures.assets import find
from limner.figures.body import JOINTS
from limner.figures.captions import REGION
from limner.figures.scene import ATTRIBUTES
from limner.images import decode_batch
from limner.scorers import dual
from limner.scorers.agreement import accuracy, judge
from limner.scorers.choices import Choices
from limner.scorers.joints import BONES, measure_names
from limner.scorers.reader import FigureReader
from limner.store import read_rows

PROMPTS, EACH, RATERS = 6, 3, 3


class Likes(nn.Module):
    """Eyes that see the more amiss with a picture the brighter it is among those of its prompt; all else is alike in all of them."""

    def __init__(self, known: Tensor) -> None:
        """known: (prompts, images of each, 3, H, W)."""
        super().__init__()
        self.known = known.mean((2, 3, 4))
        self.attributes = {k: list(v) for k, v in ATTRIBUTES.items()}
        self.joints = sorted({name for bone in BONES for name in bone})
        self.parts = ["background", *sorted({p for region in REGION.values() for p in region} - {"place"})]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        n = len(images)
        out = {name: torch.zeros(n, len(values)) for name, values in self.attributes.items()}
        out |= {"joints": torch.full((n, len(self.joints), 32, 32), -6.0), "defect_map": torch.full((n, 32, 32), 9.0)}
        out |= {"parts": torch.zeros(n, len(self.parts), 64, 64), "summary": torch.zeros(n, 1), "soundness": torch.zeros(n, 1)}
        out["parts"][:, 1, 16:48, 16:48] = 9.0
        which = (self.known.flatten()[None] - images.mean((1, 2, 3))[:, None]).abs().argmin(1)
        rank = self.known.argsort(1).argsort(1).flatten()[which]
        return {**out, "defect": torch.tensor([-4.0, 0.0, 4.0])[rank]}


def write_recipe(folder: Path, **changes: object) -> str:
    learn = {"max_train_steps": 2, "train_batch_size": 2, "rank": 2, "learning_rate": 1e-3, "checkpointing_steps": 2}
    recipe = {
        "output_dir": str(folder / "out"), "model": {"path": "figures"},
        "data": {"train": "figures", "validation": "figures", "test": "figures", "max_train_prompts": PROMPTS, "resolution": 64},
        "sampler": {"num_inference_steps": 4, "guidance_scale": 2.0, "batch_size": 18},
        "pool": {"images_per_prompt": EACH, "prompts_per_shard": PROMPTS, "keep_latents": "all"},
        "scorers": {"people": {"kind": "dual", "path": str(folder / "scorer/model")}},
        "feedback": str(folder / "study"),
        "stages": {
            "liked": {
                "winner": {"from": "pool", "pick": "best", "by": "people"}, "loser": {"from": "pool", "pick": "worst", "by": "people"},
                "learn": learn,
            },
            "said": {"winner": {"from": "feedback", "pick": "best"}, "loser": {"from": "feedback", "pick": "worst"}, "learn": learn},
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return str(path)


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.safetensors")))).hexdigest()


def frozen(unet: nn.Module) -> dict[str, Tensor]:
    """Every weight that is not the adapter's, by its name without one."""
    return {n.replace(".base_layer", ""): p.detach().clone() for n, p in unet.named_parameters() if "lora_" not in n}


def test_the_loop_closes_on_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, shipped = write_recipe(tmp_path), digest(find("base"))
    assert main(["pool", recipe]) == 0
    pool = {i.id: i for i in read_rows(tmp_path / "out/pool", records.Image)}
    assert len(pool) == PROMPTS * EACH
    pixels = decode_batch([i.image for i in pool.values()])
    ranks = pixels.mean((1, 2, 3)).view(PROMPTS, EACH).argsort(1).argsort(1)
    bright = dict(zip(pool, ranks.flatten().tolist()))  # 0: the darkest of its prompt

    # raters, who like dark pictures, answer through HTTP; what they said is consolidated
    limits = {n: [-1e3, 1e3] for n in measure_names(JOINTS)}
    monkeypatch.setattr(seen, "load_reader", lambda path: FigureReader(Likes(pixels.view(PROMPTS, EACH, *pixels.shape[1:])), limits))  # type: ignore[arg-type]
    study = {
        "output_dir": str(tmp_path / "study"), "task": "choice", "answer": "ranking", "overlap": RATERS,
        "images": {"from": str(tmp_path / "out/pool"), "each": EACH},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    assert main(["annotate", "simulate", str(tmp_path / "study.yaml"), "--count", str(RATERS), "--reader", str(tmp_path)]) == 0
    assert main(["annotate", "consolidate", str(tmp_path / "study.yaml")]) == 0
    liked = {s.image_id: s.score or 0 for s in read_rows(tmp_path / "study/preferences/scores", records.Score)}
    assert liked.keys() == pool.keys()
    assert np.corrcoef([bright[i] for i in liked], list(liked.values()))[0, 1] < -0.6

    # a scorer learns from what they said
    feedback, images = tmp_path / "study/feedback/part-00000.parquet", tmp_path / "study/preferences/images"
    said = ["--source", str(feedback), "--images", str(images), "--output_dir", str(tmp_path / "choices")]
    assert main(["scorer", "import", "--format", "feedback", *said]) == 0
    choices = Choices(tmp_path / "choices")
    assert len(choices) == PROMPTS * RATERS and {r.rater for r in choices.rows} == {f"simulated-{n:03d}" for n in range(RATERS)}
    options = {
        "output_dir": tmp_path / "scorer", "choices": tmp_path / "choices", "start.kind": "dual", "start.path": "figures/preference",
        "max_train_steps": 16, "train_batch_size": PROMPTS * RATERS, "learning_rate": 1e-3, "lr_warmup_steps": 0, "loss": "pickscore",
        "text_layers": 0,
    }  # fmt: skip
    assert main(["scorer", "train", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]) == 0
    before, after = load_file(find("preference") / "model.safetensors"), load_file(tmp_path / "scorer/model/model.safetensors")
    moved = {n for n in after if not torch.equal(before[n].float(), after[n])}
    assert moved and not any(n.startswith("text") for n in moved), "the tower of images moved, that of texts was frozen"

    def agreement(folder: Path) -> tuple[float, list[list[float]]]:
        scorer = dual.load_scorer(folder, "people")
        found = [scorer(decode_batch(choices.encoded(i)), [r.text] * EACH).tolist() for i, r in enumerate(choices.rows)]
        return accuracy(judge(choices.rows, found))["value"], found

    learned, scores = agreement(tmp_path / "scorer/model")
    assert learned > agreement(find("preference"))[0] + 0.05 and learned > 0.75, "it agrees more with them than what it started from"

    # examples by that scorer, and by the raters themselves
    assert main(["score", recipe]) == 0 and main(["examples", recipe]) == 0
    by_scorer = {name: s for row, found in zip(choices.rows, scores) for name, s in zip(row.files, found)}
    for stage, value in (("liked", by_scorer), ("said", liked)):
        pairs: dict[str, dict[str, records.Example]] = {}
        for example in read_rows(tmp_path / "out/examples" / stage, records.Example):
            pairs.setdefault(example.group, {})[example.role] = example
        assert 3 <= len(pairs) <= PROMPTS, "prompts whose images are all tied give no pair"
        for pair in pairs.values():
            winner, loser = pair["winner"].image_id, pair["loser"].image_id
            group = [value[i] for i in pool if pool[i].prompt_id == pool[winner].prompt_id]
            assert value[winner] == pytest.approx(max(group), abs=1e-4) and value[loser] == pytest.approx(min(group), abs=1e-4)
            assert pair["winner"].score == pytest.approx(value[winner], abs=1e-4)
    assert np.mean([bright[p["winner"].image_id] < bright[p["loser"].image_id] for p in pairs.values()]) > 0.5

    # and the base learns from them
    from limner.training import stage as training

    real, held = training.train_stage, list[bool]()

    def watched(pipeline, *args, **kwargs):
        start = frozen(pipeline.unet)
        found = real(pipeline, *args, **kwargs)
        end = frozen(pipeline.unet)
        held.append(start.keys() == end.keys() and all(torch.equal(start[n], end[n]) for n in start))
        return found

    monkeypatch.setattr(training, "train_stage", watched)
    assert main(["train", recipe]) == 0
    assert held == [True, True] and digest(find("base")) == shipped, "the base is as it was, in memory and on disk"
    for stage in ("liked", "said"):
        adapter = load_file(tmp_path / "out/train" / stage / "adapter/pytorch_lora_weights.safetensors")
        up = [v for n, v in adapter.items() if "lora_B" in n or "lora.up" in n]
        assert up and all(v.abs().max() > 0 for v in up), "LoRA's second factors start at 0"
        lines = [json.loads(line) for line in (tmp_path / "out/train" / stage / "log.jsonl").read_text().splitlines()]
        assert len(lines) == 2
