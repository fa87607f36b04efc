"""Training in fp16: the loss is scaled so that small gradients do not vanish, and a step that overflows changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limner import checkpoint
from limner.loop import Optimisation, fit
from limner.recipe import Learn
from limner.training.stage import prepare, train_stage
from pairs import examples, fresh


def optimisation(parameter: torch.nn.Parameter, scale: float) -> Optimisation:
    """Gradient descent at rate .1."""
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Optimisation([parameter], optimizer, rate, max_grad_norm=0, scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def descend(o: Optimisation, slopes: list[float]) -> list[tuple[float, float]]:
    """Steps on slope * p: after each, the parameter and the scale."""
    seen: list[tuple[float, float]] = []
    parameter = o.parameters[0]

    def loss(slope: float) -> tuple[Tensor, dict[str, float]]:
        return (slope * parameter).sum(), {}

    fit(
        loss, lambda step: [slopes[step]], o, max_train_steps=len(slopes),
        every=[(1, lambda step, metrics: seen.append((parameter.item(), metrics["loss_scale"])))],
    )  # fmt: skip
    return seen


def test_an_overflow_changes_nothing_and_halves_the_scale() -> None:
    """A slope of 1e35 times 65536 is above float32's 3.4e38; then a slope of 1 at rate .1."""
    assert descend(optimisation(torch.nn.Parameter(torch.zeros(1)), 65536.0), [1e35, 1.0]) == [
        (0.0, 32768.0),
        (pytest.approx(-0.1), 32768.0),
    ]


def test_a_gradient_that_is_not_finite_at_scale_1_is_an_error() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="the gradient of step 0 is not finite; nothing was updated"):
        fit(lambda b: (parameter.sqrt().sum(), {}), lambda step: [0], optimisation(parameter, 1.0), max_train_steps=1)
    assert parameter.item() == 0


def test_a_stage_in_fp16(tmp_path: Path) -> None:
    """Gradients are near float32's once unscaled, the adapter stays float32 and moves, and the scale is kept for a resume.

    The first scale may be too large for this network; the rate is so small that what was learned meanwhile does not tell.
    """
    learn = Learn(max_train_steps=8, train_batch_size=2, rank=2, learning_rate=1e-8, checkpointing_steps=1)
    norms = {}
    for name in ("no", "fp16"):
        pipeline = fresh(mixed_precision=name)
        pairs = prepare(fresh(), examples())
        after = train_stage(pipeline, pairs, learn, tmp_path / name, stage="easy", seed=3)
        assert {v.dtype for v in after.values()} == {torch.float32}
        assert all(v.abs().max() > 0 for k, v in after.items() if ".lora_B." in k)
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        norms[name] = [row["grad_norm"] for row in rows]
    taken = [i for i, norm in enumerate(norms["fp16"]) if math.isfinite(norm)]
    assert len(taken) >= 2
    assert [norms["fp16"][i] for i in taken] == pytest.approx([norms["no"][i] for i in taken], rel=0.05)
    found = checkpoint.latest(tmp_path / "fp16")
    assert found is not None
    assert checkpoint.load(found)[1]["scaler"]["scale"] == 65536.0 / 2 ** (8 - len(taken))
